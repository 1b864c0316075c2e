"""The bodies of requests, as OpenAI's clients send them: strict types, ranges, and a clear no.

Fields nobody here knows are ignored, as OpenAI does. Fields we know and do not serve are refused unless
they hold the value that changes nothing: an answer that silently lacks what was asked for is worse than an
error.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

__all__ = [
    "CHOICES_MAX",
    "IDS_MAX",
    "LOGPROBS_MAX",
    "STOP_STRINGS_MAX",
    "ChatBody",
    "ChatMessage",
    "CompletionBody",
    "DetokenizeBody",
    "GenerationBody",
    "StreamOptions",
    "TokenizeBody",
]

CHOICES_MAX: Final = 128
STOP_STRINGS_MAX: Final = 4
LOGPROBS_MAX: Final = 20
_STOP_CHARS_MAX: Final = 1024
_PROMPTS_MAX: Final = 32
IDS_MAX: Final = 1 << 18
"""In a body: the longest context of a served family. To check so many takes the event loop 30 ms."""
_SEED_MIN, _SEED_MAX = -(1 << 63), (1 << 63) - 1
_TOKEN_ID_MAX: Final = (1 << 31) - 1
_BIASES_MAX: Final = 1024
_PRIORITY_MAX: Final = 1000


def _only(*neutral: object) -> AfterValidator:
    """A field that is not served: any other value than these (or null) is refused."""

    def check(value: object) -> object:
        if value is None or any(type(value) is type(n) and value == n for n in neutral):
            return value
        raise ValueError(
            f"is not supported here: leave it out{f' or send {neutral[0]!r}' if neutral else ''}"
        )

    return AfterValidator(check)


def _listed(value: object) -> object:
    """`stop` may be one string or a list of them."""
    return [value] if isinstance(value, str) else value


def _not_empty(value: list[str]) -> list[str]:
    if "" in value:
        raise ValueError("an empty stop string would stop before the first token: leave it out")
    return value


def _text_of(content: object) -> object:
    """A message's content: a string, null, or a list of text parts (joined)."""
    if not isinstance(content, list):
        return content
    if not content:
        raise ValueError("an empty list has no text: send a string, or a part")
    texts = [
        part["text"]
        for part in content
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    ]
    if len(texts) != len(content):
        raise ValueError('only parts of {"type": "text", "text": "..."} are served')
    return "".join(texts)


def _said(content: str | None, info: ValidationInfo) -> str | None:
    """Only an assistant may have said nothing."""
    if content is None and info.data.get("role") != "assistant":
        raise ValueError("is required: send the message's text")
    return content


def _only_streamed(options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
    if options is not None and not info.data.get("stream"):
        raise ValueError("is only allowed with stream true: leave it out or stream")
    return options


def _only_with_logprobs(top: int | None, info: ValidationInfo) -> int | None:
    if top is not None and not info.data.get("logprobs"):
        raise ValueError("is only allowed with logprobs true: leave it out or ask for logprobs")
    return top


def _token_keys(biases: dict[str, float]) -> dict[str, float]:
    """JSON's keys are strings; these are token ids written out."""
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) <= _TOKEN_ID_MAX):
            raise ValueError(f"has the key {key[:20]!r}: its keys are token ids, as /tokenize tells them")
    return biases


def _prompts(prompt: object) -> object:
    """A prompt is a string, a list of strings, a list of token ids, or a list of such lists: to the last form
    or to strings, always as a list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and _ids_of(prompt) > IDS_MAX:  # counted before anything looks at each
        raise ValueError(f"has more than {IDS_MAX} token ids: send fewer")
    if isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt):
        return [prompt]
    if isinstance(prompt, list) and 0 < len(prompt) <= _PROMPTS_MAX and all(map(_is_prompt, prompt)):
        return prompt
    raise ValueError(
        f"must be a string, a list of token ids (0 and up), or a list of 1 to {_PROMPTS_MAX} such prompts"
    )


def _ids_of(prompt: list[Any]) -> int:
    """How many ids it has at most, without looking at them."""
    return max(len(prompt), sum(len(item) for item in prompt[:_PROMPTS_MAX] if isinstance(item, list)))


def _is_prompt(item: object) -> bool:
    is_ids = isinstance(item, list) and bool(item) and all(type(i) is int for i in item)
    return isinstance(item, str) or is_ids


def _ids_in_range(prompts: list[str | list[int]]) -> list[str | list[int]]:
    for prompt in prompts:
        if not isinstance(prompt, str) and not all(0 <= token <= _TOKEN_ID_MAX for token in prompt):
            raise ValueError("token ids are numbers from 0 on")
    return prompts


def _unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no encoding can write and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not text") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
TokenIdField = Annotated[int, Field(ge=0, le=_TOKEN_ID_MAX)]
Prompts = Annotated[
    list[Annotated[Text | list[int], Field(union_mode="left_to_right")]],
    BeforeValidator(_prompts),
    AfterValidator(_ids_in_range),
]
StopStrings = Annotated[
    list[Annotated[Text, Field(max_length=_STOP_CHARS_MAX)]],
    Field(max_length=STOP_STRINGS_MAX),
    AfterValidator(_not_empty),
]


Penalty = Annotated[float, Field(ge=-2, le=2)]
Biases = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=_BIASES_MAX),
    AfterValidator(_token_keys),
]
TopLogprobs = Annotated[int, Field(ge=0, le=LOGPROBS_MAX)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool | None = None


class GenerationBody(_Body):
    """What chat and text completions share."""

    model: Annotated[Text, Field(max_length=512)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=_TOKEN_ID_MAX)] = None  # 0, -1: all
    seed: Annotated[int | None, Field(ge=_SEED_MIN, le=_SEED_MAX)] = None
    stop: Annotated[StopStrings | None, BeforeValidator(_listed)] = None
    stop_token_ids: Annotated[list[TokenIdField] | None, Field(max_length=64)] = None
    ignore_eos: bool | None = None
    priority: Annotated[int | None, Field(ge=-_PRIORITY_MAX, le=_PRIORITY_MAX)] = None  # lower goes first
    deadline_s: Annotated[float | None, Field(gt=0)] = None  # to the first token
    stream: bool | None = None
    stream_options: Annotated[StreamOptions | None, AfterValidator(_only_streamed)] = None
    return_token_ids: bool | None = None

    n: Annotated[int | None, Field(ge=1, le=CHOICES_MAX)] = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    min_tokens: Annotated[int | None, Field(ge=0)] = None
    logit_bias: Biases | None = None

    best_of: Annotated[Any, _only(1)] = None
    use_beam_search: Annotated[Any, _only(False)] = None
    prompt_logprobs: Annotated[Any, _only()] = None
    allowed_token_ids: Annotated[Any, _only()] = None
    bad_words: Annotated[Any, _only([])] = None
    include_stop_str_in_output: Annotated[Any, _only(False)] = None
    skip_special_tokens: Annotated[Any, _only(True)] = None
    structured_outputs: Annotated[Any, _only()] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None

    @property
    def tokens_max(self) -> int | None:
        return self.max_tokens

    @property
    def logprobs_top(self) -> int | None:
        """How many of the most probable tokens are told beside each one drawn; None: no logprobs at all."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


Role = Literal["system", "developer", "user", "assistant"]


class ChatMessage(_Body):
    role: Role
    content: Annotated[
        Text | None, BeforeValidator(_text_of), AfterValidator(_said), Field(validate_default=True)
    ] = None
    tool_calls: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only()] = None

    def for_template(self) -> dict[str, str]:
        """`developer` is OpenAI's newer word for `system`; templates know the older one."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content or ""}


class ChatBody(GenerationBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None

    logprobs: bool | None = None
    top_logprobs: Annotated[TopLogprobs | None, AfterValidator(_only_with_logprobs)] = None
    tools: Annotated[Any, _only([])] = None
    functions: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    modalities: Annotated[Any, _only(["text"])] = None

    @property
    def tokens_max(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprobs_top(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionBody(GenerationBody):
    prompt: Prompts

    logprobs: TopLogprobs | None = None
    echo: Annotated[Any, _only(False)] = None
    suffix: Annotated[Any, _only("")] = None

    @property
    def logprobs_top(self) -> int | None:
        return self.logprobs


class TokenizeBody(_Body):
    """Either a prompt, or messages that the model's chat template renders."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage] | None, Field(min_length=1)] = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(_Body):
    model: Text | None = None
    tokens: Annotated[list[TokenIdField], Field(max_length=IDS_MAX)]
