"""Chat templates: messages in, the prompt's text out, by the model's own Jinja template.

Rendered as the model's makers do it (trim_blocks and lstrip_blocks on, `raise_exception`, `strftime_now`,
`tojson` without HTML escapes, `{% generation %}` markers, loop controls), in Jinja's immutable sandbox: a
template cannot reach Python's internals or change the messages. It comes with the model and messages come
from anyone, so what a render may produce is bounded too: the text, and any string or list made by
multiplication. The time of a hostile *template* is not: load models you trust.

About 30 us a message. Everything that goes wrong is a ChatTemplateError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import ChatTemplateError

__all__ = ["RENDERED_CHARS_MAX", "ChatTemplate"]

RENDERED_CHARS_MAX: Final = 8 << 20
"""More than any context holds."""

_INTEGER_BITS_MAX: Final = 256
_RAISED: Final = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words for training; here it is
    its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Adds bounds on what multiplication and powers may make."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(right) <= _INTEGER_BITS_MAX and abs(left) <= 1 << _INTEGER_BITS_MAX):
            raise TemplateError("a power is too large")
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                if (
                    isinstance(times, int)
                    and hasattr(sized, "__len__")
                    and len(sized) * times > RENDERED_CHARS_MAX
                ):
                    raise TemplateError("a repeated string or list is too large")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """One compiled template. Safe to use from several threads."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens`: what `bos_token` and the like stand for in the template. `now` serves templates
        that write today's date into the prompt. Raises ChatTemplateError if the source is not Jinja."""
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except (TemplateSyntaxError, RecursionError) as error:
            raise ChatTemplateError(
                f"the model's chat template is not valid Jinja ({error})", "Fetch the model again, or mend it"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Raises ChatTemplateError if the template refuses the messages (as for roles it does
        not know, or an order it does not allow), fails on them, or makes too much text."""
        values = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **(variables or {}),
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        room = RENDERED_CHARS_MAX
        try:
            for piece in self._template.generate(values):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise TemplateError(f"the prompt has more than {RENDERED_CHARS_MAX} characters")
        except _RAISED as error:
            raise ChatTemplateError(
                f"the model's chat template cannot render these messages ({error})",
                "Check their roles, their order and that each has the content the model expects",
            ) from error
        return "".join(pieces)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
