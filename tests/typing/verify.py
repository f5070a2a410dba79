"""Fails where a public name of the package has no known type: ``python -m tests.typing.verify``.

It is ``pyright --verifytypes``, without the modules for Django: a class that derives from one of Django's, which has no
types, has none itself.
"""

from __future__ import annotations

import json
import subprocess
import sys

from tests.source import PACKAGE

UNTYPED = "flask_eventsourcing.contrib.django."


def main() -> int:
    """Print the names, and return the exit status."""
    command = [sys.executable, "-m", "pyright", "--verifytypes", PACKAGE, "--ignoreexternal", "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    symbols = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    exported = [each for each in symbols if each["isExported"] and not each["name"].startswith(UNTYPED)]
    unknown = [each["name"] for each in exported if not each["isTypeKnown"]]
    print(*unknown, sep="\n")
    print(f"{len(exported) - len(unknown)} of {len(exported)} public names have a known type.")
    return 1 if unknown or not exported else 0


if __name__ == "__main__":
    sys.exit(main())
