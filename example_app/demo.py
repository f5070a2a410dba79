"""Open the bank: ``python -m example_app.demo [PORT]`` runs the development server and the worker, and stops both."""

from __future__ import annotations

import signal
import subprocess
import sys
from types import FrameType

FLASK = [sys.executable, "-m", "flask", "--app", "example_app"]
PATIENCE = 15.0


def main(port: str = "5000") -> int:
    """Run both until Ctrl-C, SIGTERM or the end of the server, and return the server's exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    # In a session of its own, so that Ctrl-C reaches it once only: from here, after the server has ended.
    worker = subprocess.Popen([*FLASK, "eventsourcing", "run", "--all"], start_new_session=True)
    server = None
    try:
        server = subprocess.Popen([*FLASK, "run", "--host", "127.0.0.1", "--port", port])
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for process in (server, worker):
            if process is not None:
                _end(process)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
