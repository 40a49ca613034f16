"""How evenly the router spreads tokens over the experts, and whether any was lost, from the counts that TorchTitan's
MoE blocks keep in `tokens_per_expert`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, ReduceOp, all_reduce
from torch.distributed.tensor import DTensor
from torchtitan.models.moe.moe import MoE


class ExpertLoad:
    """Sums the counts of the microbatches that it is shown. Nothing is read by the host before `take`."""

    def __init__(self, model_parts: Sequence[nn.Module], group: ProcessGroup | None) -> None:
        modules = (item for part in model_parts for item in part.named_modules())
        self.blocks = {name: module for name, module in modules if isinstance(module, MoE)}
        self.group = group  # the processes with other tokens
        self.tokens = 0
        self.counted: Tensor | None = None  # [layers, experts]

    def counts(self) -> Tensor:
        """Tokens that each expert of each layer has had since TorchTitan last reset its counts, `[layers, experts]`."""
        counts = (block.tokens_per_expert for block in self.blocks.values())
        return torch.stack([c.full_tensor() if isinstance(c, DTensor) else c for c in counts])

    def add(self, before: Tensor, tokens: int) -> None:
        """A microbatch of so many tokens has run since `before`."""
        counted = self.counts() - before
        self.counted = counted if self.counted is None else self.counted + counted
        self.tokens += tokens

    def take(self) -> dict[str, float]:
        """What was added by all processes, as metrics; all of them call it.

        `expert_load/max_over_mean` is the busiest expert's load, of the layer where that is largest: 1 is even. A block
        that activation checkpointing runs twice counts its tokens twice.
        """
        if self.counted is None:
            return {}
        expected = torch.tensor(float(self.tokens), device=self.counted.device)
        totals = torch.cat([self.counted.flatten(), expected[None]])
        if self.group is not None:
            all_reduce(totals, ReduceOp.SUM, self.group)
        counted, tokens = totals[:-1].view_as(self.counted).cpu(), totals[-1].item()
        self.counted, self.tokens = None, 0
        load = counted.amax(1) / counted.mean(1)
        dropped = 0
        for rows, block in zip(counted.sum(1).tolist(), self.blocks.values(), strict=True):
            wanted = tokens * block.router.top_k
            dropped += round(max(1, round(rows / wanted)) * wanted - rows)
        layers = {f"expert_load/{name}": value for name, value in zip(self.blocks, load.tolist(), strict=True)}
        return {"expert_load/max_over_mean": load.max().item(), "expert_load/dropped_rows": dropped, **layers}
