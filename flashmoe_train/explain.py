"""What `flashmoe explain` prints: what a recipe comes to, before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashmoe_train.swap import Report


class Setting(NamedTuple):
    key: str  # in the framework's own configuration
    value: Any
    said_by: str


@dataclass(frozen=True)
class Explanation:
    """What a framework's `explain` found."""

    model: str  # with its number of parameters
    processes: str  # what they share
    step: str  # sequences, tokens
    settings: Sequence[Setting]
    swaps: Report
    operators: Sequence[tuple[str, str]]  # operator, what runs it on this machine

    def print(self, console: Console) -> None:
        facts = Table.grid(padding=(0, 2))
        for name, fact in (("model", self.model), ("processes", self.processes), ("step", self.step)):
            facts.add_row(name, escape(fact))
        for operator, runs in self.operators:
            facts.add_row(operator, escape(runs))
        console.print(facts, highlight=False)
        table = Table(title="What the framework is told", title_justify="left")
        for heading in ("key", "value", "said by"):
            table.add_column(heading, overflow="fold")
        for key, value, said_by in self.settings:
            table.add_row(key, escape(str(value)), escape(said_by))
        console.print(table)
        console.print(replace(self.swaps, planned=True).table())
