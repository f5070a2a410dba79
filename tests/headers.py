"""Headers that no request should have, as a server puts them into a WSGI environment, and what they leave behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CORRELATION = "HTTP_X_CORRELATION_ID"
TRACEPARENT = "HTTP_TRACEPARENT"

HOSTILE: dict[str, dict[str, str]] = {
    "long": {CORRELATION: "x" * 129},
    "not ASCII": {CORRELATION: "caf\u00e9"},
    "wrong UTF-8": {CORRELATION: b"\xff\xfe".decode("latin-1")},
    "tab": {CORRELATION: "a\tb"},
    "empty": {CORRELATION: ""},
    "blank": {"HTTP_X_REQUEST_ID": "   "},
    "line": {CORRELATION: "a\nERROR forged"},
    "header": {CORRELATION: "a\r\nSet-Cookie: forged"},
    "line of ISO": {CORRELATION: "a\x85forged"},
    "NUL": {CORRELATION: "a\0"},
    "escape": {CORRELATION: "\x1b[2J"},
    "no trace": {TRACEPARENT: "x" * 55},
    "zero trace": {TRACEPARENT: f"00-{'0' * 32}-b7ad6b7169203331-01"},
    "zero span": {TRACEPARENT: f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01"},
    "version ff": {TRACEPARENT: "ff" + TRACE[2:]},
    "capitals": {TRACEPARENT: TRACE.upper()},
    "short": {TRACEPARENT: TRACE[:-1]},
    "line after it": {TRACEPARENT: f"{TRACE}\n"},
    "more than version 00 has": {TRACEPARENT: f"{TRACE}-more"},
    "future and long": {TRACEPARENT: f"01{TRACE[2:]}-{'a' * 100}"},
    "two": {TRACEPARENT: f"{TRACE},{TRACE}"},
    "ten megabytes": {CORRELATION: "x" * 10_000_000, TRACEPARENT: TRACE * 100_000},
}


def assert_left_out(metadata: Mapping[str, Any], headers: Mapping[str, str], log: str) -> None:
    """Check that an event has a new correlation and nothing else, and that nothing of the headers was logged."""
    assert metadata.keys() == {"correlation_id"}
    assert UUID(metadata["correlation_id"]).version == 7
    assert not any(value.strip() and value in log for value in headers.values())
    assert "forged" not in log
