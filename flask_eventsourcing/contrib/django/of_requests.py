"""The metadata that a request gives its events: its correlation, its trace and, if the setting says so, its user."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from inspect import getattr_static
from typing import Any

from django.conf import settings
from django.http import HttpRequest, RawPostDataException
from django.utils.module_loading import import_string

from ...exceptions import ConfigurationError
from ...metadata import (
    TRACEPARENT,
    USER,
    Collector,
    MetadataBlock,
    Provider,
    Steps,
    enter_request,
    leave_request,
)
from ...metadata.values import metadata_of_headers, trace_of_span
from .configuring import SETTING, Configured

KEPT = "flask_eventsourcing.metadata"
"""The attribute of a request with the metadata for all of its saves."""

_request: ContextVar[Any] = ContextVar("flask_eventsourcing.request", default=None)


@contextmanager
def answering(request: Any) -> Iterator[None]:
    """Make a request the current one in the block. Metadata that its code leaves in the context end with the block."""
    token = _request.set(request)
    enter_request(request)
    try:
        yield
    finally:
        leave_request(request)
        _request.reset(token)


class _Streaming(Steps):
    """The request and its metadata, for the code that makes the parts of a response and for no other code."""

    def __init__(self, request: Any) -> None:
        super().__init__(MetadataBlock({}))
        self._current, self._before = request, None

    def __enter__(self) -> None:
        super().__enter__()
        self._before = _request.get()
        _request.set(self._current)

    def __exit__(self, *_: object) -> None:
        _request.set(self._before)
        super().__exit__()


def answer_in_steps(request: Any, response: Any) -> None:
    """Run the code that makes the parts of a response, after the view has returned, in its request."""
    # A file stays a file, so that the server may send it by itself.
    if not getattr(response, "streaming", False) or getattr(response, "file_to_stream", None) is not None:
        return
    make = _async_parts if response.is_async else _parts
    response.streaming_content = make(_Streaming(request), response.streaming_content)


def _parts(streaming: _Streaming, content: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            with streaming:
                part = next(content)
        except StopIteration:
            return
        yield part


async def _async_parts(streaming: _Streaming, content: AsyncIterator[Any]) -> AsyncIterator[Any]:
    while True:
        try:
            with streaming:
                part = await anext(content)
        except StopAsyncIteration:
            return
        yield part


class Rereading:
    """Lets a view that is run again read its request again.

    :param arguments: the first arguments of the view, or of a method that is a view.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        # Django REST framework wraps Django's request in one of its own.
        found = (
            each if isinstance(each, HttpRequest) else getattr_static(each, "_request", None) for each in arguments
        )
        self._requests: list[Any] = [each for each in found if isinstance(each, HttpRequest)]
        for request in self._requests:
            length = str(request.META.get("CONTENT_LENGTH", ""))
            if length.isdecimal() and 0 < int(length) <= _longest_in_memory():
                # If the body was read before, the request has kept it.
                with suppress(RawPostDataException):
                    _ = request.body

    def rewind(self) -> bool:
        """Go back to the beginning of the body and the uploads. Return False if a body that was not kept was read."""
        # Each upload, even if one of them cannot go back.
        return min((_rewind(each) for each in self._requests), default=True)


def _longest_in_memory() -> int:
    longest = settings.DATA_UPLOAD_MAX_MEMORY_SIZE, settings.FILE_UPLOAD_MAX_MEMORY_SIZE
    return int(min(each for each in longest if each is not None))


def _rewind(request: Any) -> bool:
    there = vars(request)
    uploads = there["_files"].lists() if "_files" in there else ()
    for each in (upload for _, named in uploads for upload in named):
        # An upload that the view has closed stays closed.
        with suppress(ValueError):
            each.open()
    if "_body" in there:
        request._stream.seek(0)
        return True
    # Only a form is parsed into values that can be read again.
    return ("_files" in there and request.method == "POST") or not there.get("_read_started")


def of_request() -> Mapping[str, str]:
    """Provide the correlation and the trace of the current request; empty outside of a request."""
    request = _request.get()
    if request is None:
        return {}
    found: dict[str, str] | None = request.META.get(KEPT)
    if found is None:
        found = request.META[KEPT] = metadata_of_headers(request.headers)
    trace = trace_of_span()
    return found if trace is None else {**found, TRACEPARENT: trace}


def of_user() -> Mapping[str, str] | None:
    """Provide the primary key of the user who is logged in, in a request."""
    user: Any = getattr(_request.get(), "user", None)
    return {USER: str(user.pk)} if user is not None and user.is_authenticated else None


def make_collector(found: Sequence[Configured]) -> Collector | None:
    """Return the collector of the metadata of a save, or None if no metadata are stored.

    :param found: the applications in one database, which share it.
    :raises ConfigurationError: when their settings differ, or a provider cannot be imported.
    """
    if not found:
        return None
    first = found[0]
    for each in found[1:]:
        if (each.metadata, each.metadata_user) != (first.metadata, first.metadata_user):
            raise ConfigurationError(
                f"{SETTING}[{first.name!r}] and {SETTING}[{each.name!r}] are in one database, {first.alias!r}: write "
                "the same for METADATA and METADATA_USER in both."
            )
    if first.metadata is False:
        return None
    providers: list[Provider] = [of_user] if first.metadata_user else []
    return Collector([*providers, *(_provider(first, path) for path in first.metadata)], of_request)


def _provider(one: Configured, path: str) -> Provider:
    try:
        found: Provider = import_string(path)
    except ImportError as error:
        raise ConfigurationError(
            f"{SETTING}[{one.name!r}]['METADATA'] has {path!r}, which cannot be imported: {error}"
        ) from error
    return found
