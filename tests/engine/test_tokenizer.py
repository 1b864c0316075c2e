"""Text to ids and back; the digest names all that turns messages into ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ChatTemplateError, ModelCorrupt, ModelNotFound, ModelUnsupported
from engine.tokenizer import Tokenizer
from tests.tiny_model import CHAT_TEMPLATE, make_tiny_model

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(make_tiny_model(tmp_path_factory.mktemp("tiny")))


def change_settings(folder: Path, **changes: Any) -> Path:
    file = folder / "tokenizer_config.json"
    kept = {
        key: value for key, value in (json.loads(file.read_text()) | changes).items() if value is not None
    }
    file.write_text(json.dumps(kept))
    return folder


@given(st.text())
@settings(deadline=None)
def test_any_text_survives_the_round_trip(tiny: Tokenizer, text: str) -> None:
    assert tiny.decode(tiny.encode(text)) == text


def test_special_tokens_are_read_in_text_and_left_out_of_it(tiny: Tokenizer) -> None:
    ids = tiny.encode("<|im_start|>a<|im_end|>")
    assert [tiny.id_to_token(i) for i in ids] == ["<|im_start|>", "a", "<|im_end|>"]
    assert tiny.decode(ids) == "a"
    assert tiny.decode(ids, skip_special=False) == "<|im_start|>a<|im_end|>"
    assert [tiny.is_special(i) for i in ids] == [True, False, True]


def test_ids_beyond_the_vocabulary_are_nothing(tiny: Tokenizer) -> None:
    assert tiny.id_to_token(tiny.vocab_size) is None
    assert tiny.decode([tiny.vocab_size, *tiny.encode("a")]) == "a"


def test_knows_its_end_token(tiny: Tokenizer) -> None:
    assert tiny.eos_token_ids == (2,)


def test_chats_are_rendered_and_encoded(tiny: Tokenizer) -> None:
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.render_chat(HELLO) == text
    assert tiny.encode_chat(HELLO) == tiny.encode(text)


def test_the_digest_is_pinned(tiny: Tokenizer) -> None:
    """It is a part of the namespace: a change of how it is made empties every cache."""
    assert tiny.digest.hex() == "b1715053fb2f896e0a3c8a7babf91855"


@pytest.mark.parametrize("changes", [{"chat_template": "{{ 1 }}"}, {"eos_token": "<|endoftext|>"}])
def test_settings_that_change_ids_change_the_digest(
    tmp_path: Path, tiny: Tokenizer, changes: dict[str, str]
) -> None:
    folder = change_settings(make_tiny_model(tmp_path), **changes)
    assert Tokenizer.from_folder(folder).digest != tiny.digest


def test_weights_do_not_change_the_digest(tmp_path: Path, tiny: Tokenizer) -> None:
    assert Tokenizer.from_folder(make_tiny_model(tmp_path, seed=7)).digest == tiny.digest


def test_special_tokens_may_be_objects(tmp_path: Path) -> None:
    folder = change_settings(make_tiny_model(tmp_path), eos_token={"content": "<|im_end|>", "lstrip": False})
    assert Tokenizer.from_folder(folder).eos_token_ids == (2,)


def test_a_template_file_wins_over_the_settings(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    (folder / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_folder(folder).render_chat(HELLO) == "from the file"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHAT_TEMPLATE}]
    folder = change_settings(make_tiny_model(tmp_path), chat_template=templates)
    assert "hello" in Tokenizer.from_folder(folder).render_chat(HELLO)


def test_without_a_template_only_chats_fail(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(change_settings(make_tiny_model(tmp_path), chat_template=None))
    assert not tokenizer.has_chat_template
    assert tokenizer.encode("a")
    with pytest.raises(ChatTemplateError, match=r"no chat template.*instruct model"):
        tokenizer.render_chat(HELLO)


def test_settings_are_optional(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(folder).eos_token_ids == ()


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b'{"model": 1}', b"\xff\xfe"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ModelCorrupt, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="chat_template"):
        Tokenizer.from_folder(change_settings(make_tiny_model(tmp_path), chat_template=7))


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    """Training settings left in a file must not cut a prompt short."""
    folder = make_tiny_model(tmp_path)
    settings_ = json.loads((folder / "tokenizer.json").read_text())
    settings_["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(settings_))
    assert len(Tokenizer.from_folder(folder).encode("a" * 100)) == 100
