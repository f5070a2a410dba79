"""Flask under uWSGI, Pyramid under waitress, Django under gunicorn, and Celery, on one database: one projection."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import Notification

from tests.servers import postgres_database
from tests.torture.two_sites import Ledger, make_pyramid_app
from tests.workers.programs import Workspace
from tests.workers.serving import ROOT, Answers, Served, gunicorn, serving, uwsgi

ACCOUNTS = 6
CLIENTS = 4
PATIENCE = 180.0
DJANGO = "tests.torture.two_sites_django.settings"
TASKS_A_SECOND = 10
CELERY = ("celery", "-A", "tests.torture.two_sites_django.tasks", "worker", "-P", "prefork", "-c", "2")


def pyramid_line(port: int) -> list[str]:
    """Return the line that starts waitress."""
    return [sys.executable, "-m", "tests.torture.two_sites", str(port)]


class Transfers:
    """Transfers among the same accounts, asked of all sites, while workers take turns.

    :param url: the database.
    :param seconds: how long it lasts.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.seconds = seconds
        self.es: Any = make_pyramid_app().registry["flask_eventsourcing"]
        self.engine: sa.Engine = self.es.host.datastore.engine
        self.es._registry["base"].metadata.create_all(self.engine)
        self.ledger: Ledger = self.es[Ledger]
        self.accounts = [self.ledger.open() for _ in range(ACCOUNTS)]
        self.seen: list[int] = []
        self.over = threading.Event()
        self.url = url

    def paths(self, seed: int, view: str = "transfer") -> list[str]:
        """Draw transfers, more than there is time for."""
        chance = random.Random(seed)
        drawn = (chance.sample(self.accounts, 2) for _ in range(int(self.seconds * 1000)))
        return [f"/{view}/{one}_{other}_{chance.randint(1, 9)}" for one, other in drawn]

    def load(self, served: Served, seed: int, found: list[Answers]) -> None:
        """Send transfers to a site until the time is over."""
        deadline = time.monotonic() + self.seconds
        paths = iter(self.paths(seed))
        while time.monotonic() < deadline:
            found.append(served.load([next(paths) for _ in range(CLIENTS * 5)], clients=CLIENTS))

    def load_tasks(self, served: Served, seed: int, found: list[Answers]) -> None:
        """Have transfers sent as tasks until the time is over, no more than a worker can do."""
        deadline = time.monotonic() + self.seconds
        paths = iter(self.paths(seed, "later"))
        while time.monotonic() < deadline:
            found.append(served.load([next(paths)], clients=1))
            time.sleep(1 / TASKS_A_SECOND)

    def read(self) -> None:
        """Follow the log until everything is read."""
        while True:
            last_round = self.over.is_set()
            page = self.ledger.recorder.select_notifications(self.seen[-1] if self.seen else None, 200,
                                                             inclusive_of_start=False)  # fmt: skip
            self.seen.extend(each.id for each in page)
            if last_round and not page:
                return

    def work(self, log: Path) -> None:
        """Run the projection in turns in each of the sites."""
        kinds = ("flask", "pyramid", "django")
        number = 0
        while not self.over.is_set():
            command = [sys.executable, "-m", "tests.torture.two_sites", "worker", kinds[number % 3]]
            environment = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "DATABASE_URL": self.url,
                "DJANGO_SETTINGS_MODULE": DJANGO,
            }
            with log.open("ab") as output:
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=output)
            assert process.stdout is not None
            with process.stdout as ready:
                assert ready.readline() == b"ready\n", log.read_text()
            self.over.wait(max(2.0, self.seconds / 6))
            process.terminate()
            assert process.wait(PATIENCE) == 0, log.read_text()
            number += 1

    def is_complete(self, done: int) -> bool:
        """Whether the log has as many transfers."""
        with self.engine.connect() as connection:
            events = self.es._registry["base"].metadata.tables["ledger_events"]
            found = connection.scalar(sa.select(sa.func.count()).select_from(events)) or 0
        return found >= ACCOUNTS + 2 * done

    def log(self) -> list[Notification]:
        """Return the whole log."""
        return list(self.ledger.recorder.select_notifications(None, 1_000_000))

    def rows(self, table: str) -> list[Any]:
        """Return the rows of a read model."""
        tables = self.es._registry["base"].metadata.tables
        with self.engine.connect() as connection:
            return list(connection.execute(sa.select(tables[table])))


def check(transfers: Transfers, done: int) -> None:
    """Check that no update was lost, that the log is complete and in order, and that the projection is right."""
    notifications = transfers.log()
    positions = [each.id for each in notifications]
    assert transfers.seen == positions
    assert len(positions) == ACCOUNTS + 2 * done
    streams: dict[UUID, list[int]] = {}
    for each in notifications:
        streams.setdefault(each.originator_id, []).append(each.originator_version)  # type: ignore[arg-type]
    assert all(versions == list(range(1, len(versions) + 1)) for versions in streams.values())
    ledger: Any = transfers.ledger
    balances: dict[UUID, int] = {each: ledger.repository.get(each).balance for each in transfers.accounts}
    assert sum(balances.values()) == 0
    assert transfers.es.projections.worker(once=True).run() == []
    assert {row.account_id: row.amount for row in transfers.rows("total")} == balances
    assert len(transfers.rows("line")) == 2 * done


def run_transfers(url: str, redis: str, folder: Path, seconds: float) -> None:
    """Let all sites transfer among the same accounts, and check what came of it."""
    transfers = Transfers(url, seconds)
    flask_line = partial(uwsgi, "prefork-threads", "tests.torture.two_sites_flask:app")
    queue = {"QUEUE_REDIS": redis, "DJANGO_SETTINGS_MODULE": DJANGO}
    django_line = partial(gunicorn, "gthread", "tests.torture.two_sites_django.wsgi:application")
    answers: list[Answers] = []
    with ExitStack() as stack:
        for name in ("flask", "pyramid", "django"):
            (folder / name).mkdir()
        served = [
            stack.enter_context(serving(flask_line, folder / "flask", DATABASE_URL=url)),
            stack.enter_context(serving(pyramid_line, folder / "pyramid", DATABASE_URL=url)),
            stack.enter_context(serving(django_line, folder / "django", None, DATABASE_URL=url, **queue)),
        ]
        celery = stack.enter_context(
            Workspace(folder, url, redis).program(*CELERY, DATABASE_URL=url, DJANGO_SETTINGS_MODULE=DJANGO),
        )
        threads = [threading.Thread(target=transfers.load, args=(each, n, answers)) for n, each in enumerate(served)]
        threads.append(threading.Thread(target=transfers.load_tasks, args=(served[2], 3, answers)))
        reader = threading.Thread(target=transfers.read)
        worker = threading.Thread(target=transfers.work, args=(folder / "worker",))
        for thread in [*threads, reader, worker]:
            thread.start()
        for thread in threads:
            thread.join()
        done = sum(len(each.all) for each in answers)
        celery.wait_for(lambda: transfers.is_complete(done), PATIENCE + seconds)
        transfers.over.set()
        worker.join()
        reader.join()
        logs = [each.log.read_text(errors="replace")[-3000:] for each in served]
    assert {path: why for each in answers for path, why in each.failed.items()} == {}, "\n".join(logs)
    check(transfers, done)
    transfers.es.close()
    transfers.engine.dispose()


@pytest.mark.xdist_group("web-servers")
def test_two_sites(postgres_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sites and tasks transfer among the same accounts: no update is lost, and one projection is right."""
    monkeypatch.setenv("DATABASE_URL", postgres_url)
    run_transfers(postgres_url, redis_url, tmp_path, 6)


@pytest.mark.torture
def test_two_sites_for_a_minute(
    postgres_server_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same holds for a minute."""
    with postgres_database(postgres_server_url) as url:
        monkeypatch.setenv("DATABASE_URL", url)
        run_transfers(url, redis_url, tmp_path, 60)
