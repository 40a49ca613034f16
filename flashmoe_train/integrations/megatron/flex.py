"""Megatron's slot for a fused exchange of tokens, filled with our permute and combine around an all-to-all.

For launch scripts that choose the dispatcher by configuration: `moe_token_dispatcher_type="flex"` with
`moe_flex_dispatcher_backend="hybridep"`. The slot is one call from tokens to rows sorted by expert, and one back; the
experts may be anybody's. Permuting sums in a fixed order, both ways, where stock's index_add on a GPU does not.

Shape legend: T tokens, E experts of the group, P processes of the group, K experts of a token at most, h model dim,
n rows that leave here, m rows that arrive here.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashmoe_train.errors import UsageError
from flashmoe_train.ops.moe import moe_combine, moe_permute, route_plan


class Way(NamedTuple):
    """What combine needs to know of dispatch."""

    slot_row: Tensor  # [T, K]: which of the rows that left is a token's k-th
    arrived_row: Tensor  # [m, 1]: which of the sorted rows is the one that arrived there
    left: list[int]  # rows to, and from, each process
    arrived: list[int]
    group: dist.ProcessGroup


def install_flex_dispatcher() -> None:
    """Fills the slot, for all models that are built afterwards with those two settings. Does the like of an installed
    HybridEP, which it takes the place of."""
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.hybrid_ep_dispatch, token_dispatcher.hybrid_ep_combine = dispatch, combine


def slots_of(routing_map: Tensor, probs: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Of bool `[T, E]` and weights `[T, E]`: the experts of each token `[T, K]` in rising order and their weights. A
    token with fewer than K has ids -1 at the end, and any weights there."""
    experts = routing_map.shape[1]
    chosen, ids = routing_map.to(torch.int8).topk(min(most, experts), dim=1)
    ids = ids.masked_fill(chosen == 0, experts).sort(dim=1).values
    none = ids == experts
    return ids.masked_fill(none, -1), probs.gather(1, ids.masked_fill(none, 0))


def dispatch(
    x: Tensor,
    routing_map: Tensor,
    probs: Tensor,
    group: dist.ProcessGroup,
    num_local_experts: int,
    num_permuted_tokens: int | None = None,
    pad_multiple: int | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, None, Tensor, Way]:
    """Tokens x `[T, h]`, which experts each has (bool `[T, E]`) and their weights `[T, E]` give rows `[m, h]` sorted by
    expert, the weight of each `[m]`, nothing, how many rows each expert here has `[E/P]` (on the CPU), the way back.

    The host waits for the counts, as it does under stock's dispatchers. Further options are HybridEP's own.
    Raises UsageError for experts that are padded.
    """
    from megatron.core.tensor_parallel.mappings import all_to_all

    if num_permuted_tokens is not None or pad_multiple is not None:
        raise UsageError(
            "our flex dispatcher does not pad experts: unset moe_pad_expert_input_to_capacity, fp8 and fp4, found "
            f"num_permuted_tokens = {num_permuted_tokens}, pad_multiple = {pad_multiple}"
        )
    here, experts = num_local_experts, routing_map.shape[1]
    counts = routing_map.sum(0)
    coming = torch.empty_like(counts)
    dist.all_to_all_single(coming, counts, group=group)  # [P, E/P]
    most = routing_map.sum(1).max() if len(routing_map) else counts.new_zeros(())
    *numbers, most_slots = torch.cat([counts, coming, most[None]]).cpu().split([experts, experts, 1])
    left, arrived = (count.view(-1, here).sum(1).tolist() for count in numbers)

    ids, weights = slots_of(routing_map, probs, max(1, int(most_slots)))
    plan = route_plan(ids, experts)
    slot_row, row_slot = plan.slot_row, plan.row_slot[: sum(left)]
    rows = moe_permute(x, row_slot, slot_row)
    row_weights = moe_permute(weights.reshape(-1, 1), row_slot, slot_row.reshape(-1, 1))
    rows, row_weights = (all_to_all(group, y, arrived, left) for y in (rows, row_weights))

    # By process they came, and by expert within it; now by expert, and by process within that.
    expert = torch.arange(here, dtype=torch.int32).repeat(len(arrived)).repeat_interleave(numbers[1])
    sort = route_plan(expert[:, None].to(x.device), here)
    rows, row_weights = (moe_permute(y, sort.row_slot, sort.slot_row) for y in (rows, row_weights))
    way = Way(slot_row, sort.slot_row, left, arrived, group)
    return rows, row_weights.squeeze(1), None, numbers[1].view(-1, here).sum(0), way


def combine(x: Tensor, handle: Way, **_: Any) -> Tensor:
    """The experts' rows `[m, h]` give tokens `[T, h]`: sums in float32 over a token's rows, in the order of experts."""
    from megatron.core.tensor_parallel.mappings import all_to_all

    rows = all_to_all(handle.group, moe_combine(x, handle.arrived_row, None), handle.left, handle.arrived)
    return moe_combine(rows, handle.slot_row, None)
