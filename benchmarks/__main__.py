"""The command: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import sqlalchemy as sa

from .chart import draw
from .databases import DATABASES, Database
from .field import absent, contenders
from .projections import section
from .report import to_markdown, to_page
from .results import Results
from .workloads import WORKLOADS, Settings, Workload

ROOT = Path(__file__).parent.parent
QUICK = Settings(seconds=0.2, small=1_000, log=3_000, memory=5_000)
NUMBERS = {1: "one core", 2: "two cores", 4: "four cores", 8: "eight cores"}


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write table and picture."""
    options = _parse(arguments)
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    if options.render:
        results = Results.load(options.render)
    else:
        results = _measure(options)
        results.save(folder / "results.json")
    markdown = to_markdown(results)
    (folder / "benchmarks.md").write_text(markdown)
    print(markdown, flush=True)
    _draw(results, folder / "benchmarks.svg")
    if options.publish:
        kept = section()
        (ROOT / "docs" / "benchmarks.md").write_text(to_page(results) + (f"\n{kept}" if kept else ""))
        _draw(results, ROOT / "docs" / "_static" / "benchmarks.svg")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=sys.modules[__package__].__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round on little data, to see that it works")
    parser.add_argument("--only", action="append", choices=WORKLOADS, metavar="WORKLOAD", help="may be repeated")
    parser.add_argument("--rounds", type=_positive, help="default 5")
    parser.add_argument("--seconds", type=float, help="for each measurement, default 1")
    parser.add_argument("--databases", nargs="+", choices=DATABASES, help="default: all that are installed")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    parser.add_argument("--render", type=Path, metavar="FILE", help="measure nothing, take the results.json of a run")
    parser.add_argument("--publish", action="store_true", help="write docs/benchmarks.md and its picture too")
    parser.epilog = "workloads: " + ", ".join(WORKLOADS)
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _measure(options: argparse.Namespace) -> Results:
    settings = QUICK if options.quick else Settings()
    if options.seconds:
        settings = Settings(options.seconds, settings.small, settings.log, settings.memory)
    rounds = options.rounds or (1 if options.quick else 5)
    workloads = [WORKLOADS[name] for name in WORKLOADS if not options.only or name in options.only]
    results = Results(_machine(), rounds, settings.seconds)
    if options.quick:
        _remark(results, "This was a quick run on less data than the tables say: its figures are not to be quoted.")
    # A short path that every user can enter: that of a PostgreSQL socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="flask-eventsourcing-bench-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        for database_name in options.databases or DATABASES:
            missing = DATABASES[database_name].missing()
            if missing:
                _remark(results, f"{DATABASES[database_name].title} is left out: {missing}.")
                continue
            database = DATABASES[database_name](Path(name))
            with ExitStack() as stack:
                stack.callback(database.stop)
                database.start()
                results.databases[database.name] = database.version()
                _measure_database(results, database, workloads, settings)
    results.machine = ", ".join([results.machine, *results.databases.values()])
    return results


def _measure_database(results: Results, database: Database, workloads: list[Workload], settings: Settings) -> None:
    field = contenders(database.name)
    for line in absent(database.name):
        _remark(results, line)
    results.titles[database.name] = {contender.name: contender.title for contender in field}
    for number in range(results.rounds):
        # Another one is first in each round, and every second round goes backwards.
        start = number // 2 % len(field)
        order = (field[start:] + field[:start])[:: -1 if number % 2 else 1]
        due = [each for each in workloads if each.most_rounds is None or number < each.most_rounds]
        for workload, contender in product(due, order):
            if workload.suits(contender):
                begin = time.perf_counter()
                measured = workload.run(database, contender, settings)
                results.add(database.name, workload.name, contender.name, measured.value, measured.failures)
                _say(
                    f"{database.title}, round {number + 1} of {results.rounds}, {workload.title}, {contender.title}: "
                    f"{measured.value:,.1f} {workload.unit}, {measured.failures} failed "
                    f"({time.perf_counter() - begin:.1f} s)"
                )


def _remark(results: Results, line: str) -> None:
    _say(line)
    results.remarks.append(line)


def _draw(results: Results, path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        _say("No picture: matplotlib is not installed.")
        return
    draw(results, path)


def _machine() -> str:
    cores = os.cpu_count() or 1
    python = platform.python_version()
    return f"{NUMBERS.get(cores, f'{cores} cores')}, Python {python}, SQLAlchemy {sa.__version__}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
