"""How much a run repeats: every test with LONG=1 or REQUIRE_SERVERS=1, and otherwise each promise at least once."""

from __future__ import annotations

import os

from tests import servers

IS_WHOLE = os.environ.get("LONG", "") not in {"", "0"}
IS_LONG = servers.REQUIRED or IS_WHOLE


def examples(number: int) -> int:
    """Return how many examples Hypothesis draws: *number* with LONG=1, half where all servers are, or a quarter."""
    return number if IS_WHOLE else number // (2 if IS_LONG else 4)
