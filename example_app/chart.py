"""The line of an account's balance over its versions, as the points of an SVG polyline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from example_app.domain import Statement

WIDTH, HEIGHT, MARGIN = 640, 160, 10


@dataclass(frozen=True)
class Chart:
    """A staircase: the balance stays until the next entry changes it."""

    line: str
    area: str
    end_x: int
    end_y: int
    width: int = WIDTH
    height: int = HEIGHT


def balance_chart(statement: Statement) -> Chart:
    """Draw the balance up to the statement's version; what came later stays blank on the right."""
    highest = max((entry.balance for entry in statement.entries), default=0) or 1
    usable = HEIGHT - 2 * MARGIN

    def _x(version: int) -> int:
        return MARGIN + (WIDTH - 2 * MARGIN) * (version - 1) // max(1, statement.latest_version - 1)

    points: list[tuple[int, int]] = []
    for entry in statement.entries:
        if points:
            points.append((_x(entry.version), points[-1][1]))
        points.append((_x(entry.version), HEIGHT - MARGIN - usable * entry.balance // highest))
    corners = [(points[0][0], HEIGHT - MARGIN), *points, (points[-1][0], HEIGHT - MARGIN)]
    return Chart(_text(points), _text(corners), *points[-1])


def _text(points: list[tuple[int, int]]) -> str:
    return " ".join(f"{left},{top}" for left, top in points)
