"""TorchTitan 0.3.x's trainer, with the little that our runner has to ask of it in this generation's words."""

from typing import Any

from torch.distributed import ProcessGroup
from torchtitan.components.metrics import _get_metrics_rank
from torchtitan.trainer import Trainer as Stock

from flashmoe_train.integrations.torchtitan.overrides import plan
from flashmoe_train.swap import Report


class Trainer(Stock):
    """Stock's, which remembers what was swapped."""

    def __init__(self, config: Stock.Config) -> None:
        before = plan.classes(config)
        super().__init__(config)
        self._swapped = plan.report(before, config)

    def swapped(self) -> Report:
        return self._swapped

    def overflows(self) -> None:
        """There is no exchange of ours in this generation."""

    def metrics_rank(self) -> int:
        """The process that knows the loss."""
        schedule = self.config.parallelism.pipeline_parallel_schedule
        return _get_metrics_rank(parallel_dims=self.parallel_dims, pp_schedule=schedule)

    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.model_config.vocab_size

    def processes_with_other_tokens(self) -> list[ProcessGroup]:
        dims = self.parallel_dims
        names = ["loss"] * dims.dp_cp_enabled + ["tp"] * self._experts_share_tokens()
        return [dims.get_mesh(name).get_group() for name in names]

    def counted_tokens(self, labels: Any) -> int:
        """Of a batch, those that this process' counts of the experts' tokens are of."""
        tokens = sum(piece.numel() for piece in labels) if isinstance(labels, list) else labels.numel()
        dims = self.parallel_dims
        return tokens // (dims.cp * (dims.tp if self._experts_share_tokens() else 1))

    def _experts_share_tokens(self) -> bool:
        """Under both, a tensor-parallel group's processes route different tokens."""
        return self.parallel_dims.tp_enabled and self.parallel_dims.ep_enabled
