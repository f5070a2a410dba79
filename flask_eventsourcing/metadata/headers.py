"""Metadata from a request's headers: correlation and trace. What cannot be used as it was sent is left out."""

from __future__ import annotations

import re
import sys
from typing import Any

from . import CORRELATION_ID, LONGEST_CORRELATION, TRACEPARENT, new_id

CORRELATION_HEADERS = ("X-Correlation-ID", "X-Request-ID")
LONGEST_TRACE = 128
_TRACE = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?")


def metadata_of_headers(headers: Any) -> dict[str, str]:
    """Return what is filled in for a request; nothing of what cannot be used is logged.

    :param headers: those of the request, of any framework.
    """
    sent = (headers.get(name, "") for name in CORRELATION_HEADERS)
    found = {CORRELATION_ID: next(filter(_is_correlation, sent), None) or new_id()}
    trace = headers.get(TRACEPARENT, "")
    if is_trace(trace):
        found[TRACEPARENT] = trace
    return found


def _is_correlation(value: str) -> bool:
    return 0 < len(value) <= LONGEST_CORRELATION and value.isascii() and value.isprintable() and not value.isspace()


def is_trace(value: str) -> bool:
    """Whether a text is a ``traceparent`` as W3C has it."""
    match = _TRACE.fullmatch(value) if len(value) <= LONGEST_TRACE else None
    return match is not None and (match[1] != "00" or match[2] is None)


def trace_of_span() -> str | None:
    """Return the ``traceparent`` of OpenTelemetry's current span; where nobody has imported it, there is none."""
    api: Any = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    context = api.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
