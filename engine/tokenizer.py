"""A model's tokenizer: text to ids and back by `tokenizers`, and its chat template.

Loading costs about 0.1 s for 50k tokens; encoding about 1 us a character. The digest names all that turns
messages into ids: it is a part of the namespace, so KV of one tokenizer or template never meets another's.

`tokenizers` objects may be shared between threads for encoding and decoding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import tokenizers

from engine.chat import ChatTemplate
from engine.errors import ChatTemplateError, ModelCorrupt, ModelError, ModelNotFound, ModelUnsupported
from engine.folder import CONFIG_NBYTES_MAX, read_json_object

__all__ = ["SETTINGS_FILE", "TOKENIZER_FILE", "Tokenizer"]

TOKENIZER_FILE: Final = "tokenizer.json"
SETTINGS_FILE: Final = "tokenizer_config.json"
_TEMPLATE_FILE: Final = "chat_template.jinja"
_SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_DIGEST_TAG: Final = b"kvstrata.tokenizer.1\0"
DIGEST_NBYTES: Final = 16


class Tokenizer:
    """Immutable once loaded."""

    def __init__(self, text: str, special_tokens: Mapping[str, str], template: str | None) -> None:
        """`text` is tokenizer.json's; `special_tokens` maps names as `bos_token` to tokens. Raises what
        `tokenizers` raises for a text it cannot parse, and ChatTemplateError."""
        core = tokenizers.Tokenizer.from_str(text)
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._special_ids = frozenset(
            token_id for token_id, token in core.get_added_tokens_decoder().items() if token.special
        )
        end = special_tokens.get("eos_token")
        end_id = None if end is None else core.token_to_id(end)
        self.eos_token_ids: tuple[int, ...] = () if end_id is None else (end_id,)
        """The tokenizer's own end token. What ends a generation is `ModelConfig.eos_token_ids`."""
        self.vocab_size: int = core.get_vocab_size(with_added_tokens=True)
        self.digest: bytes = _digest(text, special_tokens, template)
        """16 bytes over tokenizer, special tokens and chat template."""
        self._chat = None if template is None else ChatTemplate(template, special_tokens)

    @classmethod
    def from_folder(cls, path: Path) -> Self:
        """Load from a Hugging Face style folder. Raises ModelNotFound without tokenizer.json, ModelCorrupt
        for one that does not parse, ChatTemplateError for a template that does not compile."""
        settings = read_json_object(path / SETTINGS_FILE) if (path / SETTINGS_FILE).exists() else {}
        special = {
            name: text for name in _SPECIAL_NAMES if (text := _token_text(settings.get(name))) is not None
        }
        text, template = _read_text(path / TOKENIZER_FILE), _template(path, settings)
        try:
            return cls(text, special, template)
        except ModelError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exception for whatever it cannot parse
            raise ModelCorrupt(
                f"{path / TOKENIZER_FILE} is not a tokenizer ({error})", "Fetch the model again"
            ) from error

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Ids of `text`; with `add_special` also what the model wants around it (as a BOS token).

        Special tokens written out in the text become those tokens, as chat templates need.
        """
        ids: list[int] = self._core.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids the tokenizer lacks become nothing."""
        text: str = self._core.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None for an id the tokenizer lacks."""
        token: str | None = self._core.id_to_token(token_id)
        return token

    def is_special(self, token_id: int) -> bool:
        """Is it a control token, which never shows in output?"""
        return token_id in self._special_ids

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for `messages` by the model's template. Raises ChatTemplateError."""
        if self._chat is None:
            raise ChatTemplateError(
                "this model has no chat template",
                "Use /v1/completions with a prompt of your own, or an instruct model such as smollm2-135m",
            )
        return self._chat.render(messages, add_generation_prompt=add_generation_prompt, variables=variables)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Ids of the rendered chat. No special tokens are added: the template writes its own."""
        return self.encode(self.render_chat(messages, **variables))


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > CONFIG_NBYTES_MAX:
            raise ModelCorrupt(f"{path} has more than {CONFIG_NBYTES_MAX} bytes", "Fetch the model again")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelNotFound(
            f"there is no {path.name} in {path.parent}",
            "Take the model's form for fast tokenizers, or save it once with transformers' AutoTokenizer",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelCorrupt(f"{path} is not readable text ({error})", "Fetch the model again") from error


def _template(path: Path, settings: Mapping[str, Any]) -> str | None:
    """A file of its own wins over the settings' entry; of several named ones, the default."""
    file = path / _TEMPLATE_FILE
    if file.exists():
        return _read_text(file)
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise ModelUnsupported(f"chat_template in {path / SETTINGS_FILE} is not text", "Fetch it again")
    return found


def _token_text(value: object) -> str | None:
    """Settings name a special token by its text, or by an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _digest(text: str, special_tokens: Mapping[str, str], template: str | None) -> bytes:
    identity = json.dumps([text, sorted(special_tokens.items()), template], separators=(",", ":"))
    return hashlib.sha256(_DIGEST_TAG + identity.encode()).digest()[:DIGEST_NBYTES]
