"""Tokens in memory-mapped files: a recipe's text, tokenised once into the run's folder, or a file of Megatron's own.

Sequence i of a run is the i-th window of `seq_len + 1` tokens, whatever the number of processes: which are read in a
step depends on its number alone, so that a resumed run reads what an uninterrupted one would.
"""

import glob
import json
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmoe_train import data
from flashmoe_train.errors import UsageError
from flashmoe_train.resources import replace_file

_ROWS = 256  # tokenised at once


def is_indexed(source: str | dict[str, Any]) -> bool:
    """Whether it names a file that Megatron's `preprocess_data.py` has written: tokens in .bin, beside them .idx."""
    return isinstance(source, str) and source.endswith(".bin") and Path(source).with_suffix(".idx").exists()


class TokenFile:
    """The windows of a file of tokens."""

    def __init__(self, path: Path, dtype: Any, seq_len: int, shuffled_by: int | None = None) -> None:
        self.tokens = np.memmap(path, dtype, "r")
        self.width = seq_len + 1
        count = len(self.tokens) // self.width
        if count == 0:
            raise UsageError(f"{path} has {len(self.tokens)} tokens, a sequence needs {self.width}")
        self.order = torch.arange(count)
        if shuffled_by is not None:
            self.order = torch.randperm(count, generator=torch.Generator().manual_seed(shuffled_by))

    def sequences(self, numbers: Tensor) -> Tensor:
        """Windows of these numbers, int64 `[len(numbers), seq_len + 1]`; after the last one comes the first."""
        starts = (self.order[numbers % len(self.order)] * self.width).tolist()
        return torch.from_numpy(np.stack([self.tokens[s : s + self.width] for s in starts]).astype(np.int64))

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raises UsageError for a token, of the first million, that a model of so many does not have."""
        if (most := int(self.tokens[:1_000_000].max())) >= vocabulary:
            raise UsageError(f"token {most} is in the data, and the model's vocab_size is {vocabulary}")


def open_indexed(source: str, seq_len: int, seed: int) -> TokenFile:
    """The tokens of a file of Megatron's, document after document, windows in a random order."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    path = Path(source)
    dtype = IndexedDataset(str(path.with_suffix(""))).index.dtype
    return TokenFile(path, dtype, seq_len, shuffled_by=seed)


def prepare(source: str | dict[str, Any], text_column: str, tokenizer: Path, path: Path, needed: int) -> None:
    """Writes at least `needed` tokens of the source, or all it has, to `path`; nothing if it holds them already.

    Every row of text is between the tokenizer's tokens for the beginning and the end, if it has them. More tokens of a
    source begin with the same ones. Files that have changed are read again. One process of a run calls it.
    """
    words = (tokenizer / "tokenizer.json").read_text()
    wanted = {"source": source, "text_column": text_column, "tokenizer": words, "files": _files(source)}
    about = path.with_suffix(".json")
    if path.exists() and about.exists():
        have = json.loads(about.read_text())
        if have["of"] == wanted and (have["tokens"] >= needed or have["all"]):
            return
    encode, dtype = _encoder(tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    about.unlink(missing_ok=True)
    count, rows = 0, _rows(source, text_column)
    with open(path, "wb") as file:
        while count < needed and (texts := list(islice(rows, _ROWS))):
            tokens = np.fromiter(chain.from_iterable(encode(texts)), dtype)
            tokens.tofile(file)
            count += len(tokens)
    everything = next(rows, None) is None
    replace_file(about, json.dumps({"of": wanted, "tokens": count, "all": everything, "dtype": dtype}) + "\n")


def open_prepared(path: Path, seq_len: int) -> TokenFile:
    return TokenFile(path, json.loads(path.with_suffix(".json").read_text())["dtype"], seq_len)


def _files(source: str | dict[str, Any]) -> list[list[str | int]]:
    """Name, size and time of change of a source's files here."""
    names = source if isinstance(source, str) else source.get("data_files", [])
    groups = names.values() if isinstance(names, dict) else [names]  # of splits
    patterns = chain.from_iterable([group] if isinstance(group, str) else group for group in groups)
    found = sorted({path for pattern in patterns for path in glob.glob(pattern, recursive=True)})
    return [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in found]


def _rows(source: str | dict[str, Any], column: str) -> Iterator[str]:
    if isinstance(source, str) and source in data.TORCH_SOURCES:
        yield from data.corpus(data.TORCH_SOURCES[source])["text"]
        return
    dataset, first = data.open_source(source, 1)
    if not first:
        raise UsageError(f"{source}: no rows")
    if column not in first[0]:
        raise UsageError(f"{source} has no column {column!r}; [data] text_column may be: {list(first[0])}")
    for row in dataset:
        yield data.text_of(row, column, source)


def _encoder(folder: Path) -> tuple[Any, str]:
    """A function from texts to their tokens, and the type in which these fit."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    before, after = ([] if number is None else [number] for number in around(folder).values())

    def encode(texts: list[str]) -> Iterator[list[int]]:
        for found in tokenizer.encode_batch(texts, add_special_tokens=False):
            yield [*before, *found.ids, *after]

    return encode, "uint16" if tokenizer.get_vocab_size() <= 2**16 else "uint32"


def around(folder: Path) -> dict[str, int | None]:
    """The tokenizer's `bos_token` and `eos_token`, which begin and end a text, as far as it has them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = folder / "tokenizer_config.json"
    said = json.loads(names.read_text()) if names.exists() else {}
    found: dict[str, int | None] = {}
    for key in ("bos_token", "eos_token"):
        token = said.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        found[key] = None if token is None else tokenizer.token_to_id(token)
    return found
