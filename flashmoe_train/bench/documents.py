"""Writes stored results into Markdown, so that no number is typed: `python -m flashmoe_train.bench.documents`.

In README.md and docs/ whatever stands between `<!-- results: h200/moe_parts moe_combine * -->` (a file of docs/results,
then a pattern of case labels) and `<!-- end of results -->` is replaced by the table of those cases.
"""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from flashmoe_train.bench import by_name, report
from flashmoe_train.bench.results import OURS, read

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"(<!-- results: (\S+) (.+?) -->\n).*?(<!-- end of results -->)", re.S)


def documents(root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """Every document that shows results, with what it should say."""
    for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        text = path.read_text()
        if _BLOCK.search(text):
            yield path, _BLOCK.sub(lambda found: found[1] + _table(root, found[2], found[3]) + found[4], text)


def _table(root: Path, name: str, pattern: str) -> str:
    """The cases whose labels match, then where and how they were measured. Implementations that ran in none are left
    out."""
    results = read(root / "docs/results" / f"{name}.json")
    bench = by_name()[results.bench]
    rows = [row for row in results.rows if fnmatchcase(row.label, pattern)]
    heading, *lines = report.grid(bench, rows)
    shown = [i for i in range(len(heading)) if heading[i] == OURS or any(line[i] != report.NOTHING for line in lines)]
    table = [[line[i] for i in shown] for line in (heading, ["---"] + ["--:"] * (len(heading) - 1), *lines)]
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items() if name != "flashmoe_train")
    note = f"{report.unit(bench)}; {results.gpu}, {versions}; commit {results.commit}: `{results.command}`"
    return "".join(f"| {' | '.join(line)} |\n" for line in table) + f"\n{note}\n"


if __name__ == "__main__":
    for path, text in documents():
        path.write_text(text)
        print(path.relative_to(ROOT))
