"""Replaces modules of a model that exists already, and says what it did.

A swap keeps the module object and changes its class to a subclass that computes the same function with our operators:
parameters, their names, shapes, initialisation and hooks are untouched, so checkpoints are the same with and without.

    report = flashmoe_train.swap(model)     # every class that is registered
    print(report)
    report.revert()

A framework may do it in its own way (`swap.framework`): change the name by which modules look their implementation up,
or put others in their place.
"""

import importlib
import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar, get_args

from rich.console import Console
from rich.table import Table
from torch import nn

from flashmoe_train.errors import UsageError

Choice = Literal["flashmoe", "stock"]
Part = Literal["attention", "experts"]


@dataclass(frozen=True)
class Swap:
    """One class of somebody's model and what takes its place."""

    target: type[nn.Module]  # this class exactly: a subclass may compute something else
    replacement: type[nn.Module] | None  # a subclass of target; None where we have none
    why_not: Callable[[nn.Module], str | None] = lambda module: None  # a reason to leave this one alone
    part: Part | None = None  # what `swap(model, attention="stock")` leaves alone

    def __post_init__(self) -> None:
        if self.replacement is not None and not issubclass(self.replacement, self.target):
            raise TypeError(f"{self.replacement.__name__} must be a subclass of {self.target.__name__}")


class Row(NamedTuple):
    """What became of one module that a swap matched."""

    name: str
    found: str  # class names
    became: str | None  # None: left alone
    reason: str


@dataclass
class Report:
    """What a swap did; printed as a table."""

    rows: list[Row] = field(default_factory=list)
    planned: bool = False  # of a dry run: nothing was done
    _swapped: list[tuple[nn.Module, Swap]] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)  # of what else a framework changed

    def summary(self) -> list[tuple[str, str, str, int]]:
        """(modules, from, to or why not, how many), modules that differ only in their numbers in one row."""
        counts = Counter(
            (re.sub(r"\b\d+\b", "*", row.name) or "the model", row.found, row.became or f"left alone: {row.reason}")
            for row in self.rows
        )
        return [(*key, n) for key, n in counts.items()]

    def table(self) -> Table:
        table = Table(title="What would be swapped" if self.planned else "What was swapped", title_justify="left")
        for heading in ("module", "from", "to", "how many"):
            table.add_column(heading, overflow="fold")
        for modules, found, became, count in self.summary():
            table.add_row(modules, found, became, str(count))
        if not self.rows:
            table.add_row("nothing", "", "", "0")
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self.table())
        return text.getvalue()

    def __iadd__(self, other: "Report") -> "Report":
        self.rows += other.rows
        self._swapped += other._swapped
        self.undo += other.undo
        return self

    def nothing(self) -> bool:
        """Whether no module was swapped, or would be."""
        return all(row.became is None for row in self.rows)

    def revert(self) -> None:
        """Gives every module its own class back; nothing is swapped then.

        Raises UsageError if something has wrapped a module since, as FSDP does: its class is no longer ours to change.
        """
        for module, swap in self._swapped:
            if type(module) is not swap.replacement:
                raise UsageError(f"cannot revert: a {swap.target.__name__} has become {type(module).__name__} since")
        while self._swapped:
            module, swap = self._swapped.pop()
            module.__class__ = swap.target
        while self.undo:
            self.undo.pop()()
        self.rows.clear()


def swap_modules(model: nn.Module, swaps: Sequence[Swap], *, optional: bool = False, dry_run: bool = False) -> Report:
    """Applies `swaps` to every module of `model`, in place; a `dry_run` only reports what it would do.

    Raises UsageError if not a single module could be swapped: who asks for a swap must not train without it. A model
    that has no such modules at all, nor modules of classes derived from them, is accepted if the swap is `optional`.
    """
    report = _apply(model, swaps, dry_run)
    if report.nothing() and (report.rows or not optional):
        raise _nothing_swapped(model, report, swaps)
    return report


def _apply(model: nn.Module, swaps: Sequence[Swap], dry_run: bool) -> Report:
    by_target = {swap.target: swap for swap in swaps}
    report = Report(planned=dry_run)
    for name, module in model.named_modules():
        swap = by_target.get(type(module))
        if swap is None:
            if isinstance(module, tuple(by_target)):
                done = any(type(module) is swap.replacement for swap in swaps)
                why = "swapped already" if done else "a class derived from what is swapped"
                report.rows.append(Row(name, type(module).__name__, None, why))
            continue
        reason = swap.why_not(module)
        if reason is None and swap.replacement is not None:
            if not dry_run:
                report._swapped.append((module, swap))
                module.__class__ = swap.replacement
            report.rows.append(Row(name, swap.target.__name__, swap.replacement.__name__, ""))
        else:
            report.rows.append(Row(name, swap.target.__name__, None, reason or "no replacement"))
    return report


def _nothing_swapped(model: nn.Module, report: Report, swaps: Sequence[Swap]) -> UsageError:
    looked_for = ", ".join(sorted(swap.target.__name__ for swap in swaps))
    left = "; ".join(sorted({f"{row.found}: {row.reason}" for row in report.rows}))
    return UsageError(f"nothing was swapped in {type(model).__name__}: {left or f'it has no {looked_for}'}")


Replacement = TypeVar("Replacement", bound=type[nn.Module])


class _Registered:
    """`flashmoe_train.swap`: applies the swaps that are registered."""

    def __init__(self) -> None:
        self._swaps: dict[type[nn.Module], Swap] = {}
        self._frameworks: dict[str, str] = {}

    def __call__(
        self, model: nn.Module, *, attention: Choice = "flashmoe", experts: Choice = "flashmoe", dry_run: bool = False
    ) -> Report:
        """Swaps, in place, every module of `model` that has a registered replacement: classes that were registered,
        PyTorch's own, and the attention and experts of Transformers' and Megatron-core's models.

        Call it before FSDP, `torch.compile` or anything else that wraps modules. `attention="stock"` leaves attention
        alone, `experts="stock"` experts. A `dry_run` changes nothing. Returns what was swapped to what, and what was
        left alone and why; `print` shows it, `revert()` undoes it.
        Raises UsageError if nothing could be swapped (not of a dry run, whose report says so), or for a wrong choice.
        """
        self._load_own()
        if not isinstance(model, nn.Module):
            raise UsageError(f"model must be a torch.nn.Module, found {model!r:.60}")
        wanted = {"attention": attention, "experts": experts}
        for part, choice in wanted.items():
            if choice not in get_args(Choice):
                raise UsageError(f"{part} must be one of {', '.join(map(repr, get_args(Choice)))}, found {choice!r}")
        parts = {part for part in get_args(Part) if wanted[part] == "flashmoe"}
        if not parts:
            raise UsageError('attention and experts are both "stock": there is nothing to swap')
        swaps = [swap for swap in self._swaps.values() if swap.part is None or swap.part in parts]
        report = _apply(model, swaps, dry_run)
        packages = {base.__module__.partition(".")[0] for module in model.modules() for base in type(module).__mro__}
        for package, module in self._frameworks.items():
            if package in packages:
                report += importlib.import_module(module).swap_model(model, parts, dry_run)
        if report.nothing() and not dry_run:
            raise _nothing_swapped(model, report, swaps)
        return report

    def register(
        self,
        target: type[nn.Module],
        why_not: Callable[[nn.Module], str | None] = lambda module: None,
        part: Part | None = None,
    ) -> Callable[[Replacement], Replacement]:
        """Decorates a subclass of `target` that takes its place; `why_not` gives a reason to leave a module alone,
        `part` says whether it is attention or experts, for callers of `swap` that want but one of them.

        Raises TypeError if the class is no subclass: then names and shapes of its parameters could differ; ValueError
        if there is no such part.
        """
        self._load_own()
        if part is not None and part not in get_args(Part):
            raise ValueError(f"part must be one of {', '.join(map(repr, get_args(Part)))} or None, found {part!r}")

        def decorate(replacement: Replacement) -> Replacement:
            self._swaps[target] = Swap(target, replacement, why_not, part)
            return replacement

        return decorate

    def framework(self, package: str, module: str) -> None:
        """Has `swap_model(model, parts, dry_run) -> Report` of `module`, which is imported then, swap models that have
        modules of classes from `package`."""
        self._frameworks[package] = module

    def _load_own(self) -> None:
        """Registers the swaps of PyTorch's own classes, before any that may be meant to replace them."""
        importlib.import_module("flashmoe_train.integrations.pytorch")


swap = _Registered()
