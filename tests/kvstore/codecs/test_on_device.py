"""The GPU's kernels, in Triton's interpreter, give the CPU's bits: codes and decoded values."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from kvstore.codecs import on_device
from kvstore.errors import ConfigError
from kvstore.nouns import KVLayout
from tests.house.sources import REPO
from tests.kvstore.codecs.matrix import LOSSY, encoded, kv_like, kv_of, payload_of


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.kvstore.codecs.in_interpreter"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_every_bit_is_the_cpus(found: dict[str, Any]) -> None:
    assert found["different"] == []


def test_every_codec_was_looked_at(found: dict[str, Any]) -> None:
    assert found["seen"] == dict.fromkeys((codec.name for codec in LOSSY), 15)


def test_sizes_that_no_tile_has_are_refused_by_name() -> None:
    layout = KVLayout(1, 0, 1, 48, "float32")
    kv = torch.zeros(1, 2, 32, 1, 48)
    with pytest.raises(ConfigError, match="powers of two"):
        on_device.encode(LOSSY[0], layout, kv)


def test_kv_it_cannot_stand_for_is_not_encoded() -> None:
    layout = KVLayout(1, 0, 1, 32, "float32", 8)
    kv = kv_like(layout)
    kv[0, 0, 0, 0, 0] = float("nan")
    assert all(on_device.encode(codec, layout, kv) is None for codec in LOSSY)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("codec", LOSSY, ids=lambda codec: codec.name)
def test_a_gpu_gives_the_cpus_bits(codec: Any) -> None:
    layout = KVLayout(4, 0, 2, 64, "bfloat16")
    payload = payload_of(kv_like(layout), layout)
    wanted = encoded(codec, layout, payload)
    made = on_device.encode(codec, layout, kv_of(payload, layout).cuda())
    assert made is not None
    assert bytes(made.cpu().numpy()) == bytes(wanted)
