"""A GGUF file's tokenizer gives the ids that the model's own tokenizer gives, as transformers makes it."""

from __future__ import annotations

import itertools
import random
import string
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as CoreTokenizer
from transformers import LlamaTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import generate_merges

from engine.errors import ModelCorrupt
from engine.gguf_sentencepiece import sentencepiece_core
from engine.gguf_tokenizer import write_tokenizer
from engine.tokenizer import Tokenizer
from tests.engine.gguf_file import MERGES, TOKENS

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
KINDS = [2, 3, 3] + [6] * 256
TEXTS = [
    "hello world 12",
    "  two  spaces ",
    "don't We'LL it\u0027s\n\n\tx",
    "Grüße, 世界! 1234 …",
    "e\N{COMBINING ACUTE ACCENT}",
    "</s>hello<s>[INST] hello [/INST]",
    "CamelCase/paths/HTTPServer",
    "",
]


def read(path: Path, tokens: list[str], **fields: Any) -> Tokenizer:
    """The tokenizer of a GGUF file with these tokens, through the files that are made of it."""
    writer = gguf.GGUFWriter(path / "m.gguf", "llama")
    writer.add_token_list(tokens)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    write_tokenizer(gguf.GGUFReader(path / "m.gguf"), path, path / "m.gguf", 2048)
    return Tokenizer.from_folder(path)


def sentencepieces(seed: int = 0) -> tuple[list[str], list[float]]:
    """Characters, and words that grow out of them; scores by rank, some equal."""
    rng = random.Random(seed)
    pieces = [SPACE, *string.ascii_lowercase]
    for _ in range(60):
        union = rng.choice(pieces) + rng.choice(pieces)
        if union not in pieces and len(union) < 9:
            pieces.append(union)
    scores = [-float(rank // 2) for rank in range(len(pieces))]
    return [*SPECIAL, *BYTES, *pieces], [0.0] * 259 + scores


def joined_by_score(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """SentencePiece's own rule, step by step: join the neighbours of the best score, leftmost first."""
    score = dict(zip(tokens, scores, strict=True))
    parts = list(text)
    while True:
        pairs = [(-score[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]
        if not pairs:
            return parts
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@given(st.text(alphabet="abcdlowr ", max_size=30))
@settings(deadline=None)
def test_pieces_are_joined_as_sentencepiece_joins_them(text: str) -> None:
    """With a score of its own for each piece; pieces that overlap themselves aside, as in `aaa`."""
    tokens, _ = sentencepieces()
    tokens = [t for t in tokens if len(t) < 3 or t[0] != t[-1] or t in BYTES + SPECIAL]
    scores = [-float(i) for i in range(len(tokens))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    kinds = KINDS + [1] * (len(tokens) - 259)
    core = sentencepiece_core(vocabulary, scores, kinds, "<unk>", space_before=False)
    assert core.encode(text).tokens == joined_by_score(text.replace(" ", SPACE), tokens, scores)


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_equals_transformers(text: str, tmp_path: Path) -> None:
    tokens, scores = sentencepieces()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = generate_merges(vocabulary, dict(zip(tokens, scores, strict=True)))
    theirs = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=True)
    ours = read(
        tmp_path,
        tokens,
        tokenizer_model="llama",
        tokenizer_pre="default",
        token_scores=scores,
        token_types=KINDS + [1] * (len(tokens) - 259),
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
    )
    ids = ours.encode(text)
    if not text.startswith(("</s>", " ")):  # transformers 5 puts the space elsewhere there
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text, add_special=True) == [1, *ids]
    if text and "<" not in text:
        assert ours.decode(ids) == text


def test_a_space_goes_before_every_text_of_a_chat(tmp_path: Path) -> None:
    """As llama.cpp and the tokenizer.json files of these models have it: behind special tokens, too."""
    tokens, scores = sentencepieces()
    ours = read(
        tmp_path,
        tokens,
        tokenizer_model="llama",
        token_scores=scores,
        token_types=KINDS + [1] * (len(tokens) - 259),
        bos_token_id=1,
        eos_token_id=2,
    )
    spelt = "".join(ours.id_to_token(i) or "" for i in ours.encode("<s>a</s>b"))
    assert spelt == f"<s>{SPACE}a</s>{SPACE}b"


def byte_level(path: Path, pre: str) -> Tokenizer:
    kinds = [3] * 3 + [1] * (len(TOKENS) - 3)
    return read(
        path, TOKENS, tokenizer_model="gpt2", tokenizer_pre=pre, token_merges=MERGES, token_types=kinds
    )


@pytest.mark.parametrize("text", TEXTS)
def test_qwen_equals_transformers(text: str, tmp_path: Path) -> None:
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    theirs = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    assert byte_level(tmp_path, "qwen2").encode(text) == theirs(text)["input_ids"]


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    core: CoreTokenizer = tokenizer._core
    return [text[begin:end] for _, (begin, end) in core.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("don't stop", ["don", "'t", " stop"]),
        ("2024", ["2", "0", "2", "4"]),
        ("CamelCase HTTPServer", ["Camel", "Case", " HTTPServer"]),
        ("a/b//\n c", ["a", "/b", "//\n", " c"]),
        ("x  y\n\n", ["x", " ", " y", "\n\n"]),
    ],
)
def test_tekken_cuts_words_at_capitals_and_single_digits(text: str, cut: list[str], tmp_path: Path) -> None:
    assert words(byte_level(tmp_path, "tekken"), text) == cut


def test_a_sentencepiece_file_without_scores_is_named(tmp_path: Path) -> None:
    tokens, _ = sentencepieces()
    with pytest.raises(ModelCorrupt, match=r"m\.gguf"):
        read(tmp_path, tokens, tokenizer_model="llama", token_types=KINDS + [1] * (len(tokens) - 259))
