"""Takes back what was done to a Flask app when its initialisation fails half way."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from flask import Flask


@contextmanager
def untouched_on_error(app: Flask) -> Iterator[None]:
    """Take back what was done to an app if the block fails."""
    mappings: list[MutableMapping[Any, Any]] = [app.extensions, app.config, app.after_request_funcs, app.cli.commands]
    lists: list[list[Any]] = [app.teardown_appcontext_funcs, app.shell_context_processors]
    before = [dict(mapping) for mapping in mappings], [list(items) for items in lists]
    functions = {key: list(value) for key, value in app.after_request_funcs.items()}
    try:
        yield
    except BaseException:
        # An app that is half made is no use, whatever it was.
        for mapping, old in zip(mappings, before[0], strict=True):
            mapping.clear()
            mapping.update(old)
        for items, old_items in zip(lists, before[1], strict=True):
            items[:] = old_items
        for key, value in functions.items():
            app.after_request_funcs[key][:] = value
        raise
