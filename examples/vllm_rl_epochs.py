"""Weights change under a running vLLM, as in reinforcement learning: no stale hit, and nothing is flushed.

    kvstrata store &                                             # in kvstrata's environment
    PYTHONPATH=. python examples/vllm_rl_epochs.py MODEL_FOLDER  # in vLLM's

Each round draws rollouts of prompts that share a long beginning, changes the weights in place, as a trainer
that writes into vLLM's memory does, and says so in three calls: register the new weights' digest, advance the
model's epoch, reset vLLM's caches. No request may run between the change and the reset: it would save new KV
as old. Here none does, between two rounds; a server is paused before, and resumed after. From then on KV of
the old weights is not seen. It stays where it is: an engine that still serves the old weights hits it, and
its room is taken when somebody needs it.

What is checked: the first rollouts after a change hit nothing; they say what they say with a salt that nobody
else has, which no cache can answer; and once vLLM has forgotten them, they come from the store.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that the weights are in reach
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # on shared cores threads that spin cost ten times as much

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.inputs import TokensPrompt

from kvstore import Epoch
from kvstore.nouns import WeightsDigest
from kvstore.sync import StoreClient

SHARED_TOKENS: Final = 256  # what all prompts begin with
OWN_TOKENS: Final = 24
PROMPTS: Final = 4
LEARNING_RATE: Final = 0.02


def prompts(vocabulary: int) -> list[list[int]]:
    shared = [3 + 7 * i % (vocabulary - 3) for i in range(SHARED_TOKENS)]
    return [shared + [3 + (11 * i + n) % (vocabulary - 3) for i in range(OWN_TOKENS)] for n in range(PROMPTS)]


def rollouts(llm: LLM, asked: Sequence[list[int]], salt: str = "") -> tuple[list[list[int]], int]:
    """Greedy, so that they can be compared; and how many prompt tokens were not computed."""
    sampling = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    given = [TokensPrompt(prompt_token_ids=ids) for ids in asked]
    if salt:
        for prompt in given:
            prompt["cache_salt"] = salt
    # One by one: of prompts drawn together, the later ones hit what the first has just computed.
    answers = [llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in given]
    return [list(a.outputs[0].token_ids) for a in answers], answers[0].num_cached_tokens or 0


def train(llm: LLM, step: int) -> WeightsDigest:
    """Stands for a trainer: moves every matrix, and names what came out by a digest of all of it."""
    import torch

    def update(model: Any) -> bytes:
        generator, digest = torch.Generator().manual_seed(step), hashlib.sha256()
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if step and parameter.dim() > 1:
                    parameter.mul_(1 + LEARNING_RATE * torch.randn(parameter.shape, generator=generator))
                digest.update(name.encode() + parameter.detach().cpu().float().numpy().tobytes())
        return digest.digest()

    return WeightsDigest(llm.apply_model(update)[0][:16])


def announce(store: StoreClient, model_id: str, digest: WeightsDigest) -> int:
    """The new weights count from here on. O(1), whatever the store holds."""
    known = store.epochs(model_id)
    numbers = (epoch.number for shard in known.values() for epoch in shard.registered)
    number = 1 + max(numbers, default=0)
    store.register_epoch(model_id, Epoch(number, digest))
    store.advance_epoch(model_id, number)
    return number


def main() -> int:
    options = argparse.ArgumentParser(
        description="Weights change under a running vLLM: no stale hit, no flush."
    )
    options.add_argument("model", help="a model's folder")
    options.add_argument("--store", default="default", help="name of a store that `kvstrata store` runs here")
    options.add_argument("--model-id", default="rl-example", help="the name KV is stored under")
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--dtype", default="float32")
    said = options.parse_args()
    with StoreClient.connect_running(said.store, admin=True) as store:
        return run(said, store)


def run(said: argparse.Namespace, store: StoreClient) -> int:
    transfer = KVTransferConfig(
        kv_connector="KVStrataConnector",
        kv_connector_module_path="kvstore.integrations.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"store": said.store, "model_id": said.model_id, "epoch": "store"},
    )
    llm = LLM(
        model=said.model, dtype=said.dtype, max_model_len=1024, enforce_eager=True, skip_tokenizer_init=True,
        kv_transfer_config=transfer,
    )  # fmt: skip
    asked = prompts(llm.model_config.get_vocab_size())
    stale = 0
    print("epoch  weights   hit at first  hit from the store  says what no cache says  blocks in the store")
    for step in range(said.rounds):
        # Nothing is in flight. A server is paused here, and resumed after the reset.
        digest = train(llm, step)
        number = announce(store, said.model_id, digest)
        llm.reset_prefix_cache(reset_connector=True)  # vLLM's own cache, and the connector's epoch
        first, at_first = rollouts(llm, asked)
        fresh, _ = rollouts(llm, asked, salt=f"round {step}")
        llm.reset_prefix_cache()  # vLLM's own cache alone: what is hit now comes from the store
        again, from_store = rollouts(llm, asked)
        equal = first == fresh == again
        stale += bool(at_first) + (not equal)
        blocks = sum(status.versions for status in store.status())
        columns = (f"{number:>5}", digest.hex()[:8], f"{at_first:>12}", f"{from_store:>18}")
        print(*columns, f"{'yes' if equal else 'NO':>23}", f"{blocks:>19}", sep="  ", flush=True)
    print("no stale hit" if not stale else f"{stale} answers rest on other weights' KV", flush=True)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
