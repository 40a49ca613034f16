"""The benches `moe_forward` and `moe_forward_backward`: routed experts, ours beside the ways others compute them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmoe_train import moe
from flashmoe_train.bench import peers
from flashmoe_train.bench.measure import DTYPES, ERROR_BOUND, Contender, OperatorBench, Problem, compiled, path
from flashmoe_train.bench.moe_cases import STANDARD, TINY, Case, Inputs, Layer, draw
from flashmoe_train.bench.moe_reference import forward_error, gradient_error
from flashmoe_train.bench.timing import Run
from flashmoe_train.ops.moe import MoECase, supports

# --------------------------------------------------------------------------------------------------------- contenders


def sorted_slots(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The slots in the experts' order and, for each expert, where its rows end. No host sync."""
    sorted_ids, order = ids.reshape(-1).sort(stable=True)
    bounds = torch.arange(experts, dtype=ids.dtype, device=ids.device)
    return order, torch.searchsorted(sorted_ids, bounds, right=True, out_int32=True)


def grouped(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What TorchTitan's layer does: gather, three grouped products, weights multiplied in float32, scatter."""
    order, ends = sorted_slots(ids, w1.shape[0])
    token = order // ids.shape[1]
    y = grouped_experts(x[token], w1, w2, w3, ends)
    return scattered(y, weights.reshape(-1)[order], token, len(x))


def grouped_experts(rows: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, ends: Tensor) -> Tensor:
    activation = F.silu(F.grouped_mm(rows, w1.transpose(1, 2), offs=ends))
    activation = activation * F.grouped_mm(rows, w3.transpose(1, 2), offs=ends)
    return F.grouped_mm(activation, w2.transpose(1, 2), offs=ends)


def scattered(y: Tensor, row_weight: Tensor, token: Tensor, tokens: int) -> Tensor:
    """The rows of each token, weighted and summed in float32: `[tokens, d]`."""
    out = torch.zeros(tokens, y.shape[1], dtype=torch.float32, device=y.device)
    return out.index_add(0, token, y * row_weight[:, None]).to(y.dtype)


def loop(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """One chain of products per expert, whose sizes the host has to wait for."""
    order, ends = sorted_slots(ids, w1.shape[0])
    token = order // ids.shape[1]
    bounds = ends.tolist()
    rows = x[token].split([end - begin for begin, end in zip([0, *bounds], bounds, strict=False)])
    # unbind, as if every expert were a module of its own: indexing would make w[e]'s gradient as large as w's.
    experts = zip(rows, w1.unbind(), w2.unbind(), w3.unbind(), strict=True)
    y = torch.cat([F.linear(F.silu(F.linear(xe, e1)) * F.linear(xe, e3), e2) for xe, e1, e2, e3 in experts])
    return scattered(y, weights.reshape(-1)[order], token, len(x))


def plain(function: Callable[..., Tensor]) -> Callable[[Inputs], Layer]:
    """An implementation that takes the inputs as they are."""
    return lambda inputs: Layer(partial(function, *inputs), (*inputs[:4], inputs.weights))


LAYERS: dict[str, Callable[[Inputs], Layer]] = {
    "flashmoe": plain(moe),
    "grouped": plain(grouped),
    "compiled": lambda inputs: plain(compiled(grouped, inputs.x.device))(inputs),
    "loop": plain(loop),
    "sonicmoe": peers.sonicmoe_layer,
}


def _gemm_floor(case: Case, device: torch.device) -> Run:
    """The FLOPs of the forward in dense products: R × d × n twice and R × n × d."""
    rows = case.T * case.K
    sizes = (rows, case.d), (rows, case.n), (case.n, case.d), (case.n, case.d), (case.d, case.n)
    x, h, w1, w3, w2 = (torch.randn(size, device=device, dtype=DTYPES[case.dtype]) for size in sizes)
    return lambda: (F.linear(x, w1), F.linear(x, w3), F.linear(h, w2))


# ----------------------------------------------------------------------------------------------------------- problems


def _prepare(case: Case, device: torch.device, backward: bool) -> Problem:
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    ids, weights = draw(case.T, case.E, case.K, case.skew, device)
    x, dout = (torch.randn(case.T, case.d, device=device, dtype=dtype) for _ in range(2))
    # Of a size that keeps the results of N(0, 1) inputs near 1.
    w1, w3 = (torch.randn(case.E, case.n, case.d, device=device, dtype=dtype).mul_(case.d**-0.5) for _ in range(2))
    w2 = torch.randn(case.E, case.d, case.n, device=device, dtype=dtype).mul_(case.n**-0.5)
    plain_inputs = x, w1, w2, w3, weights
    *leaves, leaf_weights = (tensor.detach().requires_grad_(backward) for tensor in plain_inputs)
    inputs = Inputs(leaves[0], leaves[1], leaves[2], leaves[3], ids, leaf_weights)

    def contender(make: Callable[[Inputs], Layer]) -> Run:
        layer = make(inputs)
        if not backward:
            return layer.forward
        return lambda: layer.gradients(*torch.autograd.grad(layer.forward(), layer.leaves, dout))

    @torch.no_grad()
    def error(found: Any) -> float:
        if backward:
            return gradient_error(plain_inputs, ids, dout, found)
        return forward_error(plain_inputs, ids, found)

    contenders: dict[str, Contender] = {name: partial(contender, make) for name, make in LAYERS.items()}
    return Problem(
        contenders=contenders,
        error=error,
        error_bound=ERROR_BOUND[dtype],
        work=(18 if backward else 6) * case.T * case.K * case.n * case.d,
        flashmoe_path=path(supports(MoECase.of(x, w1)), device.type),
        floors={"gemm_floor": partial(_gemm_floor, case, device)},
    )


BENCHES = (
    OperatorBench(
        name="moe_forward",
        title="Routed experts, forward",
        rate="tflops",
        standard=STANDARD,
        tiny=TINY,
        prepare=partial(_prepare, backward=False),
    ),
    OperatorBench(
        name="moe_forward_backward",
        title="Routed experts, forward and backward",
        rate="tflops",
        standard=STANDARD,
        tiny=TINY,
        prepare=partial(_prepare, backward=True),
        floor_factor=3.0,
        measures_memory=True,
    ),
)
