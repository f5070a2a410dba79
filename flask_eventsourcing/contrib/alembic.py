"""A plugin for Alembic 1.20.1 and later: migrations that use our column type import it.

Alembic renders a type of another package by its module's name and leaves the import to the user, so that a generated
migration fails with a ``NameError`` unless it is edited. Alembic finds this plugin by its entry point.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from alembic.runtime.plugins import Plugin
from alembic.util import PriorityDispatchResult

from flask_eventsourcing.models import UUIDType


def setup(plugin: Plugin) -> None:
    """Called by Alembic with the plugin's registration."""
    plugin.add_autogenerate_comparator(add_import, "autogenerate")


def add_import(autogen_context: Any, upgrade_ops: Any) -> PriorityDispatchResult:
    """Add the import to the migration that is being generated, if a table has a column of our type."""
    metadata = autogen_context.metadata
    collections = metadata if isinstance(metadata, list | tuple) else [metadata]
    columns = (column for each in collections for table in each.tables.values() for column in table.columns)
    if any(isinstance(column.type, UUIDType) for column in columns):
        autogen_context.imports.add(f"import {UUIDType.__module__}")
    return PriorityDispatchResult.CONTINUE


class _PluginModule(ModuleType):
    """Lets Alembic 1.18.0 to 1.20.0, which iterate over what an entry point names, find the one plugin in it."""

    def __iter__(self) -> Iterator[ModuleType]:
        yield self


# Without this, those versions of Alembic could not be imported any more where this package is installed.
sys.modules[__name__].__class__ = _PluginModule
