"""Open the bank: ``python -m example_app.demo [PORT]`` runs the development server and the worker, and stops both.

With ``--check-port`` it only says whether the port can be used, which needs nothing that has to be installed.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from types import FrameType

FLASK = [sys.executable, "-m", "flask", "--app", "example_app"]
PATIENCE = 15.0


def main(port: str = "5000", *options: str) -> int:
    """Run both until Ctrl-C, SIGTERM or the end of the server, and return the server's exit status.

    A new database gets its tables, and something to see. Nothing is begun when the port cannot be used.
    """
    if refusal := _refusal(port):
        print(refusal, file=sys.stderr)
        return 1
    if "--check-port" in options:
        return 0
    upgrade = subprocess.run([*FLASK, "db", "upgrade"], capture_output=True, text=True, check=False)
    if upgrade.returncode:
        print(upgrade.stdout, upgrade.stderr, sep="", end="", file=sys.stderr)
        return 1
    _fill()
    print(f"The bank is open at http://127.0.0.1:{port}/ (Ctrl-C closes it)", flush=True)
    return _serve(port)


def _refusal(port: str) -> str | None:
    """Say why the server could not listen on a port, if it could not."""
    remedy = "Name another one: make demo PORT=5001"
    if not port.isdecimal() or not 1 <= int(port) <= 65_535:
        return f"{port!r} is not the number of a port. {remedy}"
    with socket.socket() as probe:
        # As the server does: connections of an earlier one that are still being closed do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(port)))
        except OSError as error:
            return f"The port {port} cannot be used: {error.strerror}. {remedy}"
    return None


def _fill() -> None:
    from example_app import create_app
    from example_app.extensions import es
    from example_app.seed import seed

    app = create_app()
    with app.app_context():
        seed()
    es.close(app)


def _serve(port: str) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    # A shell that starts it in the background has it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
    sys.exit(main(*sys.argv[1:]))
