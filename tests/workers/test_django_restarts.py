"""A Django project under gunicorn, whose PostgreSQL server is restarted while connections are kept."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest

from tests.bank import Site, make_site
from tests.domain import until
from tests.servers import ServerFolder, forget_killed_connections, restart_postgres, start_postgres
from tests.workers.serving import Answers, Served, gunicorn, serving

pytestmark = pytest.mark.xdist_group("web-servers")
LINE = partial(gunicorn, "gthread", "tests.workers.django_served:app")
COUNT = 60
CONNECTIONS, WORKERS = 8, 2
"""Two workers have four threads each."""


def paid(served: Served, account_id: UUID) -> Answers:
    """Pay in with many requests at once."""
    return served.load([f"/deposit/{account_id}?{number}" for number in range(COUNT)], clients=CONNECTIONS)


def paid_by_both(served: Served, account_id: UUID) -> list[Answers]:
    """Pay in until both workers have answered: one that still starts would not outlive a restart of the server."""
    answers: list[Answers] = []

    def is_both() -> bool:
        answers.append(paid(served, account_id))
        return len(set[int]().union(*(each.pids for each in answers))) == WORKERS

    until(is_both, "an answer of each worker")
    return answers


def balance(site: Site, account_id: UUID) -> int:
    """Read what is in the account, on a new connection."""
    with site.app.app_context():
        site.db.engine.dispose()
    return site.balance(account_id) or 0


@pytest.mark.parametrize("checks", ["yes", ""], ids=["health checks", "no health checks"])
def test_server_that_is_restarted(checks: str, server_folder: ServerFolder, tmp_path: Path) -> None:
    """After a restart each kept connection fails once at most, and none where Django checks them; nothing is lost."""
    with server_folder.private("postgres-restarted", start_postgres) as server:
        site = make_site(server.url)
        account_id = site.opened()
        variables = {"DATABASE_URL": server.url, "BACKEND": "pg_backend_pid()", "HEALTH_CHECKS": checks}
        with serving(LINE, tmp_path, None, **variables) as served:
            log = served.log
            answers = paid_by_both(served, account_id)
            before = {backend for each in answers for backend in each.backends}
            assert not any(each.failed for each in answers), log.read_text(errors="replace")[-3000:]
            restart_postgres(server)
            answers += [paid(served, account_id), paid(served, account_id)]
            assert len(answers[-2].failed) <= (0 if checks else CONNECTIONS), log.read_text(errors="replace")[-3000:]
            assert answers[-1].failed == {}, log.read_text(errors="replace")[-3000:]
        assert not before & set(answers[-1].backends)
        assert balance(site, account_id) == sum(len(each.all) for each in answers)
        site.close()
        forget_killed_connections()


@pytest.mark.long
def test_server_that_is_restarted_under_load(server_folder: ServerFolder, tmp_path: Path) -> None:
    """Of what is answered while the server is restarted nothing is lost, and what fails is stored once at most."""
    with server_folder.private("postgres-restarted", start_postgres) as server:
        site = make_site(server.url)
        account_id = site.opened()
        variables = {"DATABASE_URL": server.url, "BACKEND": "pg_backend_pid()", "HEALTH_CHECKS": "yes"}
        with serving(LINE, tmp_path, None, **variables) as served:
            answers = paid_by_both(served, account_id)
            is_back = threading.Event()

            def pay() -> None:
                while not is_back.is_set():
                    answers.append(paid(served, account_id))

            payer = threading.Thread(target=pay)
            payer.start()
            time.sleep(0.3)
            restart_postgres(server)
            is_back.set()
            payer.join()
            answers.append(paid(served, account_id))
            assert answers[-1].failed == {}, served.log.read_text(errors="replace")[-3000:]
        done = sum(len(each.all) for each in answers)
        assert done <= balance(site, account_id) <= done + sum(len(each.failed) for each in answers)
        site.close()
        forget_killed_connections()
