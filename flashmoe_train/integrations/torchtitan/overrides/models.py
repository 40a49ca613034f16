"""A recipe's `[model]` as one of TorchTitan 0.3.x's, built by the functions that build its own flavors; and what our
operators want to know of any of them."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torchtitan.models import _supported_models, deepseek_v3, llama3, qwen3
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm, RoPE
from torchtitan.models.common.config_utils import make_ffn_config
from torchtitan.protocols.model_spec import ModelSpec

from flashmoe_train.errors import UsageError, nearest
from flashmoe_train.integrations.sizes import Experts, Sizes
from flashmoe_train.integrations.torchtitan.checks import check_latent, known
from flashmoe_train.schema import Llama3Scaling, Model, YarnScaling

FLAVOR = "recipe"  # the flavor under which `register` keeps the model of this process' recipe
_ANY_LENGTH = 2**31  # TorchTitan makes the rotary table as long as the training's sequences
_recipes: dict[str, tuple[Callable[[], ModelSpec], bool]] = {}


def register(model: Model, document_masks: bool, exact: bool) -> tuple[str, str]:
    """Keeps the model for `spec`; returns its `[model] name` and `flavor`.

    `exact` has no effect: this TorchTitan's own experts always round to bfloat16.
    """
    name, build = {
        "llama3": ("llama3", _llama3),
        "qwen3_moe": ("qwen3", _qwen3_moe),
        "deepseek_v3": ("deepseek_v3", _deepseek_v3),
    }[model.architecture]
    build(model)  # says now what it cannot express
    _recipes[name] = partial(_spec, name, build, model), document_masks
    return name, FLAVOR


def spec(name: str, flavor: str) -> ModelSpec:
    """A new configuration of that model; overrides change it in place. Raises UsageError if there is none."""
    if flavor == FLAVOR and name in _recipes:
        return _recipes[name][0]()
    if name not in _supported_models:
        raise UsageError(f"[model] name = {name!r} is not a model; {nearest(name, sorted(_supported_models))}")
    module = importlib.import_module(f"torchtitan.models.{name}")
    flavors = next(value for key, value in vars(module).items() if key.endswith("_configs") and isinstance(value, dict))
    known("[model] flavor", flavor, flavors)
    return module.model_registry(flavor)


def whole_sequences(name: str, flavor: str) -> bool:
    """Whether tokens attend to other documents of their sequence: in recipes that do not ask for document masks."""
    return flavor == FLAVOR and not _recipes[name][1]


def sizes(found: ModelSpec) -> Sizes:
    """Of a language model. Raises UsageError for another."""
    config: Any = found.model
    attention = getattr(config, "first_attention", None)
    if attention is None:
        raise UsageError(f"[model] name = {found.name!r} is not a language model")
    head_dim = getattr(attention, "head_dim", None) or config.dim // attention.n_heads
    qk, v = head_dim, head_dim
    if hasattr(attention, "v_head_dim"):
        qk, v = attention.qk_nope_head_dim + attention.qk_rope_head_dim, attention.v_head_dim
    moe = next((layer.moe for layer in config.layers if getattr(layer, "moe", None) is not None), None)
    return Sizes(
        dim=config.dim,
        heads=attention.n_heads,
        kv_heads=getattr(attention, "n_kv_heads", None) or attention.n_heads,
        qk_head_dim=qk,
        v_head_dim=v,
        vocabulary=config.vocab_size,
        experts=None
        if moe is None
        else Experts(moe.num_experts, moe.router.top_k, moe.routed_experts.inner_experts.hidden_dim),
    )


def heads(adapter: Any) -> tuple[int, int]:
    """Query and key/value heads of the model whose weights an adapter renames."""
    attention = adapter.model_config.first_attention
    return attention.n_heads, getattr(attention, "n_kv_heads", None) or attention.n_heads


def plain_below_original_length(config: Any, seq_len: int) -> None:
    """YaRN begins beyond the original length (`schema.YarnScaling`); this TorchTitan's would at any."""
    for _, rope, _, _ in config.traverse(RoPE.Config):
        if rope.scaling == "yarn" and seq_len <= rope.original_seq_len:
            rope.scaling = "none"


def _spec(name: str, build: Callable[[Model], Any], model: Model) -> ModelSpec:
    framework = {"llama3": llama3, "qwen3": qwen3, "deepseek_v3": deepseek_v3}[name]
    found = framework.model_registry("debugmodel")  # its functions; the sizes are ours
    found.flavor, found.model = FLAVOR, build(model)
    for _, norm, _, _ in found.model.traverse(RMSNorm.Config):
        norm.eps = model.rms_norm_eps
    return found


def _ends(model: Model, framework: Any, norm: RMSNorm.Config, head_init: dict[str, Any]) -> dict[str, Any]:
    """What comes before and after the layers."""
    rows, dim = model.vocab_size, model.hidden_size
    embedding = Embedding.Config(num_embeddings=rows, embedding_dim=dim, param_init=framework._EMBEDDING_INIT)
    head = Linear.Config(in_features=dim, out_features=rows, param_init=head_init)
    return {"dim": dim, "vocab_size": rows, "tok_embeddings": embedding, "norm": norm, "lm_head": head}


def _llama3(model: Model) -> llama3.Llama3Model.Config:
    head_dim = model.hidden_size // model.num_attention_heads
    if model.head_dim not in (None, head_dim):
        raise UsageError(f"[model] head_dim = {model.head_dim}: in TorchTitan's llama3 it is hidden_size / heads")
    scaling: dict[str, Any] = {}
    if isinstance(model.rope_scaling, Llama3Scaling):
        table = model.rope_scaling.model_dump(exclude={"rope_type", "factor"})
        scaling = table | {"scaling": "llama", "scaling_factor": model.rope_scaling.factor}
    layers = llama3._build_llama3_layers(
        n_layers=model.num_hidden_layers,
        dim=model.hidden_size,
        n_heads=model.num_attention_heads,
        n_kv_heads=model.num_key_value_heads,
        hidden_dim=model.intermediate_size,
        rope=ComplexRoPE.Config(dim=head_dim, max_seq_len=_ANY_LENGTH, theta=model.rope_theta, **scaling),
        attn_backend="flex",
    )
    norm = RMSNorm.Config(normalized_shape=model.hidden_size, param_init=llama3._NORM_INIT)
    return llama3.Llama3Model.Config(
        layers=layers, **_ends(model, llama3, norm, llama3._output_linear_init(model.hidden_size))
    )


def _qwen3_moe(model: Model) -> qwen3.Qwen3Model.Config:
    moe = model.moe
    assert moe is not None
    if moe.first_k_dense_replace:
        raise UsageError("[model.moe] first_k_dense_replace: every layer of TorchTitan's qwen3 has experts")
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    layers = qwen3._build_qwen3_moe_layers(
        n_layers=model.num_hidden_layers,
        dim=model.hidden_size,
        n_heads=model.num_attention_heads,
        n_kv_heads=model.num_key_value_heads or model.num_attention_heads,
        head_dim=head_dim,
        moe_hidden_dim=moe.moe_intermediate_size,
        num_experts=moe.num_experts,
        top_k=moe.num_experts_per_tok,
        rope=CosSinRoPE.Config(dim=head_dim, max_seq_len=_ANY_LENGTH, theta=model.rope_theta),
        attn_backend="flex",
        moe_comm_backend="standard",
    )
    for layer in layers:
        assert layer.moe is not None
        router = layer.moe.router
        router.score_func, router.route_norm = moe.scoring_func, moe.norm_topk_prob
        router.route_scale = moe.routed_scaling_factor
        router.num_expert_groups, router.num_limited_groups = moe.n_group, moe.topk_group
        if moe.n_shared_experts:
            layer.moe.shared_experts = make_ffn_config(
                dim=model.hidden_size,
                hidden_dim=moe.moe_intermediate_size * moe.n_shared_experts,
                w1_param_init=qwen3._LINEAR_INIT,
                w2w3_param_init=qwen3._LINEAR_INIT,
            )
    norm = qwen3._qwen3_norm(model.hidden_size)
    return qwen3.Qwen3Model.Config(layers=layers, **_ends(model, qwen3, norm, qwen3._LINEAR_INIT))


def _deepseek_v3(model: Model) -> deepseek_v3.DeepSeekV3Model.Config:
    moe, mla, yarn = model.moe, model.mla, model.rope_scaling
    assert moe is not None and mla is not None
    check_latent(mla)
    scaling: dict[str, Any] = {}
    if isinstance(yarn, YarnScaling):
        scaling = {"scaling": "yarn", "rope_factor": yarn.factor, "beta_fast": float(yarn.beta_fast)}
        scaling |= {"beta_slow": float(yarn.beta_slow), "original_seq_len": yarn.original_max_position_embeddings}
    layers = deepseek_v3._build_dsv3_layers(
        n_layers=model.num_hidden_layers,
        n_dense_layers=moe.first_k_dense_replace,
        dim=model.hidden_size,
        n_heads=model.num_attention_heads,
        **mla.model_dump(),
        mscale=yarn.mscale if isinstance(yarn, YarnScaling) else 1.0,
        dense_hidden_dim=model.intermediate_size,
        moe_hidden_dim=moe.moe_intermediate_size,
        num_experts=moe.num_experts,
        num_shared_experts=moe.n_shared_experts or 1,
        router_top_k=moe.num_experts_per_tok,
        router_score_func=moe.scoring_func,
        router_num_expert_groups=moe.n_group,
        router_num_limited_groups=moe.topk_group,
        router_route_scale=moe.routed_scaling_factor,
        router_route_norm=moe.norm_topk_prob,
        rope=ComplexRoPE.Config(dim=mla.qk_rope_head_dim, max_seq_len=_ANY_LENGTH, theta=model.rope_theta, **scaling),
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
    )
    for layer in layers:
        if layer.moe is not None and not moe.n_shared_experts:
            layer.moe.shared_experts = None
    norm = RMSNorm.Config(normalized_shape=model.hidden_size, param_init=deepseek_v3._NORM_INIT)
    head_init = deepseek_v3._output_linear_init(model.hidden_size)
    return deepseek_v3.DeepSeekV3Model.Config(
        layers=layers, mtp_layers=[], **_ends(model, deepseek_v3, norm, head_init)
    )
