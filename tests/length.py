"""How much a run repeats: everything with LONG=1, a part with REQUIRE_SERVERS=1, and otherwise each promise once."""

from __future__ import annotations

import os
from zlib import crc32

from tests import servers

IS_WHOLE = os.environ.get("LONG", "") not in {"", "0"}
IS_LONG = servers.REQUIRED or IS_WHOLE
ONE_OF = 4
"""Of so many long tests one is drawn where all servers are; another run draws others."""


def examples(number: int) -> int:
    """Return how many examples Hypothesis draws: *number* with LONG=1, half where all servers are, or a quarter."""
    return number if IS_WHOLE else number // (2 if IS_LONG else 4)


def is_drawn(test: str, run: str) -> bool:
    """Whether a long test is part of a run, which every process of the run answers alike."""
    return IS_WHOLE or (IS_LONG and crc32(f"{run} {test}".encode()) % ONE_OF == 0)
