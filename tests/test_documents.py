"""The tables in README.md and docs/ say what the stored results say."""

import re
from pathlib import Path

import pytest
import torch

from flashmoe_train.bench.results import FLOORS, OURS, Row, here
from flashmoe_train.documents import ROOT, documents

SHOWN = list(documents())


@pytest.mark.parametrize("path, wanted", SHOWN, ids=[path.name for path, _ in SHOWN])
def test_tables_are_up_to_date(path: Path, wanted: str) -> None:
    assert path.read_text() == wanted, "run python -m flashmoe_train.documents"


def test_every_result_is_shown() -> None:
    text = "".join(path.read_text() for path, _ in SHOWN)
    stored = {
        str(path.relative_to(ROOT / "docs/results").with_suffix("")) for path in ROOT.rglob("docs/results/**/*.json")
    }
    assert stored == set(re.findall(r"<!-- results: (\S+) ", text))


def test_table_of_the_cases_that_match(tmp_path: Path) -> None:
    results = here("moe_parts", "flashmoe bench moe_parts", torch.device("cpu"))
    for label, ours in (("moe_combine a", 0.002), ("moe_combine b", 0.004), ("route_plan a", 1.0)):
        ms = {OURS: ours, "gather": 0.008, FLOORS[1]: 0.001}
        results.rows.append(Row(case={"op": label}, label=label, ms=ms, gb_per_s=dict.fromkeys(ms, 100.0)))
    results.write(tmp_path / "docs/results/gpu/moe_parts.json")
    marked = "<!-- results: gpu/moe_parts moe_combine * -->\n{}<!-- end of table -->\nafter\n"
    (tmp_path / "README.md").write_text(marked.format("old numbers\n"))
    (tmp_path / "docs/page.md").write_text("no table\n")
    ((path, text),) = documents(tmp_path)
    assert path == tmp_path / "README.md"
    lines = text.splitlines()
    assert lines[1] == "| case | flashmoe | gather | copy | × best baseline | copy/ours |"
    assert lines[3] == "| moe_combine a | 2 (100) | 8 (100) | 1 (100) | 4.00 gather | 0.50 |"
    assert len(lines) == 9 and "old numbers" not in text and lines[-1] == "after"
