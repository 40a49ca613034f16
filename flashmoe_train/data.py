"""Text to train on, as a recipe's `[data]` names it, and the quickstart's own corpus and tokenizer.

That corpus is PyTorch's Python sources, byte by byte: some 50 MB of real text that lies wherever the library runs, with
nothing to ship and nothing to download.
"""

import json
import random
from collections.abc import Iterator, Sequence
from functools import cache
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flashmoe_train.errors import UsageError, nearest
from flashmoe_train.resources import replace_file

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from tokenizers import Tokenizer

BYTE_TOKENIZER = "bytes"
TORCH_SOURCES = {"torch_sources": False, "torch_sources_heldout": True}  # held out?
_EMPTY = "empty, 0 bytes"
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv"}


def check_source(key: str, source: str | dict[str, Any]) -> None:
    """Raises UsageError, naming `key`, if `open_source` could not find `source` on this machine."""
    if isinstance(source, str) and source not in TORCH_SOURCES:
        suffix = Path(source).suffix
        if suffix not in _BUILDERS:
            hint = nearest(source, list(TORCH_SOURCES), "nor one of ")
            kinds = f"a file ({', '.join(_BUILDERS)}) nor a table of arguments for load_dataset"
            raise UsageError(f"{key} = {source!r} is neither {kinds}; {hint}")
        files = [path for path in map(Path, glob(source, recursive=True)) if path.exists()]  # no dangling links
        if not files:
            raise UsageError(f"{key} = {source!r}: no such file")
        if not any(path.stat().st_size for path in files):
            raise UsageError(f"{key} = {source!r}: {_EMPTY}")


def check_tokenizer(key: str, tokenizer: str, others: Sequence[str] = ()) -> None:
    """Raises UsageError, naming `key`, unless `tokenizer` is "bytes" or a folder with Hugging Face's tokenizer.json.

    `others`: files that a framework makes do with by guessing how text is cut. They are not looked into.
    """
    if tokenizer == BYTE_TOKENIZER:
        return
    if not Path(tokenizer).is_dir():
        raise UsageError(f"{key} = {tokenizer!r}: no such folder, and not {BYTE_TOKENIZER!r}")
    file = Path(tokenizer) / "tokenizer.json"
    if not file.exists() and any(file.with_name(name).exists() for name in others):
        return
    if not file.exists():
        raise UsageError(f"{key} = {tokenizer!r}: a folder without tokenizer.json (AutoTokenizer can save one there)")
    from tokenizers import Tokenizer

    try:
        tokens = Tokenizer.from_file(str(file)).get_vocab_size()
    except Exception as error:  # it raises no narrower type
        raise UsageError(f"{key} = {tokenizer!r}: {file} is not a tokenizer: {error}") from None
    if tokens == 0:  # every text would come to nothing, and reading never end
        raise UsageError(f"{key} = {tokenizer!r}: {file} has a vocabulary of 0 tokens")
    about = file.with_name("tokenizer_config.json")
    try:
        said = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
    except (OSError, ValueError) as error:  # of bytes that are not UTF-8, too
        raise UsageError(f"{key} = {tokenizer!r}: {about} is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise UsageError(f"{key} = {tokenizer!r}: {about} must hold an object, found {type(said).__name__}")


def open_source(source: str | dict[str, Any], rows: int) -> "tuple[Dataset | IterableDataset, list[dict[str, Any]]]":
    """The data set that `[data] train` or `heldout` names, and its first rows, up to so many: files, or arguments of
    `load_dataset`, whose split is "train" unless they say otherwise.

    Raises UsageError with what Hugging Face's `datasets` says if it cannot be loaded.
    """
    from datasets import load_dataset

    if isinstance(source, str):
        source = {"path": _BUILDERS[Path(source).suffix], "data_files": source}
    try:
        dataset = load_dataset(**{"split": "train"} | source)
        return dataset, list(dataset.take(rows))
    except Exception as error:  # whatever a builder, a file system or a network raises
        raise UsageError(f"load_dataset({source}) failed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What `datasets` says and, because that may be no more than that it has failed, why."""
    if isinstance(error, StopIteration):  # a builder that looks into the first line to learn the columns
        return f"its files are {_EMPTY}"
    said = f"{type(error).__name__}: {error}"
    return said if error.__cause__ is None else f"{said}: {type(error.__cause__).__name__}: {error.__cause__}"


def text_of(row: dict[str, Any], column: str, source: str | dict[str, Any]) -> str:
    """A row's text. Raises UsageError where it is something else, at which a tokenizer would fail."""
    text = row.get(column)  # rows that are read as they come may each have columns of their own
    if not isinstance(text, str):
        found = "null" if text is None else f"{type(text).__name__} ({str(text)[:40]})"
        raise UsageError(f"{source}: [data] text_column {column!r} must hold strings, found {found}")
    return text


_HELD_OUT = 20  # one file in this many is kept for validation
_PIECE = 1000  # characters in a row of the data set


@cache
def source_files(held_out: bool = False) -> tuple[Path, ...]:
    """The sources of the installed torch in a fixed random order: those trained on, or those held out."""
    files = sorted(Path(torch.__file__).parent.rglob("*.py"))
    random.Random(0).shuffle(files)
    return tuple(path for i, path in enumerate(files) if (i % _HELD_OUT == 0) == held_out)


@cache
def corpus(held_out: bool = False) -> "Dataset":
    """A Hugging Face data set with one column, `text`: pieces of the files in a fixed random order.

    Whole files in a row would make every batch of a short run a single file, and its loss that file's.
    """
    from datasets import Dataset

    texts: list[str] = []
    for path in source_files(held_out):
        texts += _pieces(path.read_text(encoding="utf-8", errors="replace"))
    random.Random(0).shuffle(texts)
    return Dataset.from_dict({"text": texts})


def _pieces(text: str) -> Iterator[str]:
    """Cuts a text at line ends into pieces of some `_PIECE` characters."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if sum(map(len, lines)) >= _PIECE:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)


@cache
def unigram_entropy() -> float:
    """Nats per byte of a model that knows nothing but how often each byte occurs in the training files."""
    counts = torch.zeros(256, dtype=torch.int64)
    for path in source_files():
        if content := bytearray(path.read_bytes()):
            counts += torch.frombuffer(content, dtype=torch.uint8).bincount(minlength=256)
    p = counts[counts > 0].double() / counts.sum()
    return -(p * p.log()).sum().item()


def entropy_for_scale(source: Any, tokenizer: Path) -> float | None:
    """`unigram_entropy`, if a loss can be held against it: on the training files, with the tokenizer in that folder
    taking each byte for a token. None elsewhere: a token of another tokenizer is several bytes."""
    file = tokenizer / "tokenizer.json"
    in_bytes = file.is_file() and file.read_text(encoding="utf-8") == _byte_tokenizer().to_str()
    return unigram_entropy() if source == "torch_sources" and in_bytes else None


BYTE_VOCABULARY = 258  # 256 bytes, <bos>, <eos>


def write_byte_tokenizer(folder: Path) -> Path:
    """Writes a Hugging Face tokenizer with one token per byte and <bos>, <eos> into `folder`; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "tokenizer.json", _byte_tokenizer().to_str())
    replace_file(folder / "tokenizer_config.json", '{"bos_token": "<bos>", "eos_token": "<eos>"}\n')
    return folder


def _byte_tokenizer() -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<bos>", "<eos>")])
    assert tokenizer.get_vocab_size() == BYTE_VOCABULARY
    return tokenizer
