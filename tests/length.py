"""How much a run repeats: everything with LONG=1 or REQUIRE_SERVERS=1, and otherwise each promise at least once."""

from __future__ import annotations

import os

from tests import servers

IS_LONG = servers.REQUIRED or os.environ.get("LONG", "") not in {"", "0"}


def examples(number: int) -> int:
    """Return how many examples Hypothesis draws: *number* in a long run, a quarter of it in a short one."""
    return number if IS_LONG else number // 4
