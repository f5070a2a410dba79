"""The unit of work on a SQLAlchemy session, with no framework in it: who commits is handed in."""

from __future__ import annotations

from .commit_gate import Run
from .listeners import follow
from .pending import AfterCommit, Batch
from .running import SessionCommits, UnitRunner, check_times, commit, roll_back
from .unit import Commits, UnitOfWork, Units, log_lost

__all__ = [
    "AfterCommit",
    "Batch",
    "Commits",
    "Run",
    "SessionCommits",
    "UnitOfWork",
    "UnitRunner",
    "Units",
    "check_times",
    "commit",
    "follow",
    "log_lost",
    "roll_back",
]
