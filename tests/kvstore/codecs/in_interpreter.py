"""Every codec in Triton's interpreter beside the CPU, on ordinary and adversarial KV: differences as JSON.

A process of its own: triton must be imported with TRITON_INTERPRET set, and another test may have imported
it without.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from kvstore.codecs import on_device
from kvstore.nouns import KVLayout
from tests.kvstore.codecs.matrix import LOSSY, decoded, encoded, kv_like, kv_of, payload_of

LAYOUTS = [
    KVLayout(1, 0, 1, 32, "float32", 4),
    KVLayout(2, 0, 1, 16, "bfloat16", 4),
    KVLayout(1, 0, 2, 16, "float16", 16),
]


def payloads(layout: KVLayout) -> dict[str, torch.Tensor]:
    kv = kv_like(layout, 7)
    tiny, huge, mixed = kv * 2.0**-125, kv.clamp(-4, 4) * 2.0**97, kv.clone()
    mixed[..., ::3] = 0.0
    mixed[..., 1::5] *= 2.0**-40
    constant = kv.clone()
    constant[..., :] = kv[:, :, :1]
    ties = torch.randint(-8, 8, kv.shape, generator=torch.Generator().manual_seed(1)).float() / 2
    found = {
        "like": kv,
        "tiny": tiny,
        "huge": huge,
        "mixed": mixed,
        "constant": constant,
        "ties": ties,
        "zeros": torch.zeros_like(kv),
        "minus": -kv.abs(),
        "alike": torch.full_like(kv, -3.7),
    }
    if layout.dtype == "float16":
        found["huge"] = kv.clamp(-4, 4) * 2.0**13
    if layout is not LAYOUTS[0]:
        found = {what: found[what] for what in ("like", "huge", "mixed")}
    return found


def main() -> None:
    different: list[str] = []
    seen: dict[str, int] = {}
    for layout in LAYOUTS:
        for codec in LOSSY:
            for what, kv in payloads(layout).items():
                payload = payload_of(kv, layout)
                wanted = encoded(codec, layout, payload)
                made = on_device.encode(codec, layout, kv_of(payload, layout))
                out = torch.empty_like(kv_of(payload, layout))
                on_device.decode(codec, layout, torch.frombuffer(bytearray(wanted), dtype=torch.uint8), out)
                back = out.view(torch.uint8).numpy().tobytes()
                case = f"{codec.name}, {what}, {layout.dtype}"
                if made is None or bytes(made.numpy()) != bytes(wanted):
                    different.append(f"codes of {case}")
                if back != bytes(decoded(codec, layout, wanted)):
                    different.append(f"values of {case}")
                seen[codec.name] = seen.get(codec.name, 0) + 1
    print(json.dumps({"seen": seen, "different": different}))


if __name__ == "__main__":
    main()
