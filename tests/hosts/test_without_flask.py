"""The tests of every host, and the contract of the recorders, in a process where Flask cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.source import ROOT

LEFT_OUT = "not postgres and not mariadb and not without_flask"
"""What needs a server, and this module itself."""
FILES = (
    "tests/hosts",
    "tests/pyramid_site",
    "tests/django_host/test_requests.py",
    "tests/django_host/test_transactions.py",
    "examples/pyramid_site",
    pytest.param("tests/contract/test_recorders.py", marks=pytest.mark.long),
    pytest.param("tests/unit/test_lifecycle.py", marks=pytest.mark.long),
    pytest.param("tests/unit/test_lifecycle_fork.py", marks=pytest.mark.long),
)


@pytest.mark.parametrize("file", FILES)
def test_without_flask(file: str) -> None:
    """Scripts, Zope's transactions, Pyramid and Django get what a Flask app gets, recorders, units and a lifecycle."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    # What is long has run in this process too.
    for name in ("PYTEST_XDIST_WORKER", "REQUIRE_SERVERS", "LONG"):
        environment.pop(name, None)
    # What needs a server has run in this process; there is no second one in that.
    options = [
        "-q",
        "-p",
        "tests.hosts.no_flask",
        "-p",
        "pytest_timeout",
        "-o",
        "addopts=",
        "-k",
        LEFT_OUT,
        file,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
