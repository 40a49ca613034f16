"""What a bench leaves behind: rows of measurements, where and with what they were taken, as JSON; and the gate that
compares them with stored ones."""

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pydantic
import torch
from pydantic import BaseModel, ConfigDict, Field

import flashmoe_train
from flashmoe_train.errors import UsageError

OURS = "flashmoe"
OURS_TOO = ("flashmoe_deterministic",)  # ours, asked for more than the others are: no baseline
# What bounds an implementation without being one: dense GEMMs of the same FLOPs, a copy of the same bytes (into the
# memory of other GPUs), DeepEP without sorting by expert and without weights, a layer that exchanges nothing.
FLOORS = (
    "gemm_floor",
    "copy",
    "flashmoe_transport",
    "deepep_transport",
    "peer_copy",
    "no_exchange",
    "flashmoe_no_exchange",
)
EVERYBODY = "*"  # in Row.skipped: the case itself could not be measured


class Row(BaseModel):
    """One case of a bench; the dictionaries go by implementation."""

    model_config = ConfigDict(extra="allow")  # rows of other benches have measures of their own

    case: dict[str, Any] = Field(default_factory=dict)
    label: str = ""
    ms: dict[str, float] = Field(default_factory=dict)
    tflops: dict[str, float] = Field(default_factory=dict)
    gb_per_s: dict[str, float] = Field(default_factory=dict)
    tokens_per_s_per_gpu: dict[str, float] = Field(default_factory=dict)
    error: dict[str, float] = Field(default_factory=dict)  # relative, Frobenius norm, against float64
    peak_gib: dict[str, float] = Field(default_factory=dict)  # beside the inputs
    flashmoe_path: str = ""  # kernel | fallback | reference
    skipped: dict[str, str] = Field(default_factory=dict)  # not run, and why
    failed: dict[str, str] = Field(default_factory=dict)  # ran and was wrong: not timed

    @property
    def key(self) -> str:
        return json.dumps(self.case, sort_keys=True)

    @property
    def baselines(self) -> list[str]:
        return [name for name in self.ms if name not in (OURS, *OURS_TOO, *FLOORS)]

    def ratio(self, baselines: Iterable[str] | None = None) -> tuple[str, float] | None:
        """(the fastest of `baselines`, default all of this row; how many times as fast as it ours is)."""
        names = [name for name in (self.baselines if baselines is None else baselines) if name in self.ms]
        if OURS not in self.ms or not names:
            return None
        best = min(names, key=self.ms.__getitem__)
        return best, self.ms[best] / self.ms[OURS]


class Results(BaseModel):
    """A bench on a machine."""

    bench: str
    gpu: str
    gpus: int  # of the machine; a case says how many it used, if more than one
    torch: str
    driver: str
    commit: str
    date: str
    command: str
    versions: dict[str, str] = Field(default_factory=dict)
    skipped: dict[str, str] = Field(default_factory=dict)  # implementations that ran in no case, and why
    rows: list[Row] = Field(default_factory=list)

    def write(self, path: Path) -> None:
        content = self.hoisted().model_dump()
        content["rows"] = [
            {k: _short(v, LOSS_DIGITS if k == "loss" else DIGITS) for k, v in row.items() if v not in ({}, "")}
            for row in content["rows"]
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

    def hoisted(self) -> "Results":
        """A copy in which what no row has, for one reason, is said once instead of in every row."""
        copy = self.model_copy(deep=True)
        for name in {name for row in self.rows for name in row.skipped} - {EVERYBODY}:
            reasons = {row.skipped.get(name) for row in self.rows}
            if len(reasons) == 1:
                copy.skipped[name] = self.rows[0].skipped[name]
                for row in copy.rows:
                    del row.skipped[name]
        return copy


# Significant ones: more is noise, and makes the differences between two files unreadable. Of losses what float32 has.
DIGITS, LOSS_DIGITS = 4, 7


def _short(value: Any, digits: int) -> Any:
    """What JSON has no number for, such as the loss of a run that diverged, is null."""
    if isinstance(value, dict):
        return {k: _short(v, digits) for k, v in value.items()}
    if isinstance(value, list):
        return [_short(v, digits) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def read(path: Path) -> Results:
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(f"{path} is no results file of `flashmoe bench`: {where}: {first['msg']}") from None


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"none (CPU {platform.machine()})"


def here(bench: str, command: str, device: torch.device) -> Results:
    """Results without rows: who measures, where and with what."""
    on_gpu = device.type == "cuda"
    return Results(
        bench=bench,
        gpu=gpu_name(device),
        gpus=torch.cuda.device_count() if on_gpu else 0,
        torch=torch.__version__,
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        if on_gpu
        else "",
        commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=versions(),
    )


# Distributions whose versions decide a measurement: PyTorch's parts and the peers that may be installed.
_DISTRIBUTIONS = (
    "triton", "flash-attn-3", "fa3-xformers", "flash-attn-4", "transformer-engine", "sonic-moe", "quack-kernels",
    "nvidia-cutlass-dsl", "deep-ep", "tokenspeed-deepep",
)  # fmt: skip


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "flashmoe_train": flashmoe_train.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.backends.cudnn.is_available() and (number := torch.backends.cudnn.version()):
        found["cudnn"] = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of the checkout this runs from. FLASHMOE_COMMIT says it on machines that get the files without .git."""
    if named := os.environ.get("FLASHMOE_COMMIT"):
        return named
    root = Path(flashmoe_train.__file__).parents[1]
    if not (root / ".git").exists():
        return f"v{flashmoe_train.__version__}"
    # Results that were just written do not make the code that wrote them another one.
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", ":(exclude)docs/results")
    return (_output("git", "-C", str(root), "describe", "--always") or "unknown") + "-dirty" * bool(changed)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# ---------------------------------------------------------------------------------------------------------------- gate


def compare(now: Results, stored: Results, tolerance: float) -> tuple[int, list[str]]:
    """(how many cases are in both, what got worse): our ratio to the best baseline that both runs have, which says
    the same on machines of different clocks, must not fall by more than `tolerance` of itself."""
    known = {row.key: row for row in stored.rows}
    compared, worse = 0, []
    for row in now.rows:
        before = known.get(row.key)
        if before is None or OURS not in before.ms:
            continue
        if OURS not in row.ms:
            compared += 1
            why = row.failed.get(OURS) or row.skipped.get(OURS) or row.skipped.get(EVERYBODY)
            worse.append(f"{now.bench}: {row.label}: {OURS} has no time any more: {why}")
            continue
        common = set(before.baselines) & set(row.baselines)
        then, today = before.ratio(common), row.ratio(common)
        if then is None or today is None:
            continue
        compared += 1
        if today[1] < then[1] * (1 - tolerance):
            worse.append(
                f"{now.bench}: {row.label}: {today[1]:.3f} × {today[0]}, stored {then[1]:.3f} × {then[0]}"
                f" ({today[1] / then[1] - 1:+.1%})"
            )
    return compared, worse


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
