"""Writes tables into Markdown, so that none is typed: `python -m flashmoe_train.documents`.

In README.md and docs/ one of these marks begins what `<!-- end of table -->` ends:

    <!-- results: h200/moe_parts moe_combine * -->      a file of docs/results, then a pattern of case labels
    <!-- support -->                                    what runs each operator where
    <!-- transformers -->                               what a swap does to each family of Transformers
    <!-- schemas -->                                    the operators' signatures

and draws the loss curves of docs/results beside them.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from flashmoe_train import ops, support
from flashmoe_train.bench import by_name, hopper, report, utilisation
from flashmoe_train.bench.results import OURS, Results, read
from flashmoe_train.bench.variants.run import Measured, matrix, rate_unit
from flashmoe_train.compare import draw

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(
    r"(<!-- (?:results: (\S+) (.+?)|support|schemas|transformers) -->\n).*?(<!-- end of table -->)", re.S
)


def documents(root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """Every document that shows such a table, with what it should say."""
    for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        text = path.read_text()
        if _BLOCK.search(text):
            yield path, _BLOCK.sub(lambda found: found[1] + _content(root, found) + found[4], text)


def _content(root: Path, found: re.Match[str]) -> str:
    if found[2] is not None:
        return _results(root, found[2], found[3])
    if "schemas" in found[1]:
        return "".join(f"- `{schema}`\n" for schema in _schemas())
    heading, *lines = _transformers() if "transformers" in found[1] else support.table()
    return _lines([heading, ["---"] * len(heading), *lines])


def _schemas() -> list[str]:
    ops.load_all()
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("flashmoe::"))
    return sorted(str(getattr(torch.ops.flashmoe, name.split("::")[1]).default._schema) for name in names)


def _transformers() -> Iterator[tuple[str, ...]]:
    from flashmoe_train.integrations.transformers.small import table  # which imports Transformers

    return table()


def _lines(table: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def _results(root: Path, name: str, pattern: str) -> str:
    """The cases whose labels match, then where and how they were measured. Implementations that ran in none are left
    out."""
    path = root / "docs/results" / f"{name}.json"
    results = read(path)
    rows = [row for row in results.rows if fnmatchcase(row.label, pattern)]
    if results.bench.startswith("variants_"):
        measured = Measured.model_validate_json(path.read_bytes())
        heading, *lines = matrix(measured, rows)
        unit = f"{rate_unit(measured)} (× the library)"
    elif results.bench == hopper.NAME:
        heading, *lines = hopper.grid(rows)
        unit = hopper.unit(rows)
    elif results.bench.startswith(utilisation.PREFIX):
        heading, *lines = utilisation.grid(rows)
        lines = [[case, f"`{kernel}`", *numbers] for case, kernel, *numbers in lines]  # or <T> would be taken for HTML
        unit = utilisation.UNIT
    else:
        bench = by_name()[results.bench]
        if found := [table for row in rows for table in bench.tables(row)]:
            text = "\n".join(f"{title}\n\n{_lines([*_ruled(table)])}" for title, table in found)
            return f"{text}\n{_note(results)}\n"
        heading, *lines = report.grid(bench, rows)
        unit = report.unit(bench)
    shown = [i for i in range(len(heading)) if heading[i] == OURS or any(line[i] != report.NOTHING for line in lines)]
    table = [[line[i] for i in shown] for line in _ruled([heading, *lines])]
    return f"{_lines(table)}\n{unit}; {_note(results)}\n"


def _ruled(table: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
    """With the line that Markdown has below headings: numbers are flush right."""
    heading, *lines = table
    yield from (heading, ["---"] + ["--:"] * (len(heading) - 1), *lines)


def _note(results: Results) -> str:
    """Where and how they were measured."""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items() if name != "flashmoe_train")
    return f"{results.gpu}, {versions}; commit {results.commit}: `{results.command}`"


def curves(root: Path = ROOT) -> Iterator[tuple[Path, dict[str, list[float]]]]:
    """Of every recipe that was trained long enough to compare losses: where they are drawn, and the losses."""
    for path in sorted((root / "docs/results").rglob("train_*.json")):
        for row in read(path).rows:
            extra = row.model_extra or {}
            if "from_stock" in extra:
                yield path.with_name(f"{path.stem}_{Path(row.case['recipe']).stem}.png"), extra["loss"]


if __name__ == "__main__":
    for path, text in documents():
        path.write_text(text)
        print(path.relative_to(ROOT))
    for path, losses in curves():
        print(draw(losses, path).relative_to(ROOT))
