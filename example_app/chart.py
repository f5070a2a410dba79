"""The line of an account's balance over its versions, as an SVG image of its own, drawn by leather."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leather import Chart, theme

from example_app.money import money_text

if TYPE_CHECKING:
    from decimal import Decimal

    from example_app.domain import Statement

CONTENT_SECURITY_POLICY = "default-src 'none'; frame-ancestors 'none'"
"""For the image alone: it has neither styles nor scripts."""

HEIGHT = 240
WIDTH, NARROW = 960, 440
LINE = "#14857b"

# Colours that can be read on light and on dark ground.
theme.background_color = "none"
theme.label_color = "#768a83"
theme.tick_color = "#9aaba433"
theme.zero_color = "#9aaba4"
theme.tick_font_family = "system-ui, sans-serif"
theme.margin = 0.015


def balance_chart(statement: Statement, width: int = WIDTH) -> str:
    """Draw a staircase: each balance lasts until the next version. What came later stays blank on the right."""
    latest = statement.latest_version
    points: list[tuple[int, int]] = []
    for entry in statement.entries:
        points += [(entry.version, entry.balance), (entry.version + 1, entry.balance)]
    highest = max(balance for _, balance in points)
    chart = Chart()
    chart.add_x_scale(1, latest + 1)
    chart.add_y_scale(0, highest or 100)
    chart.add_x_axis(tick_formatter=lambda version, *_: _version_text(version, latest))
    chart.add_y_axis(tick_formatter=_amount_text)
    chart.add_line(points, stroke_color=LINE, width=2.5)
    return str(chart.to_svg(width=width, height=HEIGHT))


def _version_text(version: Decimal, latest: int) -> str:
    return f"{version:.0f}" if 1 <= version <= latest and version == int(version) else ""


def _amount_text(cents: Decimal, number: int, count: int) -> str:
    return money_text(int(cents))
