"""Tokens to text as they come, never half a character and never a part of a stop string.

A byte-level token may hold a part of a UTF-8 character, and some decoders write a space only between
tokens: so text is decoded over a small window of tokens, and of it only what later tokens cannot change
is let out. Then stop strings: what may be the beginning of one is held until it is known not to be.

    tokens    F0 9F | 98 80 |   "St" | "o" | "re"          stop = ("Stop",)
    push()    ""    | "😀"  |   ""   | ""  | "Store"

Promise: without stop strings, all pushes and the flush joined equal `tokenizer.decode` of all tokens (for
byte-level tokenizers whatever the tokens; for byte-fallback ones if they spell valid UTF-8). With them, the
text before the first completed stop string, however the text was cut into tokens. Pure: the same tokens
pushed into a new one give the same state, so a stream that resumes elsewhere replays them.
About 10 us a token.
"""

from __future__ import annotations

from typing import Final

from engine.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer"]

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_HELD_MAX: Final = 8
"""Trailing replacement characters that may yet turn into something else: a window's run of single-byte
tokens spells at most one whole character (4) and one incomplete (3), and some decoders write one
replacement for each byte."""
_WINDOW_MAX: Final = 64
_WINDOW_CUT: Final = 32
"""Tokens kept of a window that never settles: more bytes than _HELD_MAX replacements can stand for."""


class IncrementalDetokenizer:
    """One sequence's output. Not for use by several threads at once."""

    __slots__ = (
        "_held",
        "_min_tokens",
        "_settled_tokens",
        "_shown",
        "_stop",
        "_tokenizer",
        "_tokens",
        "_window",
        "finished_by_stop",
    )

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), min_tokens: int = 0) -> None:
        """A stop string that is complete within the first `min_tokens` tokens stops nothing."""
        if "" in stop:
            raise ValueError("an empty stop string would stop before the first token: leave it out")
        self.finished_by_stop = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._min_tokens = min_tokens
        self._tokens = 0  # that were pushed
        self._window: list[int] = []  # tokens of the last settled piece, then those not settled yet
        self._settled_tokens = 0  # how many of the window's tokens are settled: context for the next
        self._shown = 0  # characters of the window's text that were let out of it
        self._held = ""  # let out of the window, but perhaps the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Take one token; the text that is now safe to emit, often "". Nothing more comes after a stop."""
        self._tokens += 1
        if self.finished_by_stop or self._tokenizer.is_special(token_id):
            return ""
        self._window.append(token_id)
        return self._release(self._settle(), final=False)

    def flush(self) -> str:
        """The rest, at the end of the sequence: an incomplete character as U+FFFD, a held beginning."""
        if self.finished_by_stop:
            return ""
        rest = self._tokenizer.decode(self._window)[self._shown :]
        self._shown += len(rest)
        return self._release(rest, final=True)

    def _settle(self) -> str:
        """New text of the window that later tokens cannot change; moves the window on."""
        text = self._tokenizer.decode(self._window)
        doubtful = len(text) - len(text.rstrip(_REPLACEMENT))
        end = max(self._shown, len(text) - min(doubtful, _HELD_MAX))
        new, self._shown = text[self._shown : end], end
        if not doubtful:
            self._keep_from(self._settled_tokens, unshown=0)
            self._settled_tokens = len(self._window)
        elif len(self._window) > _WINDOW_MAX:
            self._keep_from(len(self._window) - _WINDOW_CUT, unshown=len(text) - end)
            self._settled_tokens = 0
        return new

    def _keep_from(self, begin: int, unshown: int) -> None:
        self._window = self._window[begin:]
        self._shown = len(self._tokenizer.decode(self._window)) - unshown

    def _release(self, new: str, *, final: bool) -> str:
        """Text that no stop string can claim any more, out of what is held and `new`."""
        text, held = self._held + new, len(self._held)
        # Not in what is held: a stop that was complete there was passed over, for min_tokens.
        found = ((stop, text.find(stop, max(0, held + 1 - len(stop)))) for stop in self._stop)
        stops = [(at + len(stop), at) for stop, at in found if at >= 0 and self._tokens > self._min_tokens]
        if stops:
            self.finished_by_stop = True
            self._held = ""
            return text[: min(stops)[1]]  # the stop completed first, wherever the tokens were cut
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
