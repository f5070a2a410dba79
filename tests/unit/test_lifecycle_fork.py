"""One application in every process, however that process was made."""

from __future__ import annotations

import ctypes
import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from flask_eventsourcing.lifecycle import ApplicationSlot, ProcessLock
from tests.unit.test_lifecycle import App


def fork_in_c() -> int:
    """Fork as uWSGI does: Python is not told, and no hook of ``os.register_at_fork`` runs."""
    return int(ctypes.PyDLL(None).fork())


def in_child(function: Callable[[], Any], patience: float = 20, fork: Callable[[], int] = os.fork) -> Any:
    """Fork, run a function in the child and return its result."""
    read_end, write_end = os.pipe()
    child = fork()
    if child == 0:
        try:
            result = json.dumps(function())
        except BaseException:  # noqa: BLE001  # told to the parent
            result = json.dumps(traceback.format_exc())
        os.write(write_end, result.encode())
        os._exit(0)
    os.close(write_end)
    killer = threading.Timer(patience, os.kill, (child, 9))
    killer.start()
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    killer.cancel()
    killer.join()
    os.waitpid(child, 0)
    assert text, "the child hangs"
    return json.loads(text)


def test_child_constructs_its_own() -> None:
    """A forked process has none of the parent's application and constructs its own, once, with the same arguments."""
    slot: ApplicationSlot[App] = ApplicationSlot()
    parents = slot.init(lambda: App("same"))

    def child() -> Any:
        before = slot.constructed
        own = slot.get()
        return [before, own is parents, own is slot.get(), own.arguments, slot.constructed]

    with slot:
        assert in_child(child) == [False, False, True, [["same"], {}], True]
        assert slot.get() is parents


def test_child_never_closes_the_parents() -> None:
    """Closing in a forked process closes what that process constructed and never what it inherited."""
    slot = ApplicationSlot(App)
    parents = slot.get()

    def child() -> Any:
        slot.close()
        inherited_only = parents.closed
        own = slot.get()
        slot.close()
        slot.close()
        return [inherited_only, own.closed, parents.closed]

    with slot:
        assert in_child(child) == [0, 1, 0]


def test_child_does_not_drop_the_parents() -> None:
    """What a forked process inherited is kept alive in it, as a finalizer would close what belongs to the parent."""
    dropped: list[str] = []

    class Finalized(App):
        def __del__(self) -> None:
            dropped.append("dropped")

    slot = ApplicationSlot(Finalized)
    slot.get()

    def child() -> Any:
        slot.get()
        slot.close()
        return len(dropped)

    with slot:
        # The child's own is dropped at its close, the inherited one is not.
        assert in_child(child) == 1


def test_child_may_init_although_the_parent_did() -> None:
    """A worker that initialises after the fork is not told that its parent had done so already."""
    slot: ApplicationSlot[App] = ApplicationSlot()
    with slot:
        slot.init(App)
        assert in_child(lambda: slot.init(lambda: App("own")).arguments[0]) == ["own"]


def test_child_is_not_blocked_by_a_lock_that_the_parent_held() -> None:
    """A process forked while another thread was constructing does not wait for that thread, which it does not have."""
    started = threading.Event()
    go_on = threading.Event()
    parent = os.getpid()

    def construct() -> App:
        if os.getpid() == parent:
            started.set()
            go_on.wait(20)
        return App(os.getpid())

    slot = ApplicationSlot(construct)
    thread = threading.Thread(target=slot.get)
    thread.start()
    try:
        assert started.wait(20)
        assert in_child(lambda: slot.get().arguments[0] == (os.getpid(),)) is True
    finally:
        go_on.set()
        thread.join(20)
    with slot:
        assert slot.get().arguments[0] == (parent,)


def test_grandchild_constructs_its_own() -> None:
    """Each generation of processes has its own application."""
    slot = ApplicationSlot(lambda: App(os.getpid()))
    slot.get()

    def child() -> Any:
        slot.get()
        return in_child(lambda: slot.get().arguments[0] == (os.getpid(),))

    with slot:
        assert in_child(child) is True


def test_process_id_decides_rather_than_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork that runs no hook of Python, as uWSGI's in C, is noticed by the process id alone."""
    slot = ApplicationSlot(App)
    parents = slot.get()
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: -1)
        assert slot.get() is not parents
        slot.close()


def test_process_lock_excludes_other_threads() -> None:
    """The lock of one process lets in one thread at a time, and the same thread again."""
    lock = ProcessLock()
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        with lock, lock:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.005)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8
