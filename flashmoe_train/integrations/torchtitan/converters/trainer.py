"""TorchTitan 0.2.x's trainer, with the little that our runner has to ask of it in this generation's words, and a step
that does not wait for the device."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.metrics import _get_metrics_rank
from torchtitan.config import JobConfig
from torchtitan.distributed import utils
from torchtitan.train import Trainer as Stock

from flashmoe_train.integrations.torchtitan.converters import compat, dispatch
from flashmoe_train.integrations.torchtitan.converters.converter import FlashMoEConverter
from flashmoe_train.integrations.torchtitan.converters.documents import send, sent
from flashmoe_train.integrations.torchtitan.sharing import Overflows
from flashmoe_train.swap import Report


class Trainer(Stock):
    """Stock's, where validation works for every model."""

    def __init__(self, config: JobConfig) -> None:
        compat.provide_validator(config)
        super().__init__(config)
        compat.ask_for_no_masks(self)
        self.config: Any = config
        self.is_stock = not any(row.became for row in self.swapped().rows)

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """Stock's, but that nothing waits for the device unless the step is logged: stock's asks it for the number of
        tokens, and for each batch to have arrived, before it begins. A host that goes ahead has the kernels of the next
        forward under way while the device still steps the optimizers; one that waits leaves it idle for as long as the
        first layers take to launch.
        """
        if self.is_stock:  # what ours is compared with is TorchTitan's own
            return super().train_step(data_iterator)
        self.optimizers.zero_grad()
        learning_rate = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        batches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        counted = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in batches)  # on the host, as they are
        own_tokens = sent(torch.tensor(float(counted), dtype=torch.float64), self.device)
        all_tokens = own_tokens.clone()
        if self.parallel_dims.dp_enabled:
            dist.all_reduce(all_tokens, group=self.parallel_dims.get_mesh("batch").get_group())

        losses, tokens = [], all_tokens.float()
        for inputs, labels in batches:
            moved = {key: sent(x, self.device) for key, x in inputs.items() if key != "input"}
            moved["input"] = send(inputs["input"], self.model_parts[0], self.tokenizer, self.device)
            loss = self.forward_backward_step(
                input_dict=moved, labels=sent(labels, self.device), global_valid_tokens=tokens
            )
            losses.append(loss.detach())

        norm = utils.clip_grad_norm_(
            [parameter for part in self.model_parts for parameter in part.parameters()],
            self.config.training.max_norm,
            foreach=True,
            pp_mesh=self.parallel_dims.get_optional_mesh("pp"),
            ep_enabled=self.parallel_dims.ep_enabled,
        )
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step()
        self.lr_schedulers.step()
        if self.metrics_processor.should_log(self.step):
            self._log(torch.stack(losses).sum(), (own_tokens / all_tokens).float(), norm, learning_rate)

    def _log(self, loss: Tensor, share: Tensor, norm: Tensor, learning_rate: float) -> None:
        """`loss`: of this process' tokens, over the number of all; its tokens are a `share` of these."""
        mean = largest = loss.item()
        seen: float = self.ntokens_seen
        if self.parallel_dims.dp_cp_enabled:
            mesh = self.parallel_dims.get_optional_mesh("loss")
            mean, largest = utils.dist_sum(loss, mesh), utils.dist_max(loss / share, mesh)
            seen = utils.dist_sum(torch.tensor(self.ntokens_seen, device=self.device), mesh)
        extra = {"n_tokens_seen": seen, "lr": learning_rate}
        self.metrics_processor.log(self.step, mean, largest, norm.item(), extra_metrics=extra)

    def swapped(self) -> Report:
        return FlashMoEConverter.last_report or Report()

    def overflows(self) -> Overflows | None:
        """Of our exchange, where the model has it."""
        return dispatch.overflows()

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
