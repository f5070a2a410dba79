"""The unit of work on a SQLAlchemy session, with no framework in it: who commits is handed in."""

from __future__ import annotations

from .pending import AfterCommit, Batch
from .running import SessionCommits, UnitRunner, check_times, commit, roll_back
from .unit import Commits, UnitOfWork, Units

__all__ = [
    "AfterCommit",
    "Batch",
    "Commits",
    "SessionCommits",
    "UnitOfWork",
    "UnitRunner",
    "Units",
    "check_times",
    "commit",
    "roll_back",
]
