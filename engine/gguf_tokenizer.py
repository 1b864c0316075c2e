"""The tokenizer inside a GGUF file, as tokenizer.json and tokenizer_config.json.

Byte-level BPE only: tokens in id order, merges in rank order, a name for the pre-tokenizer, and a type for
each token (control tokens never show in output; user-defined ones are matched whole in text). SentencePiece
tokenizers are refused: rebuilding their merges from scores is a guess.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from engine.errors import ModelCorrupt, ModelUnsupported
from engine.tokenizer import SETTINGS_FILE, TOKENIZER_FILE

__all__ = ["PRE_TOKENIZERS", "write_tokenizer"]

_BYTE_LEVEL_BPE: Final = "gpt2"
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_LLAMA3_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3's tokenizer cuts text into words: a fact of the model, not of ours to vary."""


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> Any:
    words = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_WORDS), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS: Final[Mapping[str, Callable[[], Any]]] = {
    "gpt-2": _gpt2,
    "llama-bpe": _llama3,
    "smollm": _smollm,
}
"""`tokenizer.ggml.pre` -> how text is cut before merging."""


def write_tokenizer(reader: gguf.GGUFReader, folder: Path, source: Path, context: int) -> None:
    """Write both files into `folder`. Raises ModelUnsupported or ModelCorrupt; `source` names the file."""

    def value(key: str, default: Any = None) -> Any:
        field = reader.fields.get(f"tokenizer.{key}")
        return default if field is None else field.contents()

    kind, cut = value("ggml.model"), value("ggml.pre", "gpt-2")
    if kind != _BYTE_LEVEL_BPE or cut not in PRE_TOKENIZERS:
        raise ModelUnsupported(
            f"{source} has a tokenizer {kind!r} with pre-tokenizer {cut!r}, which is not supported",
            f"Use the model's safetensors form, or a GGUF with a byte-level BPE tokenizer "
            f"({', '.join(PRE_TOKENIZERS)})",
        )
    tokens: list[str] = value("ggml.tokens", [])
    types = value("ggml.token_type", [])
    core = _core(tokens, value("ggml.merges", []), types, cut == "llama-bpe", source)
    core.pre_tokenizer = PRE_TOKENIZERS[cut]()
    core.decoder = decoders.ByteLevel()
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
    if value("ggml.add_bos_token", False) and "bos_token" in names:
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


def _core(
    tokens: list[str], merges: list[str], types: list[int], whole_words: bool, source: Path
) -> tokenizers.Tokenizer:
    """`whole_words`: a word that is a token is taken whole, whatever the merges say (Llama 3)."""
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    if not tokens or len(vocabulary) != len(tokens):
        raise ModelCorrupt(
            f"{source}: its tokens or merges are not those of a BPE tokenizer", "Fetch it again"
        )
    try:
        core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=whole_words))
    except Exception as error:  # `tokenizers` raises bare Exception for merges of unknown tokens
        raise ModelCorrupt(
            f"{source}: its merges do not fit its tokens ({error})", "Fetch it again"
        ) from error
    for kind in (_CONTROL, _USER_DEFINED):
        added = [token for token, its in zip(tokens, types, strict=False) if its == kind]
        core.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False) for token in added])
    return core


def _adds_bos(core: tokenizers.Tokenizer, bos: str) -> Any:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
    )
