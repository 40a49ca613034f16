"""`torch.ops.flashmoe.ep_plan`: which ranks a token goes to, and its place among those that go there."""

import torch
from torch import Tensor

from flashmoe_train.ops.library import ANY_DEVICE, LIBRARY, TAGS, implement

LIBRARY.define("ep_plan(Tensor ids, SymInt experts, SymInt world) -> (Tensor position, Tensor counts)", tags=TAGS)


def ep_plan(ids: Tensor, experts: int, world: int) -> tuple[Tensor, Tensor]:
    """Of ids int32 `[T, K]`: position `[T, W]`, the number of a token among those that go to a rank (in their order; -1
    if it does not go there), and counts `[W]`, how many do. int32, on the device: nothing waits for them.

    Ids outside `0 <= id < experts` are skipped. Raises ValueError or TypeError that names the argument.
    """
    _check(ids, experts, world)  # the compiled code's own errors are RuntimeErrors
    return torch.ops.flashmoe.ep_plan(ids, experts, world)


def _check(ids: Tensor, experts: int, world: int) -> None:
    if ids.dim() != 2 or ids.shape[1] < 1:
        raise ValueError(f"ids must be [tokens, experts per token], found {list(ids.shape)}")
    if ids.dtype != torch.int32:
        raise TypeError(f"ids must be int32, found {ids.dtype}")
    if world < 1 or experts < 1 or experts % world != 0:
        raise ValueError(f"experts must be a multiple of the ranks, found {experts} for {world}")


def _reference(ids: Tensor, experts: int, world: int) -> tuple[Tensor, Tensor]:
    _check(ids, experts, world)
    rank = torch.where((ids >= 0) & (ids < experts), ids // (experts // world), world).long()
    goes = torch.zeros(ids.shape[0], world + 1, dtype=torch.bool, device=ids.device).scatter_(1, rank, True)[:, :world]
    position = torch.where(goes, goes.cumsum(0) - 1, -1)
    return position.int(), goes.sum(0).int()


implement("ep_plan", _reference, ANY_DEVICE)


@torch.library.register_fake("flashmoe::ep_plan", lib=LIBRARY)
def _(ids: Tensor, experts: int, world: int) -> tuple[Tensor, Tensor]:
    _check(ids, experts, world)
    return ids.new_empty((ids.shape[0], world)), ids.new_empty((world,))
