"""Selective activation checkpointing of TorchTitan 0.3.x that keeps what our operators give, and does not run them
twice."""

from dataclasses import dataclass

from torchtitan.distributed.activation_checkpoint import SelectiveAC

from flashmoe_train.integrations.torchtitan.core import ATTENTION_OPERATORS, MOE_OPERATORS


class FlashMoESelectiveAC(SelectiveAC):
    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set:
        return super().get_save_ops() | {*ATTENTION_OPERATORS, *MOE_OPERATORS}
