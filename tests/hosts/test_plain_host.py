"""What holds for a host without a framework only."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.hosts.sites import PlainSite


@pytest.mark.parametrize("scoped", [False, True], ids=["sessionmaker", "scoped_session"])
def test_task_that_goes_on_after_a_transaction_is_outside_of_it(tmp_path: Path, *, scoped: bool) -> None:
    """A task that was started in a transaction, and saves after its end, stores its events."""
    site = PlainSite(f"sqlite:///{tmp_path}/bank.db", scoped=scoped)
    account = site.opened()

    async def go_on(ended: asyncio.Event) -> None:
        await ended.wait()
        site.bank.deposit(account, 5)
        if site.scoped is not None:
            site.scoped.commit()

    async def begin() -> None:
        ended = asyncio.Event()
        with site.host.transaction():
            site.bank.deposit(account, 1)
            task = asyncio.create_task(go_on(ended))
            await asyncio.sleep(0)
        ended.set()
        await task

    asyncio.run(begin())
    with site.host.transaction():
        assert site.bank.balance(account) == 6
    site.close()


def test_lock_timeout_on_mariadb_holds_where_tables_were_made_before_the_host(mariadb_url: str) -> None:
    """A connection that is older than the host waits for locks as long as the host's options say, not the server's."""
    site = PlainSite(mariadb_url, scoped=False)
    with site.engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT @@innodb_lock_wait_timeout")) == 30
    site.close()
