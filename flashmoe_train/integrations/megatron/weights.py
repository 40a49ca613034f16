"""Weights under Hugging Face's names, and Megatron's: the common form through which frameworks exchange them.

Megatron joins what Transformers keeps apart: queries, keys and values of each group of heads lie together, and so do
gate and up projections.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashmoe_train import huggingface
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.megatron.recipes import Plan
from flashmoe_train.schema import Model

_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_IN_A_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_experts.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
}
_GLU = {
    "mlp.linear_fc1.weight": "mlp.{}_proj.weight",
    "mlp.shared_experts.linear_fc1.weight": "mlp.shared_experts.{}_proj.weight",
}
_EXPERTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class Place(NamedTuple):
    """Where one of Megatron's tensors is among Hugging Face's."""

    names: list[str]
    join: Callable[[list[Tensor]], Tensor]  # Hugging Face's whole tensors into Megatron's
    split: Callable[[Tensor], list[Tensor]]
    halves: bool = False  # two tensors one above the other, each of which tensor parallelism cuts


def place(name: str, model: Model, layer: int, experts: range) -> Place:
    """Of a parameter of Megatron's that is called so in a layer (or outside of all), for these experts."""
    if name in _OUTSIDE:
        return _same(_OUTSIDE[name])
    before = f"model.layers.{layer}."
    if name in _GLU:
        names = [before + _GLU[name].format(part) for part in ("gate", "up")]
        return Place(names, torch.cat, lambda x: list(x.chunk(2)), halves=True)
    if found := re.fullmatch(r"mlp\.experts\.(w\d)", name):
        part = _EXPERTS[found[1]]
        return Place(
            [f"{before}mlp.experts.{e}.{part}.weight" for e in experts], torch.stack, lambda x: list(x.unbind())
        )
    if found := re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.linear_fc(\d)\.weight", name):
        inside = f"{before}mlp.experts.{experts[int(found[1])]}."
        if found[2] == "2":
            return _same(f"{inside}down_proj.weight")
        names = [f"{inside}gate_proj.weight", f"{inside}up_proj.weight"]
        return Place(names, torch.cat, lambda x: list(x.chunk(2)), halves=True)
    if name == "self_attention.linear_qkv.weight":
        return _qkv(model, before)
    if name == "self_attention.q_layernorm.weight":
        return _same(f"{before}self_attn.{'q_norm' if model.mla is None else 'q_a_layernorm'}.weight")
    if name not in _IN_A_LAYER:
        raise UsageError(f"{name}: Hugging Face's models have no such weight")
    return _same(before + _IN_A_LAYER[name])


def _same(name: str) -> Place:
    return Place([name], lambda tensors: tensors[0], lambda x: [x])


def _qkv(model: Model, before: str) -> Place:
    groups = model.num_key_value_heads or model.num_attention_heads
    queries = model.num_attention_heads // groups

    def join(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)

    def split(x: Tensor) -> list[Tensor]:
        grouped = x.unflatten(0, (groups, queries + 2, -1))
        return [part.flatten(0, 2) for part in grouped.split([queries, 1, 1], 1)]

    return Place([f"{before}self_attn.{part}_proj.weight" for part in "qkv"], join, split)


def _tensors(model: Any, plan: Plan) -> Iterator[tuple[str, Tensor, Place]]:
    """Every tensor of this process' part of the model, and where it is among Hugging Face's."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    first = get_transformer_layer_offset(plan.config)
    local = (plan.config.num_moe_experts or 0) // plan.config.expert_model_parallel_size
    begin = local * parallel_state.get_expert_model_parallel_rank()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        layer, inside = (first + int(found[1]), found[2]) if found else (-1, name)
        if isinstance(tensor, torch.nn.Parameter) or inside == "mlp.router.expert_bias":
            yield name, tensor, place(inside, plan.model, layer, range(begin, begin + local))


def is_huggingface(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


@torch.no_grad()
def load(model: Any, plan: Plan, folder: Path) -> None:
    """Fills this process' part of the model. Raises UsageError that names tensors that are missing, of another shape,
    or not in the model."""
    from megatron.core import parallel_state
    from safetensors import safe_open

    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    files: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        opened = safe_open(path, "pt")
        files |= dict.fromkeys(opened.keys(), opened)
    problems = []
    for name, own, where in _tensors(model, plan):
        if missing := [wanted for wanted in where.names if wanted not in files]:
            problems += [f"{wanted} is not in it" for wanted in missing]
            continue
        whole = where.join([files[wanted].get_tensor(wanted) for wanted in where.names])
        of_experts = ".mlp.experts." in name
        rank = parallel_state.get_expert_tensor_parallel_rank() if of_experts else tensor_rank
        part = _part(whole, own, rank, where.halves)
        if part is None:
            problems.append(f"{where.names[0]} makes {name} {list(whole.shape)}, here it is {list(own.shape)}")
        else:
            own.copy_(part)
    if not plan.config.moe_router_enable_expert_bias:
        for name in (name for name in files if name.endswith("e_score_correction_bias")):
            if files[name].get_tensor(name).any():
                problems.append(f"{name} is not zero: set [megatron] moe_router_enable_expert_bias = true")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UsageError(f"{folder} does not fit the model: {'; '.join(problems[:3])}{more}")


def _part(whole: Tensor, own: Tensor, rank: int, halves: bool) -> Tensor | None:
    """What tensor parallelism leaves to a process: the tensor is cut where its size differs."""
    if whole.shape == own.shape:
        return whole
    cut = [dim for dim, (a, b) in enumerate(zip(whole.shape, own.shape, strict=False)) if a != b]
    if whole.dim() != own.dim() or len(cut) != 1 or whole.shape[cut[0]] % own.shape[cut[0]]:
        return None
    pieces = whole.shape[cut[0]] // own.shape[cut[0]]
    if halves and cut[0] == 0:
        return torch.cat([half.chunk(pieces)[rank] for half in whole.chunk(2)])
    return whole.chunk(pieces, cut[0])[rank]


def export(model: Any, plan: Plan, tokenizer: Path) -> None:
    """Writes weights, config.json and the tokenizer's files into the run's folder `huggingface`; of one process' whole
    model, which `recipes.resolve` has made sure of."""
    import torch.distributed as dist
    from safetensors.torch import save_file

    if dist.get_rank() == 0:
        folder = plan.folder / "huggingface"
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for _, own, where in _tensors(model, plan):
            parts = where.split(own.detach().cpu())
            tensors |= {name: part.contiguous() for name, part in zip(where.names, parts, strict=True)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        dtype = str(plan.dtype).removeprefix("torch.")
        content = huggingface.config(plan.model, plan.seq_len, dtype, special_tokens(tokenizer))
        (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")
        for path in (*tokenizer.glob("*token*.json"), *tokenizer.glob("*.model"), *tokenizer.glob("merges.txt")):
            shutil.copy(path, folder)
    dist.barrier()


def special_tokens(tokenizer: Path) -> dict[str, int]:
    """`bos_token_id` and `eos_token_id`, as far as a tokenizer has them."""
    from flashmoe_train.integrations.megatron.token_files import around

    return {f"{name}_id": number for name, number in around(tokenizer).items() if number is not None}
