"""What a recipe may say: the schema of recipes and of the model sizes in `configs/`. Data only; `recipe` reads files.

Names of sizes are those of Hugging Face's `config.json`, so that a model's own file can be read side by side. What a
recipe does not say is the framework's default.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flashmoe_train.errors import UsageError, nearest

Choice = Literal["flashmoe", "stock"]
Count = Annotated[int, Field(ge=1)]
OrNone = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Even = Annotated[int, Field(ge=2, multiple_of=2)]


class Table(BaseModel):
    """A TOML table: no other keys than these, no other types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class MixtureOfExperts(Table):
    """Routed SwiGLU experts. Every layer has them but the first `first_k_dense_replace`."""

    num_experts: Count
    num_experts_per_tok: Count
    moe_intermediate_size: Count  # of one expert
    n_shared_experts: OrNone = 0  # experts that see every token, as one of that many times the size
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False  # divide the chosen experts' weights by their sum
    routed_scaling_factor: Positive = 1.0
    n_group: Count | None = None  # experts are chosen from `topk_group` of `n_group` groups
    topk_group: Count | None = None
    first_k_dense_replace: OrNone = 0

    @model_validator(mode="after")
    def _chosen_exist(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok is more than num_experts ({self.num_experts})")
        if (self.n_group is None) != (self.topk_group is None):
            raise ValueError("n_group and topk_group go together")
        if self.n_group is not None and self.topk_group is not None:
            if self.num_experts % self.n_group:
                raise ValueError(f"n_group does not divide num_experts ({self.num_experts})")
            if self.topk_group > self.n_group:
                raise ValueError(f"topk_group is more than n_group ({self.n_group})")
            size = self.num_experts // self.n_group
            if size < 2:
                raise ValueError(f"n_group leaves one expert to a group: at least 2 (num_experts {self.num_experts})")
            if self.topk_group * size < self.num_experts_per_tok:
                raise ValueError(f"topk_group × {size} experts of a group are less than num_experts_per_tok")
        return self


class LatentAttention(Table):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

    q_lora_rank: OrNone = 0  # 0: queries are projected in one step
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Even
    v_head_dim: Count


class Llama3Scaling(Table):
    """Rotary frequencies of Llama 3.1 for long contexts."""

    rope_type: Literal["llama3"]
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Count


class YarnScaling(Table):
    """Rotary frequencies by YaRN (arXiv:2309.00071); active for sequences beyond the original length."""

    rope_type: Literal["yarn"]
    factor: Positive
    beta_fast: Count
    beta_slow: Count
    mscale: Positive
    original_max_position_embeddings: Count


class Model(Table):
    """Sizes of a transformer: a file of `configs/`, or a recipe's `[model]`."""

    architecture: Literal["llama3", "qwen3_moe", "deepseek_v3"]
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count  # of dense SwiGLU layers
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None  # None: as many as attention heads
    head_dim: Even | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 10000.0
    rope_scaling: Annotated[Llama3Scaling | YarnScaling, Field(discriminator="rope_type")] | None = None
    moe: MixtureOfExperts | None = None
    mla: LatentAttention | None = None

    @model_validator(mode="after")
    def _fits_the_architecture(self) -> Self:
        allowed = {"llama3": (), "qwen3_moe": ("moe",), "deepseek_v3": ("moe", "mla")}[self.architecture]
        for table in ("moe", "mla"):
            if (getattr(self, table) is not None) != (table in allowed):
                raise ValueError(f"{self.architecture} {'needs a' if table in allowed else 'has no'} table [{table}]")
        scaling = {"llama3": "llama3", "deepseek_v3": "yarn"}.get(self.architecture)
        if self.rope_scaling is not None and self.rope_scaling.rope_type != scaling:
            raise ValueError(f"{self.architecture} has no rope_scaling {self.rope_scaling.rope_type!r}")
        if self.mla is not None and (self.num_key_value_heads, self.head_dim) != (None, None):
            raise ValueError("with [mla] heads have their sizes from there: no num_key_value_heads, no head_dim")
        if self.mla is None and self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads does not divide hidden_size ({self.hidden_size}); give head_dim")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(f"num_key_value_heads does not divide num_attention_heads ({self.num_attention_heads})")
        if self.moe is not None and self.moe.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(f"first_k_dense_replace is more than num_hidden_layers ({self.num_hidden_layers})")
        return self


class Swap(Table):
    """Whose parts a model runs: "flashmoe", or the framework's own, "stock"."""

    attention: Choice = "flashmoe"
    moe: Choice = "flashmoe"  # gather, experts and combine of mixture-of-experts blocks
    dispatch: Choice = "stock"  # the exchange of expert parallelism; "flashmoe" needs moe = "flashmoe"
    dispatch_capacity: Positive = 2.0  # rows that a process' experts have room for, as multiples of an even share


class Data(Table):
    """Text to train on and its tokenizer. A data set is "torch_sources" (PyTorch's own Python files), a file or pattern
    of files (.jsonl, .json, .parquet, .txt, .csv), or a table of arguments for Hugging Face's `load_dataset`."""

    train: str | dict[str, Any] = "torch_sources"
    heldout: str | dict[str, Any] | None = None  # validate on it; "torch_sources_heldout" belongs to "torch_sources"
    text_column: str = "text"
    tokenizer: str = "bytes"  # or a folder with Hugging Face's tokenizer.json
    document_masks: bool = False  # tokens do not attend to other documents of their sequence


class Training(Table):
    steps: Count | None = None
    seq_len: Count | None = None  # tokens
    global_batch_size: Count | None = None  # sequences a step, of all processes
    micro_batch_size: Count | None = None  # sequences at most that a process takes through the model at once
    learning_rate: Positive | None = None
    warmup_steps: OrNone | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    precision: Literal["bfloat16", "float32"] | None = None  # of products; bfloat16 on GPUs, float32 without one
    compile: bool | None = None
    activation_checkpointing: Literal["none", "selective", "full"] | None = None
    deterministic: bool | None = None  # sums in a fixed order: losses and gradients repeat bitwise
    validate_every: Count | None = None  # steps
    validate_steps: Count | None = None  # batches a validation


class Checkpoint(Table):
    """Checkpoints in the run's folder; a run goes on from the newest."""

    every: Count | None = None  # steps; and one after the last step
    keep: Annotated[int, Field(ge=2)] | None = None  # so many of the newest: one of them may be in the making
    asynchronous: bool | None = None  # write while training goes on
    start_from: str | None = None  # weights to begin with: a checkpoint, or Hugging Face's safetensors
    export: Literal["huggingface"] | None = None  # after the last step, into the folder `huggingface`


class Parallel(Table):
    """How many processes share what; FSDP takes those that are left."""

    replicate: Count = 1
    tensor: Count = 1
    pipeline: Count = 1
    context: Count = 1
    expert: Count | Literal["auto"] = 1  # "auto": as many as divide the number of experts


class Recipe(Table):
    """What to run: a framework, a model, swaps, training. `[torchtitan]` and `[megatron]` go to that framework as they
    are."""

    framework: Literal["torchtitan", "megatron"]
    config: str | None = None  # where `[model]` is from
    folder: str | None = None  # of logs, curve, summary and checkpoints; default: outputs/ and the recipe's name
    model: Model | None = None  # None: `[torchtitan.model]` names one of TorchTitan's
    swap: Swap = Field(default_factory=Swap)
    data: Data | None = None  # None: `[torchtitan.training]` names it
    training: Training = Field(default_factory=Training)
    parallel: Parallel = Field(default_factory=Parallel)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    torchtitan: dict[str, Any] = Field(default_factory=dict)
    megatron: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _of_one_framework(self) -> Self:
        for table in ("torchtitan", "megatron"):
            if table != self.framework and getattr(self, table):
                raise ValueError(f"[{table}] is of another framework than the recipe's, {self.framework!r}")
        return self

    @model_validator(mode="after")
    def _validates_on_other_text(self) -> Self:
        heldout = self.data.heldout if self.data is not None else None
        for key in ("validate_every", "validate_steps"):
            if getattr(self.training, key) is not None and heldout is None:
                raise ValueError(f"[training] {key} needs [data] heldout, on which to validate")
        if isinstance(heldout, dict) and "split" not in heldout:
            raise ValueError("[data] heldout needs a split: without one it would be that of training")
        return self


M = TypeVar("M", bound=Table)


def parse(schema: type[M], tables: dict[str, Any], table: str = "") -> M:
    """`tables` as `schema`; `table` is what they are called in the file they are from.

    Raises UsageError that names every unknown key, with the nearest known one, and every value of a wrong type:
    "False" is no boolean and "10" no number.
    """
    try:
        return schema.model_validate(tables)
    except ValidationError as error:
        raise UsageError(lines(_problem(schema, e, table) for e in error.errors())) from None


def lines(problems: Iterable[tuple[str, str]]) -> str:
    """A line for each subject; a value that fits no member of a union has several problems."""
    by_subject: dict[str, list[str]] = {}
    for subject, problem in problems:
        by_subject.setdefault(subject, []).append(problem)
    return "\n".join(subject + "; or ".join(texts) for subject, texts in by_subject.items())


def key_name(*place: int | str) -> str:
    """How errors name a key: `framework`, `[training] steps`."""
    *tables, key = map(str, place)
    return f"{table_name(*tables)} {key}" if tables else key


def table_name(*place: int | str) -> str:
    return f"[{'.'.join(map(str, place))}]"


def _problem(schema: type[Table], error: Any, table: str) -> tuple[str, str]:
    """What an error is about, and the error."""
    schemas: list[type[Table]] = [schema]
    place: list[int | str] = [table] if table else []
    unknown = error["type"] == "extra_forbidden"
    for part in error["loc"]:
        inner = [s.model_fields[part].annotation for s in schemas if part in s.model_fields]
        if inner or (unknown and part == error["loc"][-1]):  # other parts name members of a union
            place.append(part)
        schemas = [found for annotation in inner for found in _tables_in(annotation)] or schemas
    found = error["input"]
    match error["type"]:
        case "extra_forbidden":
            named = f"table {table_name(*place)}" if isinstance(found, dict) else f"key {key_name(*place)}"
            known = sorted({key for s in schemas for key in s.model_fields})
            return f"unknown {named}; ", nearest(str(place[-1]), known)
        case "union_tag_not_found":
            return f"{key_name(*place, 'rope_type')} ", "is missing"
        case "missing":
            return f"{key_name(*place)} ", "is missing"
        case "value_error":
            return f"{table_name(*place)} " if place else "", str(error["ctx"]["error"])
        case "model_type":
            return f"{table_name(*place)} ", f"must be a table, found {found!r}"
    return f"{key_name(*place)} = {found!r}: ", error["msg"]


def _tables_in(annotation: Any) -> Iterator[type[Table]]:
    if isinstance(annotation, type) and issubclass(annotation, Table):
        yield annotation
    for argument in get_args(annotation):
        yield from _tables_in(argument)
