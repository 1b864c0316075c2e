"""The tokenizer inside a GGUF file, as tokenizer.json and tokenizer_config.json.

Two kinds. Byte-level BPE (`gpt2`): tokens in id order, merges in rank order and a name for how text is cut
into words. SentencePiece (`llama`): scores in place of merges (gguf_sentencepiece.py). In both a type for
each token: control tokens never show in output, user-defined ones are matched whole in text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import gguf
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import ModelCorrupt, ModelError, ModelUnsupported
from engine.gguf_sentencepiece import sentencepiece_core
from engine.tokenizer import SETTINGS_FILE, TOKENIZER_FILE

__all__ = ["PRE_TOKENIZERS", "write_tokenizer"]

_BYTE_LEVEL_BPE: Final = "gpt2"
_SENTENCEPIECE: Final = "llama"
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_LLAMA3_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3's tokenizer cuts text into words: a fact of the model, not of ours to vary."""
_QWEN2_WORDS: Final = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_CAPITALS: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALLS: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_WORDS: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALLS}+|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALLS}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The same of Qwen 2 and 3, and of Mistral from Nemo on."""


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _words(pattern: str) -> Any:
    words = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS: Final[Mapping[str, Callable[[], Any]]] = {
    "gpt-2": _gpt2,
    "llama-bpe": lambda: _words(_LLAMA3_WORDS),
    "qwen2": lambda: _words(_QWEN2_WORDS),
    "smollm": _smollm,
    "tekken": lambda: _words(_TEKKEN_WORDS),
}
"""`tokenizer.ggml.pre` -> how text is cut before merging."""
_WHOLE_WORDS: Final = ("llama-bpe", "tekken")
"""Where a word that is a token is taken whole, whatever the merges say."""
_NORMALISED: Final = ("qwen2",)
"""Where text is put into Unicode's normal form C first."""


def write_tokenizer(reader: gguf.GGUFReader, folder: Path, source: Path, context: int) -> None:
    """Write both files into `folder`. Raises ModelUnsupported or ModelCorrupt; `source` names the file."""

    def value(key: str, default: Any = None) -> Any:
        field = reader.fields.get(f"tokenizer.{key}")
        return default if field is None else field.contents()

    tokens: list[str] = value("ggml.tokens", [])
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if not tokens or len(vocabulary) != len(tokens):
        raise ModelCorrupt(f"{source}: its tokens are not those of a tokenizer", "Fetch it again")
    try:
        core = _core(vocabulary, value, source)
    except ModelError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for merges of unknown tokens
        raise ModelCorrupt(
            f"{source}: its merges do not fit its tokens ({error})", "Fetch it again"
        ) from error
    _add_tokens(core, tokens, value("ggml.token_type", []))
    names = {
        name: tokens[token_id]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
        if (token_id := value(f"ggml.{key}_token_id")) is not None and 0 <= token_id < len(tokens)
    }
    if value("ggml.add_bos_token", value("ggml.model") == _SENTENCEPIECE) and "bos_token" in names:
        core.post_processor = _adds_bos(core, names["bos_token"])
    core.save(str(folder / TOKENIZER_FILE))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **names,
    }
    template = value("chat_template")
    if template is not None:
        settings["chat_template"] = template
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")


def _core(vocabulary: dict[str, int], value: Callable[..., Any], source: Path) -> tokenizers.Tokenizer:
    """Of either kind, without added tokens. Raises ModelUnsupported; and anything for what does not fit."""
    kind, cut = value("ggml.model"), value("ggml.pre", "gpt-2")
    if kind == _SENTENCEPIECE:
        tokens, unknown = list(vocabulary), value("ggml.unknown_token_id", 0)
        return sentencepiece_core(
            vocabulary,
            value("ggml.scores"),
            value("ggml.token_type"),
            tokens[unknown],
            space_before=value("ggml.add_space_prefix", True),
        )
    if kind != _BYTE_LEVEL_BPE or cut not in PRE_TOKENIZERS:
        raise ModelUnsupported(
            f"{source} has a tokenizer {kind!r} with pre-tokenizer {cut!r}, which is not supported",
            f"Use the model's safetensors form, or a GGUF with a SentencePiece or byte-level BPE tokenizer "
            f"({', '.join(PRE_TOKENIZERS)})",
        )
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in value("ggml.merges", []))]
    core = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut in _WHOLE_WORDS)
    )
    if cut in _NORMALISED:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = PRE_TOKENIZERS[cut]()
    core.decoder = decoders.ByteLevel()
    return core


def _add_tokens(core: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    for kind in (_CONTROL, _USER_DEFINED):
        added = [token for token, its in zip(tokens, types, strict=False) if its == kind]
        core.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False) for token in added])


def _adds_bos(core: tokenizers.Tokenizer, bos: str) -> Any:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
    )
