"""Metadata of events: who saved them, in which request, and what caused them. Needs no host and no database.

The functions for the context have the names of version 10 of the library. There an event takes the metadata in force
when it is triggered; here it takes those in force at ``save()``.

The metadata are a chain in one ``ContextVar``. A ``with`` block removes its own link only: a generator that is closed
late, in another context, neither fails nor removes metadata that were added later.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import Any, Self, TypeVar

from .values import (
    CAUSATION_ID,
    CORRELATION_ID,
    FILLED_IN,
    LONGEST_CORRELATION,
    RECORDED,
    TRACEPARENT,
    USER,
    Cause,
    Metadata,
    Provider,
    Recorded,
    check_size,
    checked,
    names_recorded,
    new_id,
    provided,
    trace_of_span,
)

__all__ = [
    "CAUSATION_ID",
    "CORRELATION_ID",
    "LONGEST_CORRELATION",
    "RECORDED",
    "TRACEPARENT",
    "USER",
    "Cause",
    "Collector",
    "Metadata",
    "MetadataBlock",
    "Provider",
    "Recorded",
    "Steps",
    "brought_along",
    "caused_by",
    "checked",
    "event_metadata",
    "get_metadata_from_context",
    "kept_for_later",
    "names_recorded",
    "new_id",
    "null_metadata_in_context",
    "put_metadata_in_context",
    "set_metadata_in_context",
]

F = TypeVar("F", bound=Callable[..., Any])


class _Link:
    """The metadata of one block, linked to those of the block around it."""

    __slots__ = ("before", "block", "find", "is_over", "within")

    def __init__(self, before: _Link | None, block: MetadataBlock, find: Callable[[], Metadata]) -> None:
        self.before = before
        self.block = block
        self.find = find
        self.is_over: Callable[[], bool] = block._is_over or bool
        self.within = _within.get()


def _living(link: _Link | None) -> _Link | None:
    """Return the first link that is not over, and drop the links below it that are over, which may be many."""
    while link is not None and link.is_over():
        link = link.before
    if link is not None:
        while link.before is not None and link.before.is_over():
            link.before = link.before.before
    return link


def _is_below(top: _Link | None, link: _Link) -> bool:
    while top is not None and top is not link:
        top = top.before
    return top is link


# A request, and the request around it.
_within: ContextVar[tuple[object, Any] | None] = ContextVar("flask_eventsourcing.metadata.within", default=None)
_chain: ContextVar[_Link | None] = ContextVar("flask_eventsourcing.metadata", default=None)


def get_metadata_from_context() -> dict[str, str]:
    """Return a copy of the metadata in the context, which may be empty. Use it to send them on by hand."""
    link, hidden = _chain.get(), False
    if link is not None and link.before is None and not link.is_over():
        return dict(link.find())
    parts: list[Metadata] = []
    while link is not None:
        block = link.block
        if not link.is_over():
            if not hidden:
                parts.append(link.find())
            elif block._fills:
                parts.append({key: value for key, value in link.find().items() if key in FILLED_IN})
            if block._hides and block._fills:
                break
            hidden = hidden or block._hides
        link = link.before
    return dict(chain.from_iterable(each.items() for each in reversed(parts)))


class MetadataBlock:
    """Puts metadata into the context: for a ``with`` block, or as a decorator for each call of a function.

    In a decorated coroutine function they are in force until it returns. In a decorated generator they are in force
    while it runs, but not between its steps. A ``with`` block within a generator is in force between them, for the
    caller too.

    :param hides: whether it hides the metadata of the blocks around it.
    :param fills: whether they are the package's own metadata, which a user's block does not hide.
    :param find: returns values, whenever metadata are collected; they are not checked.
    :param is_over: whether the block has ended although no code has left it. Without it, blocks within this one end
        with it.
    :raises EventMetadataError: for a key or a value that is not a string.
    """

    def __init__(
        self,
        values: Metadata,
        *,
        hides: bool = False,
        fills: bool = False,
        find: Provider | None = None,
        is_over: Callable[[], bool] | None = None,
    ) -> None:
        self._values = checked(values) if values else {}
        self._hides = hides
        self._fills = fills
        self._find = find
        self._is_over = is_over
        self._link: _Link | None = None

    def __enter__(self) -> Self:
        if self._link is not None:
            raise RuntimeError("This block of metadata is in use already: make another one for each 'with' statement.")
        self._link = _Link(_living(_chain.get()), self, self._found)
        _chain.set(self._link)
        return self

    def turn_to(self, find: Callable[[], Metadata]) -> None:
        """Within the ``with`` block, replace its values by others. Tasks that were begun before keep the old ones.

        :param find: returns them, whenever metadata are collected.
        """
        if self._link is not None:
            self._link = _Link(self._link.before, self, find)
            _chain.set(self._link)

    def __exit__(self, *_: object) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        top = _chain.get()
        if top is link or (self._fills and self._is_over is None and _is_below(top, link)):
            _chain.set(link.before and _living(link.before))
        else:
            # Another block was put on top, or it belongs to another context.
            link.is_over = lambda: True

    def __call__(self, function: F) -> F:
        """Decorate a function."""
        if isinstance(function, classmethod | staticmethod):
            return type(function)(self(function.__func__))
        return wraps(function)(self._decorated(function))  # type: ignore[return-value]

    def _again(self) -> MetadataBlock:
        return MetadataBlock(self._values, hides=self._hides, fills=self._fills, find=self._find, is_over=self._is_over)

    def _found(self) -> Metadata:
        return self._values if self._find is None else self._find() or {}

    def _decorated(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(function):

            async def run_coroutine(*args: Any, **kwargs: Any) -> Any:
                return await self._awaited(function(*args, **kwargs))

            return run_coroutine

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._again():
                found = function(*args, **kwargs)
            # Another decorator, or a callable object, may hide the kind of the function.
            if inspect.iscoroutine(found):
                return self._awaited(found)
            if inspect.isgenerator(found):
                return _stepwise(Steps(self._again()), found)
            return _async_stepwise(Steps(self._again()), found) if inspect.isasyncgen(found) else found

        return run

    async def _awaited(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        with self._again():
            return await coroutine


class Steps:
    """The chain of a generator, in force while it runs. Between its steps, its own blocks are not in force."""

    def __init__(self, block: MetadataBlock) -> None:
        with block:
            self._own = _chain.get()
        self._outer: _Link | None = None

    def __enter__(self) -> None:
        self._outer = _chain.get()
        _chain.set(self._own)

    def __exit__(self, *_: object) -> None:
        self._own = _chain.get()
        _chain.set(self._outer)


class _Answer:
    """What a generator gets for the item that it yielded: a value, or an error that was thrown in."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None

    def __enter__(self) -> Self:
        self.value = self.error = None
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        # Any error is for the generator. Only GeneratorExit is not thrown, but closes it.
        if error is None or isinstance(error, GeneratorExit):
            return False
        self.error = error
        return True


def _stepwise(steps: Steps, generator: Any) -> Generator[Any, Any, Any]:
    answer = _Answer()
    while True:
        try:
            with steps:
                item = generator.send(answer.value) if answer.error is None else generator.throw(answer.error)
        except StopIteration as stop:
            return stop.value
        try:
            with answer:
                answer.value = yield item
        except GeneratorExit:
            with steps:
                generator.close()
            raise


async def _async_stepwise(steps: Steps, generator: Any) -> AsyncIterator[Any]:
    answer = _Answer()
    while True:
        try:
            with steps:
                step = generator.asend(answer.value) if answer.error is None else generator.athrow(answer.error)
                item = await step
        except StopAsyncIteration:
            return
        try:
            with answer:
                answer.value = yield item
        except GeneratorExit:
            with steps:
                await generator.aclose()
            raise


def enter_request(request: object) -> None:
    """Note that the next blocks belong to a request."""
    _within.set((request, _within.get()))


def finish_request(request: object) -> None:
    """Note that the next blocks do not belong to a request any more, but to the request around it, if there is one."""
    within = _within.get()
    if within is not None and within[0] is request:
        _within.set(within[1])


def leave_request(request: object) -> None:
    """Leave the blocks of a request that no code has left, such as that of a generator that is kept alive."""
    link = _chain.get()
    while link is not None and link.within is not None and link.within[0] is request:
        link = link.before
    _chain.set(link)
    finish_request(request)


def put_metadata_in_context(metadata: Metadata) -> MetadataBlock:
    """Add metadata to those in force, or replace the value of a key. Put the block around ``save()``.

    :return: a context manager, which is also a decorator.
    :raises EventMetadataError: for a key or a value that is not a string.
    """
    return MetadataBlock(metadata)


def set_metadata_in_context(metadata: Metadata) -> MetadataBlock:
    """Replace all metadata in a block, for work that is not the current request's. They are back after it.

    :return: a context manager, which is also a decorator.
    :raises EventMetadataError: for a key or a value that is not a string.
    """
    return MetadataBlock(metadata, hides=True)


def null_metadata_in_context() -> MetadataBlock:
    """Hide all metadata in a block. Those that the package fills in, such as the correlation, stay.

    :return: a context manager, which is also a decorator.
    """
    return MetadataBlock({}, hides=True)


def event_metadata(**metadata: str) -> MetadataBlock:
    """Add metadata to the events that are saved within the block: ``with es.event_metadata(reason="import 7"):``.

    It is the short form of :func:`put_metadata_in_context`, a context manager and a decorator.

    :raises EventMetadataError: for a value that is no text.
    """
    return MetadataBlock(metadata)


def caused_by(find: Callable[[], Recorded | None], is_over: Callable[[], bool] | None = None) -> MetadataBlock:
    """Give saved events the correlation of another event, and that event as their cause.

    :param find: returns that event; called once, when something is saved.
    :param is_over: whether the event is no longer handled, even if the block was not left.
    """
    return MetadataBlock({}, fills=True, find=Cause(find), is_over=is_over)


def brought_along(metadata: Metadata) -> MetadataBlock:
    """Put the metadata in force that another process has sent with a piece of work.

    A current span of OpenTelemetry's in this process takes the place of the trace that was sent.
    """

    def values() -> Metadata:
        trace = trace_of_span()
        return metadata if trace is None else {**metadata, TRACEPARENT: trace}

    return MetadataBlock(metadata, fills=True, find=values)


def kept_for_later(metadata: Metadata) -> MetadataBlock:
    """Put metadata in force as they were, in the place of all in the context, what the package fills in too."""
    return MetadataBlock(metadata, hides=True, fills=True)


@dataclass(frozen=True, eq=False)
class Collector:
    """Collects the metadata of a save: those of providers, those in the context, and a correlation.

    :param providers: called without arguments, in this order; each returns a mapping of strings to strings, or None.
    :param carried: returns the metadata of the piece of work, which all others override; they are not checked again.
    """

    providers: Sequence[Provider] = ()
    carried: Callable[[], Metadata] | None = None

    def __call__(self) -> dict[str, str]:
        """Collect it.

        :raises EventMetadataError: when a provider fails, a key or value is not a string, or the metadata are too
            large.
        """
        found: dict[str, str] = dict(self.carried()) if self.carried is not None else {}
        for provider in self.providers:
            found.update(provided(provider))
        if _chain.get() is not None:
            found.update(get_metadata_from_context())
        if CORRELATION_ID not in found:
            found[CORRELATION_ID] = new_id()
        check_size(found)
        return found
