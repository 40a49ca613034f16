"""The experts by PyTorch's grouped matrix products, for GPUs and cases that have none of our kernels.

Autograd is PyTorch's own. In bfloat16 on Hopper and Blackwell `grouped_mm` reads the offsets on the device, so there is
no host sync; for other dtypes and GPUs PyTorch's implementation of it waits for them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmoe_train.ops.moe.glu import moe_glu
from flashmoe_train.ops.moe.plan import RoutePlan
from flashmoe_train.ops.moe.rows import moe_combine, moe_permute

_ALIGNMENT = 8  # elements: 16 bytes of the 2-byte types


def moe(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weights: Tensor, plan: RoutePlan, score_mode: str) -> Tensor:
    """`flashmoe_train.ops.moe.moe` for a given plan, of arguments that it has checked."""
    rows = moe_permute(x, plan.row_slot, plan.slot_row)
    if score_mode == "combine":
        return moe_combine(_experts(rows, w1, w2, w3, plan.offsets, None), plan.slot_row, weights)
    row_weight = moe_permute(weights.reshape(-1, 1), plan.row_slot, plan.slot_row.reshape(-1, 1)).squeeze(1)
    return moe_combine(_experts(rows, w1, w2, w3, plan.offsets, row_weight), plan.slot_row, None)


def moe_rows(rows: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """`flashmoe_train.ops.moe.moe_rows`, of arguments that it has checked."""
    # Both masks are for the caller: the first of the gradient of rows, the second of the result and of its gradient.
    belongs = (torch.arange(rows.shape[0], device=rows.device) < offsets[-1])[:, None]
    return torch.where(belongs, _experts(torch.where(belongs, rows, 0), w1, w2, w3, offsets, weights), 0)


def _experts(rows: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offsets: Tensor, row_weight: Tensor | None) -> Tensor:
    """Leaves rows that belong to nobody unwritten, in the gradient of rows too, as grouped_mm does; nor does it read
    them. So do permute and combine; between the products moe_glu writes zeros there."""
    ends = offsets[1:]
    dim = rows.shape[1]
    rows, w1, w2, w3 = _aligned(rows, w1, w2, w3)
    gate, up = (F.grouped_mm(rows, w.transpose(1, 2), offs=ends) for w in (w1, w3))
    return F.grouped_mm(moe_glu(gate, up, offsets, row_weight), w2.transpose(1, 2), offs=ends)[:, :dim]


def _aligned(rows: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grouped_mm wants rows of a multiple of 16 bytes: pads d and n with zeros, which change no product."""
    _, hidden, dim = w1.shape
    pad_d, pad_n = -dim % _ALIGNMENT, -hidden % _ALIGNMENT
    if pad_d == pad_n == 0:
        return rows, w1, w2, w3
    w1, w3 = (F.pad(w, (0, pad_d, 0, pad_n)) for w in (w1, w3))
    return F.pad(rows, (0, pad_d)), w1, F.pad(w2, (0, pad_n, 0, pad_d)), w3
