"""The quickstart's corpus and tokenizer: PyTorch's own Python sources, byte by byte.

Some 50 MB of real text that lies wherever the library runs: nothing to ship, nothing to download.
"""

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from datasets import Dataset

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


BYTE_VOCABULARY = 258  # 256 bytes, <bos>, <eos>


def write_byte_tokenizer(folder: Path) -> Path:
    """Writes a Hugging Face tokenizer with one token per byte and <bos>, <eos> into `folder`; returns `folder`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<bos>", "<eos>")])
    assert tokenizer.get_vocab_size() == BYTE_VOCABULARY
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "tokenizer.json", tokenizer.to_str())
    _write(folder / "tokenizer_config.json", '{"bos_token": "<bos>", "eos_token": "<eos>"}\n')
    return folder


def _write(path: Path, text: str) -> None:
    """All processes of a run write the same file: replace it in one step, so that none reads half of it."""
    temporary = path.with_name(f".{path.name}.{random.SystemRandom().randrange(2**48):012x}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
