"""How a projection is written: handlers for event classes, their topics in the log, and the models that they write."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args, overload

import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.domain import BaseAggregate
from sqlalchemy import orm

from ...exceptions import ConfigurationError
from ...failures import resolve
from ...metadata import RECORDED, Recorded, names_recorded
from .fingerprints import note_sources

F = TypeVar("F", bound=Callable[..., Any])
P = TypeVar("P")
E = TypeVar("E")
E1 = TypeVar("E1")
E2 = TypeVar("E2")
E3 = TypeVar("E3")
E4 = TypeVar("E4")
Last = TypeVar("Last")
P_contra = TypeVar("P_contra", contravariant=True)
E_contra = TypeVar("E_contra", contravariant=True)
Last_contra = TypeVar("Last_contra", contravariant=True)

OnFailure = Literal["halt", "dead-letter"]
Start = Literal["beginning", "end"]

_ON = "flask_eventsourcing_on"
_REACTION = "flask_eventsourcing_reaction"
EXITED = (
    "A handler of {} raised SystemExit, as sys.exit() does. A handler cannot end a worker, in which other projections "
    "run: raise another error, or stop the worker from outside."
)
CANCELED = (
    "A handler of {} raised asyncio's CancelledError: catch it where a task was cancelled, or raise another error."
)
MOST_EVENTS = 2000
MOST_TOPICS = 100
"""With more topics than this, a filter in the database is not worth it."""


class Told(Protocol[P_contra, E_contra, Last_contra]):
    """A method that also gets what was recorded of the event."""

    def __call__(self, projection: P_contra, event: E_contra, last: Last_contra, /, *, recorded: Recorded) -> object:
        """Handle the event."""


class Handles(Protocol[E, Last]):
    """The type of a decorator of methods that take such an event and the session or the key, for type checkers."""

    @overload
    def __call__(self, function: Callable[[P, E, Last], object], /) -> Callable[[P, E, Last], object]: ...
    @overload
    def __call__(self, function: Told[P, E, Last], /) -> Told[P, E, Last]: ...
    def __call__(self, function: Any, /) -> Any:
        """Return the method."""


@overload
def on(a: type[E1], /) -> Handles[E1, orm.Session]: ...
@overload
def on(a: type[E1], b: type[E2], /) -> Handles[E1 | E2, orm.Session]: ...
@overload
def on(a: type[E1], b: type[E2], c: type[E3], /) -> Handles[E1 | E2 | E3, orm.Session]: ...
@overload
def on(a: type[E1], b: type[E2], c: type[E3], d: type[E4], /) -> Handles[E1 | E2 | E3 | E4, orm.Session]: ...
@overload
def on(*event_classes: type[Any]) -> Handles[Any, orm.Session]: ...
def on(*event_classes: type[Any]) -> Any:
    """Mark a method of a :class:`ModelProjection` as the handler of event classes and their subclasses.

    The method takes the domain event and the session: ``def opened(self, event, session)``. Only the handler of the
    most specific class is called. If it has a parameter ``recorded``, it also gets the position, ``event_id``, time and
    metadata of the event, as a ``flask_eventsourcing.metadata.Recorded``.

    :raises ConfigurationError: when an argument is not an event class, or the class has a handler of that name.
    """
    return _marker(_ON, event_classes, "on")


@overload
def reaction(a: type[E1], /, *, start: Start = "beginning") -> Handles[E1, str]: ...
@overload
def reaction(a: type[E1], b: type[E2], /, *, start: Start = "beginning") -> Handles[E1 | E2, str]: ...
@overload
def reaction(a: type[E1], b: type[E2], c: type[E3], /, *, start: Start = "beginning") -> Handles[E1 | E2 | E3, str]: ...
@overload
def reaction(*event_classes: type[Any], start: Start = "beginning") -> Handles[Any, str]: ...
def reaction(*event_classes: type[Any], start: Start = "beginning") -> Any:
    """Mark a method of a :class:`ModelProjection` as a side effect of event classes, such as a mail or an HTTP call.

    The method takes the domain event and an idempotency key: ``def warn(self, event, key)``, and ``recorded`` like a
    handler. The key has the event's ``event_id``, if there is one. The method is called at least once, after the event
    was committed and after the projection's own models have it, and never during a rebuild. If the process is killed
    before the call is noted, the method is called again with the same key.

    :param start: where to begin: at the ``"beginning"`` of the log, or at its ``"end"`` when a worker first runs the
        reaction.
    :raises ConfigurationError: when an argument is not an event class, *start* is unknown, or the class has a handler
        of that name.
    """
    if start not in get_args(Start):
        raise ConfigurationError(f"@reaction(start=…) is 'beginning' or 'end'; found {start!r}.")
    return _marker(_REACTION, event_classes, "reaction", **{f"{_REACTION}_start": start})


def _marker(attribute: str, event_classes: tuple[Any, ...], name: str, **also: str) -> Callable[[F], F]:
    if not event_classes or not all(isinstance(each, type) for each in event_classes):
        raise ConfigurationError(
            f"@{name} takes one or more event classes, as @{name}(Account.Opened); found {event_classes!r}."
        )
    for each in event_classes:
        if wrong := _no_event_class(each):
            raise ConfigurationError(
                f"@{name} takes event classes, as @{name}(Account.Opened); {each.__qualname__} is {wrong}."
            )

    def decorate(function: F) -> F:
        _refuse_second(function, inspect.currentframe())
        function.__dict__[attribute] = (*function.__dict__.get(attribute, ()), *event_classes)
        function.__dict__.update(also)
        return function

    return decorate


def _refuse_second(function: Any, decorating: FrameType | None) -> None:
    """Refuse a second method of a name: the class would have only that one, and nobody would call the first.

    :raises ConfigurationError: when the body of the class has such a method before it.
    """
    body = decorating.f_back.f_locals if decorating and decorating.f_back else {}
    earlier = body.get(getattr(function, "__name__", "")) if "__qualname__" in body else None
    if earlier is not None and earlier is not function and {_ON, _REACTION} & getattr(earlier, "__dict__", {}).keys():
        raise ConfigurationError(
            f"{function.__qualname__} is the name of two handlers, of which Python keeps the last: give each a name of "
            "its own."
        )


def _no_event_class(cls: type[Any]) -> str:
    """Return what a class is if no event can have it, or ""; a mixin of event classes may be any other class."""
    if issubclass(cls, BaseAggregate):
        return "an aggregate class: name one of its events"
    if issubclass(cls, Application | BaseException):
        return "not an event class"
    # No class of the standard library is an event class; each event is an ``object``.
    if cls is not object and cls.__module__.partition(".")[0] in sys.stdlib_module_names:
        return "a class of Python's own"
    return ""


class Handlers:
    """The handlers of one kind by event class.

    :param functions: methods of a projection class, as ``(projection, event, session or key)``.
    :param offered: the names of further parameters that a handler may have.
    """

    def __init__(self, functions: Mapping[type[Any], Callable[..., Any]], offered: Sequence[str] = ()) -> None:
        self.functions: dict[type[Any], Callable[..., Any]] = dict(functions)
        self.telling: frozenset[Callable[..., Any]] = frozenset(
            each for each in self.functions.values() if names_recorded(each)
        )
        """The handlers with the parameter ``recorded``."""
        self.naming: dict[str, frozenset[Callable[..., Any]]] = {
            name: frozenset(each for each in self.functions.values() if name in inspect.signature(each).parameters)
            for name in offered
        }
        """The handlers with each of the offered parameters."""
        self._found: dict[type[Any], Callable[..., Any] | None] = {}
        self._topics: dict[str, bool] = {}

    def __bool__(self) -> bool:
        return bool(self.functions)

    def find(self, event_class: type[Any]) -> Callable[..., Any] | None:
        """Return the handler of the most specific class, or None."""
        try:
            return self._found[event_class]
        except KeyError:
            found = next((self.functions[cls] for cls in event_class.__mro__ if cls in self.functions), None)
            self._found[event_class] = found
            return found

    def concerns(self, topic: str) -> bool:
        """Whether an event of a topic concerns the handlers; an unknown topic does, so that it is not skipped."""
        found = self._topics.get(topic)
        if found is None:
            event_class, _ = resolve(topic)
            if event_class is None:
                return True
            found = self._topics[topic] = isinstance(event_class, type) and self.find(event_class) is not None
        return found


ERRORS_AS_THEY_ARE: AbstractContextManager[object] = nullcontext()


class ModelProjection:
    """A read model: handlers that keep Flask-SQLAlchemy models up to date with the events of an application.

    The position and what the handlers write are committed together, so no event is applied twice or missed. Handlers
    write through the session that they get, and neither commit nor roll it back::

        @es.projection
        class Balances(ModelProjection):
            models = (Balance,)

            @on(Account.Opened)
            def opened(self, event, session):
                session.add(Balance(account_id=event.originator_id, amount=0))
    """

    name: ClassVar[str] = ""
    """The name by which commands and tables know it; by default the name of the class."""
    models: ClassVar[Sequence[Any]] = ()
    """The models that it owns: no other code writes them, and a rebuild makes them again."""
    on_failure: ClassVar[OnFailure] = "halt"
    """When a handler keeps failing: halt before that event, or set it aside as a dead letter and go on."""
    retries: ClassVar[int] = 3
    """How often an event whose handler failed is tried again before that, with growing pauses from 0.1 s."""
    inline: ClassVar[bool] = False
    """Whether handlers run within ``save()``, in its transaction, so that the read model is never behind."""
    prefetch: ClassVar[bool] = True
    """Whether the rows whose primary key is the id of an aggregate are loaded at once for a batch of events."""
    batch_size: ClassVar[int] = MOST_EVENTS
    """The most events in one commit."""

    handlers: ClassVar[Handlers] = Handlers({})
    reactions: ClassVar[Handlers] = Handlers({})
    reactions_start: ClassVar[Start] = "beginning"
    handled_with: ClassVar[Sequence[str]] = ("session",)
    """The parameters of a handler after the event; *offered* has those that it may have besides."""
    offered: ClassVar[Sequence[str]] = ()

    @classmethod
    def is_model(cls, model: Any) -> bool:
        """Whether something is a model of the host's, with a table."""
        return _maps(model)

    def arguments_of(self, handler: Callable[..., Any], session: orm.Session) -> tuple[Sequence[Any], dict[str, Any]]:
        """Return the arguments of a handler after the event: positional, and by name."""
        return (session,), {}

    def told_errors(self) -> AbstractContextManager[object]:
        """Return the context in which the handlers of a batch are called, and in which errors are SQLAlchemy's."""
        return ERRORS_AS_THEY_ARE

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__
        cls.handlers = Handlers(_collect(cls, _ON, cls.handled_with, cls.offered), cls.offered)
        cls.reactions = Handlers(_collect(cls, _REACTION, ("key",), ()))
        starts = {start for _, function in _functions(cls) if (start := function.__dict__.get(f"{_REACTION}_start"))}
        if len(starts) > 1:
            raise ConfigurationError(f"The reactions of {cls.__name__} share one position: give them the same start=….")
        cls.reactions_start = next(iter(starts), "beginning")


def check_projection(cls: Any) -> type[ModelProjection]:
    """Check a projection class when it is registered.

    :raises ConfigurationError: naming what is wrong and the remedy.
    """
    if not isinstance(cls, type) or not issubclass(cls, ModelProjection):
        raise ConfigurationError(f"{cls!r} is not a projection: derive a class from ModelProjection.")
    note_sources(cls)
    problems = list(_problems(cls))
    if problems:
        raise ConfigurationError(f"Projection {cls.__name__}: {problems[0]}")
    return cls


NAMES = "a string of 1 to 100 characters without ':'"
"""What the name of a projection must be."""


def is_name(name: object) -> bool:
    """Whether a projection can have a name."""
    return isinstance(name, str) and 0 < len(name) <= 100 and ":" not in name


def _problems(cls: Any) -> Iterable[str]:
    if not is_name(cls.name):
        yield f"name must be {NAMES}; found {cls.name!r}."
    if not cls.handlers and not cls.reactions:
        yield "it has no handler: mark its methods with @on(EventClass) or @reaction(EventClass)."
    if cls.on_failure not in get_args(OnFailure):
        yield f"on_failure is 'halt' or 'dead-letter'; found {cls.on_failure!r}."
    if not _is_whole(cls.retries, 0):
        yield f"retries is a whole number from 0 up; found {cls.retries!r}."
    if not _is_whole(cls.batch_size, 1, MOST_EVENTS):
        yield f"batch_size is a whole number from 1 to {MOST_EVENTS}; found {cls.batch_size!r}."
    yield from (
        f"{model!r} in models is not a mapped class with a table." for model in cls.models if not cls.is_model(model)
    )
    if cls.inline and cls.on_failure != "halt":
        yield "inline projections fail with the save() itself, so on_failure cannot be set."


def _is_whole(value: Any, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _maps(model: Any) -> bool:
    mapper = sa.inspect(model, raiseerr=False)
    return isinstance(model, type) and mapper is not None and isinstance(mapper.local_table, sa.Table)


def _collect(
    cls: type[Any], attribute: str, last: Sequence[str], offered: Sequence[str]
) -> dict[type[Any], Callable[..., Any]]:
    functions: dict[type[Any], Callable[..., Any]] = {}
    for name, function in _functions(cls):
        for event_class in function.__dict__.get(attribute, ()):
            if event_class in functions:
                raise ConfigurationError(
                    f"Projection {cls.__name__} has two handlers for {event_class.__qualname__}: "
                    f"{functions[event_class].__name__} and {name}."
                )
            _check_signature(cls, name, function, last, offered)
            functions[event_class] = function
    return functions


def _functions(cls: type[Any]) -> list[tuple[str, Callable[..., Any]]]:
    # By the class's attributes, so that a method that is overridden without a mark is no handler any more.
    found: list[tuple[str, Callable[..., Any]]] = []
    for name in dir(cls):
        value = inspect.getattr_static(cls, name)
        if inspect.isfunction(value):
            found.append((name, value))
        elif isinstance(value, staticmethod | classmethod) and {_ON, _REACTION} & {
            *value.__dict__,
            *getattr(value.__func__, "__dict__", {}),
        }:
            raise ConfigurationError(
                f"Handler {cls.__name__}.{name} is a static or class method: make it a plain method."
            )
    return found


def _check_signature(
    cls: type[Any], name: str, function: Callable[..., Any], last: Sequence[str], offered: Sequence[str]
) -> None:
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    if any(is_kind(function) for is_kind in kinds):
        raise ConfigurationError(
            f"Handler {cls.__name__}.{name} is a coroutine or a generator, which does nothing when it is called: make "
            "it a plain method."
        )
    try:
        signature = inspect.signature(function)
        named = [each for each in offered if each in signature.parameters]
        named += [RECORDED] if names_recorded(function) else []
        signature.bind(None, None, *last, **dict.fromkeys(named))
    except TypeError:
        expected = ", ".join(("self", "event", *last))
        raise ConfigurationError(f"Handler {cls.__name__}.{name} must take ({expected}).") from None
