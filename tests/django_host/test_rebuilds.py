"""Rebuilds of projections on Django models: one transaction, of which readers see the end or nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any
from uuid import UUID

import pytest
from django.core.management import CommandError, call_command
from django.db import connections, transaction

from flask_eventsourcing.contrib.django.projecting import projections
from flask_eventsourcing.contrib.django.projections import ModelProjection, on, reaction
from flask_eventsourcing.contrib.django.rewriting import Rewrite
from flask_eventsourcing.exceptions import ProjectionBusyError, RebuildError
from flask_eventsourcing.projections.runners import Runner
from tests.django_host.conftest import DjangoBank
from tests.django_host.test_projections import balances, declaring, quiet, run, status
from tests.django_host.test_requests import as_test_case
from tests.domain import Account

AnyAccount: Any = Account
__all__ = ["quiet"]


def rewrite(name: str = "Balances", alias: str = "ledger") -> Rewrite:
    """Return what rebuilds a projection."""
    return Rewrite(projections().bound[alias].find(name))


def command(site: DjangoBank, *words: str) -> str:
    """Run a command, and return what it prints."""
    printed = StringIO()
    call_command("eventsourcing", *words, database=site.alias, stdout=printed)
    return printed.getvalue()


def spoiled(site: DjangoBank) -> UUID:
    """Make a read model that is wrong."""
    from tests.django_host.ledger.models import Balance

    account_id = site.opened()
    for amount in (1, 2, 3):
        site.bank.deposit(account_id, amount)
    run()
    Balance.objects.using(site.alias).update(amount=99)
    return account_id


class Notes(ModelProjection):
    """Keeps notes as rows that the handlers of tests write."""

    retries = 0


@contextmanager
def noting(handle: Any, **attributes: Any) -> Iterator[None]:
    """Within it, there is a projection ``Notes`` with a handler of the test's."""
    from tests.django_host.ledger.models import Note

    @on(Account.Created)
    def opened(self: Any, event: Any, using: str) -> None:
        handle(event, using)

    body = {"models": (Note,), "name": "Notes", "opened": opened, **attributes}
    with declaring(type("Notes", (Notes,), body)):
        yield


def test_rebuild(site: DjangoBank) -> None:
    """A rebuild writes the rows again, and the projection goes on behind its end; what it prints is the usual."""
    account_id = spoiled(site)
    printed = command(site, "rebuild", "Balances", "--offline")
    assert "ledger_balance: 1 rows, 1 before." in printed
    assert "Rebuilt up to position 4 (4 events in " in printed
    assert balances(site) == {account_id: 6}
    assert status().position == 4
    site.bank.deposit(account_id, 1)
    run()
    assert balances(site) == {account_id: 7}
    assert [row.name for row in checkpoints(site)] == ["Balances"]


def checkpoints(site: DjangoBank) -> list[Any]:
    """Return the rows of all projections."""
    from tests.django_host.ledger.models import BankRecords

    return list(BankRecords.Projection.objects.using(site.alias).order_by("name"))


def test_offline_is_asked_for(site: DjangoBank) -> None:
    """A rebuild that would make every writer wait needs ``--offline``; one on another database does not."""
    spoiled(site)
    if rewrite().keeps_writers_waiting:
        with pytest.raises(CommandError, match="--offline"):
            command(site, "rebuild", "Balances")
    else:
        assert "Rebuilt up to position 4" in command(site, "rebuild", "Balances")


def test_dry_run(site: DjangoBank) -> None:
    """A dry run counts events, tries some, and changes nothing."""
    account_id = spoiled(site)
    printed = command(site, "rebuild", "Balances", "--offline", "--dry-run")
    assert printed.startswith("4 events, about ")
    assert "Nothing was changed." in printed
    assert balances(site) == {account_id: 99}
    assert status().position == 4
    assert "nothing to drop" in command(site, "rebuild", "Balances", "--clean")
    assert "nothing to drop" in command(site, "rebuild", "Balances", "--give-up")


def test_readers_see_the_old_rows(site: DjangoBank) -> None:
    """While it runs, others see the rows as they were, and may save events where there can be two writers."""
    seen: list[Any] = []

    def handle(event: Any, using: str) -> None:
        from tests.django_host.ledger.models import Note

        if rebuilding:
            seen.append(site.elsewhere(lambda: list(Note.objects.using(using).values_list("text", flat=True))))
            if not rewrite("Notes").keeps_writers_waiting:
                saved.append(site.elsewhere(site.bank.open_account))
        Note.objects.using(using).create(text="new" if rebuilding else "old")

    rebuilding: list[bool] = []
    saved: list[UUID] = []
    site.opened()
    with noting(handle):
        run("Notes")
        rebuilding.append(True)
        done = rewrite("Notes").run()
        assert done is not None
        assert done.rows == {"ledger_note": (1, 1)}
        assert seen == [["old"]]
        rebuilding.clear()
        run("Notes")
    assert site.stored() == (1 + len(saved), 1 + len(saved))


def test_killed_rebuild_leaves_nothing(site: DjangoBank) -> None:
    """A rebuild that loses its connection, or is stopped, has changed nothing, and the next one works."""
    account_id = spoiled(site)
    stopped = rewrite()
    stopped.stop.set()
    assert stopped.run() is None
    lost: list[Any] = []

    def handle(event: Any, using: str) -> None:
        lost.append(event)
        raise KeyboardInterrupt

    with noting(handle), pytest.raises(KeyboardInterrupt):
        rewrite("Notes").run()
    assert len(lost) == 1
    assert balances(site) == {account_id: 99}
    assert [(row.name, row.position) for row in checkpoints(site)] == [("Balances", 4), ("Notes", 0)]
    assert rewrite().run() is not None
    assert balances(site) == {account_id: 6}


def test_event_that_fails(site: DjangoBank) -> None:
    """An event whose handler fails ends the rebuild with nothing changed, or is set aside where that is asked for."""
    from tests.django_host.ledger.models import BankRecords, Note

    def handle(event: Any, using: str) -> None:
        if event.owner == "wrong":
            raise ValueError("wrong")
        Note.objects.using(using).create(text=event.owner)

    accounts = [Account(owner) for owner in ("one", "wrong", "three")]
    site.bank.save(*accounts)
    Note.objects.using(site.alias).create(text="old")
    with noting(handle):
        with pytest.raises(
            RebuildError, match=r"halts before position 2, and nothing was changed: .*ValueError: wrong"
        ):
            rewrite("Notes").run()
        with pytest.raises(RebuildError, match="position 2"):
            rewrite("Notes").estimate()
    notes = Note.objects.using(site.alias)
    assert [each.text for each in notes.all()] == ["old"]
    with noting(handle, on_failure="dead-letter"):
        estimate = rewrite("Notes").estimate()
        assert (estimate.events, estimate.tried, estimate.failed) == (3, 3, 1)
        assert "set aside 1 dead letter" in command(site, "rebuild", "Notes", "--offline")
    assert sorted(each.text for each in notes.all()) == ["one", "three"]
    letters = BankRecords.DeadLetter.objects.using(site.alias)
    assert [(each.projection, each.position) for each in letters.all()] == [("Notes", 2)]


def test_other_tables_are_refused(site: DjangoBank) -> None:
    """A handler that writes a table which is not among the models is refused: the rebuild would write it again."""
    from tests.django_host.ledger.models import Balance, Note

    def handle(event: Any, using: str) -> None:
        Note.objects.using(using).create(text="note")
        Balance.objects.using(using).create(account_id=event.originator_id, amount=0)

    site.opened()
    with noting(handle):
        run("Notes")
        with pytest.raises(RebuildError, match="'ledger_balance', which is not among the projection's models"):
            rewrite("Notes").run()
    assert site.stored() == (1, 1)


def test_what_acts_again_is_refused(site: DjangoBank) -> None:
    """A handler that saves events, or asks for something after the commit, is refused: it would be done again."""

    def saves(event: Any, using: str) -> None:
        site.bank.open_account()

    def sends(event: Any, using: str) -> None:
        transaction.on_commit(sent.append, using=using)

    sent: Any = []
    site.opened()
    for handle, text in ((saves, "saves events"), (sends, r"after the commit")):
        with noting(handle), pytest.raises(RebuildError, match=text):
            rewrite("Notes").run()
    assert (site.stored(), sent) == ((1, 0), [])


def test_foreign_keys(site: DjangoBank) -> None:
    """Rows that refer to each other are rebuilt; if a table of no projection refers to them, this is refused."""
    from tests.django_host.ledger.models import Entry, Tag

    class Entries(ModelProjection):
        models = (Entry,)

        @on(Account.Created)
        def opened(self, event: Any, using: str) -> None:
            Entry.objects.using(using).create(pk=1)

        @on(AnyAccount.Deposited)
        def deposited(self, event: Any, using: str) -> None:
            first = Entry.objects.using(using).get(pk=1)
            made = Entry.objects.using(using).create(pk=event.originator_version, before=first)
            made.others.add(first)

    account_id = site.opened()
    site.bank.deposit(account_id, 1)
    with declaring(Entries):
        run("Entries")
        done = rewrite("Entries").run()
        assert done is not None
        assert done.rows == {"ledger_entry": (2, 2), "ledger_entry_others": (1, 1)}
        with connections[site.alias].schema_editor() as editor:
            editor.create_model(Tag)
        with pytest.raises(RebuildError, match="'ledger_tag' has a foreign key to 'ledger_entry'"):
            rewrite("Entries").run()
        with connections[site.alias].schema_editor() as editor:
            editor.delete_model(Tag)


def test_keys_that_the_commit_looks_at(site: DjangoBank) -> None:
    """A row that refers to a missing one fails with its event, in a batch of any size and in a rebuild."""
    from tests.django_host.ledger.models import BankRecords, Entry

    class Entries(ModelProjection):
        models = (Entry,)
        on_failure = "dead-letter"
        retries = 0

        @on(AnyAccount.Created)
        def opened(self, event: Any, using: str) -> None:
            number, _, before = event.owner.partition(" ")
            Entry.objects.using(using).create(pk=number, before_id=before or None)

    def found() -> tuple[list[int], list[int]]:
        letters = BankRecords.DeadLetter.objects.using(site.alias).order_by("position")
        entries = Entry.objects.using(site.alias).order_by("pk")
        return [each.pk for each in entries], [each.position for each in letters]

    site.bank.save(*map(Account, ("1", "2 3", "3", "4 3")))
    with declaring(Entries):
        consumer = projections().bound["ledger"].find("Entries")
        for size in (1, 7):
            BankRecords.Projection.objects.using(site.alias).all().delete()
            BankRecords.DeadLetter.objects.using(site.alias).all().delete()
            Entry.objects.using(site.alias).update(before=None)
            # Past the models that refer to it, of which not each has a table.
            rows: Any = Entry.objects.using(site.alias).all()
            rows._raw_delete(site.alias)
            runner = Runner(consumer, threading.Event())
            runner.pace.limit = size
            runner.run(once=True)
            assert found() == ([1, 3, 4], [2])
        if not rewrite("Entries").keeps_writers_waiting:
            assert rewrite("Entries").run() is not None
            assert found() == ([1, 3, 4], [2])


def test_keys_that_are_broken_at_the_end(site: DjangoBank) -> None:
    """Rows that refer to missing ones end a rebuild, which names the key and changes nothing."""
    from tests.django_host.ledger.models import Entry

    class Entries(ModelProjection):
        models = (Entry,)
        retries = 0

        @on(AnyAccount.Created)
        def opened(self, event: Any, using: str) -> None:
            Entry.objects.using(using).create(pk=1, before_id=before[0])

    before: list[Any] = [None]
    site.opened()
    with declaring(Entries):
        run("Entries")
        before[0] = 7
        with pytest.raises(RebuildError, match="nothing was changed"):
            rewrite("Entries").run()
        assert [each.before_id for each in Entry.objects.using(site.alias).all()] == [None]
        before[0] = None
        assert rewrite("Entries").run() is not None


def test_one_at_a_time(site: DjangoBank) -> None:
    """Two rebuilds and a worker at once end with the right rows."""
    account_id = spoiled(site)
    worker = projections().bound[site.alias].worker("Balances")
    errors: list[Exception] = []

    def build() -> None:
        try:
            rewrite().run()
        except ProjectionBusyError:
            # One was enough.
            return
        except RebuildError as error:
            errors.append(error)

    threads = [threading.Thread(target=target) for target in (worker.run, build, build)]
    for each in threads:
        each.start()
    site.bank.deposit(account_id, 4)
    for each in threads[1:]:
        each.join(60)
    projections().bound[site.alias].wait_for("Balances", 5, 30)
    worker.stop()
    threads[0].join(60)
    assert balances(site) == {account_id: 10}
    assert (worker.errors, errors) == ([], [])


def test_reactions_are_not_called_again(site: DjangoBank) -> None:
    """A rebuild calls no reaction."""
    called: list[Any] = []

    class Both(ModelProjection):
        from tests.django_host.ledger.models import Note

        models = (Note,)

        @on(Account.Created)
        def opened(self, event: Any, using: str) -> None:
            self.Note.objects.using(using).create(text="note")

        @reaction(Account.Created)
        def react(self, event: Any, key: str) -> None:
            called.append(key)

    site.opened()
    with declaring(Both):
        run("Both")
        run("Both:reactions")
        assert rewrite("Both").run() is not None
        run("Both:reactions")
        with pytest.raises(CommandError, match="Reactions are never called again"):
            command(site, "rebuild", "Both:reactions", "--offline")
    assert len(called) == 1
    assert site.stored() == (1, 1)


def test_in_a_test_case(site: DjangoBank) -> None:
    """Within a test case's transaction a rebuild works, and is undone with it."""
    with as_test_case(site):
        account_id = spoiled(site)
        assert rewrite().run() is not None
        assert balances(site) == {account_id: 6}
    assert balances(site) == {}
