"""The tables of a recipe's `[megatron]`: arguments of Megatron's configurations, checked, and who says each."""

import inspect
import json
import math
import warnings
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from flashmoe_train.errors import UsageError, nearest
from flashmoe_train.schema import Recipe

OURS = "flashmoe train"  # who says what neither the user nor Megatron does

# What the tables in `[megatron]` are the arguments of; all else there is TransformerConfig's.
_TABLES = ("optimizer", "ddp", "scheduler")


class Job:
    """Arguments by table, "config" being TransformerConfig's, and for each that is not the user's own, who says it."""

    def __init__(self, recipe: Recipe) -> None:
        own = dict(recipe.megatron)
        self.tables: dict[str, dict[str, Any]] = {name: dict(_table(own, name)) for name in _TABLES}
        self.tables["config"] = own
        for name, known in _known(recipe.model is not None and recipe.model.mla is not None).items():
            self.tables[name] = _checked(self.tables[name], known, _title(name))
        self.said_by: dict[str, str] = {}

    def say(self, place: str, value: Any, key: str) -> None:
        """Sets `table.key` to what the recipe's `key` says. Raises UsageError if the user's own tables set it too."""
        table, name = place.split(".")
        given = self.tables[table].get(name, value)
        if given != value:
            raise UsageError(f"[{_title(table)}] {name} = {given!r} contradicts {key}, which sets it to {value!r}")
        self.tables[table][name] = value
        self.said_by[place] = key

    def default(self, place: str, value: Any) -> None:
        """Sets what nobody has said."""
        table, name = place.split(".")
        if name not in self.tables[table]:
            self.say(place, value, OURS)

    def get(self, place: str) -> Any:
        table, name = place.split(".")
        return self.tables[table].get(name)


def _known(latent: bool) -> dict[str, dict[str, Any]]:
    """The keys of each table, with their types."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    scheduler = [*inspect.signature(OptimizerParamScheduler.__init__).parameters.values()][2:]
    return {
        "config": get_type_hints(MLATransformerConfig if latent else TransformerConfig),
        "optimizer": get_type_hints(OptimizerConfig),
        "ddp": get_type_hints(DistributedDataParallelConfig),
        "scheduler": {parameter.name: parameter.annotation for parameter in scheduler},
    }


def _checked(given: dict[str, Any], known: dict[str, Any], table: str) -> dict[str, Any]:
    """The values of a table in the types of its keys. Raises UsageError for other keys and types."""
    found = {}
    for key, value in given.items():
        if key not in known:
            what = f"table [{table}.{key}]" if isinstance(value, dict) else f"key [{table}] {key}"
            raise UsageError(f"unknown {what}; {nearest(key, sorted(known))}")
        adapter = TypeAdapter(known[key], config=ConfigDict(arbitrary_types_allowed=True))
        try:
            found[key] = adapter.validate_json(json.dumps(value, default=str), strict=True)
        except ValidationError as error:
            # Of a function or a torch.dtype there is no TOML.
            why = "; or ".join(
                "a recipe cannot say it"
                if problem["type"] in ("callable_type", "needs_python_object")
                else problem["msg"]
                for problem in error.errors()
            )
            raise UsageError(f"[{table}] {key} = {value!r}: {why}") from None
    return found


def _title(table: str) -> str:
    return f"megatron.{table}" if table in _TABLES else "megatron"


def _table(own: dict[str, Any], name: str) -> dict[str, Any]:
    table = own.pop(name, {})
    if not isinstance(table, dict):
        raise UsageError(f"[megatron.{name}] must be a table, found {table!r}")
    return table


_DECAYS = ("constant", "cosine", "inverse-square-root", "linear", "WSD")
_WSD_DECAYS = ("cosine", "exponential", "linear", "minus_sqrt")
_INCREASES = ("constant", "cosine", "linear")


def _check_schedule(job: Job) -> None:
    """Raises UsageError for what Megatron's scheduler refuses without a word, or when training has come so far."""
    schedule = job.tables["scheduler"]
    warmup, decayed = schedule["lr_warmup_steps"], schedule["lr_decay_steps"]
    if warmup >= decayed:
        raise UsageError(f"[training] warmup_steps = {warmup} must be less than Megatron's {decayed} steps of decay")
    styles: dict[str, tuple[str, ...]] = {"lr_decay_style": _DECAYS, "wd_incr_style": _INCREASES}
    if schedule["lr_decay_style"] == "WSD":
        styles["lr_wsd_decay_style"] = _WSD_DECAYS
        if schedule.get("wsd_decay_steps") is None:
            raise UsageError('[megatron.scheduler] wsd_decay_steps is missing: lr_decay_style = "WSD" needs it')
    for key, choices in styles.items():
        if (style := schedule.get(key)) not in choices:
            raise UsageError(f"[megatron.scheduler] {key} = {style!r} is none of {', '.join(choices)}")
    rate, start, most = schedule["max_lr"], schedule["start_wd"], math.inf
    ranges: dict[str, tuple[float, float]] = {
        "optimizer.lr": (0, most),
        "optimizer.min_lr": (0, rate),
        "scheduler.init_lr": (0, rate),
        "scheduler.lr_warmup_steps": (0, decayed),
        "scheduler.wsd_decay_steps": (1, decayed),
        "scheduler.start_wd": (0, most),
        "scheduler.end_wd": (start, start if schedule["wd_incr_style"] == "constant" else most),
        "scheduler.wd_incr_steps": (1, most),
    }
    for place, (low, high) in ranges.items():
        value = job.get(place)
        if value is not None and not low <= value <= high:
            allowed = f"at least {low}" + (f" and at most {high}" if high < most else "")
            raise UsageError(f"[megatron.{place.replace('.', '] ')} = {value}: it must be {allowed}")
    if schedule["use_checkpoint_opt_param_scheduler"] and schedule["override_opt_param_scheduler"]:
        both = "use_checkpoint_opt_param_scheduler and override_opt_param_scheduler"
        raise UsageError(f"[megatron.scheduler] {both}: a resumed run has one schedule, the checkpoint's or its own")


def configurations(job: Job, latent: bool) -> tuple[Any, Any, Any, dict[str, Any]]:
    """TransformerConfig, OptimizerConfig, DistributedDataParallelConfig; the arguments of OptimizerParamScheduler."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    config = _build(MLATransformerConfig if latent else TransformerConfig, job.tables["config"], "megatron")
    optimizer = _build(OptimizerConfig, job.tables["optimizer"], "megatron.optimizer")
    ddp = _build(DistributedDataParallelConfig, job.tables["ddp"], "megatron.ddp")
    _check_schedule(job)
    if ddp.use_megatron_fsdp or ddp.use_custom_fsdp:
        raise UsageError("[megatron.ddp] use_megatron_fsdp: recipes train with DistributedDataParallel")
    kinds = ("adam", "sgd") if optimizer.optimizer_cpu_offload else ("adam",)  # of Megatron's distributed optimizer
    if optimizer.optimizer not in kinds:
        raise UsageError(f"[megatron.optimizer] optimizer = {optimizer.optimizer!r} is none of {', '.join(kinds)}")
    if config.virtual_pipeline_model_parallel_size is not None:
        raise UsageError("[megatron] virtual_pipeline_model_parallel_size: recipes build one part of the model a stage")
    if config.mtp_num_layers:
        raise UsageError("[megatron] mtp_num_layers: recipes build no multi-token prediction")
    return config, optimizer, ddp, job.tables["scheduler"]


def _build(cls: Any, arguments: dict[str, Any], table: str) -> Any:
    """Megatron's configuration, with its own errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(**arguments)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"[{table}] {cls.__name__}: {error}") from None
