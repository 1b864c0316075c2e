"""`kvstrata bench codec`: the JSON's shape is a contract; a codec that broke KV would show."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from cli.bench import codec as bench_codec
from cli.bench.codec import QUICK, Result, pydoc_topics, run
from cli.bench.codec_quality import Seen, divergence, first_divergence
from cli.bench.codec_report import document, draw
from cli.main import app
from kvstore.codecs import CODECS
from kvstore.codecs.int8 import Int8
from kvstore.nouns import KVLayout
from tests.tiny_model import make_tiny_model

ROW = {
    "name", "bits_per_element", "ppl_increase_pct", "divergence", "first_divergence", "kept_lossless",
    "encode_gb_s", "decode_gb_s", "decode_of_memcpy",
}  # fmt: skip


def silent(_step: str, _done: int, _total: int) -> None:
    """Nobody looks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return run(folder, pydoc_topics()[:4_000], QUICK, silent)


def test_the_document_has_a_row_for_each_codec(result: Result) -> None:
    said = document(result)
    assert set(said) == {"codecs", "memcpy_gb_s", "ppl_lossless", "tokens"}
    assert [row["name"] for row in said["codecs"]] == [name for name in CODECS if name != "lossless"]
    for row in said["codecs"]:
        assert set(row) == ROW
        assert row["bits_per_element"] == round(CODECS[row["name"]].bits_per_element(result.layout), 4)
        assert min(row["encode_gb_s"], row["decode_gb_s"], said["memcpy_gb_s"]) > 0
        assert abs(row["ppl_increase_pct"]) < 10, "a random model hardly notices"
        assert row["kept_lossless"] == 0


def test_the_table_names_every_codec(result: Result) -> None:
    out = io.StringIO()
    draw(result, Console(file=out, width=100))
    assert all(name in out.getvalue() for name in result.seen)


@dataclasses.dataclass(frozen=True, slots=True)
class Broken(Int8):
    """Decodes every block to zeros."""

    def decode(self, layout: KVLayout, encoded: memoryview, out: memoryview) -> None:
        out.cast("B")[:] = bytes(out.nbytes)


def test_a_codec_that_loses_everything_shows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_codec, "CODECS", {"int8": Broken()})
    found = run(folder, pydoc_topics()[:4_000], QUICK, silent)
    assert divergence(found.lossless, found.seen["int8"]) > 0.1


def test_divergence_counts_what_greedy_decoding_would_choose_otherwise() -> None:
    lossless = Seen(1.0, torch.zeros(2, 8, dtype=torch.int64), 0)
    greedy = lossless.greedy.clone()
    greedy[0, 1] = greedy[0, 6] = 1
    lossy = Seen(1.0, greedy, 0)
    assert divergence(lossless, lossless) == 0
    assert first_divergence(lossless, lossless) == 4, "none: the rest of the window"
    assert divergence(lossless, lossy) == 2 / 16
    assert first_divergence(lossless, lossy) == 3, "the median of 2 and, where there is none, 4"


def test_a_text_that_is_too_short_is_one_line(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    asked: list[Any] = ["bench", "codec", "--quick", "--model", str(folder), "--text", str(text)]
    ran = CliRunner().invoke(app, asked)
    assert ran.exit_code == 1
    assert "give a longer one" in ran.output


def test_speed_alone_needs_no_model() -> None:
    ran = CliRunner().invoke(app, ["bench", "codec", "--quick", "--speed-only", "--json"])
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    assert [row["name"] for row in said["codecs"]] == [name for name in CODECS if name != "lossless"]
    assert all(row["encode_gb_s"] > 0 and row["decode_of_memcpy"] > 0 for row in said["codecs"])


def test_speed_alone_is_a_table_for_people() -> None:
    ran = CliRunner().invoke(app, ["bench", "codec", "--quick", "--speed-only"])
    assert ran.exit_code == 0, ran.output
    rows = [line.split("│")[1].strip() for line in ran.stdout.splitlines() if "│" in line]
    assert rows == [*(name for name in CODECS if name != "lossless"), "memcpy"]
