"""Print the path of a Python 3.12 or later, which Django 6 needs, or nothing where there is none.

It is looked for on PATH and among pyenv's versions. The newest one that makes environments is taken.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MINORS = range(16, 11, -1)
"""The minor versions that are tried, the newest first."""


def candidates() -> Iterator[str]:
    """Yield programs that may be such a Python."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for minor in MINORS:
        if found := shutil.which(f"python3.{minor}"):
            yield found
        yield from map(str, sorted(root.glob(f"3.{minor}.*/bin/python"), reverse=True))


def is_whole(python: str) -> bool:
    """Tell whether a program runs, is new enough, and has what an environment needs."""
    code = "import ensurepip, sqlite3, ssl, sys, venv; sys.exit(sys.version_info < (3, 12))"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    sys.stdout.write(next(filter(is_whole, candidates()), ""))
