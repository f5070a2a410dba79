"""Runs programs of steps, and compares what was said, and what is stored, with what is true."""

from __future__ import annotations

import logging
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from flask_eventsourcing import events_discarded, events_recorded
from tests.integration.unit_stages import TOLD, Logged, Outcome, Setting
from tests.integration.unit_steps import Saving, Step, holds
from tests.integration.unit_truth import Key


class Driver(Saving):
    """Runs one program, on a host whose ends of transactions a subclass knows."""

    # ------------------------------------------------------------------------------------------- the whole

    def run(self, steps: Sequence[Step], setting: Setting) -> None:
        """Run a program, and compare what was said, and what is stored, with what is true."""
        before = self._last_position()
        self._open_accounts()
        with self._heard() as (recorded, discarded, lines), warnings.catch_warnings():
            warnings.simplefilter("ignore", sa.exc.SAWarning)
            outcome = self.stage.perform(lambda: self._begun(steps, setting), setting)
            if self.violation is not None:
                raise self.violation
            self._ended(outcome, setting)
        self._check_stored(before)
        own = Counter(key for key in self.truth.own if key not in self.truth.unsure)
        holds(
            Counter(key for key in recorded if key not in self.truth.unsure) == own,
            f"signalled are {recorded}, and stored are {self.truth.own}",
        )
        if setting.place != "view" and not (lines and self.stage.tells_by_log):
            untold = set(self.truth.untold) - set(discarded)
            holds(not untold, f"nobody was told that {untold} is not stored")
        self._check_discarded(discarded)

    def _begun(self, steps: Sequence[Step], setting: Setting) -> None:
        """Take the steps, in what the setting begins."""
        self._take_all(steps)

    def _check_discarded(self, discarded: Sequence[Key]) -> None:
        """Look at what was told to be gone, beside what has to be."""

    def _ended(self, outcome: Outcome, setting: Setting) -> None:
        truth = self.truth
        if isinstance(outcome.error, TOLD):
            truth.rollback()
        elif outcome.error is not None:
            raise outcome.error
        elif outcome.status is None:
            truth.rollback(told=False)
        elif outcome.status >= 400:
            truth.rollback()
        else:
            holds(not truth.untold, f"the view answers {outcome.status} although {truth.untold} is not stored")
            if setting.mode == "request":
                truth.commit()
            holds(not truth.pending_events, f"the view answers {outcome.status} with events that are not committed")
            truth.rollback()

    def _open_accounts(self) -> None:
        def opened() -> None:
            self._accounts = [self.stage.bank.open_account() for _ in range(2)]

        self.stage.elsewhere(opened)
        self.truth.streams = {account_id: [0] for account_id in self._accounts}

    @contextmanager
    def _heard(self) -> Iterator[tuple[list[Key], list[Key], list[str]]]:
        mine, recorded, discarded, logged = threading.get_ident(), list[Key](), list[Key](), Logged()

        def keys(application: Any, notifications: Any) -> list[Key]:
            if threading.get_ident() != mine:
                return []
            events: Any = [application.mapper.to_domain_event(notification) for notification in notifications]
            return [(event.originator_id, getattr(event, "amount", 0)) for event in events]

        def hear_recorded(sender: object, application: Any, notifications: Any) -> None:
            recorded.extend(keys(application, notifications))

        def hear_discarded(sender: object, application: Any, notifications: Any) -> None:
            discarded.extend(keys(application, notifications))

        logger = logging.getLogger("flask_eventsourcing")
        logger.addHandler(logged)
        with events_recorded.connected_to(hear_recorded), events_discarded.connected_to(hear_discarded):
            try:
                yield recorded, discarded, logged.lines
            finally:
                logger.removeHandler(logged)

    def _last_position(self) -> int:
        with self.stage.engine.connect() as connection:
            return connection.scalar(sa.select(sa.func.max(self.stage.StoredEvent.notification_id))) or 0

    def _check_stored(self, before: int) -> None:
        record, note = self.stage.StoredEvent, self.stage.Note
        columns = sa.select(record.originator_id, record.originator_version)
        mine = sa.select(note.text).where(note.text.startswith(self._prefix))
        versions: dict[UUID, list[int]] = {}
        with self.stage.engine.connect() as connection:
            for account_id, version in connection.execute(columns.where(record.notification_id > before)):
                versions.setdefault(account_id, []).append(version)
            texts = list(connection.scalars(mine))
        with self.stage.working():
            streams = {each: [getattr(e, "amount", 0) for e in self._events(each)] for each in versions}
            found = self.truth.differences({each: sorted(all_) for each, all_ in versions.items()}, streams, texts)
            holds(not found, "; ".join(found))
            for account_id, amounts in streams.items():
                balance = self.stage.bank.account(account_id).balance
                holds(balance == sum(amounts), f"served is {balance}, and stored are {amounts}")

    def _events(self, account_id: UUID) -> Iterator[Any]:
        return iter(self.stage.bank.events.get(account_id))
