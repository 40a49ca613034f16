"""How evenly the router spreads tokens over the experts, and whether any was lost, from the counts that TorchTitan's
MoE blocks keep for balancing them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, ReduceOp, all_gather_object, all_reduce, get_world_size
from torch.distributed.tensor import DTensor

_COUNTS = ("tokens_per_expert", "tokens_per_expert_E")  # a block's buffer, by generation


class ExpertLoad:
    """Sums the counts of the microbatches that it is shown. Nothing is read by the host before `take`.

    `groups` are the processes with other tokens, one group for each direction, `stages` those with other layers.
    """

    def __init__(
        self, model_parts: Sequence[nn.Module], groups: Sequence[ProcessGroup], stages: ProcessGroup | None = None
    ) -> None:
        modules = (item for part in model_parts for item in part.named_modules())
        self.blocks = {_plain(name): module for name, module in modules if _counts(module) is not None}
        self.groups = groups
        self.stages = stages
        self.tokens = 0
        self.counted: Tensor | None = None  # [layers, experts]

    def counts(self) -> Tensor:
        """Tokens that each expert of each layer has had since TorchTitan last reset its counts, `[layers, experts]`."""
        counts = (_counts(block) for block in self.blocks.values())
        return torch.stack([c.full_tensor() if isinstance(c, DTensor) else c for c in counts]).double()  # type: ignore[misc]

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
        layers = [own := self._layers()]
        if self.stages is not None:
            layers = [{}] * get_world_size(self.stages)
            all_gather_object(layers, own, self.stages)
        found = {name: value for stage in layers for name, value in stage.items()}
        if not found:
            return {}
        return {
            "expert_load/max_over_mean": max(load for load, _ in found.values()),
            "expert_load/dropped_rows": sum(dropped for _, dropped in found.values()),
            **{f"expert_load/{name}": load for name, (load, _) in found.items()},
        }

    def _layers(self) -> dict[str, tuple[float, int]]:
        """By layer of this process: the busiest expert's load over the mean, and dropped rows."""
        if self.counted is None:
            return {}
        expected = torch.tensor(self.tokens, dtype=torch.double, device=self.counted.device)
        totals = torch.cat([self.counted.flatten(), expected[None]])
        for group in self.groups:
            all_reduce(totals, ReduceOp.SUM, group)
        counted, tokens = totals[:-1].view_as(self.counted).cpu(), totals[-1].item()
        self.counted, self.tokens = None, 0
        found = {}
        for (name, block), counts in zip(self.blocks.items(), counted, strict=True):
            wanted, rows = tokens * block.router.top_k, counts.sum().item()
            dropped = round(max(1, round(rows / wanted)) * wanted - rows)
            found[name] = ((counts.max() / counts.mean()).item(), dropped)
        return found


def _counts(module: nn.Module) -> Tensor | None:
    """How many tokens each expert of a block has had, `[experts]`; None of other modules."""
    return next((buffer for name in _COUNTS if (buffer := getattr(module, name, None)) is not None), None)


def _plain(name: str) -> str:
    """Without what activation checkpointing and compilation wrap around a module."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
