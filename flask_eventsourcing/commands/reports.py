"""``init-db``, ``check`` and ``status``, and the progress of commands that run long."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import sqlalchemy as sa

from ..persistence import SQLAlchemyApplicationRecorder
from ..persistence.dialects.looks import Finding
from ..projections.consumers.belonging import HELD_BACK, OLD_CODE
from ..projections.consumers.inline import merge_ranges
from ..projections.rebuilding import leftovers
from ..projections.runners import Runner
from ..projections.upkeep.following import Health, ProjectionStatus, status_of
from . import (
    Bar,
    CommandError,
    Output,
    Subject,
    as_table,
    clear_errors,
    counted,
    missing_tables,
    remedy_of_missing,
    require_tables,
)

logger: logging.Logger = logging.getLogger(__name__)

TRIES, PAUSE = 5, 0.1
"""How often the creation of tables is tried while none of them appears, and the seconds between two tries."""

POOLER = (
    "A pooler shares the server's connections among clients, as PgBouncer does in transaction mode, so no process can "
    "hold the lock of a projection: set {} to 'lease'."
)
FIRST_LINE = 2.0
"""Seconds after which the first lines are logged, unless the period is shorter."""
WORTH_A_BAR = 1000
"""From this lag on, in positions, a bar is shown."""


def init_db(subject: Subject, output: Output) -> int:
    """Create the missing tables of applications, projections and their models.

    Another process may do the same at the same time.
    """
    apart = _create_apart(subject)
    left = missing = missing_tables(subject)
    stuck = 0
    while left:
        try:
            with clear_errors():
                _create(subject, left)
            break
        except CommandError:
            # Another process may have created one of them. Only tables that are still missing are tried again.
            found = missing_tables(subject)
            stuck = stuck + 1 if found == left else 0
            if stuck == TRIES:
                raise
            time.sleep(PAUSE)
            left = found
    for name in (*apart, *(table.fullname for table in missing)):
        output.write(f"Created table {name}.")
    if not missing and not apart:
        output.write("All tables are there.")
    return 0


def _create_apart(subject: Subject) -> Sequence[str]:
    if subject.store is None:
        return ()
    with clear_errors():
        return subject.store.create_tables()


def _create(subject: Subject, missing: Sequence[sa.Table]) -> None:
    # In the order of their foreign keys, and only these tables, not those that they refer to elsewhere.
    places = {table: (table.metadata, subject.engine_of(table)) for table in missing}
    for metadata, engine in dict.fromkeys(places.values()):
        metadata.create_all(engine, [table for table, place in places.items() if place == (metadata, engine)])


def check(subject: Subject, output: Output) -> int:
    """Check the configuration, the connection, the settings, the tables, the rights and the logs.

    It prints what it finds, each fault with its remedy.

    :raises CommandError: when something is wrong.
    """
    with clear_errors():
        faults = _check_databases(subject, output)
        if not faults:
            faults = _check_logs(subject, output)
    if faults:
        one = len(faults) == 1
        raise CommandError(faults[0] if one else f"{len(faults)} faults were found; see above.")
    return 0


def _check_databases(subject: Subject, output: Output) -> list[str]:
    faults: list[str] = []
    missing: list[sa.Table] = []
    for engine in subject.engines():
        address = engine.url.render_as_string(hide_password=True)
        output.write(f"Database: {address} ({engine.dialect.name}, {engine.driver})")
    output.write(f"Commit mode: {subject.commit_mode}")
    _check_store(subject, output, faults)
    for engine in subject.engines():
        dialect = subject.dialect_of(engine)
        with engine.connect() as connection:
            _tell(output, dialect.check_settings(connection), faults)
            for owner, table in subject.tables():
                if subject.engine_of(table) is not engine:
                    continue
                findings = dialect.check_table(connection, table)
                if findings is None:
                    missing.append(table)
                wrong = findings is None or any(each.is_fault for each in findings)
                state = "is missing" if findings is None else "has a fault" if wrong else "ok"
                output.write(f"{owner}: table {table.fullname} {state}")
                _tell(output, findings or (), faults)
    return [f"Tables are missing: {remedy_of_missing(subject)}.", *faults] if missing else faults


def _check_store(subject: Subject, output: Output, faults: list[str]) -> None:
    if subject.store is not None:
        output.write(subject.store.address())
        _tell(output, (Finding(text, is_fault=fault) for text, fault in subject.store.look()), faults)


def _check_logs(subject: Subject, output: Output) -> list[str]:
    faults: list[str] = []
    for name, application in subject.applications().items():
        recorder = application.recorder
        # This also finds a standby, on which the order would not be safe.
        if isinstance(recorder, SQLAlchemyApplicationRecorder):
            # Without the session, which may not begin by itself.
            last = recorder.high_water_mark()
            with recorder.datastore.reading(join=False) as read:
                _tell(output, recorder.dialect.check_log(read.connection, recorder.events_table), faults)
        else:
            last = recorder.max_notification_id() or 0
        output.write(f"{name}: log {'is not safe' if faults else 'ok'}, last position {last}")
    faults += _check_locks(subject)
    if not faults:
        _merge(subject)
        faults += [each.problem for each in map(status_of, subject.consumers()) if each.problem is not None]
    return faults


def _check_locks(subject: Subject) -> list[str]:
    """Check that the server's locks would stay with the process that has taken them."""
    dialects = {consumer.application.datastore.dialect for consumer in subject.consumers() if not consumer.leased}
    sharing = (dialect.options for dialect in dialects if dialect.shares_connections())
    return [POOLER.format(options.named("projection_lock")) for options in sharing][:1]


def _merge(subject: Subject) -> None:
    """Merge the ranges of inline projections, in case no worker does that."""
    for application in dict.fromkeys(consumer.application for consumer in subject.consumers()):
        # The role may have only the right to read.
        with suppress(sa.exc.DBAPIError):
            merge_ranges(application)


def _tell(output: Output, findings: Iterable[Finding], faults: list[str]) -> None:
    for each in findings:
        output.write(f"  {each.text}")
        if each.is_fault:
            faults.append(each.text)


def status(subject: Subject, output: Output, *, as_json: bool = False, check: bool = False) -> int:
    """Show how far each projection is, which process runs it, and what is wrong.

    It prints a table, and below it what needs an operator.

    :param check: return 1 unless all run and nothing was set aside.
    """
    require_tables(subject)
    with clear_errors():
        _merge(subject)
        health = Health(tuple(status_of(consumer) for consumer in subject.consumers()))
    if as_json:
        output.write(json.dumps(health.to_dict(), indent=2))
    elif not health.projections:
        output.write("No projection is registered.")
    else:
        output.write(_table(subject, health.projections))
        for line in _left_over(subject):
            output.write(line)
    return 1 if check and not health.ok else 0


HEADS = ("NAME", "APPLICATION", "STATE", "POSITION", "HEAD", "LAG", "SECONDS", "DEAD", "RUNNER", "SINCE")


def _table(subject: Subject, projections: Sequence[ProjectionStatus]) -> str:
    text = as_table(HEADS, [_row(each) for each in projections])
    notes = [f"{each.name}: {trouble}" for each in projections if (trouble := _trouble(subject, each))]
    return "\n".join([text, "", *notes] if notes else [text])


def _left_over(subject: Subject) -> Iterator[str]:
    """Return lines about tables that rebuilds have left in the database."""
    for consumer in subject.consumers():
        if consumer.kind == "reactions" or not consumer.tables:
            continue
        with clear_errors():
            left = leftovers(consumer)
        give_up = consumer.command("rebuild", "--give-up")
        if left.position is not None:
            yield (
                f"{consumer.name}: a rebuild is at position {left.position}: unless it is running, go on with "
                f"{consumer.command('rebuild')} or give it up with {give_up}"
            )
        elif left.unfinished:
            yield f"{consumer.name}: {', '.join(left.unfinished)} left of a rebuild: drop with {give_up}"
        if left.replaced:
            clean = consumer.command("rebuild", "--clean")
            yield f"{consumer.name}: {', '.join(left.replaced)} replaced by a rebuild: drop with {clean}"


def _row(each: ProjectionStatus) -> list[str]:
    return [
        each.name,
        each.application,
        each.state,
        str(each.position),
        str(each.head),
        str(each.lag_events),
        "-" if each.lag_seconds is None else f"{each.lag_seconds:.1f}",
        str(each.dead_letters),
        each.runner or "-",
        "-" if each.since is None else each.since.isoformat(sep=" ", timespec="seconds"),
    ]


def _trouble(subject: Subject, each: ProjectionStatus) -> str:
    parts = [each.problem.rstrip(".")] if each.problem else []
    if each.code_changed and each.state != OLD_CODE:
        parts.append(f"its code has changed since the last rebuild: see {subject.command('rebuild')}")
    if each.writer and each.state != HELD_BACK:
        age = "an unknown time" if each.writer_seconds is None else f"{each.writer_seconds:.0f} s"
        parts.append(f"readers wait for {each.writer}, whose transaction is open for {age}")
    if each.error:
        parts.append(f"{'halted at' if each.state == 'halted' else 'last error:'} {each.error}")
    if each.dead_letters:
        waiting = f", {each.waiting} waiting behind" if each.waiting else ""
        dead = counted(each.dead_letters, "dead letter")
        parts.append(f"{dead}{waiting}: see {subject.command('dead-letters list')}")
    return "; ".join(parts)


class Reporter:
    """Watches runners and reports their progress.

    :param period: seconds between two log lines of each.
    """

    def __init__(self, runners: Sequence[Runner], output: Output, period: float) -> None:
        self.runners = runners
        self.output = output
        self.period = period
        now = time.monotonic()
        self._due = now + min(FIRST_LINE, period)
        self._counted = dict.fromkeys(runners, (now, 0))
        self._stretch: _Stretch | None = None
        self._draws = True

    def tick(self) -> None:
        """Log the lines that are due, or move the bar."""
        if self._draws:
            behind = [each for each in self.runners if each.progress.state == "catching up" and _lag(each) > 0]
            if self._stretch is None and sum(map(_lag, behind)) >= WORTH_A_BAR:
                self._start_bar()
            if self._stretch is not None:
                self._stretch.move()
                if not behind:
                    self.finish_bar()
                    self._due = time.monotonic()
        if self._stretch is None and time.monotonic() >= self._due:
            self.log_lines()

    def log_lines(self) -> None:
        """Log a line for each runner."""
        for runner in self.runners:
            logger.info("%s", self._line(runner))
        self._due = time.monotonic() + self.period

    def finish_bar(self) -> None:
        """End the line of the bar."""
        if self._stretch is not None:
            self._stretch.move()
            self._stretch.bar.finish()
            self._stretch = None

    def _start_bar(self) -> None:
        names = ", ".join(runner.name for runner in self.runners)
        bar = self.output.bar(
            sum(map(_end, self.runners)) - _position(self.runners),
            names if len(names) <= 40 else f"{len(self.runners)} projections",
        )
        # The terminal is gone, so log lines follow.
        self._draws = bar is not None
        self._stretch = None if bar is None else _Stretch(self.runners, bar)

    def _line(self, runner: Runner) -> str:
        now, events = time.monotonic(), runner.progress.events
        since, counted = self._counted[runner]
        self._counted[runner] = now, events
        rate = (events - counted) / max(now - since, 0.001)
        text = f"{runner.name}: {runner.progress.state}, position {runner.progress.position}"
        if runner.progress.state == "standing by":
            return f"{text}; another process runs it"
        return f"{text}, head {_end(runner)}, lag {_lag(runner)}, {rate:.0f} events/s"


class _Stretch:
    """The events from the beginning of a catch-up to the heads of the logs, shown as a bar."""

    def __init__(self, runners: Sequence[Runner], bar: Bar) -> None:
        self.runners = runners
        self.bar = bar
        self.started = time.monotonic()
        self.events = _events(runners)
        self.position = _position(runners)

    def move(self) -> None:
        """Show how far it is; the log grows meanwhile."""
        seconds = time.monotonic() - self.started
        rate = f"{(_events(self.runners) - self.events) / seconds:,.0f} events/s" if seconds > 0.1 else ""
        length = sum(map(_end, self.runners)) - self.position
        self.bar.move(_position(self.runners) - self.position, length, rate)


def _events(runners: Sequence[Runner]) -> int:
    return sum(runner.progress.events for runner in runners)


def _position(runners: Sequence[Runner]) -> int:
    return sum(runner.progress.position for runner in runners)


def _end(runner: Runner) -> int:
    return runner.progress.end


def _lag(runner: Runner) -> int:
    return runner.progress.lag
