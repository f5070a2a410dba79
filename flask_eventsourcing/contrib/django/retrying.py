"""Units of work that are run again after a conflict, in ``atomic()`` blocks of their own."""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar, overload

from django.db import transaction
from django.db.utils import Error
from eventsourcing.persistence import IntegrityError

from ...applications.apart import trying
from ...exceptions import ConfigurationError, RollbackOnlyError
from ...uow import LONGEST_PAUSE, always, check_times, why_not_again
from .hosting import site
from .of_requests import Rereading
from .transactions import DjangoUnit

P = ParamSpec("P")
R = TypeVar("R")

NESTED = (
    "retry_on_conflict is inside another atomic() block of {alias!r}, which it cannot run again after a conflict: put "
    "it around the outermost block. As the first decorator of a view, it switches ATOMIC_REQUESTS off for that view."
)

LATER = (
    "{name} runs after the atomic() block of retry_on_conflict has ended: decorate a plain function instead, and call "
    "it with sync_to_async() or from a generator."
)
SWALLOWED = (
    "Code inside retry_on_conflict caught an error after which the block can only be rolled back: let the error pass, "
    "put code that may fail into an atomic() block of its own, or request the rollback with "
    "transaction.set_rollback(True)."
)


@overload
def retry_on_conflict(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def retry_on_conflict(*, times: int = 3, using: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def retry_on_conflict(
    function: Callable[..., Any] | None = None, /, *, times: int = 3, using: str | None = None
) -> Any:
    """Run a function in ``atomic(durable=True)``, and again after a conflict; usable as a decorator of views.

    A decorated view gets no transaction from ``ATOMIC_REQUESTS``, and reads the same body and uploads at each try. A
    conflict is another writer who was first, a serialisation failure or a deadlock. The next try queues for the
    aggregates that had the conflict before it reads them, so that it does not lose the race again.

    :param times: how often it is run again, at most.
    :param using: the alias of the database; by default, that of the only one with events.
    :raises IntegrityError: after the last try.
    :raises RollbackOnlyError: when the function caught an error after which the block can only be rolled back.
    :raises ConfigurationError: for a coroutine function or a generator, which would run after the end of the block.
    :raises RuntimeError: inside another ``atomic()`` block. In that of a test case, each try is a savepoint.
    """
    check_times(times)

    def decorate(decorated: Callable[..., Any]) -> Callable[..., Any]:
        kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
        if any(is_kind(each) for is_kind in kinds for each in (decorated, getattr(decorated, "__call__", None))):  # noqa: B004
            raise ConfigurationError(LATER.format(name=getattr(decorated, "__qualname__", repr(decorated))))

        @wraps(decorated)
        def run(*args: Any, **kwargs: Any) -> Any:
            return run_again(lambda: decorated(*args, **kwargs), times, using, Rereading(args[:2]).rewind)

        # Django reads this attribute of the view. The setting must not be read while views are imported.
        run._non_atomic_requests = _Aliases(using)  # type: ignore[attr-defined]
        return run

    return decorate if function is None else decorate(function)


class _Aliases(set[str]):
    """The databases for which ``ATOMIC_REQUESTS`` begins no transaction around a view."""

    def __init__(self, using: str | None) -> None:
        super().__init__(() if using is None else (using,))
        self._using = using

    def __contains__(self, alias: object) -> bool:
        return super().__contains__(alias) or (self._using is None and _is_only(alias))


def _is_only(alias: object) -> bool:
    """Whether an alias is that of the only database with events. If all events are apart, there is none."""
    return site().host_apart() is None and alias == _alias(None)


def _alias(using: str | None) -> str:
    aliases = list(site().databases)
    if using is None and len(aliases) == 1:
        return aliases[0]
    if using not in aliases:
        raise ConfigurationError(
            f"retry_on_conflict(using={using!r}): say in which database the events are, one of {aliases!r}."
        )
    return using


def run_again(function: Callable[[], Any], times: int, using: str | None, rewind: Callable[[], bool] = always) -> Any:
    """Call a function in a block, and again after a conflict, *times* times at most.

    :param rewind: called before another try; returns whether there can be one.
    """
    apart = site().host_apart() if using is None else None
    if apart is not None:
        return apart.retry(function, times, rewind=rewind)
    alias = _alias(using)
    unit = site().databases[alias].units.current()
    blocks: Any = unit.wrapper.atomic_blocks
    if blocks and not blocks[-1]._from_testcase:
        raise RuntimeError(NESTED.format(alias=alias))
    for tries in range(times + 1):
        with trying() as attempt:
            try:
                with transaction.atomic(using=alias, durable=True), queueing_for(unit):
                    return function()
            except (IntegrityError, Error) as error:
                conflict = attempt.conflict if error is attempt.conflict else as_conflict(unit, error)
                if conflict is None or attempt.has_saved:
                    # Events apart from the database would be saved a second time.
                    raise
                if (reason := why_not_again(tries, times, rewind)) is not None:
                    conflict.add_note(reason)
                    raise conflict from conflict.__cause__
        time.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.004 * 2**tries)))  # noqa: S311
    raise IntegrityError


@contextmanager
def queueing_for(unit: DjangoUnit) -> Iterator[None]:
    """A context in which reads queue for the aggregates that had conflicts, as the transaction can be run again."""
    unit.queue.active = True
    unit.losses.forget()
    try:
        if unit.queue.has_conflicts:
            with unit.dialect.translated:
                unit.queue.join_conflicting(unit.connection())
        yield
    finally:
        unit.queue.active = False
    if unit.wrapper.needs_rollback and not unit.losses.is_asked:
        raise RollbackOnlyError(SWALLOWED)


def as_conflict(unit: DjangoUnit, error: Exception) -> IntegrityError | None:
    """Return the library's conflict error if the unit may be run again after this error, else None."""
    if isinstance(error, IntegrityError):
        return error if unit.dialect.is_conflict(error) else None
    driver_error = error.__cause__
    if not isinstance(driver_error, Exception) or not unit.dialect.is_serialization_failure(driver_error):
        return None
    translated = unit.dialect.translate_driver(driver_error)
    translated.__cause__ = error
    return translated if isinstance(translated, IntegrityError) else None
