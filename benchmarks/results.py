"""The results of a run, kept as JSON so that table and picture can be made again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median


@dataclass
class Series:
    """What one contender achieved in one workload, round by round."""

    values: list[float] = field(default_factory=list)
    failures: int = 0

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)


@dataclass
class Results:
    """All series by database, workload and contender, and what they were measured on."""

    machine: str
    rounds: int
    seconds: float
    databases: dict[str, str] = field(default_factory=dict)
    """Versions by name."""
    titles: dict[str, dict[str, str]] = field(default_factory=dict)
    """The contenders' titles by database and name."""
    series: dict[str, dict[str, dict[str, Series]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, database: str, workload: str, contender: str, value: float, failures: int) -> None:
        """Add one measurement."""
        series = self.series.setdefault(database, {}).setdefault(workload, {}).setdefault(contender, Series())
        series.values.append(value)
        series.failures += failures

    def ratios(self, database: str, workload: str, one: str, other: str) -> Series | None:
        """How many times as much one contender achieved as the other, in each round."""
        found = self.series.get(database, {}).get(workload, {})
        if one not in found or other not in found:
            return None
        pairs = zip(found[one].values, found[other].values, strict=True)
        return Series([a / b for a, b in pairs if b])

    def save(self, path: Path) -> None:
        """Write them down."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read them back."""
        content = json.loads(path.read_text())
        content["series"] = {
            database: {w: {c: Series(**s) for c, s in by_contender.items()} for w, by_contender in by_workload.items()}
            for database, by_workload in content["series"].items()
        }
        return cls(**content)
