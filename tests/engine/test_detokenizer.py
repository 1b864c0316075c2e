"""Streamed text is the text: whole characters only, nothing of a stop string, nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from engine.detokenizer import IncrementalDetokenizer
from engine.gguf import GgufModel
from engine.progress import silent
from engine.tokenizer import Tokenizer
from tests.engine.gguf_file import TOKENS, write_gguf
from tests.tiny_model import make_tiny_model

BYTE_IDS = st.integers(3, 258)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte, so that every character of more than a byte comes in pieces."""
    return Tokenizer.from_folder(make_tiny_model(tmp_path_factory.mktemp("tiny")))


def byte_fallback() -> Tokenizer:
    """As Llama 2's: words with a mark for the space before them, bytes for what has no token."""
    words = ["▁the", "▁sea", "s", "▁", "x"]
    vocabulary = {token: i for i, token in enumerate([f"<0x{b:02X}>" for b in range(256)] + words)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(core.to_str(), {}, None)


def stream(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@given(
    st.lists(st.integers(97, 99).map(lambda letter: letter + 3), max_size=14),
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(0, 14),
)
@settings(deadline=None, max_examples=200)
def test_a_stop_that_is_complete_within_min_tokens_stops_nothing(
    tiny: Tokenizer, ids: list[int], stop: list[str], min_tokens: int
) -> None:
    """One token a letter, so the rule is plain: the first end of a stop behind so many letters."""
    text = tiny.decode(ids)
    detokenizer = IncrementalDetokenizer(tiny, tuple(stop), min_tokens)
    said = "".join([*(detokenizer.push(i) for i in ids), detokenizer.flush()])
    for end in range(min_tokens + 1, len(text) + 1):
        begins = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begins:
            # Of what was let out before it was known to belong to a stop, nothing can be taken back.
            assert text.startswith(said)
            assert min(begins) <= len(said) < end
            assert detokenizer.finished_by_stop
            return
    assert said == text
    assert not detokenizer.finished_by_stop


def before_first_stop(text: str, stop: tuple[str, ...]) -> str:
    """The rule, said plainly: grow the text by characters until one of the stop strings is in it."""
    for end in range(len(text) + 1):
        found = [text[:end].find(s) for s in stop if s in text[:end]]
        if found:
            return text[: min(found)]
    return text


@given(st.lists(st.one_of(BYTE_IDS, st.integers(0, 2), st.integers(259, 400)), max_size=40))
@example([*range(200, 259)] * 4)
@settings(deadline=None, max_examples=300)
def test_any_tokens_joined_are_the_full_decode(tiny: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(tiny, ids)) == tiny.decode(ids)


@given(st.text())
@settings(deadline=None)
def test_no_piece_of_a_text_holds_half_a_character(tiny: Tokenizer, text: str) -> None:
    pieces = stream(tiny, tiny.encode(text))
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_text_comes_as_soon_as_it_is_whole(tiny: Tokenizer) -> None:
    assert stream(tiny, tiny.encode("aé😀b")) == ["a", "", "é", "", "", "", "😀", "b", ""]


def test_an_incomplete_character_at_the_end_is_replaced(tiny: Tokenizer) -> None:
    assert stream(tiny, tiny.encode("a😀")[:-1]) == ["a", "", "", "", "\ufffd"]


def test_garbage_does_not_grow_the_window(tiny: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tiny)
    continuation = tiny.encode("é")[1]
    text = "".join(detokenizer.push(continuation) for _ in range(5_000))
    assert len(detokenizer._window) <= 65
    assert text + detokenizer.flush() == "\ufffd" * 5_000


def test_merged_tokens_join_too(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = tmp_path / "folder"
    folder.mkdir()
    GgufModel.open(tmp_path / "m.gguf").write_folder(folder, silent)
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("hello world, hello 12 hellos")
    assert len(ids) < len(TOKENS)
    assert "".join(stream(tokenizer, ids)) == "hello world, hello 12 hellos"


@given(st.lists(st.sampled_from(["▁the", "▁sea", "s", "▁", "x", "é", "世", "😀", "\n"]), max_size=20))
@settings(deadline=None)
def test_byte_fallback_tokenizers_keep_their_spaces(parts: list[str]) -> None:
    tokenizer = byte_fallback()
    ids = [i for part in parts for i in _byte_fallback_ids(tokenizer, part)]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def _byte_fallback_ids(tokenizer: Tokenizer, part: str) -> list[int]:
    known = {tokenizer.id_to_token(i): i for i in range(256, tokenizer.vocab_size)}
    return [known[part]] if part in known else list(part.encode())


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


@given(st.text("ab\né", max_size=40), STOPS)
@example("ab", ["abc", "b"])
@example("aab", ["ab"])
@settings(deadline=None, max_examples=400)
def test_text_ends_before_the_stop_completed_first(tiny: Tokenizer, text: str, stops: list[str]) -> None:
    detokenizer = IncrementalDetokenizer(tiny, tuple(stops))
    out = "".join(detokenizer.push(i) for i in tiny.encode(text)) + detokenizer.flush()
    assert out == before_first_stop(text, tuple(stops))
    assert detokenizer.finished_by_stop == any(stop in text for stop in stops)


def test_a_stop_in_the_middle_of_a_token_cuts_it(tmp_path: Path) -> None:
    tokenizer = byte_fallback()
    sea = _byte_fallback_ids(tokenizer, "▁sea")
    detokenizer = IncrementalDetokenizer(tokenizer, ("e",))
    assert detokenizer.push(sea[0]) == "s"
    assert detokenizer.finished_by_stop
    assert (detokenizer.push(sea[0]), detokenizer.flush()) == ("", "")


def test_a_possible_beginning_is_held_until_it_is_known(tiny: Tokenizer) -> None:
    assert stream(tiny, tiny.encode("a STORE"), (" STOP",)) == ["a", "", "", "", "", " STOR", "E", ""]
    assert stream(tiny, tiny.encode("a ST"), (" STOP",)) == ["a", "", "", "", " ST"]


@given(st.lists(BYTE_IDS, max_size=30), st.integers(0, 30))
@settings(deadline=None)
def test_a_replay_goes_on_where_the_first_stopped(tiny: Tokenizer, ids: list[int], cut: int) -> None:
    first, second = (IncrementalDetokenizer(tiny, ("ab",)) for _ in range(2))
    for token in ids[:cut]:
        assert first.push(token) == second.push(token)
    rest = [first.push(token) for token in ids[cut:]]
    assert [second.push(token) for token in ids[cut:]] == rest
    assert first.flush() == second.flush()


def test_an_empty_stop_string_is_our_callers_mistake(tiny: Tokenizer) -> None:
    with pytest.raises(ValueError, match="empty"):
        IncrementalDetokenizer(tiny, ("",))
