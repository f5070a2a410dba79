"""The unit of work on a SQLAlchemy session, without a framework. The host says who commits."""

from __future__ import annotations

from .abstract import Unit
from .commit_gate import Commits, Run
from .listeners import follow
from .pending import AfterCommit, Batch, describe, log_lost
from .routes import FIXED, same_database, session_of, writer_of
from .running import (
    LONGEST_PAUSE,
    SessionCommits,
    UnitRunner,
    always,
    check_times,
    close,
    commit,
    may_lose,
    roll_back,
    why_not_again,
)
from .unit import LENT, UnitOfWork, Units

__all__ = [
    "FIXED",
    "LENT",
    "LONGEST_PAUSE",
    "AfterCommit",
    "Batch",
    "Commits",
    "Run",
    "SessionCommits",
    "Unit",
    "UnitOfWork",
    "UnitRunner",
    "Units",
    "always",
    "check_times",
    "close",
    "commit",
    "describe",
    "follow",
    "log_lost",
    "may_lose",
    "roll_back",
    "same_database",
    "session_of",
    "why_not_again",
    "writer_of",
]
