"""The exchange over peer memory: NCCL's results bit by bit, whatever runs beside it; an error where a rank is missing.

Every test is one start of as many processes as it has GPUs.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flashmoe_train import moe
from flashmoe_train.ops.expert_parallel import Exchange, operator, routed_experts

from .. import processes
from .moe_gpu import NAMES, exact
from .test_expert_parallel import (
    Layers,
    Shared,
    check_added,
    check_frozen,
    check_layers,
    check_overflow,
    check_wide,
    exchange_for,
    run,
)

pytestmark = pytest.mark.gpu

SIZES = {"dim": 256, "hidden": 128, "per_rank": 4, "top_k": 3}
ROUTINGS = ("random", "zipf", "one", "rank", "skipped", "nobody", "duplicate")
LARGER = 1.3  # than the error of one GPU: what a rank computes of a token is rounded once more before it travels


def on_gpu(**options: object) -> dict[str, object]:
    return {"dtype": torch.bfloat16, "device": torch.device("cuda"), "timeout": 20.0} | options


def exchanges(shared: Shared, **options: object) -> tuple[Exchange, Exchange]:
    """Over peer memory, and over NCCL."""
    return tuple(exchange_for(shared, **on_gpu(peer_memory=peer, **options)) for peer in (True, False))


def one_gpu(shared: Shared, exchange: Exchange) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The layer's results by one GPU with all experts, and exactly; this rank's part of both."""
    (x, *w, weights), ids, dout = shared.tensors(exchange)
    leaves = [t.requires_grad_() for t in (x, *w, weights)]
    out = moe(*leaves[:4], ids, leaves[4])
    found = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    wanted = exact(*leaves, ids, dout)
    tokens, experts = shared.own(dist.get_rank())
    own = (tokens, tokens, experts, experts, experts, tokens)
    return tuple(tuple(t[part] for t, part in zip(results, own, strict=True)) for results in (found, wanted))


def check_results() -> None:
    world = dist.get_world_size()
    for tokens in ((200, 131, 0, 77)[:world], (0, 300, 300, 300)[:world], (1, 1, 1, 1)[:world]):
        for routing in ROUTINGS:
            for dtype in (torch.bfloat16, torch.float16):
                shared = Shared(routing, tokens, **SIZES)
                peer, nccl = exchanges(shared, dtype=dtype)
                found, same = run(shared, peer), run(shared, nccl)
                one, wanted = one_gpu(shared, peer)
                for name, a, b, c, d in zip(NAMES, found, same, one, wanted, strict=True):
                    assert torch.equal(a, b), (name, shared, dtype)
                    wrong, allowed = (a - d).norm(), LARGER * (c - d).norm() + 1e-4 * d.norm()
                    assert wrong <= allowed, (name, shared, dtype, wrong.item(), allowed.item())
                peer.close(), nccl.close()


def check_many() -> None:
    """A thousand exchanges of changing routings while another stream computes and ranks are late in turns."""
    world, rank = dist.get_world_size(), dist.get_rank()
    cases = [Shared(routing, (500, 900, 0, 700)[:world], **SIZES) for routing in ROUTINGS]
    exchange = exchange_for(replace(cases[0], tokens=(900,) * world), **on_gpu(peer_memory=True))
    wanted, inputs = [run(case, exchange) for case in cases], []
    for case in cases:
        (x, *w, weights), ids, dout = case.tensors(exchange)
        tokens, experts = case.own(rank)
        leaves = [t.requires_grad_() for t in (x[tokens], *(e[experts] for e in w), weights[tokens])]
        inputs.append((leaves, ids[tokens], dout[tokens]))
    different = torch.zeros((), dtype=torch.int64, device=exchange.device)
    beside, a = torch.cuda.Stream(), torch.randn(2048, 2048, device=exchange.device)
    torch.manual_seed(0)
    for i in range(1000):
        case = int(torch.randint(len(cases), ()))
        leaves, ids, dout = inputs[case]
        if i % 8 == 0:
            with torch.cuda.stream(beside):
                for _ in range(4):
                    a @ a
        if i % (world + 1) == rank:
            torch.cuda._sleep(int(torch.randint(1, 400_000, (), generator=torch.Generator().manual_seed(i))))
        out = routed_experts(*leaves[:4], ids, leaves[4], exchange)
        results = (out, *torch.autograd.grad(out, leaves, dout))
        for found, want in zip(results, wanted[case], strict=True):
            different += (found != want).sum()
    torch.cuda.synchronize()
    exchange.check()
    assert int(different) == 0


def check_graph() -> None:
    """A captured step goes on from whatever epoch the exchange has, replayed often and mixed with calls."""
    shared = Shared("random", (64, 48, 32, 16)[: dist.get_world_size()], **SIZES)
    exchange = exchange_for(shared, **on_gpu(peer_memory=True))
    tokens, _ = shared.own(dist.get_rank())
    x = shared.tensors(exchange)[0][0][tokens].clone()
    model = Layers(exchange, shared, None)
    step = lambda: torch.autograd.grad(model(x).float().square().sum(), list(model.parameters()))  # noqa: E731
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for i in range(5):
        x.copy_(x * 0.9)
        graph.replay()
        found = [w.clone() for w in captured]
        for _ in range(i % 2 + 1):
            wanted = step()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    exchange.check()


def check_late() -> None:
    """In turns one rank's exchanges or last products begin late, in backwards of several layers: the others, which go
    ahead, overwrite nothing that it still reads, and it reads nothing that it has not got yet."""
    world, rank = dist.get_world_size(), dist.get_rank()
    shared = Shared("zipf", (300, 200, 0, 100)[:world], **SIZES)
    exchange = exchange_for(shared, **on_gpu(peer_memory=True))
    x = shared.tensors(exchange)[0][0][shared.own(rank)[0]]
    model = Layers(exchange, shared, None)
    step = lambda: torch.autograd.grad(model(x).float().square().sum(), list(model.parameters()))  # noqa: E731
    wanted = step()

    def late(function: Callable) -> Callable:
        def call(*given: object, **named: object) -> object:
            torch.cuda._sleep(1_000_000)
            return function(*given, **named)

        return call

    transport = exchange.transport
    for who in range(world):
        for slow in ((operator, "moe_weight_gradient_up_"), (transport, "dispatch"), (transport, "combine")):
            with pytest.MonkeyPatch.context() as patch:
                if rank == who:
                    patch.setattr(*slow, late(getattr(*slow)))
                for _ in range(5):
                    assert all(torch.equal(a, b) for a, b in zip(step(), wanted, strict=True)), (who, slow[1])
    exchange.check()


def check_rest() -> None:
    world = dist.get_world_size()
    shared = Shared("random", (40, 33, 0, 21)[:world], **SIZES)
    check_layers(shared, exchange_for(shared, **on_gpu(peer_memory=True)), compiled=True)
    check_added(shared, on_gpu(peer_memory=True))
    check_frozen(shared, on_gpu(peer_memory=True))
    check_wide(shared, on_gpu(peer_memory=True))
    check_graph()
    check_late()
    if world == 2:
        check_overflow(on_gpu(peer_memory=True), SIZES)


def check_missing() -> None:
    """The last rank stays away: the others go on, and are told who and where."""
    world, rank = dist.get_world_size(), dist.get_rank()
    shared = Shared("random", (16,) * world, **SIZES)
    exchange = exchange_for(shared, **on_gpu(peer_memory=True, timeout=2.0))
    run(shared, exchange, "layers.0")
    torch.cuda.synchronize()
    if rank < world - 1:
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match=rf"layer 'layers.1': rank {rank} waited 2 s for rank {world - 1}"):
            for _ in range(3):
                run(shared, exchange, "layers.1")
                torch.cuda.synchronize()
        assert time.monotonic() - begin < 6
    dist.barrier()


def _entry(rank: int, world: int, port: int, function: Callable[[], None]) -> None:
    processes.join(rank, world, port, "nccl")
    function()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("function", [check_results, check_many, check_rest, check_missing])
def test_peer_memory(function: Callable[[], None], world: int) -> None:
    processes.need_gpus(world)
    processes.start(_entry, world, processes.free_port(), function, processes=world)
