"""The quickstart's corpus and tokenizer."""

import json
import math
from collections import Counter
from pathlib import Path

from flashmoe_train import data


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
