"""The settings for servers that the example brings."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.servers import require
from tests.workers.serving import BIN, ROOT, serving

pytestmark = pytest.mark.xdist_group("web-servers")


@pytest.fixture
def bank(postgres_url: str, tmp_path: Path) -> dict[str, str]:
    """The environment of the example with a database that has its tables."""
    environment = {"DATABASE_URL": postgres_url, "SECRET_KEY": "secret", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-m", "flask", "--app", "example_app", "db", "upgrade"],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        timeout=60,
    )
    return environment


def uwsgi(folder: Path, port: int) -> list[str]:
    """Return the line of the README, with another port."""
    require(find_spec("uwsgidecorators"), "uWSGI", "pip install 'Flask-EventSourcing[uwsgi]'")
    settings = (ROOT / "example_app" / "uwsgi.ini").read_text()
    assert "127.0.0.1:9001" in settings
    (folder / "uwsgi.ini").write_text(settings.replace("127.0.0.1:9001", f"127.0.0.1:{port}"))
    return [str(BIN / "uwsgi"), "--ini", str(folder / "uwsgi.ini")]


def gunicorn(folder: Path, port: int) -> list[str]:
    """Return the line of the README, with another port."""
    require(find_spec("gunicorn"), "gunicorn", "pip install 'Flask-EventSourcing[gunicorn]'")
    settings = str(ROOT / "example_app" / "gunicorn.conf.py")
    return [sys.executable, "-m", "gunicorn", "-c", settings, "--bind", f"127.0.0.1:{port}"]


@pytest.mark.parametrize("line", [uwsgi, gunicorn], ids=["uwsgi", "gunicorn"])
def test_the_example_is_served(line: object, bank: dict[str, str], tmp_path: Path) -> None:
    """The example answers under uWSGI and gunicorn with the settings that it brings, and ends at SIGTERM."""
    make = uwsgi if line is uwsgi else gunicorn
    with serving(lambda port: make(tmp_path, port), tmp_path, None, **bank) as served:
        answers = [served.ask("/api/accounts", "GET") for _ in range(20)]
        assert [answer["total"] for answer in answers] == [0] * 20
        served.settle()
        assert served.end() == 0
