"""The page of the documentation about Cassandra."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from uuid import UUID

import pytest

from tests.django_host.test_program import Project
from tests.docs.pages import ROOT, files
from tests.servers import require
from tests.workers.serving import serving

PAGE = ROOT / "docs" / "cassandra.md"


def variables_of(server: str, keyspace: str) -> dict[str, str]:
    """Return the settings of a Flask app on a node as variables of its environment."""
    host, _, port = server.partition(":")
    return {
        "FLASK_EVENTSOURCING_CASSANDRA_CONTACT_POINTS": json.dumps([host]),
        "FLASK_EVENTSOURCING_CASSANDRA_PORT": port,
        "FLASK_EVENTSOURCING_CASSANDRA_KEYSPACE": json.dumps(keyspace),
        "FLASK_EVENTSOURCING_CASSANDRA_REPLICATION": "1",
    }


def test_program_of_the_page(cassandra_server: str, cassandra_keyspace: str, tmp_path: Path) -> None:
    """The programs that the page shows work as it says, word for word: an app, and one with a projection."""
    for name, text in files(PAGE).items():
        (tmp_path / name).write_text(text)
    variables = variables_of(cassandra_server, cassandra_keyspace)
    command = [sys.executable, "-m", "flask", "--app", "ledger"]
    environment = {**variables, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}

    def call(app: str, *arguments: str) -> str:
        line = [sys.executable, "-m", "flask", "--app", app, *arguments]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    made = call("owners", "eventsourcing", "init-db").splitlines()
    assert {"Created table bank_log.", "Created table bank_projections.", "Created table owner."} <= set(made)
    with serving(lambda at: [*command, "run", "--port", str(at)], tmp_path, None, **variables) as served:
        connection = HTTPConnection("127.0.0.1", served.port, timeout=60)
        with closing(connection):
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            connection.request("POST", "/accounts", "owner=ada", headers)
            answer = connection.getresponse()
            assert answer.status == 201
            assert UUID(json.loads(answer.read())["id"]).version == 4
    call("owners", "eventsourcing", "run", "--all", "--once")
    asking = "from owners import create_app; print(create_app().test_client().get('/owners').json)"
    done = subprocess.run(
        [sys.executable, "-c", asking], cwd=tmp_path, env=environment, capture_output=True, check=True
    )
    assert done.stdout.decode() == "['ada']\n"


# ------------------------------------------------------------------------------------------------------------- Django

USING = """
import multiprocessing
from django.core.management import call_command
from flask_eventsourcing.contrib.django import get_application, wait_for

def save(owner):
    get_application("Bank").open_account(owner)

call_command("check")
call_command("eventsourcing", "init-db")
call_command("migrate", database="default")
save("parent")
child = multiprocessing.get_context("fork").Process(target=save, args=("child",))
child.start()
child.join()
call_command("eventsourcing", "run", "--once")
wait_for("Owners", 2)
from bank.models import Owner
print(sorted(Owner.objects.values_list("name", flat=True)))
call_command("eventsourcing", "check")
"""


def made_project(folder: Path, server: str, keyspace: str, python: str | None = None) -> Project:
    """Make the project of the page, on a node; with another interpreter, by the settings of the engine."""
    shown = files(PAGE, "project")
    host, _, port = server.partition(":")
    project = Project(folder)
    for name in ("bank/domain.py", "bank/models.py", "bank/projections.py"):
        project.write(name, shown[name])
    settings = "site_of_bank/settings.py"
    project.append(settings, f"\n{shown['settings.py']}\n")
    own = {"CONTACT_POINTS": [host], "PORT": int(port), "KEYSPACE": keyspace, "REPLICATION": 1, "PATIENCE": 60}
    if python is None:
        project.append(settings, f"\nEVENTSOURCING['Bank']['CASSANDRA'] |= {own!r}\n")
        return project
    project.python = [python]
    project.append(settings, f"\n{shown['engine.py']}\n")
    project.append(
        settings,
        f"DATABASES['cassandra'] |= {{'HOST': {host!r}, 'NAME': {keyspace!r}}}\n"
        f"DATABASES['cassandra']['OPTIONS'] = {{'replication': {{'replication_factor': 1}}, "
        f"'connection': {{'port': {int(port)}}}}}\n",
    )
    return project


def use(project: Project) -> None:
    """Make the tables, save in two processes, and follow the log."""
    # In a process of its own, as the engine pretends then to be no database, until the end.
    project.manage("makemigrations", "bank")
    printed = project.manage("shell", "-c", USING)
    assert "no issues" in printed
    assert "Created table bank_log." in printed
    assert "\n['child', 'parent']\n" in printed
    assert "Bank: log ok, last position 2" in printed
    migration = (project.folder / "bank" / "migrations" / "0001_initial.py").read_text()
    assert "bank_projections" in migration
    assert "bank_events" not in migration


def test_django_project_of_the_page(cassandra_server: str, cassandra_keyspace: str, tmp_path: Path) -> None:
    """The Django project that the page shows works as it says, word for word, in forked processes too."""
    use(made_project(tmp_path, cassandra_server, cassandra_keyspace))


@pytest.fixture(scope="module")
def engine_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with django-cassandra-engine and its driver, instead of the driver of this environment."""
    folder = tmp_path_factory.mktemp("engine")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    for path in map(Path, sys.path):
        if path.name == "site-packages":
            for each in path.iterdir():
                if not each.name.startswith(("cassandra", "__pycache__")):
                    (own / each.name).symlink_to(each)
    wanted = ["django-cassandra-engine==1.11.*", "scylla-driver==3.29.*", "geomet"]
    command = [sys.executable, "-m", "pip", "--python", f"{folder}/bin/python", "install", "-q", "--no-deps", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    require(done.returncode == 0, f"django-cassandra-engine ({done.stderr[-300:]})", "pip install " + " ".join(wanted))
    return f"{folder}/bin/python"


@pytest.mark.long
def test_django_project_with_the_engine(
    cassandra_server: str, cassandra_keyspace: str, engine_python: str, tmp_path: Path
) -> None:
    """The same works by the settings of django-cassandra-engine, which connects before any fork, with its driver."""
    project = made_project(tmp_path, cassandra_server, cassandra_keyspace, engine_python)
    use(project)
    # What pip leaves where the other driver is installed too.
    (own,) = Path(engine_python).parents[1].glob("lib/python*/site-packages")
    for found in (each for path in map(Path, sys.path) for each in path.glob("cassandra_driver-*.dist-info")):
        (own / found.name).symlink_to(found)
    assert "are both installed" in project.manage("check", status=1)
