"""A plugin for Alembic 1.20.1 and later: migrations that use our column type import it.

Alembic renders a type of another package by its module's name and leaves the import to the user, so that a generated
migration fails with a ``NameError`` unless it is edited. Alembic finds this plugin by its entry point, while it is
imported itself; that is why nothing of it is imported here before it is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flask_eventsourcing.models import UUIDType

if TYPE_CHECKING:
    from alembic.runtime.plugins import Plugin
    from alembic.util import PriorityDispatchResult

RenderItem = Callable[[str, Any, Any], Any]


def setup(plugin: Plugin) -> None:
    """Called by Alembic with the plugin's registration."""
    plugin.add_autogenerate_comparator(add_renderer, "autogenerate")


def add_renderer(autogen_context: Any, upgrade_ops: Any) -> PriorityDispatchResult:
    """Have our type rendered together with its import, in the migration that is being generated."""
    from alembic.util import PriorityDispatchResult

    options: dict[str, Any] = autogen_context.opts
    options["render_item"] = _rendering(options.get("render_item"))
    return PriorityDispatchResult.CONTINUE


def _rendering(other: RenderItem | None) -> RenderItem:
    def render_item(kind: str, item: Any, autogen_context: Any) -> Any:
        rendered = False if other is None else other(kind, item, autogen_context)
        if rendered is False and kind == "type" and isinstance(item, UUIDType):
            autogen_context.imports.add(f"import {UUIDType.__module__}")
            return f"{UUIDType.__module__}.{item!r}"
        return rendered

    return render_item


class _PluginModule(ModuleType):
    """Lets Alembic 1.18.0 to 1.20.0, which iterate over what an entry point names, find the one plugin in it."""

    def __iter__(self) -> Iterator[ModuleType]:
        yield self


# Without this, those versions of Alembic could not be imported any more where this package is installed.
sys.modules[__name__].__class__ = _PluginModule
