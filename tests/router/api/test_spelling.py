"""Joined, the bytes of an answer's tokens are its text, whatever the tokens cut in two."""

from __future__ import annotations

import math

import pytest
import tokenizers

from engine.tokenizer import Tokenizer
from engine.types import TokenLogprobs
from router.api.spelling import Spelling
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(make_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As Llama 2's: blanks as U+2581, unknown characters as tokens of a byte, the first blank dropped."""
    vocabulary = {"<unk>": 0, "\u2581the": 1, "\u2581sea": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(core.to_str(), {}, None)


@pytest.mark.parametrize("text", ["The tide.", "naïve 你好", "😀🏳️‍🌈 done", "\n\t a  b"])
def test_byte_level_tokens_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    spelling = Spelling(tokenizer)
    ids = tokenizer.encode(text)
    assert b"".join(spelling.octets(token_id) for token_id in ids).decode() == text


def test_byte_fallback_tokens_keep_their_blank_and_their_byte(byte_fallback: Tokenizer) -> None:
    spelling = Spelling(byte_fallback)
    assert [spelling.text(1), spelling.text(2)] == [" the", " sea"]
    assert b"".join(spelling.octets(3 + byte) for byte in "é".encode()) == "é".encode()


def test_a_part_of_a_character_reads_as_a_replacement(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("😀")
    assert Spelling(tokenizer).text(first) == "\N{REPLACEMENT CHARACTER}"


def test_a_special_token_is_spelled_out(tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.eos_token_ids
    assert Spelling(tokenizer).text(end) == tokenizer.id_to_token(end)


def test_json_can_write_every_logprob(tokenizer: Tokenizer) -> None:
    scored = [(70, TokenLogprobs(-math.inf, (71,), (-math.inf,)))]
    spelling = Spelling(tokenizer)
    assert spelling.completion(scored, 0)["token_logprobs"] == [-9999.0]
    (token,) = spelling.chat(scored)["content"]
    assert token["logprob"] == token["top_logprobs"][0]["logprob"] == -9999.0


def test_of_tokens_that_read_the_same_the_best_is_told(tokenizer: Tokenizer) -> None:
    halves = [tokenizer.encode(letter)[0] for letter in "😀é"]
    scored = [(halves[1], TokenLogprobs(-2.0, tuple(halves), (-0.5, -2.0)))]
    assert Spelling(tokenizer).completion(scored, 3)["top_logprobs"] == [{"\N{REPLACEMENT CHARACTER}": -0.5}]
