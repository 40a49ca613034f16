"""How evenly Megatron's routers spread tokens over the experts, stock's and swapped layers' alike."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ExpertLoad:
    """Counts what the routers choose, on the device; nothing is read by the host before `take`.

    `same_layers` are the processes with the same layers, `stages` those with other layers.
    """

    def __init__(self, model: nn.Module, same_layers: Any, stages: Any) -> None:
        from megatron.core.transformer.moe.router import TopKRouter

        self.same_layers, self.stages = same_layers, stages
        self.counts: dict[str, Tensor] = {}  # [experts + 1]: the last one is how many there should be
        self.on = False
        for module in model.modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(self._count)

    def _count(self, router: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        if not (self.on and torch.is_grad_enabled()):  # a recomputed layer would be counted in its first run only
            return
        routing_map = output[1]
        with torch.no_grad():
            wanted = torch.full_like(routing_map[:1, 0], routing_map.shape[0] * router.topk, dtype=torch.double)
            counts = torch.cat([routing_map.sum(0, dtype=torch.double), wanted])
            name = f"layer {router.layer_number}"
            self.counts[name] = self.counts[name] + counts if name in self.counts else counts

    def take(self) -> dict[str, float]:
        """What was counted by all processes since the last call, as metrics; all of them call it.

        `expert_load/max_over_mean` is the busiest expert's load, of the layer where that is largest: 1 is even.
        """
        found: dict[str, tuple[float, int]] = {}
        for name, counts in self.counts.items():
            dist.all_reduce(counts, group=self.same_layers)
            of_experts, wanted = counts[:-1], counts[-1]
            found[name] = ((of_experts.max() / of_experts.mean()).item(), round((wanted - of_experts.sum()).item()))
        self.counts.clear()
        layers = [found]
        if self.stages.size() > 1:
            layers = [{}] * self.stages.size()
            dist.all_gather_object(layers, found, self.stages)
        found = {name: value for stage in layers for name, value in stage.items()}
        if not found:
            return {}
        return {
            "expert_load/max_over_mean": max(load for load, _ in found.values()),
            "expert_load/dropped_rows": sum(dropped for _, dropped in found.values()),
            **{f"expert_load/{name}": load for name, (load, _) in found.items()},
        }
