"""``application.save(…, session=…)``, on every host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import pytest
from eventsourcing.application import Application
from sqlalchemy import orm

from flask_eventsourcing.applications import construct
from flask_eventsourcing.exceptions import CommitInsideUnitError, ConfigurationError, RollbackOnlyError
from flask_eventsourcing.persistence.dialects import is_in_memory
from flask_eventsourcing.uow import LENT
from tests.domain import Account, Bank
from tests.hosts.sites import HostSite


class Branch(Bank):
    """A bank that takes a snapshot of everything."""

    name = "Bank"
    is_snapshotting_enabled = True
    snapshotting_intervals: ClassVar[dict[type[Any], int]] = {Account: 1}


class Careless(Bank):
    """A bank that passes everything on."""

    name = "Bank"

    def save(self, *objs: Any, **kwargs: Any) -> Any:
        """Save with a session that this method has got from somewhere else."""
        return super().save(*objs, **kwargs | {"session": object()})


class OnSessions:
    """Applications on the database of a site whose current session is what was made current last."""

    def __init__(self, site: HostSite) -> None:
        self.site = site
        self.current: list[orm.Session] = []

    @contextmanager
    def using_session(self, session: orm.Session) -> Iterator[None]:
        """Make a session the current one."""
        session.info[LENT] = True
        self.current.append(session)
        yield
        self.current.pop()

    def unit(self) -> Any:
        """Return the unit of the current session."""
        return self.site.host.unit_of(self.current[-1]) if self.current else None

    def construct(self, cls: type[Application[Any]], **arguments: Any) -> Any:
        """Construct an application."""
        return construct(cls, self.site.host.datastore.joining(self.unit), {}, self.unit, **arguments)


def test_save_uses_the_session_that_is_given(site: HostSite) -> None:
    """Events and snapshots are stored with that session, and with no other; a ``scoped_session`` stands for its own."""
    on = OnSessions(site)
    bank = on.construct(Branch, using_session=on.using_session)
    factory = orm.sessionmaker(site.host.datastore.engine)
    for session in (factory(), orm.scoped_session(factory)):
        account = Account("Ada")
        bank.save(account, session=session)
        assert on.current == []
        session.rollback()
        account = Account("Ada")
        bank.save(account, session=session)
        session.commit()
        assert len(list(bank.snapshots.get(account.id))) == 1
        session.close()
    assert site.stored() == (2, 0)
    bank.close()


def test_session_is_never_ignored(site: HostSite) -> None:
    """``save()`` refuses an argument that is not a usable session, and leaves the object as it was."""
    on = OnSessions(site)
    bank, other, careless = (
        on.construct(Bank),
        on.construct(Bank, using_session=on.using_session),
        on.construct(Careless),
    )
    account = Account("Ada")
    with orm.Session(site.host.datastore.engine) as session, pytest.raises(ConfigurationError, match="Bank"):
        bank.save(account, session=session)
    with pytest.raises(TypeError, match="session of SQLAlchemy"):
        other.save(account, session="session")
    with pytest.raises(ConfigurationError, match="super"):
        careless.save(Account("Bob"))
    assert site.stored() == (0, 0)
    bank.save(account, session=None)
    assert site.stored() == (1, 0)
    for each in (bank, other, careless):
        each.close()


def test_unit_on_another_session_is_another_unit(site: HostSite) -> None:
    """A unit within ``using_session`` commits that session; one on a session with a unit already joins it."""
    if is_in_memory(site.host.datastore.engine.url):
        return
    account_id = site.opened()
    factory = orm.sessionmaker(site.host.datastore.engine)

    def unit() -> None:
        with site.host.context(), site.host.transaction() as outer, factory() as own:
            with site.host.using_session(own):
                with site.host.transaction():
                    site.bank.deposit(account_id, 1)
                own.rollback()
                site.bank.deposit(account_id, 2)
                own.commit()
                with pytest.raises(CommitInsideUnitError):
                    outer.commit()
                with site.host.using_session(outer), suppress(KeyError), site.host.transaction():
                    raise KeyError
            site.note()

    with pytest.raises(RollbackOnlyError):
        unit()
    assert site.stored() == (3, 0)


def test_save_with_a_session_inside_a_unit(site: HostSite) -> None:
    """Events saved with another session are committed by its owner, and do not depend on the unit."""
    if is_in_memory(site.host.datastore.engine.url):
        return
    factory = orm.sessionmaker(site.host.datastore.engine)
    with factory() as own:
        with suppress(KeyError), site.host.context(), site.host.transaction():
            site.bank.save(Account("Ada"), session=own)
            raise KeyError
        assert site.stored() == (0, 0)
        own.commit()
    assert site.stored() == (1, 0)
