"""Tokens on disk: what a window is, what is written again, Megatron's own files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmoe_train import data
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.megatron import token_files

from . import jobs


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return data.write_byte_tokenizer(tmp_path / "tokenizer")


def write(folder: Path, *texts: Any, column: str = "text") -> str:
    (folder / "text.jsonl").write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(folder / "text.jsonl")


def test_rows_are_between_the_tokenizers_tokens(tmp_path: Path, tokenizer: Path) -> None:
    source, path = write(tmp_path, "ab", "c"), tmp_path / "tokens/train.bin"
    token_files.prepare(source, "text", tokenizer, path, 100)
    opened = token_files.open_prepared(path, 2)
    a, b, c = opened.tokens[[1, 2, 5]].tolist()
    assert opened.tokens.tolist() == [256, a, b, 257, 256, c, 257] and b == a + 1 == c - 1
    # Two windows of three tokens; after the last one comes the first.
    wanted = torch.tensor([[256, a, b], [257, 256, c], [256, a, b]])
    assert torch.equal(opened.sequences(torch.tensor([0, 1, 2])), wanted)
    opened.check_vocabulary(258)
    with pytest.raises(UsageError, match="token 257 is in the data, and the model's vocab_size is 257"):
        opened.check_vocabulary(257)
    with pytest.raises(UsageError, match="has 7 tokens, a sequence needs 9"):
        token_files.open_prepared(path, 8)


def test_files_that_have_changed_are_read_again(tmp_path: Path, tokenizer: Path) -> None:
    source, path = write(tmp_path, "aaaa"), tmp_path / "train.bin"
    for given in (source, str(tmp_path / "*.jsonl"), {"path": "json", "data_files": {"train": [source]}}):
        write(tmp_path, "aaaa")
        token_files.prepare(given, "text", tokenizer, path, 100)
        before = token_files.open_prepared(path, 1).tokens.tolist()
        write(tmp_path, "bbbb", "b")
        token_files.prepare(given, "text", tokenizer, path, 100)
        after = token_files.open_prepared(path, 1).tokens.tolist()
        assert len(after) == len(before) + 3 and after[1] == before[1] + 1


def test_more_tokens_begin_with_the_same_ones(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "_ROWS", 1)
    source, path = write(tmp_path, *(chr(97 + i) * 5 for i in range(10))), tmp_path / "train.bin"
    token_files.prepare(source, "text", tokenizer, path, 20)
    few = token_files.open_prepared(path, 1).tokens.tolist()
    assert len(few) == 21
    written = path.stat().st_mtime_ns
    token_files.prepare(source, "text", tokenizer, path, 15)
    assert path.stat().st_mtime_ns == written  # nothing to do
    token_files.prepare(source, "text", tokenizer, path, 1000)
    everything = token_files.open_prepared(path, 1).tokens.tolist()
    assert len(everything) == 70 and everything[:21] == few
    written = path.stat().st_mtime_ns
    token_files.prepare(source, "text", tokenizer, path, 2000)
    assert path.stat().st_mtime_ns == written  # there is no more
    token_files.prepare(write(tmp_path, "other"), "text", tokenizer, tmp_path / "other.bin", 5)
    with pytest.raises(UsageError, match=r"no column 'texts'; \[data\] text_column may be: \['text'\]"):
        token_files.prepare(source, "texts", tokenizer, path, 20)


@pytest.mark.parametrize("rows, found", [((None,), "null"), ((1,), "int"), ((["a"],), "list"), (("a", 1), "int")])
def test_text_that_is_none_is_named(rows: tuple[Any, ...], found: str, tmp_path: Path, tokenizer: Path) -> None:
    source = write(tmp_path, *rows)
    with pytest.raises(UsageError, match=rf"text.jsonl: \[data\] text_column 'text' must hold strings, found {found}"):
        token_files.prepare(source, "text", tokenizer, tmp_path / "train.bin", 100)


def test_the_shipped_corpus(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "train.bin"
    token_files.prepare("torch_sources", "text", tokenizer, path, 1000)
    assert len(token_files.open_prepared(path, 9).tokens) >= 1000


def test_files_of_megatrons_preprocessing(tmp_path: Path) -> None:
    path = jobs.write_tokens(tmp_path)
    assert token_files.is_indexed(str(path)) and not token_files.is_indexed(str(path.with_suffix(".idx")))
    assert not token_files.is_indexed({"path": "x"}) and not token_files.is_indexed("nothing.bin")
    opened, other = (token_files.open_indexed(str(path), 32, seed) for seed in (0, 1))
    assert len(opened.tokens) == 20_000 and opened.sequences(torch.tensor([0])).shape == (1, 33)
    assert not torch.equal(opened.order, other.order)
    assert torch.equal(opened.order.sort().values, torch.arange(20_000 // 33))
