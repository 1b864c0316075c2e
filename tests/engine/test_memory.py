"""Promise: paging holds at least twice the requests of fixed pieces, in 30 % less; waste is under a block.

Over lengths drawn as the public traces have them: many short, few long.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from benchmarks.memory import BLOCK_TOKENS, measure, report


def test_paging_holds_what_the_benchmark_claims(tmp_path: Path) -> None:
    draw = random.Random(7)
    trace = tmp_path / "trace.jsonl"
    rows = [
        {
            "input_length": (length := min(4000, int(draw.lognormvariate(5.5, 1.1)) + 1)),
            "output_length": min(300, int(draw.lognormvariate(3.0, 0.8)) + 1),
            "hash_ids": [draw.randrange(4), *range(100 * i, 100 * i + length // 512)],
        }
        for i in range(120)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    found = measure(trace, 120, 4)
    assert found["saved_mean"] > 0.3
    assert found["saved_peak"] > 0.3
    assert found["paged_requests_ratio"] > 2
    assert found["paged_requests_shared"] >= found["paged_requests"] * 0.95
    assert found["waste_tokens_max"] < BLOCK_TOKENS
    assert "times as many" in report(found)
