"""The steps that end transactions and savepoints, and those that have others within them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from tests.integration.unit_driver import Driver
from tests.integration.unit_stages import TOLD
from tests.integration.unit_steps import Skip, Step, Violation, holds
from tests.integration.unit_truth import Frame


class SessionDriver(Driver):
    """Commits, rolls back and closes a session of SQLAlchemy's."""

    # ------------------------------------------------------------------------------------------- savepoints

    def _orm_savepoint(self, step: Step) -> None:
        self._savepoint("orm", self.stage.session.begin_nested)

    def _connection_savepoint(self, step: Step) -> None:
        self._savepoint("connection", lambda: self.stage.session.connection().begin_nested())

    def _text_savepoint(self, step: Step) -> None:
        name = f"s{next(self._numbers)}"

        def begin() -> str:
            self._execute(f"SAVEPOINT {name}")
            return name

        self._savepoint("text", begin)

    def _savepoint(self, level: Any, begin: Callable[[], Any]) -> None:
        self.truth.written = True
        self.truth.frames.append(Frame(level, begin()))

    def _ending(self, step: Step) -> int:
        """Which savepoint a step ends: one within which there are none but textual ones."""
        levels = [frame.level for frame in self.truth.frames]
        ends = [n for n in range(1, len(levels)) if all(level == "text" for level in levels[n + 1 :])]
        if not ends:
            raise Skip
        return ends[-1 - step.number % 3 % len(ends)]

    def _release(self, step: Step) -> None:
        index = self._ending(step)
        frame = self.truth.frames[index]
        if frame.level == "text":
            self._execute(f"RELEASE SAVEPOINT {frame.handle}")
        else:
            frame.handle.commit()
        self.truth.odd |= bool(self._units.begun and frame.level == "orm")
        self.truth.released(index)

    def _roll_back_to(self, step: Step) -> None:
        index = self._ending(step)
        frame = self.truth.frames[index]
        if frame.level == "text":
            self._execute(f"ROLLBACK TO SAVEPOINT {frame.handle}")
        else:
            frame.handle.rollback()
        self.truth.odd |= bool(self._units.begun and frame.level == "orm")
        self.truth.rolled_back(index, stays=frame.level == "text")

    # ------------------------------------------------------------------------------------------- ends

    def _orm_commit(self, step: Step) -> Exception | None:
        return self._commit("orm", self.stage.commit)

    def _connection_commit(self, step: Step) -> Exception | None:
        return self._commit("connection", self.stage.session.connection().commit)

    def _text_commit(self, step: Step) -> Exception | None:
        return self._commit("text", lambda: self._execute("COMMIT"))

    def _driver_commit(self, step: Step) -> Exception | None:
        if self.stage.memory:
            # The driver's one connection is that of all the threads, so an end of it is nobody's.
            raise Skip
        return self._commit("driver", self._raw().commit)

    def _commit(self, level: str, commit: Callable[[], Any]) -> Exception | None:
        truth, aborted, saved = self.truth, self._aborted(), bool(self.truth.pending_events)
        try:
            commit()
        except TOLD as error:
            if self._units.depth:
                # After a refused commit of the connection's, SQLAlchemy takes the transaction for a failed one.
                truth.odd |= bool(self._units.begun) or level == "connection"
                if level == "orm" and not self.stage.begins:
                    # A manager of transactions takes all of it back, and lets nothing join any more.
                    self._units.lost(truth.pending_events)
                    truth.rollback()
                    truth.odd = True
                return error
            has_reason = aborted or truth.odd or truth.overtaken or self._units.conflicts
            holds(level != "orm" or bool(has_reason), f"a commit failed without a reason: {error!r}")
            # A savepoint may have been released by then.
            truth.odd = True
            raise
        if self._units.depth:
            # The package may not know the connection of a unit that has saved nothing.
            # With a manager of transactions, a closed session leaves one behind in which nothing takes part.
            is_unseen = level in ("text", "driver") or (not saved and (level == "connection" or not self.stage.begins))
            holds(is_unseen, f"a commit by the {level} was carried out within a unit of work")
            self._units.was_halved = True
        odd = self._is_odd_after(level)
        if aborted and level in ("text", "driver"):
            # The server has turned it into a rollback.
            self._units.lost(truth.pending_events)
            truth.rollback(told=bool(self._units.depth))
        else:
            truth.commit()
        truth.odd = odd
        return None

    def _is_odd_after(self, level: str) -> bool:
        if self._units.begun:
            # SQLAlchemy wants its own block to be left before it goes on.
            return True
        return level != "orm" and (level == "connection" or self.truth.odd or self.truth.has_savepoints)

    def _ddl(self, step: Step) -> None:
        if self.stage.dialect not in ("mysql", "mariadb"):
            raise Skip
        odd = self._is_odd_after("text")
        self._execute(f"CREATE TABLE IF NOT EXISTS t{step.number} (a INTEGER)")
        self._units.was_halved |= bool(self._units.depth)
        self.truth.commit(unsure=True)
        self.truth.odd = odd

    def _orm_rollback(self, step: Step) -> None:
        self._rollback("orm", self.stage.rollback)

    def _connection_rollback(self, step: Step) -> None:
        self._rollback("connection", self.stage.session.connection().rollback)

    def _text_rollback(self, step: Step) -> None:
        self._rollback("text", lambda: self._execute("ROLLBACK"))

    def _driver_rollback(self, step: Step) -> None:
        if self.stage.memory:
            # The driver's one connection is that of all the threads, so an end of it is nobody's.
            raise Skip
        self._rollback("driver", self._raw().rollback)

    def _rollback(self, level: str, rollback: Callable[[], Any]) -> None:
        odd = self._is_odd_after(level)
        rollback()
        self._units.lost(self.truth.pending_events)
        self.truth.rollback()
        self.truth.odd = odd

    def _row_error(self, step: Step) -> Exception | None:
        levels = [frame.level for frame in self.truth.frames]
        index = max((number for number, level in enumerate(levels) if level == "orm"), default=0)
        if index and "connection" in levels[index:]:
            raise Skip
        self.truth.written = True
        try:
            self.stage.add_row(None)
        except sa.exc.SQLAlchemyError as error:
            if self._units.within and not step.caught:
                # What is around it rolls back.
                return error
            if index:
                self.truth.frames[index].handle.rollback()
                self.truth.odd |= bool(self._units.begun)
                self.truth.rolled_back(index, stays=False)
            else:
                self._orm_rollback(step)
            return error
        raise Violation("a row without a text was taken")

    def _close(self, step: Step) -> None:
        self._leave(self.stage.session.close)

    def _reset(self, step: Step) -> None:
        self._leave(self.stage.session.reset)

    def _with(self, step: Step) -> None:
        def enter_and_leave() -> None:
            with self.stage.session:
                pass

        self._leave(enter_and_leave)

    def _remove(self, step: Step) -> None:
        def remove() -> None:
            if not self.stage.remove():
                raise Skip

        self._leave(remove)

    def _leave(self, leave: Callable[[], Any]) -> None:
        if self._units.begun:
            raise Skip
        leave()
        self.stage.after_leaving()
        self._units.lost(self.truth.pending_events)
        self.truth.rollback(told=bool(self._units.depth))
        self.truth.odd = False

    # ------------------------------------------------------------------------------------------- blocks

    def _unit(self, step: Step) -> Exception | None:
        def unit() -> None:
            with self.stage.transaction():
                self._take_all(step.body)

        return self._outermost(unit) if not self._units.depth else self._inner(unit)

    def _inner(self, unit: Callable[[], Any]) -> Exception | None:
        self._units.depth += 1
        try:
            unit()
        except TOLD as error:
            self._units.has_to_fail = True
            return error
        finally:
            self._units.depth -= 1
        return None

    def _outermost(self, unit: Callable[[], Any]) -> Exception | None:
        units = self._units
        units.depth, units.has_to_fail, units.was_halved = 1, False, False
        try:
            unit()
        except TOLD as error:
            self.truth.rollback()
            return error
        finally:
            units.depth = 0
            self.truth.odd = bool(units.begun)
        holds(not units.has_to_fail, "a unit of work ended well although a part of it was lost")
        self.truth.commit()
        return None

    def _retry(self, step: Step) -> Exception | None:
        if self._units.depth:
            raise Skip
        tries: list[bool] = []

        def work() -> None:
            if tries:
                holds(not self._units.was_halved, "a unit was run again of which a part was committed")
                self.truth.rollback()
                self._units.has_to_fail = False
                self.truth.odd = False
            tries.append(True)
            self._take_all(step.body)

        return self._outermost(lambda: self.stage.retry(work, 2))

    def _begin(self, step: Step) -> Exception | None:
        if not self.stage.begins or self._units.within or self.stage.session.in_transaction():
            raise Skip
        self._units.begun += 1
        try:
            with self.stage.session.begin():
                self._take_all(step.body)
        except TOLD as error:
            self.truth.rollback()
            self.truth.odd = False
            return error
        finally:
            self._units.begun -= 1
        self.truth.commit()
        self.truth.odd = False
        return None

    def _savepoint_block(self, step: Step) -> Exception | None:
        truth, frame = self.truth, Frame("orm")
        truth.written = True
        self._units.begun += 1
        try:
            with self.stage.session.begin_nested() as frame.handle:
                truth.frames.append(frame)
                self._take_all(step.body)
        except TOLD as error:
            if frame not in truth.frames or truth.odd:
                raise
            truth.rolled_back(truth.frames.index(frame), stays=False)
            return error
        except AssertionError as error:
            if self.stage.begins or isinstance(error, Violation):
                raise
            # SQLAlchemy's, for a session that the manager has closed, with a savepoint that a statement had ended.
            raise sa.exc.InvalidRequestError("the session was closed") from error
        finally:
            self._units.begun -= 1
        if frame in truth.frames:
            index = truth.frames.index(frame)
            truth.odd |= any(each.level == "connection" for each in truth.frames[index:])
            truth.released(index)
        return None
