"""What a run of `kvstrata bench codec` found: one JSON document for scripts, a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvstore.codecs import CODECS

if TYPE_CHECKING:
    from rich.console import Console

    from cli.bench.codec import Result, Speed
    from cli.bench.figures import Spread


def document(result: Result) -> dict[str, Any]:
    """The JSON of `kvstrata bench codec --json`; its shape is a contract."""
    return {
        "codecs": [_codec(result, name) for name in result.seen],
        "memcpy_gb_s": round(result.memcpy.median, 4),
        "ppl_lossless": round(result.lossless.perplexity, 4),
        "tokens": result.plan.windows * result.plan.window_tokens,
    }


def speed_document(speeds: dict[str, Speed], memcpy: Spread) -> dict[str, Any]:
    """The JSON of `kvstrata bench codec --speed-only --json`; its shape is a contract."""
    rows = [{"name": name, **_speed(speed, memcpy)} for name, speed in speeds.items()]
    return {"codecs": rows, "memcpy_gb_s": round(memcpy.median, 4)}


def _speed(speed: Speed, memcpy: Spread) -> dict[str, float]:
    return {
        "encode_gb_s": round(speed.encode.median, 4),
        "decode_gb_s": round(speed.decode.median, 4),
        "decode_of_memcpy": round(speed.decode.median / memcpy.median, 4),
    }


def _codec(result: Result, name: str) -> dict[str, Any]:
    from cli.bench.codec_quality import divergence, first_divergence

    seen, speed = result.seen[name], result.speeds[name]
    increase = (seen.perplexity / result.lossless.perplexity - 1) * 100
    return {
        "name": name,
        "bits_per_element": round(CODECS[name].bits_per_element(result.layout), 4),
        "ppl_increase_pct": round(increase, 4),
        "divergence": round(divergence(result.lossless, seen), 4),
        "first_divergence": first_divergence(result.lossless, seen),
        "kept_lossless": seen.kept_lossless,
        **_speed(speed, result.memcpy),
    }


def draw_speed(speeds: dict[str, Speed], memcpy: Spread, console: Console) -> None:
    from rich.table import Table

    table = Table("codec", title="GB/s of lossless bytes, one thread each: medians, least and greatest")
    for name in ("encode", "decode", "of memcpy"):
        table.add_column(name, justify="right")
    for name, speed in speeds.items():
        ratio = f"{speed.decode.median / memcpy.median:.2f}"
        table.add_row(name, f"{speed.encode:.2f}", f"{speed.decode:.2f}", ratio)
    table.add_row("memcpy", "", f"{memcpy:.2f}", "1.00")
    console.print(table)


def draw(result: Result, console: Console) -> None:
    from rich.table import Table

    said = document(result)
    table = Table(title=f"perplexity without a codec {said['ppl_lossless']}, {said['tokens']:,} tokens")
    columns = ("bits", "perplexity", "other", "first", "encode", "decode", "of memcpy")
    table.add_column("codec", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for row in said["codecs"]:
        table.add_row(
            row["name"],
            f"{row['bits_per_element']:.2f}",
            f"{row['ppl_increase_pct']:+.2f} %",
            f"{100 * row['divergence']:.1f} %",
            f"{row['first_divergence']:.0f}",
            f"{row['encode_gb_s']:.2f}",
            f"{row['decode_gb_s']:.2f}",
            f"{row['decode_of_memcpy']:.2f}",
        )
    console.print(table)
    console.print(
        f"memcpy {said['memcpy_gb_s']:.2f} GB/s; encode, decode: GB/s of lossless bytes, one thread each. "
        "Other: next tokens that greedy decoding would choose otherwise; first: after how many tokens.",
        highlight=False,
    )
