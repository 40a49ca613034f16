"""The attention operator under DTensor, tensor parallelism and FSDP2, on two processes."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from flashmoe_train import attention

from .. import processes
from .operators import saving
from .test_attention import Case, run_fallback


class Block(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.norm = nn.RMSNorm(dim)
        self.wq, self.wo = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.wk, self.wv = (nn.Linear(dim, groups * self.head_dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (w(h).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        return x + self.wo(attention(q, k, v, causal=True).flatten(2))


def check_dtensor() -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    full = Case().tensors()
    wanted = attention(*full)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), full)
    for placement, free in ((Shard(2), True), (Shard(0), True), (Replicate(), True), (Shard(1), False)):
        inputs = [distribute_tensor(x.detach(), mesh, [placement]).requires_grad_() for x in full]
        with CommDebugMode() as communication:
            out = attention(*inputs)
            grads = torch.autograd.grad(out.square().sum(), inputs)
        torch.testing.assert_close(out.full_tensor(), wanted)
        for x, y in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(x.full_tensor(), y)
        assert (communication.get_total_counts() == 0) == free, (placement, communication.get_comm_counts())


def check_dtensor_uneven_heads() -> None:
    """6 query and 3 key heads on 2 devices: a plain head shard would pair queries with the wrong keys."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    full = [x.detach() for x in Case(heads=6, groups=3).tensors()]
    out = attention(*(distribute_tensor(x, mesh, [Shard(2)]) for x in full))
    torch.testing.assert_close(out.full_tensor(), attention(*full))


def check_dtensor_documents() -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    case = Case(batch=1, length_q=20, documents_q=(5, 15))
    full, cu_seqlens = [x.detach() for x in case.tensors()], case.arguments()["cu_seqlens_q"]
    inputs = [distribute_tensor(x, mesh, [Shard(2)]) for x in full]
    out = attention(*inputs, cu_seqlens_q=distribute_tensor(cu_seqlens, mesh, [Replicate()]))
    assert out.placements == (Shard(2),)
    torch.testing.assert_close(out.full_tensor(), attention(*full, cu_seqlens_q=cu_seqlens))


def check_fallback_on_dtensors() -> None:
    """PyTorch's kernels lack sharding rules for documents and windows: the fallback runs them on every shard."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    for case, placement in (
        (Case(batch=1, length_q=20, documents_q=(5, 15)), Shard(2)),
        (Case(window=(3, 2)), Shard(0)),
        (Case(causal=True), Shard(1)),
        (Case(heads=6, groups=3), Shard(2)),
    ):
        full = case.tensors()
        wanted = run_fallback(*full, case)
        wanted_grads = torch.autograd.grad(wanted.square().sum(), full)
        inputs = [distribute_tensor(x.detach(), mesh, [placement]).requires_grad_() for x in full]
        out = run_fallback(*inputs, case)
        torch.testing.assert_close(out.full_tensor(), wanted)
        for x, y in zip(torch.autograd.grad(out.square().sum(), inputs), wanted_grads, strict=True):
            torch.testing.assert_close(x.full_tensor(), y)


def check_tensor_parallel() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for compiled in (False, True):
        torch.manual_seed(0)
        reference = Block()
        block = copy.deepcopy(reference)
        x = torch.randn(2, 16, 32)
        column = ColwiseParallel(use_local_output=False)
        parallelize_module(block, mesh, {"wq": column, "wk": column, "wv": column, "wo": RowwiseParallel()})
        y = (torch.compile(block, fullgraph=True) if compiled else block)(x)
        torch.testing.assert_close(y, reference(x))
        y.square().sum().backward()
        reference(x).square().sum().backward()
        torch.testing.assert_close(block.wq.weight.grad.full_tensor(), reference.wq.weight.grad)


def train(model: nn.Module, x: Tensor, steps: int = 3) -> Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def check_fsdp2() -> None:
    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    x = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(1))
    for compiled, selective, param_dtype in (
        (False, False, None),
        (False, True, None),
        (True, True, None),
        (False, False, torch.bfloat16),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block())
        wanted = train(copy.deepcopy(model), x)
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        for i, block in enumerate(model):
            if selective:
                context = saving(torch.ops.flashmoe.attention_forward.default)
                block = model[i] = checkpoint_wrapper(block, context_fn=context, preserve_rng_state=False)
            if compiled:
                block.compile(fullgraph=True)
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        found = train(model, x[2 * rank : 2 * rank + 2])
        dist.all_reduce(found)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if param_dtype is None else {"rtol": 5e-2, "atol": 5e-2}
        torch.testing.assert_close(found / 2, wanted, **tolerance)


def test_dtensor() -> None:
    processes.run(check_all_dtensor)


def check_all_dtensor() -> None:  # one start of the processes serves all
    check_dtensor()
    check_dtensor_uneven_heads()
    check_dtensor_documents()
    check_fallback_on_dtensors()
    check_tensor_parallel()


def test_fsdp2() -> None:
    processes.run(check_fsdp2)
