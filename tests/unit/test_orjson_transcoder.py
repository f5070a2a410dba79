"""The transcoder on orjson and the library's own understand each other."""

from __future__ import annotations

import enum
import math
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from eventsourcing.persistence import (
    DatetimeAsISO,
    DecimalAsStr,
    JSONTranscoder,
    Transcoding,
    TranscodingNotRegisteredError,
    UUIDAsHex,
)

from flask_eventsourcing.orjson_transcoder import OrjsonTranscoder


class Colour(enum.IntEnum):
    """A subclass of a plain type."""

    RED = 1


class SetAsList(Transcoding):
    """A transcoding whose data has values that need transcodings too."""

    type = set
    name = "set"

    def encode(self, obj: set[Any]) -> list[Any]:
        """As a list."""
        return list(obj)

    def decode(self, data: list[Any]) -> set[Any]:
        """From a list."""
        return set(data)


def registered(transcoder: JSONTranscoder) -> JSONTranscoder:
    """The transcoder with the transcodings that an application registers, and one more."""
    for transcoding in (UUIDAsHex(), DecimalAsStr(), DatetimeAsISO(), SetAsList()):
        transcoder.register(transcoding)
    return transcoder


VALUES = [
    {"timestamp": datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC), "amount": Decimal("10.50"), "id": uuid4()},
    {"nested": {"list": [1, "two", None, True, {"deep": UUID(int=7)}]}, "set": {Decimal(1)}},
    {"text": 'quotes " and \\ and \n and \x00 and é and 😀', "empty": {}, "float": 0.1, "small": 1e-300},
    {"large": 2**63 - 1, "larger": 2**63, "largest": -(2**100), "almost": 10**17},
    {"tuple": (1, 2), "enum": Colour.RED, "infinity": math.inf},
    {1: "a key that is a number", None: "and one that is nothing"},
    {"_type_": "a key of the format", "other": 1},
    [],
    "plain",
    None,
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
@pytest.mark.parametrize("writer", [OrjsonTranscoder, JSONTranscoder])
def test_each_reads_what_the_other_wrote(writer: type[JSONTranscoder], value: Any) -> None:
    """An event that either transcoder has written is read alike by both."""
    data = registered(writer()).encode(value)
    expected = registered(JSONTranscoder()).decode(registered(JSONTranscoder()).encode(value))
    assert registered(OrjsonTranscoder()).decode(data) == expected
    assert registered(JSONTranscoder()).decode(data) == expected


def test_not_a_number_stays_what_it_is() -> None:
    """A NaN comes back as a NaN, not as nothing."""
    transcoder = registered(OrjsonTranscoder())
    assert math.isnan(transcoder.decode(transcoder.encode({"x": math.nan}))["x"])


def test_unknown_types_are_refused_as_the_library_refuses_them() -> None:
    """A type without a transcoding is refused with the library's own error, when writing and when reading."""
    with pytest.raises(TranscodingNotRegisteredError):
        OrjsonTranscoder().encode({"x": object()})
    with pytest.raises(TranscodingNotRegisteredError):
        OrjsonTranscoder().decode(registered(JSONTranscoder()).encode(Decimal(1)))
