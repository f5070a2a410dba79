"""Measures memory in a process of its own: ``python -m benchmarks.memory CONTENDER DATABASE URL EVENTS``."""

from __future__ import annotations

import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa

ROOT = Path(__file__).parent.parent
_STATUS = Path("/proc/self/status")


def growth(contender: str, database: str, url: sa.URL, events: int) -> float:
    """Return by how many bytes the peak of a process grew that read a log to its end.

    :raises RuntimeError: when it did not find all of the events.
    """
    plain = url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "benchmarks.memory", contender, database, plain, str(events)]
    result = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{contender} on {database} failed:\n{result.stderr}")
    return float(result.stdout)


def forget_peak() -> None:
    """Let the peak begin again, where the system can: importing may have taken more than reading will."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most memory that this process had since :func:`forget_peak`, in bytes."""
    if _STATUS.exists():
        # ``ru_maxrss`` would do on other systems; on Linux it begins with what the parent process had.
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main(name: str, database: str, url: str, events: int) -> None:
    """Read the first page, and then the log to its end."""
    from .field import contender
    from .log import PAGE, read_log

    opened = contender(name, database)(sa.make_url(url), 2)
    with opened.worker() as worker:
        worker.page(1, PAGE)
        worker.rollback()
        forget_peak()
        before = peak()
        found = read_log(worker)
        after = peak()
    opened.close()
    if found != events:
        raise RuntimeError(f"{name} found {found} of {events} events in the log.")
    sys.stdout.write(str(after - before))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
