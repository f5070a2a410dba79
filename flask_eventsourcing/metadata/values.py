"""Values of metadata: strings that every database stores, what was recorded, UUIDs of version 7, and headers.

Headers of a request that cannot be used are left out.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from json.encoder import encode_basestring
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import UUID

from ..config import is_plain
from ..exceptions import EventMetadataError
from ..failures import raised_as

if sys.version_info >= (3, 14):
    from uuid import uuid7
else:
    import uuid_utils

    class _Seeded(threading.local):
        pid = 0

    _seeded = _Seeded()

    def uuid7() -> Any:
        """Return a UUID of version 7, from random numbers that no process had before a fork."""
        # uuid_utils has a generator for each thread, and uWSGI forks without telling it.
        pid = os.getpid()
        if _seeded.pid != pid:
            uuid_utils.reseed_rng()
            _seeded.pid = pid
        return uuid_utils.uuid7()


Metadata = Mapping[str, str]
Provider = Callable[[], Metadata | None]

CORRELATION_ID = "correlation_id"
CAUSATION_ID = "causation_id"
TRACEPARENT = "traceparent"
FILLED_IN = frozenset({CORRELATION_ID, CAUSATION_ID, TRACEPARENT})
"""The keys that the package fills in by itself, which ``null_metadata_in_context()`` does not hide."""
USER = "user"
LONGEST_CORRELATION = 128
"""The most characters of a correlation id, which its column has."""
MOST_BYTES = 4096
"""The most bytes of an event's metadata as JSON."""


class Recorded(NamedTuple):
    """What was recorded of an event beside its state. Values are None, or empty, if nothing was recorded.

    A handler, a reaction or a receiver of ``events_recorded`` gets it if it has a parameter ``recorded``.
    """

    position: int
    """In the application's log."""
    event_id: UUID | None
    time: datetime | None
    """In UTC, by the clock of the process that saved it; it is not the order of the log."""
    metadata: Metadata

    @property
    def correlation_id(self) -> str | None:
        """The request, or other unit, that the event belongs to. Events of a request and of its tasks share it."""
        return self.metadata.get(CORRELATION_ID)

    @property
    def causation_id(self) -> str | None:
        """The ``event_id`` of the event that was handled when this one was saved. None if no event caused it."""
        return self.metadata.get(CAUSATION_ID)


class Cause:
    """The metadata of all events that one event has caused, looked up when something is saved."""

    __slots__ = ("_find", "_values")

    def __init__(self, find: Callable[[], Recorded | None]) -> None:
        self._find = find
        self._values: dict[str, str] | None = None

    def __call__(self) -> Metadata:
        """Return them."""
        if self._values is None:
            recorded, known = self._find(), {}
            if recorded is not None:
                # Its consequences belong together, even if the event itself has no correlation.
                known[CORRELATION_ID] = recorded.correlation_id or new_id()
                if recorded.event_id is not None:
                    known[CAUSATION_ID] = str(recorded.event_id)
            self._values = known
        return self._values


RECORDED = "recorded"


def names_recorded(function: Callable[..., Any]) -> bool:
    """Whether a function has the parameter ``recorded``, for what was recorded of an event beside its state."""
    try:
        return RECORDED in inspect.signature(function).parameters
    except (TypeError, ValueError):  # it does not tell
        return False


def checked(values: Any, what: str = "the metadata of an event") -> dict[str, str]:
    """Return a copy of metadata if they are a mapping of strings to strings that every database can store.

    :raises EventMetadataError: naming the key.
    """
    if not isinstance(values, Mapping):
        raise EventMetadataError(f"A mapping of strings to strings is expected; {what} is a {type(values).__name__}.")
    found: dict[str, str] = {}
    # Not by dict(), which has lists of a MultiDict's values; and not by isinstance(), which believes proxies.
    for given, value in values.items():
        # A subclass of str may do anything, for example escape the strings that it is joined with.
        key = str.__str__(given) if issubclass(type(given), str) else ""
        if not key or not is_plain(key):
            raise EventMetadataError(f"In {what}, a key is not a string, is empty, or has control characters.")
        if not issubclass(type(value), str):
            raise EventMetadataError(
                f"In {what}, the value of {key!r} is of type {type(value).__name__} and no string: pass str(…)."
            )
        text = found[key] = str.__str__(value)
        if not is_storable(text):
            raise EventMetadataError(f"In {what}, the value of {key!r} has a NUL character or an unpaired surrogate.")
    return found


def is_storable(value: str) -> bool:
    """Whether every database takes a string: it has no NUL, and no halves of surrogate pairs."""
    if "\0" in value:
        return False
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def provided(provider: Provider) -> Metadata:
    """Return what a provider returns, checked.

    :raises EventMetadataError: when it fails, or returns what cannot be stored.
    """

    def failed(error: Exception) -> EventMetadataError:
        text = f"The provider of metadata {_name(provider)} failed, so that nothing was saved"
        return EventMetadataError(f"{text}: {type(error).__name__}.")

    # The user's function may raise anything, and so may an object that only looks like a mapping, when it is read.
    with raised_as(failed):
        values: Any = provider()
        values = dict(values.items()) if isinstance(values, Mapping) else values
    return {} if values is None else checked(values, f"what the provider {_name(provider)} returns")


def _name(provider: Any) -> str:
    return f"{provider.__module__}.{getattr(provider, '__qualname__', type(provider).__qualname__)}"


def check_size(metadata: Mapping[str, str]) -> None:
    """Check that the metadata of a save are not too large, and that their correlation fits its column.

    :raises EventMetadataError: otherwise.
    """
    # A character takes six bytes at most.
    characters = len("".join([*metadata, *metadata.values()])) + 6 * len(metadata)
    if characters > MOST_BYTES // 6:
        size = len(to_json(metadata).encode())
        if size > MOST_BYTES:
            raise EventMetadataError(
                f"The metadata of an event take {size} bytes as JSON, and {MOST_BYTES} are the most (keys: "
                f"{', '.join(sorted(metadata))[:200]}): put what is long into the event."
            )
    correlation = metadata[CORRELATION_ID]
    if not fits_column(correlation):
        raise EventMetadataError(
            f"A correlation_id must have 1 to {LONGEST_CORRELATION} characters, and none that ends a line; "
            f"found {len(correlation)}."
        )


def fits_column(correlation: str) -> bool:
    """Whether a string can be stored as a correlation."""
    return 0 < len(correlation) <= LONGEST_CORRELATION and is_plain(correlation)


def to_json(metadata: Metadata) -> str:
    """Return metadata as JSON; an encoder of the standard library's takes five times as long for a mapping so small."""
    return f"{{{','.join([f'{encode_basestring(key)}:{encode_basestring(metadata[key])}' for key in metadata])}}}"


def new_id() -> str:
    """Return a UUID of version 7 as text, for a correlation."""
    return str(uuid7())


_DIGITS = tuple([f"{number:03x}" for number in range(16**3)])
_HALF = dict(zip("0123456789abcdef", "01234567" * 2, strict=True))


def new_block() -> str:
    """Return the hexadecimal digits of a UUID of version 7 without the last three, for :func:`ids_of`.

    Each is above those of the same millisecond by a counter in the bits before the last 32, of which the first is left
    free.
    """
    digits: str = uuid7().hex
    return f"{digits[:24]}{_HALF[digits[24]]}{digits[25:29]}"


def ids_of(block: str, count: int, *, dashes: bool = False) -> list[str]:
    """Return UUIDs as text that follow one another, with dashes or without: they differ in their last 32 bits only."""
    start = f"{block[:8]}-{block[8:12]}-{block[12:16]}-{block[16:20]}-{block[20:]}" if dashes else block
    if count == 1:
        return [f"{start}000"]
    found = [start + each for each in _DIGITS[:count]]
    while len(found) < count:
        block = f"{int(block, 16) + 1:029x}"
        found += ids_of(block, min(count - len(found), len(_DIGITS)), dashes=dashes)
    return found


def uuids_of(block: str, count: int) -> list[UUID]:
    """Return the same ids as UUIDs."""
    return list(map(UUID, ids_of(block, count)))


CORRELATION_HEADERS = ("X-Correlation-ID", "X-Request-ID")
LONGEST_TRACE = 128
_TRACE = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?")


def metadata_of_headers(headers: Any, around: Metadata = MappingProxyType({})) -> dict[str, str]:
    """Return the metadata of a request. A header that cannot be used is ignored and not logged.

    :param headers: those of the request, of any framework.
    :param around: the metadata of the request around it, which count if the headers say nothing.
    """
    sent = (headers.get(name, "") for name in CORRELATION_HEADERS)
    correlation = next(filter(is_correlation, sent), None) or around.get(CORRELATION_ID) or new_id()
    found = {**around, CORRELATION_ID: correlation}
    trace = headers.get(TRACEPARENT, "")
    if is_trace(trace):
        found[TRACEPARENT] = trace
    return found


def is_correlation(value: str) -> bool:
    """Whether a string that comes from outside can be a correlation id."""
    return 0 < len(value) <= LONGEST_CORRELATION and value.isascii() and value.isprintable() and not value.isspace()


def is_trace(value: str) -> bool:
    """Whether a string is a valid ``traceparent`` of W3C."""
    match = _TRACE.fullmatch(value) if len(value) <= LONGEST_TRACE else None
    return match is not None and (match[1] != "00" or match[2] is None)


def trace_of_span() -> str | None:
    """Return the ``traceparent`` of OpenTelemetry's current span, or None if OpenTelemetry is not imported."""
    # Another thread may be importing it.
    current_span: Any = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    if current_span is None:
        return None
    context = current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
