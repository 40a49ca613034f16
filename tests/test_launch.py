"""How processes are started, and started again; what is said of a run that failed."""

import os
import signal

import pytest
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from flashmoe_train.launch import reason, share_gpus, torchrun


@pytest.mark.parametrize(
    "output, errors, wanted",
    [
        ("llama3 on 1 × cuda\n", "Traceback\n  File\nValueError: seq_len is 3\n", "ValueError: seq_len is 3"),
        ("step 1\n", "[rank1]: torch._dynamo.exc.Unsupported: no trace\n[rank1]:   Hint: none\n", "no trace"),
        ("", "error: 8 cannot be shared by 3\n", "error: 8 cannot be shared by 3"),
        ("a table\n\nthe end\n", "Killed\n", "Killed"),
        ("the end\n", "", "the end"),
        ("\n", "", ""),
    ],
)
def test_last_line_that_names_an_error(output: str, errors: str, wanted: str) -> None:
    found = reason(output, errors)
    assert found.endswith(wanted) and (bool(found) == bool(wanted)) and "\n" not in found


@pytest.mark.parametrize(
    "codes, restarts, starts, ends_with",
    [
        ([0], 3, 1, None),
        ([-signal.SIGKILL, 1, 0], 3, 3, None),
        ([1, 1, 1], 1, 2, 1),
        ([1], 0, 1, 1),
        ([-signal.SIGKILL], 0, 1, "error: process 1 was ended by SIGKILL"),
        ([2, 0], 3, 1, 2),  # a usage error would come again
        ([-signal.SIGKILL, 2, 0], 3, 2, 2),
    ],
)
def test_starts_again_unless_the_user_was_wrong(
    codes: list[int],
    restarts: int,
    starts: int,
    ends_with: int | str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`codes`: what the process that fails first returns in each start; 0: none fails."""
    started: list[list[str]] = []

    def main(arguments: list[str]) -> None:
        started.append(arguments)
        if code := codes[len(started) - 1]:
            failure = ProcessFailure(local_rank=1, pid=1, exitcode=code, error_file="<N/A>")
            raise ChildFailedError("train", {1: failure})

    monkeypatch.setattr(torch.distributed.run, "main", main)
    if ends_with is None:
        torchrun(["a.toml"], 2, restarts)
    else:
        with pytest.raises(SystemExit) as ended:
            torchrun(["a.toml"], 2, restarts)
        assert ended.value.code == ends_with
    assert len(started) == starts and started[0][-1] == "a.toml"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == starts - 1
    if codes[0] == -signal.SIGKILL and starts > 1:
        assert said[0] == f"process 1 was ended by SIGKILL: all processes start again, restart 1 of {restarts}"


def test_a_signal_ends_all_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: list[str]) -> None:
        raise SignalException("Process 1 got signal: 15", signal.SIGTERM)

    monkeypatch.setattr(torch.distributed.run, "main", main)
    with pytest.raises(SystemExit) as ended:
        torchrun(["a.toml"], 2, restarts=3)
    assert ended.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "ended by SIGTERM\n"


@pytest.mark.parametrize("gpus, processes", [(1, 2), (2, 4), (2, 2), (8, 2), (0, 2)])
def test_processes_share_gpus_where_these_are_fewer(
    gpus: int, processes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    places = []
    for rank in range(processes):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {"LOCAL_RANK": str(rank)})
            share_gpus(rank, processes)
            places.append((int(os.environ["LOCAL_RANK"]), os.environ.get("NCCL_HOSTID")))
    said = capsys.readouterr().out
    if 0 < gpus < processes:
        assert [gpu for gpu, _ in places] == [rank % gpus for rank in range(processes)]
        assert len({host for _, host in places}) == processes
        assert said.count("\n") == 1 and f"{processes} processes share {gpus} GPU" in said
    else:
        assert places == [(rank, None) for rank in range(processes)] and not said
