"""`torch.ops.flashmoe.route_plan`: from the experts of each token to the rows that each expert computes.

Runs on any device by PyTorch's own operations, without a host sync; on CUDA by a kernel.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flashmoe_train.ops.library import ANY_DEVICE, LIBRARY, TAGS, implement

LIBRARY.define(
    "route_plan(Tensor ids, SymInt num_experts) -> (Tensor offsets, Tensor row_slot, Tensor slot_row)", tags=TAGS
)


class RoutePlan(NamedTuple):
    """int32 maps between slots and rows; see `flashmoe_train.ops.moe`."""

    offsets: Tensor  # [E + 1]: expert e owns rows offsets[e] to offsets[e + 1]
    row_slot: Tensor  # [R]: the slot, token · K + k, that a row computes; -1 in rows that belong to nobody
    slot_row: Tensor  # [T, K]: the row that computes a slot; -1 where the id is out of range


def route_plan(ids: Tensor, num_experts: int) -> RoutePlan:
    """Sorts the slots of `ids` `[T, K]` (int32 or int64) by expert, stably: within an expert by token, then by k.

    Ids outside `0 <= id < num_experts` are skipped. The CUDA kernel takes at most 8192 experts. Raises ValueError or
    TypeError that names the argument.
    """
    _check(ids, num_experts)  # the compiled code's own errors are RuntimeErrors
    return RoutePlan(*torch.ops.flashmoe.route_plan(ids, num_experts))


def _check(ids: Tensor, num_experts: int) -> None:
    if ids.dim() != 2 or ids.shape[1] < 1:
        raise ValueError(f"ids must be [tokens, experts per token], found {list(ids.shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, found {ids.dtype}")
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, found {num_experts}")


def _reference(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _check(ids, num_experts)
    flat = ids.reshape(-1)
    # Skipped slots sort behind all experts, as if they belonged to an expert E.
    expert = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = expert.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, expert.long(), torch.ones_like(expert, dtype=torch.int64))
    ends = counts.cumsum(0)[:-1]
    offsets = torch.cat([ends.new_zeros(1), ends])
    row = torch.arange(flat.shape[0], device=ids.device)
    used = row < offsets[-1]
    row_slot = torch.where(used, order, -1)
    slot_row = torch.empty_like(row).scatter_(0, order, torch.where(used, row, -1))
    return offsets.int(), row_slot.int(), slot_row.view(ids.shape).int()


implement("route_plan", _reference, ANY_DEVICE)


@torch.library.register_fake("flashmoe::route_plan", lib=LIBRARY)
def _(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _check(ids, num_experts)
    sizes = ((num_experts + 1,), (ids.shape[0] * ids.shape[1],), tuple(ids.shape))
    offsets, row_slot, slot_row = (ids.new_empty(size, dtype=torch.int32) for size in sizes)
    return offsets, row_slot, slot_row
