"""Hit rates as a picture: over capacity, one line a policy and codec, or over perplexity, one point a codec.

SVG, written here: a dozen shapes are no reason for a plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from cli.replay.offline import Ideal
from cli.replay.runs import Row
from kvstore.errors import ConfigError

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 860, 490, 64, 28, 190, 82
_LABEL_ROWS: Final = 3
_LETTER: Final = 6.5  # its width, about
_COLOURS: Final = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e5ea2", "#b8860b", "#4a4a4a", "#17a2a2", "#d6336c")
Point = tuple[float, float, str]


def check_path(path: Path) -> None:
    """Raises ConfigError."""
    if path.suffix != ".svg":
        raise ConfigError(f"--plot {path}: pictures are written as SVG, say a name that ends in .svg")


def draw_svg(path: Path, ideal: Ideal, rows: Sequence[Row]) -> None:
    """Several capacities make lines over capacity; one capacity and several codecs points over perplexity."""
    several = len({row["capacity_blocks"] for row in rows}) > 1
    codecs = len({row["cold_codec"] for row in rows}) > 1
    lines: dict[str, list[Point]] = {}
    for row in rows:
        name = f"{row['policy']}, {row['cold_codec']}" if codecs and several else row["policy"]
        if several or not codecs:
            point = math.log10(row["capacity_blocks"]), row["block_hit"], f"{row['capacity_blocks']:,}"
        elif row["perplexity_increase"] is not None:
            point = row["perplexity_increase"], row["block_hit"], row["cold_codec"]
        else:
            continue
        lines.setdefault(name, []).append(point)
    if several or not codecs:
        for row in rows:
            lines.setdefault("optimum (Belady)", []).append(
                (math.log10(row["capacity_blocks"]), row["opt_block_hit"], f"{row['capacity_blocks']:,}")
            )
        path.write_text(_svg(lines, 100 * ideal.block, "capacity in blocks"), encoding="utf-8")
    else:
        path.write_text(_svg(lines, 100 * ideal.block, "perplexity increase, %"), encoding="utf-8")


def _svg(lines: dict[str, list[Point]], ceiling: float, along: str) -> str:
    points = [point for line in lines.values() for point in line]
    least, most = (pick((x for x, _, _ in points), default=0.0) for pick in (min, max))
    top = max([ceiling, *(y for _, y, _ in points)]) * 1.05 or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - least) / (most - least) if most > least else 0.5
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM),
        )

    shapes = [*_axes(at, points, top, ceiling, along, (least, most))]
    for number, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [at(x, y) for x, y, _ in sorted(set(line))]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        shapes.append(_text(_WIDTH - _RIGHT + 16, _TOP + 18 * (number + 1), name, colour))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif"'
    )
    return f'{head} font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(
        [*shapes, "</svg>\n"]
    )


def _axes(
    at: object, points: Sequence[Point], top: float, ceiling: float, along: str, span: tuple[float, float]
) -> list[str]:
    assert callable(at)
    shapes = []
    for tick in range(0, int(top) + 1, 5):
        (left, y), (right, _) = at(span[0], tick), at(span[1], tick)
        left, right = min(left, _LEFT), max(right, _WIDTH - _RIGHT)
        shapes.append(f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        shapes.append(_text(_LEFT - 30, y + 4, str(tick)))
    _, y = at(span[0], ceiling)
    shapes.append(
        f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#999" '
        'stroke-dasharray="5 4"/>'
    )
    shapes.append(_text(_LEFT + 4, y - 5, f"infinite cache {ceiling:.1f} %"))
    ends = [0.0] * _LABEL_ROWS  # of the last label of each row: who would touch it goes a row down
    for x, name in sorted({(x, name) for x, _, name in points}):
        begin = at(x, 0.0)[0] - _LETTER / 2 * len(name)
        row = next((row for row, end in enumerate(ends) if end < begin), _LABEL_ROWS - 1)
        ends[row] = begin + _LETTER * (len(name) + 1)
        shapes.append(_text(begin, _HEIGHT - _BOTTOM + 18 + 14 * row, name))
    shapes.append(_text((_WIDTH - _RIGHT) / 2, _HEIGHT - 12, along))
    shapes.append(_text(8, 16, "block hit, %"))
    return shapes


def _text(x: float, y: float, said: str, colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{escape(said)}</text>'
