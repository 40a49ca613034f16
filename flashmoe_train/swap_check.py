"""`flashmoe swap-check`: what `flashmoe_train.swap` makes of a model, and whether it computes the same.

A model is a Transformers family by name (`qwen3_moe`: a small one with every mechanism of the family), or a Python
file that defines `model()`, which builds one, and, unless it is a Transformers model, `inputs()`: the positional
arguments of its forward in a tuple, or the named ones in a dictionary.
"""

import contextlib
import copy
import math
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import flashmoe_train
from flashmoe_train.errors import UsageError, nearest

# What stock and swapped may differ by, relatively in the Frobenius norm, where both compute in float32.
TOLERANCE = 1e-4
# In bfloat16 both differ from float32, by rounding and by tokens whose experts are nearly tied: ours may by so many
# times as much as stock.
ROUNDING = 3.0


class Subject(NamedTuple):
    model: nn.Module
    args: tuple
    kwargs: dict[str, Any]


def check(name: str, console: Console, device: torch.device | None = None) -> bool:
    """Prints what is swapped in the model `name`, and how outputs and gradients compare on random input; whether they
    are the same. On a GPU, in bfloat16, "the same" is as near to float32 as stock's own are.

    Raises UsageError for a name or a file that is none, and if nothing could be swapped.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    subject = _of_file(Path(name)) if name.endswith(".py") else _of_family(name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    exact = outcome(subject, device, torch.float32)
    stock = exact if dtype == torch.float32 else outcome(subject, device, dtype)
    report = flashmoe_train.swap(subject.model)
    console.print(report.table())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = outcome(subject, device, dtype)
    for reason in dict.fromkeys(str(w.message) for w in said if "is computed by" in str(w.message)):
        console.print(f"note: {reason}", highlight=False, markup=False)
    return _compare(console, exact, stock, ours, device, dtype)


def _compare(
    console: Console,
    exact: dict[str, Tensor],
    stock: dict[str, Tensor],
    ours: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    if exact.keys() != ours.keys():
        console.print(f"not the same: gradients of {', '.join(sorted(exact.keys() ^ ours.keys()))} in one of them only")
        return False
    outputs = [name for name in exact if name.startswith("output ")]
    kinds = {"outputs": outputs, "gradients": [name for name in exact if name not in outputs]}
    where = f"{device.type}, {str(dtype).removeprefix('torch.')}"
    fine = True
    for kind, names in kinds.items():
        found = {name: _deviation(ours[name], exact[name]) for name in names}
        allowed = {
            name: TOLERANCE if stock is exact else ROUNDING * _deviation(stock[name], exact[name]) + TOLERANCE
            for name in names
        }
        worst = max(names, key=lambda name: found[name] / allowed[name])
        wrong = [name for name in names if not found[name] <= allowed[name]]
        fine = fine and not wrong
        console.print(
            f"{kind:<10} {'differ' if wrong else 'equal'}: {len(names)} compared ({where}), "
            f"at most {found[worst]:.1e} off of {allowed[worst]:.1e} allowed ({worst})",
            highlight=False,
            markup=False,
        )
    return fine


def _deviation(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Frobenius norm; infinite where either is no number."""
    if not (found.isfinite().all() and wanted.isfinite().all()):
        return math.inf
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)).item()


def outcome(subject: Subject, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs of the subject, and gradients of its parameters from a fixed random weighting of them, computed in
    `dtype`."""
    model = copy.deepcopy(subject.model).to(device, dtype)

    def placed(x: Any) -> Any:
        return x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x

    args, kwargs = pytree.tree_map(placed, (subject.args, subject.kwargs))
    with _precise():
        out = model(*args, **kwargs)
        tensors = [x for x in pytree.tree_leaves(dict(out) if hasattr(out, "keys") else out) if isinstance(x, Tensor)]
        floating = [_kept(x, kwargs) for x in tensors if x.is_floating_point()]
        differentiable = [x for x in floating if x.requires_grad]
        if not differentiable:
            raise UsageError(f"{type(subject.model).__name__} gives nothing that has gradients")
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator).to(x) for x in differentiable]
        torch.autograd.backward(differentiable, weights)
    found = {f"output {i}": x.detach() for i, x in enumerate(floating)}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _kept(x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """What of an output `[batch, sequence, ...]` is no padding: of padding nobody promises anything."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and x.shape[:2] == mask.shape:
        return x[mask.bool()]
    return x


@contextlib.contextmanager
def _precise() -> Iterator[None]:
    """float32 products are float32, on GPUs too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _of_family(name: str) -> Subject:
    try:
        from flashmoe_train.integrations.transformers import families, small
    except ImportError as error:
        raise UsageError(f"{name!r} is no .py file, and Transformers cannot be imported: {error}") from None
    wanted, names = name.replace("-", "_"), [family.model_type for family in families.FAMILIES]
    if wanted not in names:
        raise UsageError(f"no family is called {name!r}, and it is no .py file; {nearest(wanted, names, 'there are ')}")
    model = small.build(wanted)
    return Subject(model, (), _tokens(model))


def _tokens(model: Any) -> dict[str, Any]:
    """Random tokens for a Transformers model, with padding in front of the first sequence."""
    ids = torch.randint(3, model.config.vocab_size, (2, 32))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def _of_file(path: Path) -> Subject:
    if not path.is_file():
        raise UsageError(f"{path} is no file")
    defined = runpy.run_path(str(path))
    if not callable(defined.get("model")):
        raise UsageError(f"{path} must define model(), which builds the model to swap")
    model = defined["model"]()
    if not isinstance(model, nn.Module):
        raise UsageError(f"model() of {path} must return a torch.nn.Module, found {type(model).__name__}")
    if "inputs" not in defined and hasattr(getattr(model, "config", None), "vocab_size"):
        return Subject(model, (), _tokens(model))
    if not callable(defined.get("inputs")):
        raise UsageError(f"{path} must define inputs(), which returns what {type(model).__name__}'s forward takes")
    given = defined["inputs"]()
    if isinstance(given, dict):
        return Subject(model, (), given)
    if isinstance(given, tuple):
        return Subject(model, given, {})
    raise UsageError(f"inputs() of {path} must return a tuple or a dictionary, found {type(given).__name__}")
