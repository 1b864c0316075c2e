"""What the routes stand on: one served model, the orchestrator, and the service around them.

Everything a route needs is reached through a `Backend`, so that tests put a scripted fleet behind the same
routes.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from engine.sampling.noise import choice_seed
from engine.tokenizer import Tokenizer
from engine.types import SamplingParams
from kvstore.clock import Clock
from router.api.schemas import ChatBody, ChatMessage, CompletionBody, GenerationBody
from router.attempts import Job
from router.errors import BadRequest, ModelUnknown
from router.metrics import RouterMetrics
from router.orchestrator import Orchestrator
from router.updating import WantedWeights

__all__ = ["Backend", "Operations"]

_COMPLETION_TOKENS: Final = 16
"""What OpenAI's text completions generate when they are not told."""
_SEED_BITS: Final = 64
_TOKEN_CHARS_MAX: Final = 128
"""About the longest token a vocabulary has: a run of blanks."""


class Operations(Protocol):
    """The service around the workers: who runs them, and what is known of them."""

    def not_ready(self) -> str | None:
        """Why requests cannot be served now; None when they can."""
        ...

    async def gather(self) -> None:
        """Bring the metrics' totals up to date with workers and shards. Bounded; who is late is left out."""
        ...

    async def status(self) -> dict[str, Any]:
        """For `kvstrata status`: plain JSON."""
        ...

    async def update_weights(self, wanted: WantedWeights) -> dict[str, Any]:
        """For `kvstrata weights update`: what happened, as plain JSON. Raises errors of KVStrataError's tree;
        then nothing has changed."""
        ...


@dataclass(frozen=True, slots=True)
class Backend:
    model: str  # the name it is served under
    created: int  # Unix seconds
    tokenizer: Tokenizer
    orchestrator: Orchestrator
    metrics: RouterMetrics
    operations: Operations
    clock: Clock
    max_tokens_default: int = 1024
    """Of a chat that does not say. OpenAI's own default, the whole context, would be set aside in decode's
    pool for every chat: a few of them would fill it."""

    send_timeout_s: float = 60.0
    """For a client to take a piece of its answer."""

    def check_model(self, name: str | None) -> None:
        """Raises ModelUnknown. Null is allowed where OpenAI's surface has no model field."""
        if name is not None and name != self.model:
            raise ModelUnknown(
                f"The model `{name}` does not exist. This service has `{self.model}`",
                param="model",
                code="model_not_found",
            )

    @property
    def max_model_len(self) -> int:
        return self.orchestrator.fleet.max_model_len

    async def chat_ids(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The rendered chat's ids, computed beside the event loop: a long prompt takes milliseconds."""
        self._check_length(sum(len(message.content or "") for message in messages), "messages")
        rendered = [message.for_template() for message in messages]
        return await asyncio.to_thread(self.tokenizer.encode_chat, rendered)

    async def text_ids(self, text: str, *, add_special: bool = True) -> list[int]:
        self._check_length(len(text), "prompt")
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special=add_special)

    def _check_length(self, chars: int, field: str) -> None:
        """Raises BadRequest for a text that no context can hold, before it costs a second to tokenise it."""
        limit = self.max_model_len
        if chars > limit * _TOKEN_CHARS_MAX:
            raise BadRequest(
                f"This model's context is {limit} tokens, and {field} has {chars} characters: far more than "
                f"fit. Shorten {field}",
                param=field,
                code="context_length_exceeded",
            )

    async def chat_jobs(self, body: ChatBody) -> list[Job]:
        """One a choice. Raises RequestError for an unknown model, too long a prompt, what does not fit it."""
        self.check_model(body.model)
        ids = await self.chat_ids(body.messages)
        return self._jobs("chatcmpl", ids, body, self.max_tokens_default, "messages")

    async def completion_jobs(self, body: CompletionBody) -> list[Job]:
        """One a prompt and choice, the choices of a prompt side by side."""
        self.check_model(body.model)
        jobs: list[Job] = []
        for prompt in body.prompt:
            ids = await self.text_ids(prompt) if isinstance(prompt, str) else prompt
            if any(token >= self.tokenizer.vocab_size for token in ids):
                raise BadRequest(
                    f"prompt: token ids of this model are below {self.tokenizer.vocab_size}", param="prompt"
                )
            jobs.extend(self._jobs("cmpl", ids, body, _COMPLETION_TOKENS, "prompt"))
        return jobs

    def _jobs(
        self, prefix: str, ids: Sequence[int], body: GenerationBody, tokens_default: int, field: str
    ) -> list[Job]:
        room = self._room(ids, body, field)
        sampling = self._sampling(body, body.tokens_max or min(tokens_default, room))
        prompt_ids = tuple(ids)  # one for all choices
        seeds = (choice_seed(sampling.seed, choice) for choice in range(body.n or 1))
        return [
            Job(
                f"{prefix}-{secrets.token_hex(12)}",
                prompt_ids,
                replace(sampling, seed=seed),
                priority=body.priority or 0,
                deadline_s=body.deadline_s,
            )
            for seed in seeds
        ]

    def _sampling(self, body: GenerationBody, tokens: int) -> SamplingParams:
        biases = tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items())
        if any(token >= self.tokenizer.vocab_size for token, _ in biases):
            raise BadRequest(
                f"logit_bias: token ids of this model are below {self.tokenizer.vocab_size}",
                param="logit_bias",
            )
        if (body.min_tokens or 0) > tokens:
            raise BadRequest(
                f"min_tokens: {body.min_tokens} are more than the {tokens} that may be generated: lower it",
                param="min_tokens",
            )
        return SamplingParams(
            max_tokens=tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(body.top_k or 0, 0),
            seed=secrets.randbits(_SEED_BITS) if body.seed is None else body.seed % (1 << _SEED_BITS),
            stop=tuple(body.stop or ()),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            min_p=body.min_p or 0.0,
            min_tokens=body.min_tokens or 0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=biases,
            logprobs=body.logprobs_top,
        )

    def _room(self, ids: Sequence[int], body: GenerationBody, field: str) -> int:
        """Tokens that may be generated after the prompt."""
        if not ids:
            raise BadRequest(f"{field}: the prompt has no tokens: send some text", param=field)
        limit = self.max_model_len
        wanted = body.tokens_max or 1
        if len(ids) + wanted > limit:
            asked = f" and {wanted} to generate" if body.tokens_max else ""
            raise BadRequest(
                f"This model's context is {limit} tokens; the request has {len(ids)} in {field}{asked}. "
                f"Shorten {field}" + (" or ask for fewer tokens" if body.tokens_max else ""),
                param=field,
                code="context_length_exceeded",
            )
        return limit - len(ids)
