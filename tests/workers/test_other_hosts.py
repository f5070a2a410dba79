"""Celery and RQ on hosts other than Flask: the same modules, and tasks that are sent after the commit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from celery import Celery
from celery.app.trace import build_tracer
from pyramid.request import Request
from pyramid.scripting import prepare

from flask_eventsourcing.exceptions import ConfigurationError, NotInitializedError
from flask_eventsourcing.metadata import CORRELATION_ID
from flask_eventsourcing.workers import CARRIED, carried, rq, task_unit
from flask_eventsourcing.workers.celery import init_celery, send_after_commit
from tests.domain import Bank, conflict_with
from tests.hosts.zope_site import ZopeSite
from tests.published import published
from tests.pyramid_site.site import VETO, PyramidSite, bank_of
from tests.source import ROOT


@pytest.fixture
def zope_site(tmp_path: Path) -> Iterator[ZopeSite]:
    """A script's bank."""
    made = ZopeSite(f"sqlite:///{tmp_path}/bank.db", scoped=True)
    yield made
    made.close()


@pytest.fixture
def pyramid_site(tmp_path: Path) -> Iterator[PyramidSite]:
    """A Pyramid application."""
    made = PyramidSite(f"sqlite:///{tmp_path}/bank.db", **VETO)
    yield made
    made.close()


def make_celery(site: Any, *, eager: bool = False) -> Any:
    """Make a Celery app, and return a task of it that pays into an account."""
    celery_app = Celery("other", set_as_current=False)
    celery_app.conf.update(broker_url="memory://", task_always_eager=eager, task_eager_propagates=True)
    init_celery(celery_app, site)
    es = site if hasattr(site, "host") else site.registry["flask_eventsourcing"]

    @celery_app.task(name=f"pay_in_{uuid4().hex}", shared=False)
    def pay_in(account_id: str) -> None:
        es[Bank].deposit(UUID(account_id), 5)

    return pay_in


def test_task_of_a_script_is_sent_after_the_commit(zope_site: ZopeSite) -> None:
    """A task that was sent in a transaction goes out when that is committed, and never after an abort."""
    account_id = str(zope_site.opened())
    pay_in = make_celery(zope_site.es)
    with published() as sent:
        with zope_site.manager:
            zope_site.bank.deposit(UUID(account_id))
            send_after_commit(pay_in, account_id)
            assert sent == []
        assert len(sent) == 1
        with suppress(KeyError), zope_site.manager:
            zope_site.bank.deposit(UUID(account_id))
            send_after_commit(pay_in, account_id)
            raise KeyError
        with zope_site.manager:
            # Of a transaction that has only read, zope.sqlalchemy would make a rollback.
            zope_site.bank.balance(UUID(account_id))
            send_after_commit(pay_in, account_id)
        assert len(sent) == 2


def test_task_has_a_unit_of_work(zope_site: ZopeSite, pyramid_site: PyramidSite) -> None:
    """A task's events are committed at its end on each host."""
    for site, opened, balance in (
        (zope_site.es, zope_site.opened, None),
        (pyramid_site.app, pyramid_site.opened, pyramid_site.balance),
    ):
        account_id = opened()
        make_celery(site, eager=True).delay(str(account_id))
        if balance is not None:
            assert balance(account_id) == 5
        else:
            with zope_site.manager:
                assert zope_site.bank.balance(account_id) == 5


def test_task_of_a_request_is_sent_after_the_commit(pyramid_site: PyramidSite) -> None:
    """A task that a view has sent goes out after the commit, with the correlation and no cause; not after an abort."""
    account_id = str(pyramid_site.opened())
    pay_in = make_celery(pyramid_site.app)
    with published() as sent:
        for status, count in ((409, 0), (200, 1)):

            def view(request: Any, status: int = status) -> Any:
                bank_of(request).deposit(UUID(account_id))
                send_after_commit(pay_in, account_id)
                request.response.status_code = status
                return {}

            pyramid_site.answer(view, headers={"X-Request-ID": "r1"})
            assert len(sent) == count
        assert sent[0][CARRIED] == {CORRELATION_ID: "r1"}


def test_job_context_takes_a_pyramid_application(pyramid_site: PyramidSite) -> None:
    """RQ's job functions run in a unit of work of a Pyramid application too."""
    account_id = pyramid_site.opened()
    with rq.job_context(pyramid_site.app) as session:
        pyramid_site.es[Bank].deposit(account_id, 2)
        session.add(pyramid_site.Note(text="note"))
    assert pyramid_site.balance(account_id) == 2
    assert pyramid_site.stored() == (2, 1)


def test_metadata_are_carried_from_a_request(pyramid_site: PyramidSite) -> None:
    """A task carries the correlation of the request that has sent it."""
    with prepare(Request.blank("/", headers={"X-Request-ID": "r1"}), pyramid_site.config.registry):
        assert carried()[CORRELATION_ID] == "r1"


@pytest.mark.parametrize("came", [None, {CORRELATION_ID: "r1"}])
def test_task_in_a_worker_that_keeps_a_request(pyramid_site: PyramidSite, came: Any) -> None:
    """A task that is tried again keeps its correlation, also where a process keeps the request of ``bootstrap()``."""
    account_id = pyramid_site.opened()
    celery_app = Celery("keeping", broker="memory://", set_as_current=False)
    init_celery(celery_app, pyramid_site.app)

    @celery_app.task(name=f"pay_in_{uuid4().hex}", shared=False)
    def pay_in() -> None:
        again = conflict_with(pyramid_site.es[Bank], account_id)
        pyramid_site.elsewhere(lambda bank: bank.deposit(account_id))
        again()

    brought = {} if came is None else {CARRIED: came}
    request = {
        "id": "t1",
        "root_id": "t1",
        "headers": brought,
        "is_eager": False,
        "called_directly": False,
        "retries": 0,
    }
    trace = build_tracer(pay_in.name, pay_in, app=celery_app)
    kept = Request.blank("/", headers={"X-Request-ID": "kept"})
    with published() as sent, prepare(kept, pyramid_site.config.registry):
        trace("t1", (), {}, request)
    assert [headers.get(CARRIED) for headers in sent] == [came]


def test_no_site(zope_site: ZopeSite) -> None:
    """Without a current site nothing can be sent, and an object that is no site is refused."""
    pay_in = make_celery(zope_site.es)
    with pytest.raises(NotInitializedError):
        send_after_commit(pay_in, "1")
    with pytest.raises(ConfigurationError):
        init_celery(Celery("third", set_as_current=False), 5)  # type: ignore[arg-type]
    with task_unit(zope_site.es):
        zope_site.note()
    assert zope_site.stored() == (0, 1)


def test_workers_run_without_flask() -> None:
    """The modules for Celery and RQ can be imported where Flask is missing."""
    # Both need click themselves.
    code = (
        "from tests.hosts import no_flask; no_flask.BLOCKED.discard('click'); "
        "import flask_eventsourcing.workers.celery, flask_eventsourcing.workers.rq"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
