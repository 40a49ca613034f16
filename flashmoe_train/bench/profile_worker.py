"""What `flashmoe bench profile` starts on every process: `flashmoe train`'s program, whose last step is traced on the
first process. A trace has the GPU's kernels and the calls that the host made to it, without PyTorch's operators, which
would slow the host down; on a CPU the operators.

The step before is the profiler's own warm-up. All processes begin the traced one together.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from flashmoe_train import integrations
from flashmoe_train import recipe as recipes
from flashmoe_train.schema import Recipe
from flashmoe_train.train import patience, train, usage_errors

TRACE, WALL = "trace.json", "wall.json"  # in the run's folder
UNTIMED = 2  # steps at the end that the profiler makes slower


def traced(trainer: Any, folder: Path) -> Any:
    """A subclass of a framework's trainer that leaves a trace of its last step in `folder`."""

    class Traced(trainer):
        tracer: profile | None = None

        def train_step(self, *arguments: Any) -> Any:
            left = self.config.training.steps - self.step
            if left < UNTIMED and dist.get_rank() == 0 and self.tracer is None:
                on_gpu = torch.cuda.is_available()
                self.tracer = profile(
                    activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU],
                    schedule=schedule(wait=0, warmup=UNTIMED - 1, active=1),
                    on_trace_ready=lambda finished: finished.export_chrome_trace(str(folder / TRACE)),
                )
                self.tracer.start()
            if left > 0:
                return super().train_step(*arguments)
            _wait()
            dist.barrier()
            if self.tracer is not None:
                self.tracer.step()
            begin = time.perf_counter()
            result = super().train_step(*arguments)
            _wait()
            if self.tracer is not None:
                ms = (time.perf_counter() - begin) * 1e3
                (folder / WALL).write_text(json.dumps({"ms": ms}))
                self.tracer.stop()
            return result

    return Traced


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(path: str) -> None:
    recipe: Recipe = recipes.load(path)
    runner = integrations.part(recipe.framework, "runner")
    runner.MonitoredTrainer = traced(runner.MonitoredTrainer, Path(str(recipe.folder)))  # type: ignore[attr-defined]
    with usage_errors(patience()):
        train(path, [], allow_fallback=True)


if __name__ == "__main__":
    main(sys.argv[1])
