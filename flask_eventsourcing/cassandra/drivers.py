"""Finds the driver of Cassandra: two projects install a package of the same name, and one overwrites the other."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..exceptions import ConfigurationError

DRIVERS = {"cassandra-driver": "Flask-EventSourcing[cassandra]", "scylla-driver": "Flask-EventSourcing[scylla]"}
"""The projects that install the package ``cassandra``, each with the extra that installs it."""
LAST_WITH_GEVENT = (3, 30)
REACTOR = "cassandra.io.geventreactor"
"""The module that the driver imports only if gevent has patched the sockets before."""


def installed() -> dict[str, str]:
    """Return the version of each of the projects that is installed."""
    found = {}
    for name in DRIVERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_drivers() -> None:
    """Check that there is one driver, and that it works in this process.

    :raises ConfigurationError: when there is none, or both are installed, or the driver does not work with gevent.
    """
    found = installed()
    if not found:
        raise ConfigurationError(
            "The driver of Cassandra is missing: run pip install 'Flask-EventSourcing[cassandra]', or [scylla]."
        )
    if len(found) > 1:
        raise ConfigurationError(
            "cassandra-driver and scylla-driver are both installed, and each has overwritten files of the other: "
            "uninstall both, and install one of them again."
        )
    ((name, text),) = found.items()
    if not _uses_gevent():
        return
    if name != "cassandra-driver" or _numbers(text) > LAST_WITH_GEVENT:
        raise ConfigurationError(
            f"{name} {text} does not connect where gevent has patched the sockets: use cassandra-driver below 3.31, "
            "the last one with a reactor for gevent, or another kind of worker."
        )


def check_process() -> None:
    """Check that this process may open a session.

    :raises ConfigurationError: in the master of uWSGI, which forks, and where gevent came after the driver.
    """
    if _uses_gevent() and REACTOR not in sys.modules:
        raise ConfigurationError(
            "The driver of Cassandra was imported before gevent patched the sockets, and would wait for ever: start "
            "gunicorn without --preload, or patch at the top of its configuration file (gevent.monkey.patch_all())."
        )
    # The module exists only inside the server.
    server: Any = sys.modules.get("uwsgi")
    if server is not None and server.worker_id() == 0 and server.masterpid() == os.getpid():
        raise ConfigurationError(
            "The master of uWSGI must not connect to Cassandra: it forks while the driver's threads run, and a worker "
            "may then hang before its first request. Use the application in requests, not while the module is "
            "imported, or start uWSGI with --lazy-apps."
        )


def _uses_gevent() -> bool:
    # If a program has patched anything, this module is imported.
    monkey: Any = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("socket"))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
