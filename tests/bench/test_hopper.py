"""How the facts about Hopper are read, kept and shown."""

from pathlib import Path

import pytest
import torch

from flashmoe_train.bench import hopper
from flashmoe_train.bench.results import here, read
from flashmoe_train.errors import UsageError


def test_facts_are_read_kept_and_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(command: list[str]) -> str:
        if command[0] == "compute-sanitizer":
            return f"way {command[-1]}: no error\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n"
        return "adds\t8 MB\tred.v4\t3790\nadds\t8 MB\tstore.v4\t4790.1\nexp2\tall\terror\t8.24e-05\n"

    monkeypatch.setattr(hopper, "_run", run)
    monkeypatch.setattr(hopper, "_program", lambda name: name)
    monkeypatch.setattr(hopper, "here", lambda *_: here(hopper.NAME, "a command", torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    hopper.measure().write(tmp_path / "facts.json")
    rows = read(tmp_path / "facts.json").rows
    assert hopper.grid(rows[:1]) == [["case", "red.v4", "store.v4"], ["8 MB", "3790", "4790"]]
    assert hopper.unit(rows[:1]) == "GB/s of float32 terms"
    assert hopper.grid(rows[1:2])[1] == ["all", "8.24e-05"]
    assert len(hopper.grid(rows[2:])) == 1 + 7


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="sees no GPU"):
        hopper.measure()
    monkeypatch.setattr(hopper, "_PROGRAMS", tmp_path)
    with pytest.raises(UsageError, match="flashmoe_hopper_throughput is not built: make facts"):
        hopper._program("throughput")
    with pytest.raises(UsageError, match="no-such-tool is not installed"):
        hopper._run(["no-such-tool"])
    with pytest.raises(UsageError, match="ls /nowhere ended with 2"):
        hopper._run(["ls", "/nowhere"])
