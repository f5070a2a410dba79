"""Scripts and the shell of a Pyramid project, each in a process of its own, as the documentation has them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.docs.pages import ROOT, files

PAGE = ROOT / "docs" / "pyramid.md"
INI = """
[app:main]
use = call:bank_site:main
sqlalchemy.url = {url}
tm.commit_veto = pyramid_tm.default_commit_veto

[pshell]
{shell}

[loggers]
keys = root
[handlers]
keys = console
[formatters]
keys = generic
[logger_root]
level = WARNING
handlers = console
[handler_console]
class = StreamHandler
args = (sys.stderr,)
formatter = generic
[formatter_generic]
format = %(levelname)s %(message)s
"""

TABLES = """
import sys
from bank_site import Base
from pyramid.paster import get_app
Base.metadata.create_all(get_app(sys.argv[1]).registry["dbsession_factory"].kw["bind"])
"""
DATABASES = pytest.mark.parametrize("url", ["sqlite-file", "postgresql", "mariadb"], indirect=True)


class Project:
    """The site of the documentation in a folder of its own, with an ini file and the tables."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        for name, text in files(PAGE).items():
            (folder / name).write_text(text)
        self.write_ini("")
        self.run("-c", TABLES)

    def write_ini(self, shell: str) -> None:
        """Write the ini file, with a section for the shell."""
        (self.folder / "site.ini").write_text(INI.format(url=self.url.replace("%", "%%"), shell=shell))

    def run(self, *command: str, entered: str = "") -> str:
        """Run Python in the folder with the ini file as last argument, and return what it says."""
        done = subprocess.run(
            [sys.executable, *command, "site.ini"],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}"},
            input=entered,
            capture_output=True,
            text=True,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        return said

    def shell(self, *lines: str) -> str:
        """Enter lines in ``pshell``, and return what it says."""
        return self.run("-m", "pyramid.scripts.pshell", "-p", "python", entered="\n".join((*lines, "")))

    def stored(self) -> tuple[int, int]:
        """Count the events and the rows."""
        engine = sa.create_engine(self.url)
        with engine.connect() as connection:
            events, rows = (connection.scalar(sa.text(f"SELECT count(*) FROM {name}")) for name in TABLES_COUNTED)
        engine.dispose()
        return events, rows


TABLES_COUNTED = ("bank_events", "total")


@pytest.fixture
def project(tmp_path: Path, url: str) -> Project:
    """The site."""
    return Project(tmp_path, url)


@DATABASES
def test_script(project: Project) -> None:
    """A script of ``bootstrap()`` commits events and rows with the request's manager, and with a unit of work."""
    assert project.run("open_account.py") == ""
    assert project.stored() == (2, 1)


@DATABASES
def test_shell_whose_setup_begins_a_transaction(project: Project) -> None:
    """In ``pshell``, what is committed is stored, events with rows, and what is aborted is not."""
    project.write_ini("setup = shell.setup")
    said = project.shell(
        "from bank_site import Total",
        "account = bank.open_account('ada')",
        "dbsession.add(Total(account_id=account.id, amount=0))",
        "tm.commit()",
        "tm.begin()",
        "bank.deposit(account.id, 5)",
        "tm.abort()",
        "tm.begin()",
        "print('balance', bank.repository.get(account.id).balance)",
        "tm.abort()",
    )
    assert "balance 0" in said
    assert project.stored() == (1, 1)


@DATABASES
def test_shell_without_a_setup(project: Project) -> None:
    """In ``pshell`` without further code, ``with request.tm:`` and units of work commit what is saved in them."""
    said = project.shell(
        "from domain import Bank",
        "bank = request.eventsourcing[Bank]",
        "with request.tm: account = bank.open_account('ada')",
        "",
        "with request.eventsourcing.transaction(): bank.deposit(account.id, 5)",
        "",
        "with request.tm: print('balance', bank.repository.get(account.id).balance)",
        "",
    )
    assert "balance 5" in said
    assert project.stored() == (2, 0)


def test_uncommitted_events_of_a_shell_are_told(project: Project) -> None:
    """What nobody has committed when the shell ends is rolled back, and logged."""
    project.write_ini("setup = shell.setup")
    said = project.shell("account = bank.open_account('ada')")
    assert "1 event of Bank" in said
    assert project.stored() == (0, 0)


def test_save_without_a_transaction_is_told(project: Project) -> None:
    """A save in a shell whose transaction nobody has begun fails, and the error says how to begin one."""
    said = project.shell("from domain import Bank", "account = request.eventsourcing[Bank].open_account('ada')")
    assert "request.tm" in said
    assert project.stored() == (0, 0)
