"""A plugin of pytest with which Flask cannot be imported, nor anything that comes with it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec

BLOCKED = {"click", "flask", "flask_sqlalchemy", "flask_sqlalchemy_lite", "werkzeug"}


class Blocker:
    """Finds no module of Flask."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Refuse what is blocked, and leave the rest to others."""
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
        return None


sys.meta_path.insert(0, Blocker())
