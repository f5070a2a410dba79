"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from .results import Results, Series
from .workloads import WORKLOADS, Memory

RATIOS = (("this", "peer"), ("this", "own"), ("this-alone", "own"), ("this", "bare"))
NOTES = """\
- Each figure is the median of all rounds, followed by the lowest and the highest. A ratio is the median of the \
ratios of each round, so it may differ from the ratio of the medians.
- *This, in a session*: the recorder in an application context, with `db.session.commit()` after each unit that wrote \
and `db.session.rollback()` after each unit that read. *eventsourcing-sqlalchemy* does exactly the same, set up for \
Flask-SQLAlchemy as in its README. Each thread has one application context for the whole measurement.
- *This, on its own*: the same recorder outside an application context, where it commits by itself.
- The library's recorders, and this one on its own, commit when events are saved. The pause comes after the commit, \
when no lock is held.
- *Bare*: the driver alone, with the same statements as this package, including those that keep the log in order.
- Every contender has a database of its own, filled with the same events (about 220 bytes of JSON each) and analysed. \
Each measurement that writes has a fresh copy of it. Pools have a connection for each thread, except that of \
eventsourcing.sqlite, which has at most 15 and no setting for it. SQLite files are in WAL mode for all. All other \
settings of servers and drivers are the defaults.
- A session holds its locks until its commit. SQLite has one writer at a time, and on MariaDB a row lock keeps the \
log in order until the commit, so with a pause of 5 ms there are at most 200 commits a second. \
eventsourcing-sqlalchemy has no such lock on MariaDB, and a reader of its log can miss events there. On PostgreSQL \
writers of this package do not wait for each other; eventsourcing-sqlalchemy locks its table until the commit.
- The log is read in pages of 1,000 events. Memory is the growth of a process's peak while it read the log from the \
first page to the end, in at most two rounds.
"""


def to_markdown(results: Results) -> str:
    """Return the tables and what is to be known about them."""
    rounds = "1 round" if results.rounds == 1 else f"{results.rounds} rounds"
    measured = (
        f"Measured on {results.machine}: {rounds} of {results.seconds:g} s for each contender and workload. "
        "In each round the contenders run one after the other, in another order.\n"
    )
    parts = [measured]
    for database in results.series:
        parts.append(f"## {results.databases[database]}\n")
        parts.append("\n".join(_ratio_table(results, database)) + "\n")
        parts.append("\n".join(_value_table(results, database)) + "\n")
    parts.append("## How to read this\n")
    parts.append(NOTES + "".join(f"- {line}\n" for line in results.remarks))
    return "\n".join(parts)


def to_page(results: Results) -> str:
    """Return the page of the documentation."""
    return (
        "# Benchmarks\n\n`make bench` compares this package with the library's own recorders, "
        "`eventsourcing-sqlalchemy` and the bare drivers.\n\n"
        "![Speed relative to eventsourcing-sqlalchemy](_static/benchmarks.svg)\n\n" + to_markdown(results)
    )


def _ratio_table(results: Results, database: str) -> Iterator[str]:
    titles = results.titles[database]
    pairs = [pair for pair in RATIOS if pair[0] in titles and pair[1] in titles]
    heads = [f"{titles[one]} / {titles[other]}" for one, other in pairs]
    yield from _head(["workload", *heads])
    for workload in results.series[database]:
        if isinstance(WORKLOADS[workload], Memory):
            continue  # There is next to nothing to divide by.
        cells = [_ratio(results.ratios(database, workload, one, other)) for one, other in pairs]
        yield _row([WORKLOADS[workload].title, *cells])


def _value_table(results: Results, database: str) -> Iterator[str]:
    titles = results.titles[database]
    yield from _head(["workload", *titles.values()])
    for name, series in results.series[database].items():
        workload = WORKLOADS[name]
        digits = 1 if isinstance(workload, Memory) else 0
        cells = [_value(series.get(contender), digits) for contender in titles]
        yield _row([f"{workload.title}, {workload.unit}", *cells])


def _head(cells: list[str]) -> Iterator[str]:
    yield _row(cells)
    yield "|---" + "|---:" * (len(cells) - 1) + "|"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _value(series: Series | None, digits: int) -> str:
    if series is None:
        return ""
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(series.values), series.median, max(series.values)))
    failed = f", {series.failures} failed" if series.failures else ""
    return f"{middle} ({low}..{high}{failed})"


def _ratio(series: Series | None) -> str:
    if series is None or not series.values:
        return ""
    return f"**{series.median:.2f}** ({min(series.values):.2f}..{max(series.values):.2f})"
