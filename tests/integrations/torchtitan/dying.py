"""Imported by runs of a test ([experimental] custom_import): their last process is killed as a step begins, once."""

import os
import signal
from typing import Any

from torchtitan.train import Trainer

STEP = 5
_step = Trainer.train_step


def train_step(self: Any, *arguments: Any) -> Any:
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and self.step == STEP and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return _step(self, *arguments)


Trainer.train_step = train_step
