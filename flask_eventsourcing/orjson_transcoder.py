"""A faster transcoder that reads and writes the library's own JSON format, with the optional package ``orjson``.

Switch it on in ``EVENTSOURCING_ENV``, with ``flask_eventsourcing.orjson_transcoder:OrjsonTranscoder`` as the
``TRANSCODER_TOPIC``. Events that either transcoder has written can be read with the other.
"""

from __future__ import annotations

import re
from typing import Any

import orjson
from eventsourcing.persistence import JSONTranscoder

_PLAIN = frozenset({str, bool, type(None)})
_NUMBERS = frozenset({int, float})
_LARGEST = 2**63 - 1
# orjson reads larger integers as floats.
_LARGE_NUMBER = re.compile(rb"\d{18}")


class _NotForOrjsonError(Exception):
    """A value that orjson would write in another way than the library does."""


class OrjsonTranscoder(JSONTranscoder):
    """A ``JSONTranscoder`` that uses ``orjson`` instead of ``json``.

    Values that orjson writes or reads in another way (integers beyond 64 bits, ``NaN``, subclasses of plain types) are
    left to the library, so the format is always the same.
    """

    def encode(self, obj: Any) -> bytes:
        """Return the object as JSON.

        :raises TranscodingNotRegisteredError: when there is no transcoding for an object's type.
        """
        try:
            return orjson.dumps(self._prepare(obj))
        except (_NotForOrjsonError, orjson.JSONEncodeError):
            return super().encode(obj)

    def decode(self, data: bytes) -> Any:
        """Return the object.

        :raises TranscodingNotRegisteredError: when there is no transcoding of a name in it.
        """
        # For values with a type, each mapping needs a call of a Python function, and then the C code of ``json`` is
        # faster.
        if b'"_type_"' in data or _LARGE_NUMBER.search(data):
            return super().decode(data)
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            return super().decode(data)

    def _prepare(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is dict:
            prepared = {}
            for key, item in value.items():
                if type(key) is not str:
                    raise _NotForOrjsonError
                prepared[key] = item if type(item) is str else self._prepare(item)
            return prepared
        if kind is list or kind is tuple:
            return [self._prepare(item) for item in value]
        # NaN and the infinities fail the comparison too.
        if kind in _NUMBERS and -_LARGEST <= value <= _LARGEST:
            return value
        transcoding = self.types.get(kind)
        if transcoding is None:
            raise _NotForOrjsonError
        return {"_type_": transcoding.name, "_data_": self._prepare(transcoding.encode(value))}
