"""A vLLM engine as a process, asked by JSON lines. It runs in vLLM's environment.

The engine's core is in this process too, so that a test may look at both halves of the connector and steps
one by one. Nothing here knows our connector: it comes by the transfer configuration, as for any user.
"""

from __future__ import annotations

from typing import Any

from cli.bench.jsonlines import answer
from cli.bench.peers.vllm_cpu import prepare_vllm

_llm: list[Any] = []


def start(folder: str, transfer: dict[str, Any] | None, options: dict[str, Any]) -> dict[str, Any]:
    prepare_vllm()
    from vllm import LLM
    from vllm.config import KVTransferConfig

    configured = KVTransferConfig(**transfer) if transfer is not None else None
    llm = LLM(
        model=folder, enforce_eager=True, seed=0, kv_transfer_config=configured,
        skip_tokenizer_init=True, **options,
    )  # fmt: skip
    _llm[:] = [llm]
    cache = llm.llm_engine.vllm_config.cache_config
    return {"block_size": cache.block_size, "blocks": cache.num_gpu_blocks}


def add(requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Each: id, prompt, tokens (how many to draw); params: kv_transfer_params; salt: cache_salt."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    for asked in requests:
        extra = {"kv_transfer_params": asked["params"]} if asked.get("params") else None
        sampling = SamplingParams(
            temperature=0.0, max_tokens=asked["tokens"], ignore_eos=True, extra_args=extra, detokenize=False
        )
        prompt = TokensPrompt(prompt_token_ids=asked["prompt"])
        if asked.get("salt"):
            prompt["cache_salt"] = asked["salt"]
        _engine().add_request(asked["id"], prompt, sampling)
    return {}


def step(count: int) -> dict[str, Any]:
    """At most so many steps; what finished in them."""
    finished: list[dict[str, Any]] = []
    for _ in range(count):
        if not _engine().has_unfinished_requests():
            break
        for output in _engine().step():
            if output.finished:
                (choice,) = output.outputs
                finished.append(
                    {
                        "id": output.request_id,
                        "tokens": list(choice.token_ids),
                        "cached": output.num_cached_tokens,
                        "finish": choice.finish_reason,
                        "params": output.kv_transfer_params,
                    }
                )
    return {"finished": finished, "unfinished": _engine().has_unfinished_requests()}


def idle(count: int) -> dict[str, Any]:
    for _ in range(count):
        _engine().step()
    return {}


def abort(ids: list[str]) -> dict[str, Any]:
    _engine().abort_request(ids)
    return {}


def reset(connector: bool, running: bool) -> dict[str, Any]:
    """vLLM's own prefix cache goes; `connector`: its caches are told, too, as after new weights."""
    return {"done": _engine().reset_prefix_cache(running, connector)}


def perturb(seed: int) -> dict[str, Any]:
    """Other weights in place, as a trainer writes them: every matrix is scaled by noise drawn from `seed`,
    from what the folder holds; 0 is the folder's own."""
    import torch

    def change(model: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                whole = _original.setdefault(name, parameter.detach().clone())
                noise = torch.randn(whole.shape, generator=generator) * (0.3 if seed else 0.0)
                parameter.copy_(whole * (1 + noise).to(whole.dtype))

    _engine().apply_model(change)
    return {}


def reload(folder: str) -> dict[str, Any]:
    """Other weights from a folder, by vLLM's own way: a collective call that every worker takes."""
    _engine().collective_rpc("reload_weights", kwargs={"weights_path": folder})
    return {}


def counters() -> dict[str, Any]:
    """Numbers of Prometheus' whole table that are not vLLM's own, and what both halves of vLLM still hold."""
    from prometheus_client import REGISTRY

    found: dict[str, float] = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if "kvstrata" in sample.name and not sample.name.endswith("_created"):
                labels = ",".join(
                    f"{k}={v}" for k, v in sorted(sample.labels.items()) if k not in _VLLM_LABELS
                )
                found[f"{sample.name}{{{labels}}}"] = sample.value
    return {"counters": found}


def held() -> dict[str, Any]:
    """What both halves of the connector, and vLLM's pool, hold for requests. All 0: nothing leaked."""
    from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group

    core = _engine().engine_core.engine_core.scheduler
    scheduling, worker = core.connector._scheduling, get_kv_transfer_group()._worker
    pool = core.kv_cache_manager.block_pool
    staging = {"loads": worker._loader._staging, "saves": worker._saver._staging}
    return {
        "requests": len(scheduling._requests) + len(scheduling._gone_loading),
        "look-ups": scheduling._asked,
        **{f"staged for {what}": of.slots - len(of._free) for what, of in staging.items()},
        "vLLM's blocks": pool.num_gpu_blocks - pool.get_num_free_blocks() - 1,  # one is a placeholder
    }


_VLLM_LABELS = ("engine", "model_name")
_original: dict[str, Any] = {}


def _engine() -> Any:
    (llm,) = _llm
    return llm.llm_engine


if __name__ == "__main__":
    handlers = (start, add, step, idle, abort, reset, perturb, reload, counters, held)
    answer({handler.__name__: handler for handler in handlers})
