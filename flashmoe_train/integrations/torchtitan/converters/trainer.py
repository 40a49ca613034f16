"""TorchTitan 0.2.x's trainer, with the little that our runner has to ask of it in this generation's words."""

from typing import Any

from torch.distributed import ProcessGroup
from torchtitan.components.metrics import _get_metrics_rank
from torchtitan.config import JobConfig
from torchtitan.train import Trainer as Stock

from flashmoe_train.integrations.torchtitan.converters import compat
from flashmoe_train.integrations.torchtitan.converters.converter import FlashMoEConverter
from flashmoe_train.swap import Report


class Trainer(Stock):
    """Stock's, where validation works for every model."""

    def __init__(self, config: JobConfig) -> None:
        compat.provide_validator(config)
        super().__init__(config)
        compat.ask_for_no_masks(self)
        self.config: Any = config

    def swapped(self) -> Report:
        return FlashMoEConverter.last_report or Report()

    def metrics_rank(self) -> int:
        """The process that knows the loss."""
        return _get_metrics_rank(self.parallel_dims, self.config)

    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.model_args.vocab_size

    def processes_with_other_tokens(self) -> list[ProcessGroup]:
        dims = self.parallel_dims
        return [dims.get_mesh("loss").get_group()] if dims.dp_cp_enabled else []

    def counted_tokens(self, labels: Any) -> int:
        """Of a batch, those that this process' counts of the experts' tokens are of."""
        return labels.numel() // self.parallel_dims.cp
