"""Charts as SVG text. Colours are the page's classes (`keep`, `gone`, `line`, `mark`, `axis`)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 800, 64, 8, 10, 24


def dots(values: Mapping[int, float], gone: Collection[int]) -> str:
    """A dot for each block on a logarithmic axis; values of 0 and less lie at its foot."""
    height = 200
    positive = [value for value in values.values() if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)) + 1e-9)
    high += low == high

    def down(value: float) -> float:
        share = (math.log10(value) - low) / (high - low) if value > 0 else 0.0
        return height - BOTTOM - share * (height - TOP - BOTTOM)

    marks = [_line(down(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1)]
    for at, (block, value) in zip(_across(len(values)), values.items(), strict=True):
        kind = "gone" if block in gone else "keep"
        marks.append(
            f'<circle class="{kind}" cx="{at:.1f}" cy="{down(value):.1f}" r="5">{_told(block, value)}</circle>'
        )
    return _svg(height, [*marks, *_numbers(values, height)])


def bars(values: Mapping[int, float]) -> str:
    """A bar for each block, of a share from 0 to 1."""
    height = 160
    foot, room = height - BOTTOM, height - TOP - BOTTOM
    wide = _step(len(values)) * 0.7
    marks = [_line(foot - share * room, f"{share:.0%}") for share in (0, 0.5, 1)]
    for at, (block, share) in zip(_across(len(values)), values.items(), strict=True):
        tall = share * room
        box = f'x="{at - wide / 2:.1f}" y="{foot - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
        marks.append(f'<rect class="keep" {box}>{_told(block, share)}</rect>')
    return _svg(height, [*marks, *_numbers(values, height)])


def heat(
    cells: Mapping[tuple[int, int], float], rows: Mapping[int, str], gone: Collection[tuple[int, int]] = ()
) -> str:
    """A cell for each (block, row), the darker the larger; those that are gone are crossed."""
    blocks = sorted({block for block, _ in cells})
    tall, most = 22, max(cells.values()) or 1.0
    height = TOP + tall * len(rows) + BOTTOM
    places = dict(zip(blocks, _across(len(blocks)), strict=True))
    wide = _step(len(blocks)) - 2
    marks = [f'<text x="0" y="{TOP + tall * row + 15}">{name}</text>' for row, name in rows.items()]
    for (block, row), value in cells.items():
        x, y = places[block] - wide / 2, TOP + tall * row
        depth = 0.08 + 0.92 * max(0.0, value) / most
        box = f'x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{tall - 2}" fill-opacity="{depth:.2f}"'
        marks.append(f'<rect class="keep" {box}>{_told(block, value, rows[row])}</rect>')
        if (block, row) in gone:
            marks.append(
                f'<path class="mark" d="M{x:.1f} {y}l{wide:.1f} {tall - 2}m0 {2 - tall}l{-wide:.1f} {tall - 2}"/>'
            )
    return _svg(height, [*marks, *_numbers(blocks, height)])


def gathered(values: Sequence[float], kept: int) -> str:
    """The sum of the largest 1, 2, 3 … values as a share of all; a line after `kept`."""
    height, total = 220, sum(values) or 1.0
    foot, room, reach = height - BOTTOM, height - TOP - BOTTOM, WIDTH - LEFT - RIGHT
    points, so_far = [(float(LEFT), float(foot))], 0.0
    at_cut = 0.0
    for count, value in enumerate(sorted(values, reverse=True), start=1):
        so_far += value / total
        points.append((LEFT + reach * count / len(values), foot - room * so_far))
        at_cut = so_far if count == kept else at_cut
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x = LEFT + reach * kept / len(values)
    marks = [_line(foot - share * room, f"{share:.0%}") for share in (0, 0.5, 1)]
    marks += [
        f'<polyline class="line" points="{line}"/>',
        f'<path class="mark" d="M{x:.1f} {TOP}V{foot}"/>',
        f'<text x="{x - 6:.1f}" y="{foot - 8}" text-anchor="end">{kept} of {len(values)}: {at_cut:.1%}</text>',
    ]
    return _svg(height, marks)


# -- parts -------------------------------------------------------------------------------------------------------
def _svg(height: int, marks: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(marks)}</svg>'


def _line(y: float, text: str) -> str:
    across = f'<path class="axis" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
    return f'{across}<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'


def _step(count: int) -> float:
    return (WIDTH - LEFT - RIGHT) / max(1, count)


def _across(count: int) -> list[float]:
    """The middles of so many columns."""
    return [LEFT + (i + 0.5) * _step(count) for i in range(count)]


def _numbers(blocks: Iterable[int], height: int) -> list[str]:
    """Numbers under the columns, as many as there is room for."""
    known = list(blocks)
    every = max(1, math.ceil(24 / _step(len(known))))
    return [
        f'<text x="{at:.1f}" y="{height - 8}" text-anchor="middle">{block}</text>'
        for i, (at, block) in enumerate(zip(_across(len(known)), known, strict=True))
        if i % every == 0
    ]


def _told(block: int, value: float, what: str = "") -> str:
    return f"<title>block {block}{', ' + what if what else ''}: {value:.4g}</title>"
