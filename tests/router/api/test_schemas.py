"""Bodies that would cost the event loop or a tokenizer much are refused before they do."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from engine.sampling.noise import choice_seed
from router.api.app import build_app
from router.api.backend import Backend
from router.api.schemas import IDS_MAX, ChatBody, ChatMessage, CompletionBody, DetokenizeBody
from router.errors import BadRequest
from tests.router.fakes import MAX_MODEL_LEN, MODEL, fake_service

MANY = [5] * (IDS_MAX + 1)


@pytest.mark.parametrize("prompt", [MANY, [MANY[: IDS_MAX // 2 + 1]] * 2])
def test_too_many_ids_are_refused(prompt: object) -> None:
    with pytest.raises(ValidationError, match=f"more than {IDS_MAX} token ids"):
        CompletionBody.model_validate({"model": MODEL, "prompt": prompt})


def test_too_many_tokens_to_spell_are_refused() -> None:
    DetokenizeBody.model_validate({"tokens": MANY[:-1]})
    with pytest.raises(ValidationError, match=f"at most {IDS_MAX}"):
        DetokenizeBody.model_validate({"tokens": MANY})


def test_what_no_context_holds_is_refused_at_once() -> None:
    began = time.process_time()
    with pytest.raises(ValidationError):
        CompletionBody.model_validate({"model": MODEL, "prompt": [5] * 5_000_000})
    assert time.process_time() - began < 0.2


async def test_text_far_beyond_the_context_is_not_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = fake_service(tmp_path).backend

    def unreachable(*_: object, **__: object) -> list[int]:
        raise AssertionError

    monkeypatch.setattr(backend.tokenizer, "encode", unreachable)
    text = "a" * (MAX_MODEL_LEN * 128 + 1)
    with pytest.raises(BadRequest, match=r"context is 512 tokens.*Shorten prompt") as caught:
        await backend.text_ids(text)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(BadRequest, match="Shorten messages"):
        await backend.chat_ids([ChatMessage(role="user", content=text)])


async def test_spelling_tokens_leaves_the_event_loop_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: Backend = fake_service(tmp_path).backend
    threads: set[threading.Thread] = set()

    def spell(*_: object, **__: object) -> str:
        threads.add(threading.current_thread())
        return "a"

    monkeypatch.setattr(backend.tokenizer, "id_to_token", spell)
    monkeypatch.setattr(backend.tokenizer, "decode", spell)
    app = build_app(backend, api_key=None, body_nbytes_max=1024)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        asked = {"prompt": "The sea", "return_token_strs": True}
        strings = (await client.post("/tokenize", json=asked)).json()["token_strs"]
        assert set(strings) == {"a"}
        assert (await client.post("/detokenize", json={"tokens": [5]})).json() == {"prompt": "a"}
    assert threading.current_thread() not in threads


async def test_fields_of_sampling_arrive_as_they_are(tmp_path: Path) -> None:
    backend = fake_service(tmp_path).backend
    given = {
        "min_p": 0.1,
        "min_tokens": 3,
        "repetition_penalty": 1.2,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "logit_bias": {"7": -100, "9": 2.5},
        "logprobs": 4,
    }
    body = CompletionBody.model_validate({"model": MODEL, "prompt": "a"} | given)
    (job,) = await backend.completion_jobs(body)
    assert {name: getattr(job.sampling, name) for name in given} == given | {
        "logit_bias": ((7, -100.0), (9, 2.5))
    }


@pytest.mark.parametrize(
    ("asked", "told"), [({}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 5}, 5)]
)
async def test_a_chat_asks_for_logprobs_with_a_flag(
    tmp_path: Path, asked: dict[str, object], told: int | None
) -> None:
    messages = [{"role": "user", "content": "a"}]
    body = ChatBody.model_validate({"model": MODEL, "messages": messages} | asked)
    (job,) = await fake_service(tmp_path).backend.chat_jobs(body)
    assert job.sampling.logprobs == told


async def test_choices_have_ids_and_seeds_of_their_own_the_first_the_requests(tmp_path: Path) -> None:
    backend = fake_service(tmp_path).backend
    body = CompletionBody.model_validate({"model": MODEL, "prompt": ["a", "b"], "n": 3, "seed": 7})
    jobs = await backend.completion_jobs(body)
    assert [job.sampling.seed for job in jobs] == [choice_seed(7, choice) for choice in range(3)] * 2
    assert jobs[0].sampling.seed == 7
    assert len({job.request_id for job in jobs}) == 6
    assert [job.prompt_ids for job in jobs[:3]] == [jobs[0].prompt_ids] * 3


async def test_min_tokens_beyond_what_may_be_generated_are_refused(tmp_path: Path) -> None:
    body = CompletionBody.model_validate({"model": MODEL, "prompt": "a", "max_tokens": 4, "min_tokens": 5})
    with pytest.raises(BadRequest, match="min_tokens") as caught:
        await fake_service(tmp_path).backend.completion_jobs(body)
    assert caught.value.param == "min_tokens"


async def test_a_top_k_of_minus_one_means_all_as_in_vllm(tmp_path: Path) -> None:
    backend = fake_service(tmp_path).backend
    for given, meant in (-1, 0), (0, 0), (40, 40), (None, 0):
        body = CompletionBody.model_validate({"model": MODEL, "prompt": "a", "top_k": given})
        (job,) = await backend.completion_jobs(body)
        assert job.sampling.top_k == meant


async def test_priority_and_deadline_are_the_jobs(tmp_path: Path) -> None:
    backend = fake_service(tmp_path).backend
    body = CompletionBody.model_validate({"model": MODEL, "prompt": "a", "priority": -2, "deadline_s": 1.5})
    (job,) = await backend.completion_jobs(body)
    assert (job.priority, job.deadline_s) == (-2, 1.5)
