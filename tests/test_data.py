"""The quickstart's corpus and tokenizer, and what is said of data and tokenizers that are broken."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flashmoe_train import data
from flashmoe_train.errors import UsageError


def test_corpus_is_split_by_file() -> None:
    training, held_out = set(data.source_files()), set(data.source_files(held_out=True))
    assert not training & held_out
    assert len(training) > 15 * len(held_out) > 0
    assert data.source_files() == data.source_files.__wrapped__()  # the same order every time


def test_corpus_is_all_of_the_text_in_pieces() -> None:
    pieces = data.corpus(held_out=True)["text"]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in data.source_files(held_out=True)]
    assert sum(map(len, pieces)) == sum(map(len, texts))
    assert all(any(piece in text for text in texts) for piece in pieces[:20])
    assert sorted(map(len, pieces))[len(pieces) // 2] < 1200


def test_unigram_entropy() -> None:
    counts: Counter[int] = Counter()
    for path in data.source_files():
        counts.update(path.read_bytes())
    total = sum(counts.values())
    wanted = -sum(n / total * math.log(n / total) for n in counts.values())
    assert math.isclose(data.unigram_entropy(), wanted, rel_tol=1e-9)


def test_entropy_of_bytes_is_for_losses_of_bytes(tmp_path: Path) -> None:
    own = data.write_byte_tokenizer(tmp_path / "bytes")
    assert data.entropy_for_scale("torch_sources", own) == data.unigram_entropy()
    assert data.entropy_for_scale("text.jsonl", own) is None
    assert data.entropy_for_scale("torch_sources", tmp_path / "nowhere") is None
    merging = json.loads((own / "tokenizer.json").read_text())
    merging["model"]["vocab"]["ee"] = 258
    merging["model"]["merges"] = [["e", "e"]]
    (tmp_path / "merging").mkdir()
    (tmp_path / "merging/tokenizer.json").write_text(json.dumps(merging))
    assert data.entropy_for_scale("torch_sources", tmp_path / "merging") is None


def test_byte_tokenizer(tmp_path: Path) -> None:
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(str(data.write_byte_tokenizer(tmp_path / "tokenizer")))
    text = "def f(x):\n\treturn 'größer — \U0001f600'\r\n\x00"
    ids = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert len(ids) == len(text.encode()) + 2
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id) == (256, 257)
    assert tokenizer.decode(ids[1:-1]) == text
    assert tokenizer.get_vocab_size() == data.BYTE_VOCABULARY
    assert [path.name for path in sorted((tmp_path / "tokenizer").iterdir())] == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


WORD = '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'


@pytest.mark.parametrize(
    "files, text",
    [
        ({}, "a folder without tokenizer.json"),
        ({"vocab.txt": "a"}, "a folder without tokenizer.json"),
        ({"tokenizer.json": "{broken"}, r"tokenizer.json is not a tokenizer: key must be a string at line 1 column 2"),
        ({"tokenizer.json": "{}"}, r"tokenizer.json is not a tokenizer: Model missing"),
        ({"tokenizer.json": ""}, r"tokenizer.json is not a tokenizer: EOF"),
        ({"tokenizer.json": WORD.replace('"a": 0', "")}, r"tokenizer.json has a vocabulary of 0 tokens"),
        ({"tokenizer.json": WORD, "tokenizer_config.json": "{"}, r"tokenizer_config.json is not JSON: Expecting"),
        ({"tokenizer.json": WORD, "tokenizer_config.json": "[]"}, r"_config.json must hold an object, found list"),
    ],
)
def test_broken_tokenizers_are_named(files: dict[str, str], text: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=rf"\[data\] tokenizer = '{tmp_path}': .*{text}"):
        data.check_tokenizer("[data] tokenizer", str(tmp_path))


def test_whole_tokenizers_pass(tmp_path: Path) -> None:
    data.check_tokenizer("key", "bytes")
    data.check_tokenizer("key", str(data.write_byte_tokenizer(tmp_path)))
    (tmp_path / "tokenizer_config.json").unlink()
    data.check_tokenizer("key", str(tmp_path))
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocab.json")
    data.check_tokenizer("key", str(tmp_path), ("vocab.json",))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".txt", ".csv"])
def test_empty_files_are_named(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"none{suffix}").touch()
    source = str(tmp_path / f"*{suffix}")
    with pytest.raises(UsageError, match=r"train = '.*': empty, 0 bytes"):
        data.check_source("[data] train", source)
    (tmp_path / f"some{suffix}").write_text("x")
    data.check_source("[data] train", source)


def test_dangling_links_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(UsageError, match="no such file"):
        data.check_source("[data] train", str(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    "name, content, text",
    [
        ("a.jsonl", b"", "failed: its files are empty, 0 bytes$"),
        ("a.txt", b"caf\xe9", "DatasetGenerationError: .*: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9"),
        ("a.jsonl", b"no json", "DatasetGenerationError: .*: ArrowInvalid: JSON parse error"),
    ],
)
def test_why_files_cannot_be_read(name: str, content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=text):
        data.open_source(str(tmp_path / name), 1)


@pytest.mark.parametrize("value, found", [(None, "null"), (1, r"int \(1\)"), (["a"], r"list \(\['a'\]\)")])
def test_text_is_strings(value: Any, found: str) -> None:
    assert data.text_of({"text": ""}, "text", "a.jsonl") == ""
    with pytest.raises(UsageError, match=rf"a.jsonl: \[data\] text_column 'text' must hold strings, found {found}"):
        data.text_of({"text": value}, "text", "a.jsonl")
