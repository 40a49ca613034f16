"""What layers share to exchange tokens: one exchange for those of the same sizes, as large as is said or needed."""

import torch
import torch.distributed as dist

from flashmoe_train.integrations.exchanges import Sharing, _exchanges, forget
from flashmoe_train.ops.expert_parallel import routed_experts

from .. import processes

D, N, K, E = 8, 4, 2, 4


def check() -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    here = (group, E, D, K, torch.float32, torch.device("cpu"))
    tokens = 3 + 4 * rank  # the second process brings more
    shared = Sharing(None, None)
    exchange = shared.exchange(*here, tokens)
    assert exchange.tokens == 7 and shared.exchange(*here, 5) is exchange
    assert Sharing(9, 1.5).exchange(*here).tokens == 9 and len(_exchanges) == 2
    assert shared.exchange(group, E, D, 1, torch.float32, torch.device("cpu"), 0).tokens == 1

    weights = [torch.randn(shape) for shape in ((2, N, D), (2, D, N), (2, N, D))]
    one = torch.tensor([0, 1]).expand(tokens, K)  # the experts of the first process
    out = routed_experts(torch.randn(tokens, D), *weights, one, torch.ones(tokens, K), exchange)
    assert not exchange.lost.any() and out.abs().sum(1).all()
    forget()
    assert not _exchanges
    assert shared.exchange(*here, 2) is not exchange
    forget()


def test_sharing() -> None:
    processes.run(check)
