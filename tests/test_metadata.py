"""What the package says of itself."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOUND = re.compile(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)")


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    """Return the oldest version that is admitted, by name."""
    return {match[1]: match[2] for match in map(BOUND.match, requirements) if match}


def test_oldest_versions_that_are_tested_are_those_admitted() -> None:
    """The oldest versions that the metadata admits are the ones that the tests are run on."""
    extras = PROJECT["optional-dependencies"]
    admitted = lower_bounds(
        [*PROJECT["dependencies"], *extras["postgres"], *extras["mysql"], *extras["migrate"], *extras["demo"]]
    )
    lines = (ROOT / "tests" / "minimum.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    assert admitted.items() <= tested.items()
    assert set(tested) - set(admitted) == {"Flask-SQLAlchemy-Lite", "psycopg-binary"}
