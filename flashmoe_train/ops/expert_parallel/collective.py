"""Exchange by all_to_all_single of whatever backend the group has: the reference, the way between nodes, and on a CPU.

The host reads how many rows go where. Arrived rows are laid out as `peer` has them.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Arrived(NamedTuple):
    """Tokens that the ranks have sent here. `rows` may be memory that later exchanges overwrite."""

    rows: Tensor  # [S, d]; anything in places without a token
    counts: Tensor  # int32 [W]: tokens of each source
    ids: Tensor | None  # int32 [S, K]: numbers among the experts here, -1 of others' and where no token is
    weights: Tensor | None  # [S, K]: 0 where ids are -1


class Collective:
    """The exchange of `group`, of `experts` experts, with places for `tokens` tokens of every rank."""

    def __init__(self, group: dist.ProcessGroup, experts: int, tokens: int) -> None:
        self.group, self.tokens = group, tokens
        self.world, self.rank = group.size(), group.rank()
        self.here = experts // self.world

    def dispatch(
        self,
        x: Tensor,
        position: Tensor,
        counts: Tensor,
        layer: int,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Arrived:
        """Tokens `[T, d]` to where the plan says, with their routing if it is given."""
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        rows = self._send(x, position, counts, arriving, float("nan"))  # whoever reads empty places shall notice
        if ids is None or weights is None:
            return Arrived(rows, arriving, None, None)
        ids = self._send(ids, position, counts, arriving, -1) - self.rank * self.here
        own = (ids >= 0) & (ids < self.here)
        weights = self._send(weights, position, counts, arriving, 0)
        return Arrived(rows, arriving, torch.where(own, ids, -1), torch.where(own, weights, 0))

    def combine(
        self,
        rows: Tensor,
        position: Tensor,
        counts: Tensor,
        arrived: Tensor,
        layer: int,
        values: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Of every token the sum over ranks, in order, of what they have computed of it: `[S, d]` there, `[T, d]` here.
        And of every slot the value `[S, K]` of the rank that has its expert: `[T, K]`, 0 of skipped ones."""
        goes = position >= 0  # in the order of tokens, as the plan numbers them
        wide = torch.promote_types(rows.dtype, torch.float32)
        out = rows.new_zeros(position.shape[0], rows.shape[1], dtype=wide)
        for rank, part in enumerate(self._return(rows, counts, arrived)):
            out[goes[:, rank]] += part
        if values is None or ids is None:
            return out.to(rows.dtype), None
        slots = torch.zeros_like(ids, dtype=values.dtype)
        for rank, part in enumerate(self._return(values, counts, arrived)):
            theirs = (ids >= rank * self.here) & (ids < (rank + 1) * self.here)
            slots[goes[:, rank]] += torch.where(theirs[goes[:, rank]], part, 0)
        return out.to(rows.dtype), slots

    def release(self) -> None:
        """Nobody waits for what has arrived to be read."""

    def failure(self) -> tuple[int, int, str] | None:
        """The backend raises errors of its own."""
        return None

    def _send(self, x: Tensor, position: Tensor, counts: Tensor, arriving: Tensor, empty: float) -> Tensor:
        coming = arriving.tolist()
        leaving = torch.cat([x[position[:, rank] >= 0] for rank in range(self.world)])
        places = x.new_full((self.world, self.tokens, x.shape[1]), empty)
        parts = self._exchange(leaving, counts.tolist(), coming)
        for place, count, part in zip(places, coming, parts, strict=True):
            place[:count] = part
        return places.flatten(0, 1)

    def _return(self, rows: Tensor, counts: Tensor, arrived: Tensor) -> tuple[Tensor, ...]:
        """What every rank has computed of this one's tokens, in the order in which they went there."""
        going = arrived.tolist()
        leaving = torch.cat([rows[rank * self.tokens :][:count] for rank, count in enumerate(going)])
        return self._exchange(leaving, going, counts.tolist())

    def _exchange(self, leaving: Tensor, going: list[int], coming: list[int]) -> tuple[Tensor, ...]:
        came = leaving.new_empty(sum(coming), leaving.shape[1])
        dist.all_to_all_single(came, leaving, coming, going, group=self.group)
        return came.split(coming)
