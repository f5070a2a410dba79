"""A plugin for Alembic 1.20.1 and later: migrations import our column types, and drop no table of a rebuild.

Alembic renders a type of another package by its module's name and leaves the import to the user, so that a generated
migration fails with a ``NameError`` unless it is edited. Alembic finds this plugin by its entry point, while it is
imported itself; that is why nothing of it is imported here before it is needed.

A table that a rebuild is building, or has replaced, is not among the models: autogenerate would drop it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import models

if TYPE_CHECKING:
    from alembic.runtime.plugins import Plugin
    from alembic.util import PriorityDispatchResult

OURS = models.UUIDType, models.MetadataType, models.ExactText
RenderItem = Callable[[str, Any, Any], Any]


def setup(plugin: Plugin) -> None:
    """Called by Alembic with the plugin's registration."""
    from alembic.util import DispatchPriority

    plugin.add_autogenerate_comparator(add_renderer, "autogenerate")
    plugin.add_autogenerate_comparator(leave_rebuilds, "autogenerate", priority=DispatchPriority.LAST)


def add_renderer(autogen_context: Any, upgrade_ops: Any) -> PriorityDispatchResult:
    """Have our type rendered together with its import, in the migration that is being generated."""
    from alembic.util import PriorityDispatchResult

    options: dict[str, Any] = autogen_context.opts
    options["render_item"] = _rendering(options.get("render_item"))
    return PriorityDispatchResult.CONTINUE


def leave_rebuilds(autogen_context: Any, upgrade_ops: Any) -> PriorityDispatchResult:
    """Take back what would drop a table that a rebuild has made beside one of the metadata."""
    from alembic.util import PriorityDispatchResult

    known = {table.name for table in autogen_context.sorted_tables}

    def is_ours(operation: Any) -> bool:
        name = getattr(operation, "table_name", None)
        return name is not None and name not in known and models.is_of_rebuild(name, known)

    upgrade_ops.ops[:] = [operation for operation in upgrade_ops.ops if not is_ours(operation)]
    return PriorityDispatchResult.CONTINUE


def _rendering(other: RenderItem | None) -> RenderItem:
    def render_item(kind: str, item: Any, autogen_context: Any) -> Any:
        rendered = False if other is None else other(kind, item, autogen_context)
        if rendered is False and kind == "type" and isinstance(item, OURS):
            autogen_context.imports.add(f"import {models.__name__}")
            return f"{models.__name__}.{item!r}"
        return rendered

    return render_item
