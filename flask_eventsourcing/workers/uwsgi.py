"""uWSGI: constructs the applications when a worker begins, and closes them when it ends.

Forks are safe without this. With it, the first request of each worker need not construct the applications, and they are
closed at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from flask import Flask

from ..web.state import state_of


def init_uwsgi(app: Flask) -> None:
    """Construct the app's applications in each worker before its first request, and close them at its end.

    Call it at the end of the module that uWSGI loads, after ``import uwsgidecorators`` if you use that. Under another
    server it does nothing. Functions that were already registered as ``uwsgi.post_fork_hook`` and ``uwsgi.atexit`` are
    called too. uWSGI does not call them in a worker that is killed, or that it ends during a request.

    :raises NotInitializedError: when ``es.init_app(app)`` was not called.
    """
    state = state_of(app)
    try:
        import uwsgi
    except ImportError:  # It exists inside of the server only.
        return
    server: Any = uwsgi

    def begin() -> None:
        # Not in a mule or a spooler, which may not need the applications, and construct them at the first use.
        if server.worker_id() > 0:
            state.construct()

    if server.worker_id() > 0:
        # With lazy-apps the module is loaded after the fork, so that uWSGI calls no hook.
        begin()
    else:
        server.post_fork_hook = _chained(getattr(server, "post_fork_hook", None), begin)
    server.atexit = _chained(state.close, getattr(server, "atexit", None))


def _chained(*functions: Callable[[], Any] | None) -> Callable[[], None]:
    def call() -> None:
        # uWSGI prints the error of a hook and goes on. The other hooks are called as well.
        with ExitStack() as stack:
            for function in reversed(functions):
                if function is not None:
                    stack.callback(function)

    return call
