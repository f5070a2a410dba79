"""The topics of event classes, so that the database returns only the events that somebody handles."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from eventsourcing import utils

MOST_TOPICS = 100
"""More than this many are not worth a filter."""


def topics_of(event_classes: Iterable[type[Any]]) -> Sequence[str]:
    """Return the topics under which events of these classes and their subclasses are stored.

    Topics that were registered for renamed classes and modules, with the library's ``register_topic()``, are among
    them. The result is empty, for no filter, when a class of the library itself is asked for, as it is the base of
    classes that are not imported yet.
    """
    found: dict[str, None] = {}
    for event_class in event_classes:
        if event_class.__module__.partition(".")[0] in ("eventsourcing", "builtins"):
            return ()
        for cls in (event_class, *_subclasses(event_class)):
            found[utils.get_topic(cls)] = None
    for topic in list(found):
        found.update(dict.fromkeys(_aliases(topic)))
    return tuple(found) if len(found) <= MOST_TOPICS else ()


def _subclasses(cls: type[Any]) -> Iterable[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _aliases(topic: str) -> Iterable[str]:
    # The library keeps what was registered in a private mapping and offers no other way to it.
    for alias, target in list(utils._topic_cache.items()):
        own = _own_topic(target)
        if own and alias != own and (topic == own or topic.startswith((f"{own}.", f"{own}:"))):
            yield alias + topic[len(own) :]


def _own_topic(target: Any) -> str | None:
    if inspect.ismodule(target):
        return target.__name__
    return utils.construct_topic(target) if hasattr(target, "__qualname__") else None
