"""The bench `moe_transformers`: whole sparse-MoE blocks of Transformers' models, router included, forward and backward,
with `experts_implementation` "flashmoe" beside those that Transformers has.

Shape legend: T tokens, d model dim, n hidden dim of an expert, E experts, K experts per token.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashmoe_train.bench.measure import (
    DTYPES,
    ERROR_BOUND,
    OperatorBench,
    Problem,
    Unavailable,
    path,
    relative_error,
    worst,
)
from flashmoe_train.bench.peers import import_peer
from flashmoe_train.bench.timing import Run
from flashmoe_train.ops.moe import MoECase, supports

# Ours first; "eager" is a loop over experts.
IMPLEMENTATIONS = {"flashmoe": "flashmoe", "grouped_mm": "grouped_mm", "eager_loop": "eager", "sonicmoe": "sonicmoe"}


class _Block(NamedTuple):
    """Where Transformers has it, and what its configuration calls n."""

    module: str
    block: str
    config: str
    hidden_dim: str


_BLOCKS = {
    "Qwen3-MoE": _Block("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", "moe_intermediate_size"),
    "OLMoE": _Block("olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig", "intermediate_size"),
}


@dataclass(frozen=True)
class Case:
    family: str
    T: int
    d: int
    n: int
    E: int
    K: int
    renormalize: bool
    dtype: str = "bf16"

    @property
    def label(self) -> str:
        return f"{self.family} T{self.T} d{self.d} n{self.n} E{self.E} K{self.K}"

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("family", "T", "d", "n", "E", "K", "renormalize", "dtype")}


STANDARD = [Case("Qwen3-MoE", 16384, 2048, 768, 128, 8, True), Case("OLMoE", 16384, 2048, 1024, 64, 8, False)]
TINY = [
    Case("Qwen3-MoE", 96, 64, 24, 8, 2, True, "fp32"),
    Case("OLMoE", 80, 48, 32, 8, 3, False, "fp32"),
]


def block_of(case: Case, device: torch.device) -> Any:
    """The stock block, of weights that keep the results of N(0, 1) inputs near 1. Raises Unavailable."""
    import_peer("flashmoe_train.integrations.transformers")  # registers ours
    where = _BLOCKS[case.family]
    config_class = getattr(import_peer("transformers"), where.config)
    sizes = {"hidden_size": case.d, where.hidden_dim: case.n, "num_experts": case.E, "num_experts_per_tok": case.K}
    config = config_class(**sizes, norm_topk_prob=case.renormalize)
    module = import_peer(f"transformers.models.{where.module}.modeling_{where.module}")
    with torch.device(device):
        block = getattr(module, where.block)(config).to(DTYPES[case.dtype])
    generator = torch.Generator(device).manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return block


def _prepare(case: Case, device: torch.device) -> Problem:
    torch.manual_seed(0)
    block, dtype = block_of(case, device), DTYPES[case.dtype]
    x, dout = (torch.randn(1, case.T, case.d, device=device, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    with torch.no_grad():
        *_, ids = block.gate(x.view(-1, case.d))  # the router is stock's, for everybody

    def contender(implementation: str) -> Run:
        # Its own configuration, and the same parameters.
        mine = copy.copy(block)
        mine._modules = dict(block._modules)
        mine.experts = copy.copy(block.experts)
        mine.experts.config = copy.copy(block.experts.config)
        if implementation == "sonicmoe":
            import_peer("kernels")  # through which Transformers has it
        if implementation not in ("eager", *_registered()):
            raise Unavailable("not offered by this version of transformers")
        mine.experts.config._experts_implementation = implementation
        leaves = [x, *block.parameters()]

        def run() -> tuple[Tensor, ...]:
            out = mine(x)
            return (out.detach(), *torch.autograd.grad(out, leaves, dout))

        return run

    first = block.experts.gate_up_proj
    kernel = supports(MoECase(device.type, MoECase.of(x, first).capability, dtype, case.d, case.n, case.E))
    return Problem(
        contenders={name: partial(contender, value) for name, value in IMPLEMENTATIONS.items()},
        error=partial(_error, block, x.detach(), dout, ids, case),
        error_bound=ERROR_BOUND[dtype],
        work=18 * case.T * case.K * case.n * case.d,
        flashmoe_path=path(kernel, device.type),
        floors={},
    )


def _registered() -> list[str]:
    return list(import_peer("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS.keys())


@torch.no_grad()
def _error(block: Any, x: Tensor, dout: Tensor, ids: Tensor, case: Case, found: tuple[Tensor, ...]) -> float:
    """The largest relative error of out and of the gradients of x, the router's and the experts' weights: against
    float64, one expert at a time, with the experts that the router in its own precision chose."""
    out, dx, *gradients = found
    names = [name for name, _ in block.named_parameters()]
    given = dict(zip(names, gradients, strict=True))
    tokens, dtokens = x.view(-1, case.d).double(), dout.view(-1, case.d).double()
    scores = F.linear(tokens, block.gate.weight.double()).softmax(1)
    chosen = scores.gather(1, ids)
    weights = chosen / chosen.sum(1, keepdim=True) if case.renormalize else chosen
    wanted_out, wanted_dx, dweights = torch.zeros_like(tokens), torch.zeros_like(tokens), torch.zeros_like(weights)
    errors, squares = (torch.zeros(2, dtype=torch.float64, device=x.device) for _ in range(2))  # of gate_up and down
    for expert in range(case.E):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        up, down = block.experts.gate_up_proj[expert].double(), block.experts.down_proj[expert].double()
        rows, weight, dy = tokens[token], weights[token, slot, None], dtokens[token]
        gate, linear = F.linear(rows, up).chunk(2, 1)
        sigmoid = gate.sigmoid()
        hidden = gate * sigmoid * linear
        y = F.linear(hidden, down)
        wanted_out.index_add_(0, token, y * weight)
        dweights[token, slot] = (dy * y).sum(1)
        dhidden = (dy * weight) @ down
        dgate = dhidden * linear * sigmoid * (1 + gate * (1 - sigmoid))
        dup = torch.cat([dgate, dhidden * gate * sigmoid], 1)
        wanted_dx.index_add_(0, token, dup @ up)
        wanted = dup.T @ rows, (dy * weight).T @ hidden
        for i, (name, want) in enumerate(zip(("experts.gate_up_proj", "experts.down_proj"), wanted, strict=True)):
            errors[i] += (given[name][expert].double() - want).square().sum()
            squares[i] += want.square().sum()
    if case.renormalize:
        dweights = (dweights - (dweights * weights).sum(1, keepdim=True)) / chosen.sum(1, keepdim=True)
    dscores = torch.zeros_like(scores).scatter_(1, ids, dweights)
    dlogits = scores * (dscores - (dscores * scores).sum(1, keepdim=True))
    wanted_dx += dlogits @ block.gate.weight.double()
    pairs = [(out.view_as(tokens), wanted_out), (dx.view_as(tokens), wanted_dx)]
    pairs.append((given["gate.weight"], dlogits.T @ tokens))
    return worst([relative_error(*pair) for pair in pairs] + (errors / squares).sqrt().tolist())


BENCHES = (
    OperatorBench(
        name="moe_transformers",
        title="Sparse-MoE blocks of Transformers' models, forward and backward",
        rate="tflops",
        standard=STANDARD,
        tiny=TINY,
        prepare=_prepare,
        measures_memory=True,
    ),
)
