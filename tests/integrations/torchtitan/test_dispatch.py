"""Which weights of experts FSDP takes over: those that processes share, and no others."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Shard

from flashmoe_train.integrations.torchtitan.converters import dispatch
from flashmoe_train.integrations.torchtitan.converters.moe import FlashMoESharedExperts

from ... import processes


class Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts, self.router = experts, nn.Linear(8, 4)


def dimensions(over_data: int, over_experts: int, **how: object) -> tuple[int, int]:
    """Of the meshes that the experts' and the router's weights are sharded over."""
    mesh = init_device_mesh("cpu", (over_data, over_experts), mesh_dim_names=("efsdp", "ep"))
    experts = FlashMoESharedExperts(dim=8, hidden_dim=4, num_experts=4, use_grouped_mm=False)
    for name, parameter in list(experts.named_parameters()):
        sharded = distribute_tensor(parameter.detach(), mesh["ep"], [Shard(0)])
        experts.register_parameter(name, nn.Parameter(sharded))
    block = Block(experts)
    dispatch.fully_shard(block.experts, mesh=mesh["efsdp"], **how)
    dispatch.fully_shard(block, mesh=init_device_mesh("cpu", (2,)), **how)
    assert isinstance(block.experts, FSDPModule)
    found = [
        {p.device_mesh.ndim for p in part.parameters() if isinstance(p, DTensor)} for part in (experts, block.router)
    ]
    assert all(len(ndims) == 1 for ndims in found)
    return found[0].pop(), found[1].pop()


def check() -> None:
    torch.manual_seed(0)
    assert dimensions(1, 2) == (1, 1)  # nobody else has them
    assert dimensions(2, 1) == (2, 1)
    assert dimensions(1, 2, offload_policy=CPUOffloadPolicy(pin_memory=False)) == (2, 1)


def test_fsdp_leaves_alone_what_nobody_shares() -> None:
    processes.run(check)
