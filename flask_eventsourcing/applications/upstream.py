"""Notes which event a follower of the library's ``System`` processes: it is the cause of the events it saves."""

from __future__ import annotations

from typing import Any

from eventsourcing.system import Follower

from .._patches import follower_follow
from ..persistence import SQLAlchemyApplicationRecorder, SQLAlchemyProcessRecorder

_follow = Follower.follow


def follow(self: Follower[Any], name: str, log: Any) -> None:
    """Follow a log like ``Follower.follow()``; saved events get the correlation of the event that is processed."""
    _follow(self, name, log)
    upstream = getattr(log, "recorder", None)
    if isinstance(self.recorder, SQLAlchemyProcessRecorder) and isinstance(upstream, SQLAlchemyApplicationRecorder):
        self.recorder.upstream[name] = upstream


def note_upstream() -> None:
    """Have every follower note it."""
    follower_follow(Follower, follow)
