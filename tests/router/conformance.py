"""What any live service must do for the official `openai` client; asked of scripted and of real workers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

TIMEOUT_S = 60.0
HELLO: list[Any] = [{"role": "user", "content": "Say something about the sea."}]


def client(url: str, key: str = "unused") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT_S)


class Conformance:
    """Subclasses give the fixtures `url` and `model`."""

    def test_chat_answers_with_usage(self, url: str, model: str) -> None:
        with client(url) as openai_client:
            answer = openai_client.chat.completions.create(
                model=model, messages=HELLO, max_tokens=12, temperature=0
            )
        assert answer.object == "chat.completion"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens is not None
        extra = (answer.model_extra or {})["kvstrata"]
        assert set(extra) == {"ttft_ms", "cached_by_tier", "misses", "epochs"}
        assert extra["ttft_ms"] > 0

    def test_streamed_chat_is_the_same_answer(self, url: str, model: str) -> None:
        ask: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 12, "temperature": 0}
        with client(url) as openai_client:
            whole = openai_client.chat.completions.create(**ask)
            stream = openai_client.chat.completions.create(
                **ask, stream=True, stream_options={"include_usage": True}
            )
            chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert whole.usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert all(chunk.usage is None for chunk in chunks[:-1])

    async def test_async_client_streams(self, url: str, model: str) -> None:
        async with AsyncOpenAI(
            base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=TIMEOUT_S
        ) as openai_client:
            stream = await openai_client.chat.completions.create(
                model=model, messages=HELLO, max_tokens=6, temperature=0, stream=True
            )
            chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert all(chunk.usage is None for chunk in chunks)

    def test_text_completions_take_strings_lists_and_ids(self, url: str, model: str) -> None:
        with client(url) as openai_client:
            for prompt in ("The sea", ["The sea", "The land"], [5, 6, 7], [[5, 6], [7, 8]]):
                answer = openai_client.completions.create(
                    model=model, prompt=prompt, max_tokens=3, temperature=0
                )
                prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
                assert [choice.index for choice in answer.choices] == list(range(prompts))
            stream = openai_client.completions.create(
                model=model, prompt=["a", "b"], max_tokens=3, temperature=0, stream=True
            )
            finished = {c.index for chunk in stream for c in chunk.choices if c.finish_reason}
        assert finished == {0, 1}

    def test_a_seed_repeats_an_answer(self, url: str, model: str) -> None:
        ask: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 8, "seed": -7}
        with client(url) as openai_client:
            answers = [openai_client.chat.completions.create(**ask, temperature=1.3) for _ in range(2)]
        assert answers[0].choices[0].message.content == answers[1].choices[0].message.content

    def test_choices_are_told_apart_and_the_first_is_what_one_alone_would_be(
        self, url: str, model: str
    ) -> None:
        ask: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 6, "seed": 3}
        with client(url) as openai_client:
            alone = openai_client.chat.completions.create(**ask)
            three = openai_client.chat.completions.create(**ask, n=3)
            chunks = list(
                openai_client.chat.completions.create(
                    **ask, n=3, stream=True, stream_options={"include_usage": True}
                )
            )
        assert [choice.index for choice in three.choices] == [0, 1, 2]
        assert three.choices[0].message.content == alone.choices[0].message.content
        texts = ["", "", ""]
        for choice in (choice for chunk in chunks for choice in chunk.choices):
            texts[choice.index] += choice.delta.content or ""
        assert texts == [choice.message.content for choice in three.choices]
        assert three.usage is not None
        assert alone.usage is not None
        assert three.usage.prompt_tokens == alone.usage.prompt_tokens
        assert alone.usage.completion_tokens < three.usage.completion_tokens <= 18
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == three.usage.completion_tokens

    def test_choices_of_several_prompts_stand_side_by_side(self, url: str, model: str) -> None:
        ask: dict[str, Any] = {"model": model, "max_tokens": 3, "temperature": 0, "n": 2}
        with client(url) as openai_client:
            answer = openai_client.completions.create(prompt=["The sea", "A"], **ask)
            one = openai_client.completions.create(prompt=["A"], **ask)
            stream = openai_client.completions.create(prompt=["The sea", "A"], **ask, stream=True)
            finished = {c.index for chunk in stream for c in chunk.choices if c.finish_reason}
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.choices[2].text == answer.choices[3].text == one.choices[0].text
        assert finished == {0, 1, 2, 3}

    def test_chat_logprobs_stand_beside_the_tokens_whole_and_streamed(self, url: str, model: str) -> None:
        ask: dict[str, Any] = {
            "model": model,
            "messages": HELLO,
            "max_tokens": 6,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 2,
        }
        with client(url) as openai_client:
            (choice,) = openai_client.chat.completions.create(**ask).choices
            chunks = [c.choices[0] for c in openai_client.chat.completions.create(**ask, stream=True)]
        assert choice.logprobs is not None
        assert choice.logprobs.content
        said = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
        assert said.decode(errors="replace") == choice.message.content
        for token in choice.logprobs.content:
            assert token.logprob <= 0.0
            assert token.top_logprobs[0].token == token.token, "greedy draws the first"
            assert len(token.top_logprobs) == 2
            assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        streamed = [token for c in chunks if c.logprobs for token in c.logprobs.content or []]
        assert [t.token for t in streamed] == [t.token for t in choice.logprobs.content]
        assert all(
            a.logprob == pytest.approx(b.logprob, abs=1e-4)
            for a, b in zip(streamed, choice.logprobs.content, strict=True)
        )

    def test_completion_logprobs_have_the_older_shape(self, url: str, model: str) -> None:
        ask: dict[str, Any] = {
            "model": model,
            "prompt": "The sea",
            "max_tokens": 4,
            "temperature": 0,
            "logprobs": 2,
        }
        with client(url) as openai_client:
            (choice,) = openai_client.completions.create(**ask).choices
            stream = openai_client.completions.create(**ask, stream=True)
            streamed = [c.choices[0].logprobs for c in stream if c.choices[0].logprobs]
            bare = openai_client.completions.create(**ask | {"logprobs": 0}).choices[0].logprobs
        told = choice.logprobs
        assert told is not None
        assert told.tokens
        assert "".join(told.tokens) == choice.text
        assert told.text_offset == [len("".join(told.tokens[:n])) for n in range(len(told.tokens))]
        assert told.top_logprobs is not None
        assert told.token_logprobs is not None
        for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
            assert len(top) == 2
            assert top[token] == logprob == max(top.values())
        assert [offset for one in streamed for offset in one.text_offset or []] == told.text_offset
        assert [token for one in streamed for token in one.tokens or []] == told.tokens
        assert bare is not None
        assert bare.top_logprobs is not None
        assert [len(top) for top in bare.top_logprobs] == [1] * len(told.tokens)

    def test_every_sampling_field_is_taken(self, url: str, model: str) -> None:
        extra = {
            "top_k": 20,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "ignore_eos": False,
            "stop_token_ids": [7],
        }
        with client(url) as openai_client:
            answer = openai_client.chat.completions.create(
                model=model,
                messages=HELLO,
                max_tokens=4,
                temperature=0.9,
                top_p=0.9,
                presence_penalty=0.5,
                frequency_penalty=-0.5,
                logit_bias={"9": -100, "10": 5},
                seed=1,
                stop=["never said"],
                n=1,
                extra_body=extra,
            )
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.choices[0].logprobs is None

    def test_max_completion_tokens_bounds_the_answer(self, url: str, model: str) -> None:
        with client(url) as openai_client:
            answer = openai_client.chat.completions.create(
                model=model, messages=HELLO, max_completion_tokens=2, extra_body={"ignore_eos": True}
            )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2
        assert answer.choices[0].finish_reason == "length"

    def test_an_assistant_may_have_said_nothing(self, url: str, model: str) -> None:
        messages: list[Any] = [*HELLO, {"role": "assistant", "content": None}, *HELLO]
        with client(url) as openai_client:
            answer = openai_client.chat.completions.create(
                model=model, messages=messages, max_tokens=2, extra_body={"top_k": -1}
            )
        assert answer.choices[0].finish_reason in ("stop", "length")

    def test_models_are_listed_with_their_context(self, url: str, model: str) -> None:
        with client(url) as openai_client:
            (card,) = openai_client.models.list().data
            assert card.id == model
            assert (card.model_extra or {})["max_model_len"] > 0
            assert openai_client.models.retrieve(model).id == model

    def test_unknown_model_is_404(self, url: str) -> None:
        with client(url) as openai_client, pytest.raises(openai.NotFoundError) as caught:
            openai_client.chat.completions.create(model="nope", messages=HELLO)
        assert caught.value.code == "model_not_found"

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("temperature", 2.5),
            ("temperature", -0.1),
            ("temperature", "hot"),
            ("top_p", 0),
            ("top_p", 1.5),
            ("top_k", -2),
            ("max_tokens", 0),
            ("max_tokens", 1.5),
            ("n", 0),
            ("n", 129),
            ("n", 1.5),
            ("best_of", 2),
            ("structured_outputs", {"choice": ["a"]}),
            ("response_format", {"type": "json_object"}),
            ("prompt_logprobs", 1),
            ("presence_penalty", 2.1),
            ("frequency_penalty", -2.1),
            ("repetition_penalty", 0),
            ("min_p", 1.1),
            ("min_tokens", -1),
            ("min_tokens", 1 << 40),
            ("logit_bias", {"5": 101}),
            ("logit_bias", {"five": 1}),
            ("logit_bias", {"99999999": 1}),
            ("logit_bias", [5]),
            ("top_logprobs", 3),
            ("top_logprobs", 21),
            ("seed", 1 << 70),
            ("stop", ["a", "b", "c", "d", "e"]),
            ("stop", ""),
            ("stop", 5),
            ("logprobs", 3),
            ("messages", []),
            ("messages", "hello"),
            ("messages", [{"role": "wizard", "content": "x"}]),
            ("messages", [{"role": "user", "content": [{"type": "image_url"}]}]),
            ("messages", [{"role": "user", "content": "\ud800"}]),
            ("messages", [{"role": "user"}]),
            ("messages", [{"role": "system", "content": None}]),
            ("messages", [{"role": "user", "content": []}]),
            ("messages", [{"role": "assistant", "content": []}]),
            ("stream_options", {"include_usage": True}),
            ("tools", [{"type": "function"}]),
            ("stream", "yes"),
            ("stop_token_ids", [-1]),
        ],
    )
    def test_a_wrong_value_is_400_and_names_the_field(
        self, url: str, model: str, field: str, value: object
    ) -> None:
        body = json.dumps({"model": model, "messages": HELLO} | {field: value})
        headers = {"content-type": "application/json"}
        answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers, timeout=TIMEOUT_S)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"].startswith(field)
        assert error["message"].startswith(field)

    @pytest.mark.parametrize("body", [b"{", b"", b"[1]", b"\xff", b'{"model": NaN', b"[" * 60_000])
    def test_malformed_json_is_400(self, url: str, body: bytes) -> None:
        headers = {"content-type": "application/json"}
        answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers, timeout=TIMEOUT_S)
        assert answer.status_code == 400
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    def test_too_long_a_prompt_says_the_limit_and_the_length(self, url: str, model: str) -> None:
        with client(url) as openai_client:
            (card,) = openai_client.models.list().data
            limit = (card.model_extra or {})["max_model_len"]
            with pytest.raises(openai.BadRequestError) as caught:
                openai_client.completions.create(model=model, prompt=[5] * (limit + 3), max_tokens=1)
        assert caught.value.code == "context_length_exceeded"
        assert str(limit) in str(caught.value)
        assert str(limit + 3) in str(caught.value)

    def test_tokenize_and_detokenize_are_inverse(self, url: str, model: str) -> None:
        tokens = httpx.post(f"{url}/tokenize", json={"model": model, "prompt": "The sea"}).json()
        assert tokens["count"] == len(tokens["tokens"])
        text = httpx.post(f"{url}/detokenize", json={"model": model, "tokens": tokens["tokens"]}).json()
        assert text["prompt"] == "The sea"

    def test_token_ids_come_on_request(self, url: str, model: str) -> None:
        ask = {"model": model, "messages": HELLO, "max_tokens": 4, "temperature": 0, "return_token_ids": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=TIMEOUT_S).json()
        assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"]
        assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]

    def test_health_and_metrics(self, url: str) -> None:
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.content) == (200, b"")
        metrics = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).text
        for name in (
            "kvstrata_time_to_first_token_seconds_count",
            "kvstrata_verified_blocks_total",
            "kvstrata_ownerless_bytes 0.0",
            "kvstrata_prompt_tokens_total",
        ):
            assert name in metrics

    def test_every_answer_has_a_request_id(self, url: str) -> None:
        own = httpx.get(f"{url}/health", headers={"X-Request-Id": "mine-1"})
        assert own.headers["x-request-id"] == "mine-1"
        assert httpx.get(f"{url}/nowhere").headers["x-request-id"]
