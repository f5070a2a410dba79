"""The program of the documentation, word for word, in a project that ``startproject`` has made."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.bank import make_site
from tests.contract.backends import url_for
from tests.django_host.conftest import DATABASES
from tests.django_host.project import database_settings
from tests.docs.pages import files
from tests.servers import require
from tests.source import ROOT

FILES = files(ROOT / "docs" / "django.md", "project")
REQUEST = """
import bank.reading, bank.tasks
from bank.models import Balance
from django.test import Client
answer = Client(headers={"host": "localhost"}).post("/accounts", {"owner": "Ada"})
print(answer.status_code, len(answer.json()["id"]))
"""
BALANCES = """
from flask_eventsourcing.contrib.django import wait_for
wait_for("Balances", 1)
from bank.models import Balance, BankRecords
print([(each.account_id == event.originator_id, each.amount) for each, event in
       zip(Balance.objects.all(), BankRecords.StoredEvent.objects.all())])
"""
PICKLED = """
import pickle
print(list(pickle.loads(pickle.dumps(BankStoredEvent.objects.all()))))
"""


class Project:
    """A project in a folder, whose commands are run in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = [sys.executable, "-W", "error"]
        self.run("-m", "django", "startproject", "site_of_bank", ".")
        self.run("manage.py", "startapp", "bank")

    def run(self, *command: str, status: int = 0, **variables: str) -> str:
        """Run a command of Python's, with warnings as errors, and return what it prints."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        environment.pop("DJANGO_SETTINGS_MODULE", None)
        done = subprocess.run(
            [*self.python, *command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def manage(self, *command: str, status: int = 0) -> str:
        """Run a command of ``manage.py``."""
        return self.run("manage.py", *command, status=status)

    def write(self, name: str, text: str) -> None:
        """Write a file of the project."""
        (self.folder / name).write_text(text)

    def append(self, name: str, text: str) -> None:
        """Append to one."""
        with (self.folder / name).open("a") as file:
            file.write(text)


def bank_project(folder: Path, databases: dict[str, Any] | None = None) -> Project:
    """Make the documentation's project."""
    project = Project(folder)
    if databases is not None:
        project.append("site_of_bank/settings.py", f"\nDATABASES = {databases!r}\n")
    for name, text in FILES.items():
        if name == "settings.py":
            project.append("site_of_bank/settings.py", text)
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            project.write(f"site_of_bank/{name}" if name == "urls.py" else name, text)
    return project


@pytest.mark.parametrize("backend", ["startproject", *DATABASES])
def test_program(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The documentation's program works from ``startproject`` on, and ``makemigrations`` has nothing to do then."""
    found = None
    if backend != "startproject":
        found = {"default": database_settings(url_for(backend, tmp_path, request))}
    project = bank_project(tmp_path, found)
    project.manage("makemigrations", "bank")
    project.manage("migrate")
    said = project.manage("check", "--database", "default")
    assert ("W003" in said) == (backend == "startproject")
    assert "no issues" in said or backend == "startproject"
    project.manage("makemigrations", "--check")
    assert "201 36" in project.manage("shell", "-v", "0", "-c", REQUEST)
    project.manage("eventsourcing", "run", "--once")
    assert "[(True, 0)]" in project.manage("shell", "-v", "0", "-c", BALANCES)
    said = project.manage("shell", "-c", PICKLED)
    assert "could not" not in said
    assert "[<BankStoredEvent: " in said


@pytest.mark.parametrize(
    "backend", [DATABASES[0], *(pytest.param(each, marks=pytest.mark.long) for each in DATABASES[1:])]
)
def test_tests_of_a_project(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The documentation's tests pass, in processes side by side and under pytest-django, where each is alone."""
    require(find_spec("pytest_django"), "pytest-django", "pip install 'Flask-EventSourcing[test]'")
    found = {"default": database_settings(url_for(backend, tmp_path, request))}
    project = bank_project(tmp_path, found)
    project.append("site_of_bank/urls.py", ADMIN)
    project.write("bank/test_admin.py", (ROOT / "tests/django_host/admin_cases.py").read_text())
    project.manage("makemigrations", "bank")
    said = project.manage("test", "--parallel", "2")
    assert "Ran 12 tests" in said
    assert said.count("Cloning test database") in (0, 2)
    plain = ("-m", "pytest", "-q", "-p", "pytest_django.plugin", "-p", "no:cacheprovider", "-p", "xdist", "-n", "2")
    settings = ("--ds", "site_of_bank.settings", "bank/test_accounts.py")
    assert "3 passed" in project.run(*plain, *settings, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")


@pytest.mark.parametrize(
    "backend", [DATABASES[0], *(pytest.param(each, marks=pytest.mark.long) for each in DATABASES[1:])]
)
def test_test_cases_of_users(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Data of a class, captured callbacks and live servers work with events, in parallel and under pytest-django."""
    require(find_spec("pytest_django"), "pytest-django", "pip install 'Flask-EventSourcing[test]'")
    project = bank_project(tmp_path, {"default": database_settings(url_for(backend, tmp_path, request))})
    project.append("site_of_bank/urls.py", LIVE)
    project.write("bank/test_cases.py", (ROOT / "tests/django_host/cases.py").read_text())
    project.manage("makemigrations", "bank")
    said = project.manage("test", "bank.test_cases", "--parallel", "2")
    assert "Ran 10 tests" in said
    plain = ("-m", "pytest", "-q", "-p", "pytest_django.plugin", "-p", "no:cacheprovider")
    said = project.run(
        *plain, "--ds", "site_of_bank.settings", "bank/test_cases.py", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"
    )
    assert "15 passed" in said


LIVE = """
from django.views.decorators.csrf import csrf_exempt
urlpatterns += [path("live", csrf_exempt(open_account))]
"""
ADMIN = """
from django.contrib import admin
urlpatterns += [path("admin/", admin.site.urls)]
"""
TAKEN_OVER = """
from io import StringIO
from django.core.management import call_command
from flask_eventsourcing.contrib.django import get_application
call_command("eventsourcing", "check")
call_command("eventsourcing", "init-db")
call_command("migrate", fake_initial=True, verbosity=0)
call_command("makemigrations", "--check", "--dry-run", verbosity=0)
bank = get_application("Bank")
events = bank.notification_log.select(1, 10)
account = bank.repository.get(events[0].originator_id)
account.deposit(5)
bank.save(account)
print("balance", account.balance, "events", len(events))
"""


@pytest.mark.parametrize(
    "backend", [DATABASES[0], *(pytest.param(each, marks=pytest.mark.long) for each in DATABASES[1:])]
)
def test_tables_of_another_site(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Tables that a Flask site has made, and its events, are taken over by ``migrate --fake-initial``."""
    url = url_for(backend, tmp_path, request)
    flask_site = make_site(url)
    account_id = flask_site.opened(1, 2)
    found = {"default": database_settings(url)}
    project = bank_project(tmp_path, found)
    project.write("bank/domain.py", "from tests.domain import Account, Bank\n")
    models = FILES["bank/models.py"]
    project.write("bank/models.py", models[: models.index("class Balance")])
    project.write("bank/projections.py", "")
    project.append("site_of_bank/settings.py", 'INSTALLED_APPS += ["journal"]\n')
    project.manage("makemigrations", "bank", "journal")
    said = project.manage("shell", "-v", "0", "-c", TAKEN_OVER)
    assert "table bank_events ok" in said
    assert "created table bank_dead_letters" in said
    assert "balance 8 events 3" in said
    assert flask_site.balance(account_id) == 8
    flask_site.close()


OWN = """
from django.db import models
from flask_eventsourcing.contrib.django.models import AbstractStoredEvent, event_models


class Event(AbstractStoredEvent):
    # further fields
    class Meta(AbstractStoredEvent.Meta):
        db_table = "events"

    @classmethod
    def column_values(cls, event, metadata):
        return {}


BankRecords = event_models(__name__, "Bank", stored_event_model=Event)
"""


def test_migration_of_a_table(tmp_path: Path) -> None:
    """``check`` names a column that the record class has and the table lacks, and ``migrate`` adds it."""
    project = bank_project(tmp_path)
    project.write("bank/projections.py", "")
    project.write("bank/models.py", OWN)
    project.manage("makemigrations", "bank")
    project.manage("migrate")
    project.write("bank/models.py", OWN.replace("# further fields", "tenant = models.TextField(null=True)"))
    assert "E005" in project.manage("check", "--database", "default", status=1)
    project.manage("makemigrations", "bank")
    said = project.manage("migrate")
    assert "events.tenant is missing" in said
    assert "0002" in said
    assert "tenant" not in project.manage("check", "--database", "default")


def test_nothing_is_constructed_by_commands(tmp_path: Path) -> None:
    """Management commands that do not use the applications construct none, and ask no database."""
    project = bank_project(tmp_path)
    project.append(
        "bank/domain.py", "\n\nclass Bank(Bank):\n    def __init__(self, env=None):\n        raise SystemExit(9)\n"
    )
    project.manage("makemigrations", "bank")
    project.manage("check")
    assert not (tmp_path / "db.sqlite3").exists() or (tmp_path / "db.sqlite3").stat().st_size == 0


def test_checks(tmp_path: Path) -> None:
    """What is wrong with the setting is said by ``check``, with an id and a hint."""
    project = bank_project(tmp_path)
    settings = (tmp_path / "site_of_bank/settings.py").read_text()
    wrong = {
        "EVENTSOURCING = []": "E001",
        'EVENTSOURCING = {"Bank": {"APPLICATION": "bank.domain.Bank", "DB": "x"}}': "E001",
        'EVENTSOURCING = {"Bank": {"APPLICATION": "bank.domain.Bank", "DATABASE": "other"}}': "E001",
        'EVENTSOURCING = {"Bank": {"APPLICATION": "bank.domain.Bank", "PROJECTION_LOCK": True}}': "E001",
        'EVENTSOURCING = {"Bank": {"APPLICATION": "bank.domain.Nope"}}': "E002",
        'EVENTSOURCING = {"Bank": {"APPLICATION": "bank.domain.Account"}}': "E002",
        'EVENTSOURCING = {"Bank": {"APPLICATION": "bank.domain.Bank", "ENV": {"CIPHR_KEY": "x"}}}': "E002",
        'EVENTSOURCING = {"Shop": {"APPLICATION": "bank.domain.Bank"}}': "E002",
    }
    for line, code in wrong.items():
        project.write("site_of_bank/settings.py", f"{settings}\n{line}\n")
        said = project.manage("check", status=1)
        assert f"eventsourcing.{code}" in said, said
        assert "HINT" in said
    project.write("site_of_bank/settings.py", f"{settings}\ndel EVENTSOURCING\n")
    assert "W001" in project.manage("check")
    project.write("site_of_bank/settings.py", settings)
    project.write("bank/models.py", FILES["bank/models.py"].replace('BankRecords = event_models(__name__, "Bank")', ""))
    assert "E003" in project.manage("check", status=1)
