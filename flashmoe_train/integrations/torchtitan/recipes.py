"""From a recipe to the tables of a TorchTitan job: where TorchTitan has what the keys that frameworks share say."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import torch

from flashmoe_train import data, huggingface
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations import checkpoint_files
from flashmoe_train.integrations.torchtitan import checkpoints, datasets, generation
from flashmoe_train.integrations.torchtitan.generation import OURS
from flashmoe_train.recipe import with_swap
from flashmoe_train.schema import Checkpoint, Parallel, Recipe

job, models = generation.part("job"), generation.part("models")

# Shared keys whose value TorchTitan takes as it is; the others have their own lines in `job_of`.
_SAME = {
    "training.steps": "training.steps",
    "training.seq_len": "training.seq_len",
    "training.learning_rate": "optimizer.lr",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "training.seed": "debug.seed",
    "training.precision": "training.mixed_precision_param",
    "training.compile": "compile.enable",
    "training.activation_checkpointing": "activation_checkpoint.mode",
    "training.deterministic": "debug.deterministic",
    "training.validate_every": "validation.freq",
    "training.validate_steps": "validation.steps",
    "parallel.replicate": "parallelism.data_parallel_replicate_degree",
    "parallel.tensor": "parallelism.tensor_parallel_degree",
    "parallel.pipeline": "parallelism.pipeline_parallel_degree",
    "parallel.context": "parallelism.context_parallel_degree",
}


class Job:
    """The tables of a job, and for every key that is not the user's own `[torchtitan.*]`, who says it."""

    def __init__(self, recipe: Recipe) -> None:
        self.name = "torchtitan" if recipe.data is not None else ""  # what the file calls TorchTitan's tables
        self.tables = copy.deepcopy(recipe.torchtitan)
        self.said_by: dict[str, str] = {}
        job.check_tables(self.tables, self.name)

    def say(self, place: str, value: Any, key: str) -> None:
        """Sets `table.key` to what the recipe's `key` says. Raises UsageError if the user's own tables set it too."""
        if self.get(place) is not None and self.get(place) != value:
            table, name = place.rsplit(".", 1)
            own = f"{self.name}.{table}" if self.name else table
            raise UsageError(f"[{own}] {name} = {self.get(place)!r} contradicts {key}, which sets it to {value!r}")
        self._set(place, value, key)

    def add(self, place: str, value: str) -> None:
        """Adds one value to a list of the user's."""
        given = self.get(place) or []
        if value not in given:
            self._set(place, [*given, value], OURS)

    def default(self, place: str, value: Any) -> None:
        """Sets what nobody has said."""
        if self.get(place) is None:
            self._set(place, value, OURS)

    def get(self, place: str) -> Any:
        table, key = place.rsplit(".", 1)
        return self.tables.get(table, {}).get(key)

    def _set(self, place: str, value: Any, said_by: str) -> None:
        table, key = place.rsplit(".", 1)
        self.tables.setdefault(table, {})[key] = value
        self.said_by[place] = said_by


def job_of(recipe: Recipe, processes: int) -> Job:
    """The TorchTitan job of a recipe on that many processes. Registers its model and data sets with TorchTitan.

    Raises UsageError for what contradicts itself and for numbers that do not fit each other.
    """
    result = Job(recipe)
    job.activate(result)
    for part, choice in recipe.swap.model_dump().items():
        result.say(f"flashmoe.{part}", choice, f"[swap] {part}")
    result.say("job.dump_folder", recipe.folder, "folder")
    result.say("metrics.enable_tensorboard", True, OURS)
    for key, place in _SAME.items():
        table, name = key.split(".")
        value = getattr(getattr(recipe, table), name)
        if value is not None and name in getattr(recipe, table).model_fields_set:
            result.say(place, value, f"[{table}] {name}")
    if recipe.training.activation_checkpointing == "selective":
        result.default("activation_checkpoint.selective_ac_option", "op")
    if not torch.cuda.is_available():
        result.default("training.mixed_precision_param", "float32")
    if recipe.model is None:
        _names_a_model(recipe, result)
    else:
        exact = result.get("training.mixed_precision_param") == "float32"
        name, flavor = models.register(recipe.model, recipe.data is not None and recipe.data.document_masks, exact)
        result.say("model.name", name, "[model]")
        result.say("model.flavor", flavor, "[model]")
    _share_experts(recipe, result, processes)
    _share_batch(recipe, result, processes)
    _choose_data(recipe, result, processes)
    _keep_checkpoints(recipe, result)
    return result


def resolve(recipe: Recipe, processes: int) -> tuple[Job, Any]:
    """The job of a recipe, and TorchTitan's configuration of it with every value checked."""
    resolved = job_of(recipe, processes)
    config = job.parse(resolved.tables)
    try:
        job.check(config, processes)
    except UsageError as error:
        raise UsageError(f"{error}{_in_words_of_the_recipe(str(error), resolved)}") from None
    return resolved, config


def _in_words_of_the_recipe(message: str, resolved: Job) -> str:
    """Which of the recipe's keys said what a message calls by TorchTitan's names."""
    named = {
        key
        for place, key in resolved.said_by.items()
        if key.startswith("[") and re.search(r"\[{}\][^\[]*\b{}\b".format(*place.split(".")), message)
    }
    return f" (said by {', '.join(sorted(named))})" if named else ""


def _names_a_model(recipe: Recipe, result: Job) -> None:
    if result.get("model.name") is None:
        raise UsageError("the recipe names no model: neither a config, nor [model], nor [torchtitan.model] name")
    if recipe.data is not None and recipe.data.document_masks:
        raise UsageError("[data] document_masks needs [model]; with [torchtitan.model] the flavor says which masks")


def _choose_data(recipe: Recipe, result: Job, processes: int) -> None:
    chosen = recipe.data
    replicas = _replicas(result, processes)
    if chosen is None or "tokenizer" not in chosen.model_fields_set:
        result.default("model.hf_assets_path", data.BYTE_TOKENIZER)
    else:
        data.check_tokenizer("[data] tokenizer", chosen.tokenizer)
        result.say("model.hf_assets_path", chosen.tokenizer, "[data] tokenizer")
    if chosen is None or "train" not in chosen.model_fields_set:
        result.default("training.dataset", "torch_sources")
    else:
        data.check_source("[data] train", chosen.train)
        name = datasets.register("recipe_train", chosen.train, chosen.text_column, replicas)
        result.say("training.dataset", name, "[data] train")
    if chosen is not None and chosen.heldout is not None:
        data.check_source("[data] heldout", chosen.heldout)
        name = datasets.register("recipe_heldout", chosen.heldout, chosen.text_column, replicas)
        result.say("validation.dataset", name, "[data] heldout")
        result.say("validation.enable", True, "[data] heldout")
        for key in ("seq_len", "local_batch_size"):
            if (value := result.get(f"training.{key}")) is not None:
                result.default(f"validation.{key}", value)
        result.default("validation.steps", 16)  # TorchTitan's is all of it


def _keep_checkpoints(recipe: Recipe, result: Job) -> None:
    chosen = recipe.checkpoint
    if not chosen.model_fields_set:
        return
    if chosen.export is not None and recipe.model is not None:
        huggingface.check(recipe.model)
    result.say("checkpoint.enable", True, "[checkpoint]")
    for key, place in {"every": "interval", "keep": "keep_latest_k"}.items():
        if (value := getattr(chosen, key)) is not None:
            result.say(f"checkpoint.{place}", value, f"[checkpoint] {key}")
    if chosen.every is None:
        result.default("checkpoint.interval", 2**31)  # after the last step only
    if chosen.asynchronous is not None:
        mode = "async" if chosen.asynchronous else "disabled"
        result.say("checkpoint.async_mode", mode, "[checkpoint] asynchronous")
    result.default("checkpoint.last_save_model_only", False)  # or the run could not be made longer
    if chosen.start_from is not None:
        folder = Path(chosen.start_from)
        if not (checkpoint_files.is_complete(folder) or checkpoints.is_huggingface(folder)):
            found = "holds neither a checkpoint (.metadata) nor Hugging Face's *.safetensors"
            why = found if folder.is_dir() else "no such folder"
            raise UsageError(f"[checkpoint] start_from = {chosen.start_from!r}: {why}")
        result.say("checkpoint.initial_load_path", chosen.start_from, "[checkpoint] start_from")
        if checkpoints.is_huggingface(folder):
            result.say("checkpoint.initial_load_in_hf", True, "[checkpoint] start_from")


def _share_experts(recipe: Recipe, result: Job, processes: int) -> None:
    degree = recipe.parallel.expert
    if degree == "auto":
        experts = job.sizes(result.tables).experts
        if experts is None:
            raise UsageError("[parallel] expert: this model has no experts")
        outer = _degree(result, "pipeline_parallel_degree") * _degree(result, "data_parallel_replicate_degree")
        degree = math.gcd(experts.number, max(1, processes // outer))
    if "expert" in recipe.parallel.model_fields_set:
        result.say("parallelism.expert_parallel_degree", degree, "[parallel] expert")


def _share_batch(recipe: Recipe, result: Job, processes: int) -> None:
    """A recipe says how many sequences a step has and how many of them a process may hold at once; TorchTitan wants to
    know how many each process takes at once, and accumulates gradients over as many turns as that needs. Through a
    pipeline a process' whole share goes in one turn, in pieces: at least as many as there are stages."""
    whole, most = recipe.training.global_batch_size, recipe.training.micro_batch_size
    stages = _degree(result, "pipeline_parallel_degree")
    if whole is None and most is None:
        return
    if whole is None:
        share, micro, says = (most or 1) * stages, most or 1, "[training] micro_batch_size"
    else:
        replicas, says = _replicas(result, processes), "[training] global_batch_size"
        if whole % replicas:
            raise UsageError(
                f"[training] global_batch_size = {whole} cannot be shared by {replicas} data-parallel processes: "
                f"make it a multiple of {replicas}"
            )
        share = whole // replicas
        if share < stages:
            raise UsageError(
                f"[training] global_batch_size = {whole}: the share of a data-parallel process, {share}, is less than "
                f"the {stages} stages of the pipeline"
            )
        most = min(most or share, share // stages)
        micro = max(size for size in range(1, most + 1) if share % size == 0)
        result.say("training.global_batch_size", whole, says)
    if stages > 1:
        result.say("training.local_batch_size", share, says)
        result.say("parallelism.pipeline_parallel_microbatch_size", micro, says)
    else:
        result.say("training.local_batch_size", micro, says)


def _replicas(result: Job, processes: int) -> int:
    """Processes that see different data."""
    keys = ("pipeline_parallel_degree", "tensor_parallel_degree", "context_parallel_degree")
    return max(1, processes // math.prod(_degree(result, key) for key in keys))


def _degree(result: Job, key: str) -> int:
    return max(1, result.get(f"parallelism.{key}") or 1)


def weights_of(recipe: Recipe) -> str | None:
    """The weights that the recipe itself starts from."""
    own = recipe.torchtitan.get("checkpoint", {})
    assets = recipe.torchtitan.get("model", {}).get("hf_assets_path")
    return (
        recipe.checkpoint.start_from
        or own.get("initial_load_path")
        or (assets if own.get("initial_load_in_hf") else None)
    )


def seed(recipe: Recipe, folder: str) -> tuple[Recipe, str]:
    """The recipe of one process that writes the stock model's first weights and stops; and where those will be."""
    tables = copy.deepcopy(recipe.torchtitan)
    for key in ("parallelism", "compile"):
        tables.pop(key, None)
    tables["checkpoint"] = {"enable": True, "create_seed_checkpoint": True}
    tables.setdefault("training", {}).pop("global_batch_size", None)
    training = recipe.training.model_copy(update={"compile": None, "global_batch_size": None})
    changes = {"parallel": Parallel(), "checkpoint": Checkpoint(), "training": training, "torchtitan": tables}
    return with_swap(recipe, "stock", folder).model_copy(update=changes), f"{folder}/checkpoint/step-0"


def starting_from(recipe: Recipe, weights: str) -> Recipe:
    """The recipe, starting from those weights and saving none."""
    tables = copy.deepcopy(recipe.torchtitan)
    own = {key: value for key, value in tables.get("checkpoint", {}).items() if not key.startswith("initial_load")}
    tables["checkpoint"] = own | {"enable": True, "load_only": True}
    return recipe.model_copy(update={"checkpoint": Checkpoint(start_from=weights), "torchtitan": tables})
