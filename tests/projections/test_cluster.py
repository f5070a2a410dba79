"""Projections on a cluster of MariaDB servers that all take writes, each with locks of its own.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from flask_eventsourcing.exceptions import ProjectionBusyError, RebuildError
from flask_eventsourcing.projections.rebuilding import Rebuild
from flask_eventsourcing.projections.upkeep.repair import retry
from tests import servers
from tests.domain import until
from tests.galera import catch_up
from tests.projections.desk_hosts import FlaskDesk, make_desk
from tests.projections.test_killed_rebuild import start
from tests.projections.test_rebuild import repeating

pytestmark = pytest.mark.xdist_group("galera")
PATIENCE = 120


class Cluster:
    """The same bank on each node."""

    def __init__(self, uris: list[str], **attributes: Any) -> None:
        self.uris = uris
        self.desks: list[FlaskDesk] = []
        for uri in uris:
            catch_up(uri)
            self.desks.append(make_desk(uri))
            self.desks[-1].balances(**{"batch_size": 20, **attributes})

    def deposit(self, number: int, account_id: Any) -> None:
        """Pay in on a node, which others may overtake."""
        desk = self.desks[number]
        with desk.context():
            desk.retry(lambda: desk.bank.deposit(account_id, 1), 40)

    def right(self) -> dict[Any, int]:
        """Return what the accounts have, as the log says."""
        catch_up(self.uris[0])
        desk = self.desks[0]
        with desk.context() as bank:
            query = sa.select(desk.events_table.c.originator_id).distinct()
            return {each: bank.account(each).balance for each in desk.session.scalars(query)}

    def amounts(self) -> list[dict[Any, int]]:
        """Return the read model as each node has it."""
        for uri in self.uris:
            catch_up(uri)
        return [desk.amounts() for desk in self.desks]

    def followed(self, number: int) -> None:
        """Wait until the projection is at the end of the log."""
        catch_up(self.uris[number])
        desk = self.desks[number]
        until(lambda: desk.position() >= desk.head(), "the projection", PATIENCE)


@pytest.fixture
def new_cluster(galera_urls: list[str]) -> Iterator[Callable[..., Cluster]]:
    """Makes the bank on each node, in a new database of them all."""
    made: list[Cluster] = []
    with servers.mariadb_database(galera_urls[0]) as url:
        database = sa.make_url(url).database

        def make(**attributes: Any) -> Cluster:
            uris = [sa.make_url(u).set(database=database).render_as_string(hide_password=False) for u in galera_urls]
            made.append(Cluster(uris, **attributes))
            return made[-1]

        yield make
        for cluster in made:
            for desk in cluster.desks:
                desk.close()


def test_another_node_takes_over(new_cluster: Callable[..., Cluster]) -> None:
    """Of workers on several nodes one runs the projection, and when it is killed another applies each event once."""
    cluster = new_cluster()
    ids = [cluster.desks[0].open(1) for _ in range(3)]
    writers = [partial(cluster.deposit, number, ids[number]) for number in range(3)]
    with start(cluster.uris[0], "run") as first, start(cluster.uris[1], "run") as second:
        try:
            with repeating(*writers):
                until(lambda: cluster.desks[2].position() > 5, "the first worker", PATIENCE)
                tokens = [desk.row().runner for desk in cluster.desks]
                owner = str(tokens[2]).rpartition(":")[2]
                killed, left = (first, second) if owner == str(first.pid) else (second, first)
                assert owner == str(killed.pid)
                killed.kill()
                reached = cluster.desks[2].head()
                # The one that was killed may have been there already.
                other = f":{left.pid}"
                until(lambda: str(cluster.desks[2].row().runner).endswith(other), "the other worker", PATIENCE)
                until(lambda: cluster.desks[2].position() >= reached, "the end of the log", PATIENCE)
            cluster.followed(2)
        finally:
            first.kill()
            second.kill()
    assert cluster.amounts() == [cluster.right()] * 3


def test_a_rebuild_on_another_node(new_cluster: Callable[..., Cluster]) -> None:
    """A rebuild beside writers, readers and a worker on other nodes: no reader sees half of it, nothing is missed."""
    cluster = new_cluster()
    ids = [cluster.desks[0].open(1) for _ in range(10)]
    cluster.desks[0].run_once()
    for uri in cluster.uris:
        catch_up(uri)
    seen: set[int] = set()

    def read() -> None:
        desk = cluster.desks[1]
        with desk.context():
            # A node may end a transaction that is in the way of a change of tables.
            count = sa.select(sa.func.count()).select_from(desk.Balance)
            seen.add(desk.retry(lambda: desk.session.scalar(count) or 0))

    def pay() -> None:
        cluster.deposit(1, ids[0])
        # The last step of a rebuild queues for no writer of another node: without a pause it may lose each time.
        time.sleep(0.1)

    with cluster.desks[0].running(), repeating(read, pay):
        for desk in (cluster.desks[2], cluster.desks[0]):
            rebuilt = Rebuild(desk.consumer()).run()
            assert rebuilt is not None
            Rebuild(desk.consumer()).drop_old()
        cluster.followed(0)
    with cluster.desks[0].running():
        cluster.followed(0)
    assert seen == {10}
    assert cluster.amounts() == [cluster.right()] * 3


def test_a_second_operator_on_another_node_is_told(new_cluster: Callable[..., Cluster]) -> None:
    """While a rebuild is in progress on one node, one on another node is refused and touches nothing."""
    cluster = new_cluster(retries=1000)
    account_id = cluster.desks[0].open(1, 13)
    cluster.desks[0].run_once()
    cluster.desks[0].poison = {13}
    stop = threading.Event()
    rebuild = Rebuild(cluster.desks[0].consumer(), stop)
    thread = threading.Thread(target=rebuild.run)
    thread.start()
    try:
        until(cluster.desks[1].consumer().of_kind("rebuild").checkpoint.read, "the rebuild", PATIENCE)
        with pytest.raises(ProjectionBusyError):
            Rebuild(cluster.desks[1].consumer()).run()
    finally:
        stop.set()
        thread.join()
    assert cluster.amounts() == [{account_id: 14}] * 3


def test_dead_letters_of_another_node(new_cluster: Callable[..., Cluster]) -> None:
    """A dead letter of a worker on one node is retried on another, while the worker goes on."""
    cluster = new_cluster(on_failure="dead-letter", retries=0)
    here, there, _ = cluster.desks
    here.poison = {13}
    ids = [here.open(1, 13, 5) for _ in range(3)]
    with here.running():
        cluster.followed(0)
        catch_up(cluster.uris[1])
        assert (there.status().dead_letters, there.status().waiting) == (3, 3)
        assert list(cluster.amounts()[1].values()) == [1, 1, 1]
        repair = retry(there.consumer())
        assert (len(repair.failed), len(repair.applied)) == (0, 6)
        catch_up(cluster.uris[0])
        cluster.deposit(2, ids[0])
        cluster.followed(0)
    assert cluster.amounts() == [cluster.right()] * 3


def test_inline_on_each_node(new_cluster: Callable[..., Cluster]) -> None:
    """An inline projection is right on each node; its rebuild is refused with what to do instead."""
    cluster = new_cluster(inline=True)
    ids = [cluster.desks[0].open(1) for _ in range(3)]
    for uri in cluster.uris:
        catch_up(uri)

    def write(number: int) -> None:
        for _ in range(10):
            cluster.deposit(number, ids[number])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cluster.amounts() == [dict.fromkeys(ids, 11)] * 3
    with pytest.raises(RebuildError, match="is inline, and the database has several servers"):
        Rebuild(cluster.desks[1].consumer()).run()
    assert "balance__new" not in sa.inspect(cluster.desks[1].engine).get_table_names()
