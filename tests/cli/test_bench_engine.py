"""`kvstrata bench engine`: the JSON's shape is a contract; who is not there is named, with a reason."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.serving import command
from tests.tiny_model import make_tiny_model

END_S = 100


def test_a_quick_run_prints_the_one_document(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny", max_position_embeddings=512)
    nowhere = ("--vllm-venv", str(tmp_path / "nowhere"))
    asked = command(
        "bench", "engine", "--quick", "--json", "--model", str(folder), "--threads", "1", *nowhere
    )
    ran = subprocess.run(asked, capture_output=True, text=True, timeout=END_S, check=False)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert set(document) == {"prefill_s", "decode_tok_s", "engines", "dtype", "threads", "rounds"}
    for figures, names in ((document["prefill_s"], ["16", "32"]), (document["decode_tok_s"], ["1", "2x16"])):
        assert set(figures) == {"kvstrata", "vllm", "transformers"}
        assert figures["vllm"] is None
        for engine in ("kvstrata", "transformers"):
            assert set(figures[engine]) == {n + suffix for n in names for suffix in ("", "_min", "_max")}
            for name in names:
                assert 0 < figures[engine][f"{name}_min"] <= figures[engine][name]
    assert document["engines"]["vllm"].startswith("absent: not installed in")


def test_a_model_that_is_not_there_is_told() -> None:
    asked = command("bench", "engine", "--quick", "--no-peers", "--json", "--model", "gpt-17")
    ran = subprocess.run(asked, capture_output=True, text=True, timeout=END_S, check=False)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert "gpt-17" in ran.stderr
