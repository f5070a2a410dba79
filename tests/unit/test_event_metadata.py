"""The metadata in force: put, replaced and hidden; in threads, greenlets, tasks and generators."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any
from uuid import UUID

import pytest
from markupsafe import Markup
from werkzeug.local import LocalProxy

from flask_eventsourcing import EventMetadataError
from flask_eventsourcing.metadata import (
    Collector,
    MetadataBlock,
    Recorded,
    brought_along,
    caused_by,
    event_metadata,
    get_metadata_from_context,
    kept_for_later,
    null_metadata_in_context,
    put_metadata_in_context,
    set_metadata_in_context,
)
from flask_eventsourcing.metadata.values import new_block, uuids_of
from flask_eventsourcing.workers import received


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    assert get_metadata_from_context() == {}
    yield
    assert get_metadata_from_context() == {}


def test_put_merges_set_replaces_null_hides() -> None:
    """Blocks within each other merge, replace or hide what is around them, and give it back."""
    with put_metadata_in_context({"a": "1", "b": "1"}):
        with put_metadata_in_context({"b": "2"}):
            assert get_metadata_from_context() == {"a": "1", "b": "2"}
        with set_metadata_in_context({"c": "3"}):
            assert get_metadata_from_context() == {"c": "3"}
        with null_metadata_in_context():
            assert get_metadata_from_context() == {}
            with event_metadata(d="4"):
                assert get_metadata_from_context() == {"d": "4"}
        assert get_metadata_from_context() == {"a": "1", "b": "1"}


def test_what_is_got_is_a_copy() -> None:
    """A caller that changes the mapping it got does not change the metadata in force."""
    with event_metadata(a="1"):
        get_metadata_from_context()["b"] = "2"
        assert get_metadata_from_context() == {"a": "1"}


def test_block_gives_back_after_an_error() -> None:
    """An error ends a block as its end does."""
    with pytest.raises(KeyError), event_metadata(a="1"):
        raise KeyError


def test_decorator_of_a_function_may_be_reentered() -> None:
    """A decorated function may call itself, and threads may call it at once."""

    @event_metadata(a="1")
    def again(depth: int) -> dict[str, str]:
        return again(depth - 1) if depth else get_metadata_from_context()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(again, range(8))) == [{"a": "1"}] * 8
    assert again.__name__ == "again"


def test_block_is_used_once_at_a_time() -> None:
    """A block within itself is refused, and can be used again afterwards."""
    block = event_metadata(a="1")
    with block, pytest.raises(RuntimeError, match="each 'with'"), block:
        pass
    with block:
        assert get_metadata_from_context() == {"a": "1"}


def test_decorated_generator_keeps_it_between_its_steps() -> None:
    """What a decorated generator has is not in force for its caller, and the other way round, nor when it is closed."""
    ended: list[dict[str, str]] = []

    @event_metadata(a="1")
    def steps() -> Iterator[Any]:
        try:
            with event_metadata(b="2"):
                got = yield get_metadata_from_context()
                yield got
        finally:
            ended.append(get_metadata_from_context())

    with event_metadata(outer="1"):
        generator: Any = steps()
        assert next(generator) == {"outer": "1", "a": "1", "b": "2"}
        assert get_metadata_from_context() == {"outer": "1"}
        assert generator.send("sent") == "sent"
        assert get_metadata_from_context() == {"outer": "1"}
    generator.close()
    assert ended == [{"outer": "1", "a": "1"}]


def test_decorated_generator_returns_and_is_thrown_into() -> None:
    """A decorated generator takes errors and returns a value as another does."""

    @event_metadata(a="1")
    def steps() -> Any:
        try:
            yield 1
        except ValueError:
            yield get_metadata_from_context()
        return 3

    generator = steps()
    assert next(generator) == 1
    assert generator.throw(ValueError()) == {"a": "1"}
    with pytest.raises(StopIteration) as stop:
        next(generator)
    assert stop.value.value == 3


def test_block_in_a_generator_may_end_elsewhere() -> None:
    """A generator that is closed in another context, or after others have put more, takes away its own only."""

    def steps() -> Generator[int, None, None]:
        with event_metadata(a="1"):
            yield 1

    generator = steps()
    next(generator)
    with event_metadata(b="2"):
        generator.close()
        assert get_metadata_from_context() == {"b": "2"}
    other = steps()
    contextvars.copy_context().run(next, other)
    assert get_metadata_from_context() == {}
    other.close()
    last = steps()
    next(last)
    del last
    gc.collect()


def test_coroutines_and_asynchronous_generators() -> None:
    """Tasks have their own, a decorated coroutine has it to its end, an asynchronous generator while it runs."""

    async def task(name: str) -> list[str]:
        found = []
        with event_metadata(task=name):
            for _ in range(20):
                await asyncio.sleep(0)
                found.append(get_metadata_from_context()["task"])
        return found

    @event_metadata(a="1")
    async def decorated() -> dict[str, str]:
        await asyncio.sleep(0)
        return get_metadata_from_context()

    @event_metadata(a="1")
    async def steps() -> AsyncIterator[dict[str, str]]:
        yield get_metadata_from_context()
        await asyncio.sleep(0)
        yield get_metadata_from_context()

    async def main() -> None:
        names = [str(number) for number in range(50)]
        assert await asyncio.gather(*map(task, names)) == [[name] * 20 for name in names]
        assert await decorated() == {"a": "1"}
        async for found in steps():
            assert found == {"a": "1"}
            assert get_metadata_from_context() == {}

    asyncio.run(main())


def test_decorator_of_what_hides_a_coroutine_function_or_a_method() -> None:
    """It does not matter whether it stands above or below another decorator, or those of methods."""

    async def coroutine() -> dict[str, str]:
        await asyncio.sleep(0)
        return get_metadata_from_context()

    class Methods:
        @event_metadata(a="1")
        @classmethod
        def of_class(cls) -> dict[str, str]:
            return get_metadata_from_context()

        @event_metadata(a="1")
        @staticmethod
        def static() -> dict[str, str]:
            return get_metadata_from_context()

        async def __call__(self) -> dict[str, str]:
            return await coroutine()

    @event_metadata(a="1")
    def hidden() -> Any:
        return coroutine()

    def steps() -> Iterator[dict[str, str]]:
        yield get_metadata_from_context()

    async def asynchronous_steps() -> AsyncIterator[dict[str, str]]:
        yield get_metadata_from_context()

    def again(function: Any) -> Any:
        def call() -> Any:
            return function()

        return call

    async def first() -> dict[str, str]:
        found: dict[str, str] = await anext(event_metadata(a="1")(again(asynchronous_steps))())
        return found

    assert list(event_metadata(a="1")(again(steps))()) == [{"a": "1"}]
    assert asyncio.run(first()) == {"a": "1"}
    decorated: list[Any] = [event_metadata(a="1")(Methods()), hidden]
    assert [asyncio.run(each()) for each in decorated] == [{"a": "1"}] * 2
    assert (Methods.of_class(), Methods().static()) == ({"a": "1"}, {"a": "1"})


def test_threads_do_not_see_each_other() -> None:
    """Sixteen threads at once with different metadata: none sees another's."""
    start, wrong = threading.Barrier(16), []

    def work(name: str) -> None:
        start.wait()
        for number in range(200):
            with event_metadata(thread=name, number=str(number)):
                time.sleep(0)
                if get_metadata_from_context() != {"thread": name, "number": str(number)}:
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(16)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import gevent
from flask_eventsourcing.metadata import event_metadata, get_metadata_from_context

def work(name):
    for number in range(20):
        with event_metadata(name=name, number=str(number)):
            gevent.sleep(0)
            assert get_metadata_from_context() == {"name": name, "number": str(number)}
    assert get_metadata_from_context() == {}

gevent.joinall([gevent.spawn(work, str(number)) for number in range(100)], raise_error=True)
"""


def test_greenlets_do_not_see_each_other() -> None:
    """A hundred greenlets at once with different metadata: none sees another's."""
    pytest.importorskip("gevent")
    done = subprocess.run([sys.executable, "-c", GREENLETS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "values", [{"a": 1}, {"a": None}, {1: "a"}, {"": "a"}, {"a": "\0"}, {"a": "\ud800"}, {"a\n": "b"}, [("a", "b")]]
)
def test_what_is_no_text_is_refused(values: Any) -> None:
    """Keys and values are texts that every database takes; others are refused where they are put."""
    with pytest.raises(EventMetadataError):
        put_metadata_in_context(values)


def test_proxy_of_a_text_is_refused() -> None:
    """What only stands for a text, such as a proxy of Flask's, is refused where it is put, with what to do."""
    proxy: Any = LocalProxy(lambda: "ada")
    assert isinstance(proxy, str)
    with pytest.raises(EventMetadataError, match=r"'user' is of type LocalProxy.*str"):
        put_metadata_in_context({"user": proxy})


class Shouted(str):
    """A text that does something else."""

    __slots__ = ()

    def __contains__(self, part: object) -> bool:
        return False

    def __str__(self) -> str:
        return "another"


def test_texts_are_stored_as_what_they_are() -> None:
    """A subclass of ``str`` is stored as its characters, whatever its methods return, such as markup."""
    with put_metadata_in_context({Shouted("a"): Markup("<b>"), "b": Shouted("1")}):
        found = get_metadata_from_context()
    assert found == {"a": "<b>", "b": "1"}
    assert {type(each) for each in (*found, *found.values())} == {str}
    with pytest.raises(EventMetadataError, match="NUL"):
        put_metadata_in_context({"a": Shouted("\0")})


class Arguments(dict[str, Any]):
    """A mapping that has lists, and gives the last value of each, as Django's ``request.GET``."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)[-1]

    def items(self) -> Any:
        """Return the last of each."""
        return [(key, self[key]) for key in self]


def test_mapping_with_several_values_of_a_key() -> None:
    """Of several values for a key of a request's arguments, the one that the mapping itself returns is taken."""
    given = Arguments(a=["1", "2"])
    with put_metadata_in_context(given):
        assert get_metadata_from_context() == {"a": "2"}
        assert Collector()()["a"] == "2"
    assert Collector([lambda: given])()["a"] == "2"


def test_mapping_that_fails_when_it_is_read() -> None:
    """A provider is named whose mapping fails when it is read, such as one of another request."""

    class Gone(dict[str, str]):
        def items(self) -> Any:
            raise LookupError("secret")

    def provider() -> Any:
        return Gone()

    with pytest.raises(EventMetadataError, match=r"provider failed.*LookupError"):
        Collector([provider])()


def test_mapping_that_is_changed_later_changes_nothing() -> None:
    """What was checked is in force, whatever the caller does with the mapping afterwards."""
    given: dict[str, Any] = {"a": "1"}
    with put_metadata_in_context(given):
        given.update(a=5, b="2")
        assert Collector()()["a"] == "1"
        assert "b" not in get_metadata_from_context()


def test_collector_names_the_provider() -> None:
    """A provider that fails, or returns no mapping, is named, and its own message is not shown."""

    def broken() -> Any:
        raise LookupError("secret")

    def wrong() -> Any:
        return {"user": 7}

    with pytest.raises(EventMetadataError, match=r"test_event_metadata.*broken.*LookupError") as found:
        Collector([broken])()
    assert "secret" not in str(found.value)
    with pytest.raises(EventMetadataError, match=r"wrong.*'user' is of type int"):
        Collector([wrong])()
    assert Collector([lambda: None])().keys() == {"correlation_id"}


def test_collector_takes_what_was_put_before_what_is_provided() -> None:
    """Metadata of the context replace those of providers, and a correlation is always there."""
    collect = Collector([lambda: {"a": "1", "b": "1"}, lambda: {"b": "2"}])
    with event_metadata(a="put", correlation_id="mine"):
        assert collect() == {"a": "put", "b": "2", "correlation_id": "mine"}
    assert collect()["correlation_id"] != collect()["correlation_id"]


@pytest.mark.parametrize("long", ["x" * 4100, "é" * 2100, '"' * 2100])
def test_metadata_are_limited(long: str) -> None:
    """More than 4 KiB of JSON is refused with the size, and less is not."""
    with event_metadata(note=long), pytest.raises(EventMetadataError, match=r"\d+ bytes"):
        Collector()()
    with event_metadata(note=long[: len(long) // 2]):
        Collector()()


@pytest.mark.parametrize("correlation", ["", "x" * 129, "a\nb"])
def test_correlation_fits_its_column(correlation: str) -> None:
    """A correlation id that its column does not take is refused."""
    with event_metadata(correlation_id=correlation), pytest.raises(EventMetadataError, match="128"):
        Collector()()


def test_cause_is_looked_up_once_and_late() -> None:
    """The event that is handled is looked up when something is saved, once, and only then."""
    calls: list[int] = []
    event_id = UUID(int=7)

    def find() -> Recorded:
        calls.append(1)
        return Recorded(1, event_id, None, {"correlation_id": "c", "user": "ada"})

    with caused_by(find):
        assert calls == []
        assert Collector()() == {"correlation_id": "c", "causation_id": str(event_id)}
        assert Collector()()["correlation_id"] == "c"
    assert calls == [1]
    with caused_by(lambda: None):
        assert Collector()().keys() == {"correlation_id"}


CAUSED = caused_by(lambda: Recorded(1, UUID(int=7), None, {"correlation_id": "c"}))
FILLED = {"correlation_id": "c", "causation_id": str(UUID(int=7))}


@pytest.mark.parametrize(
    ("around", "filled"),
    [(CAUSED, FILLED), (brought_along({"correlation_id": "c", "reason": "r"}), {"correlation_id": "c"})],
)
def test_what_the_package_fills_in_is_not_hidden(around: MetadataBlock, filled: dict[str, str]) -> None:
    """In a handler or task, hiding or replacing metadata keeps correlation and cause, so the tree has no gap."""
    with around:
        with null_metadata_in_context():
            assert Collector()() == filled
            with event_metadata(correlation_id="mine"):
                assert Collector()() == {**filled, "correlation_id": "mine"}
        with event_metadata(a="1", causation_id="other"), set_metadata_in_context({"b": "2"}):
            assert Collector()() == {**filled, "b": "2"}
        with kept_for_later({"correlation_id": "d"}):
            assert Collector()() == {"correlation_id": "d"}


@pytest.mark.parametrize("around", [CAUSED, brought_along({"correlation_id": "c"}), kept_for_later({})])
def test_what_is_left_ends_with_the_handler_or_task(around: MetadataBlock) -> None:
    """Metadata that a handler or task sets do not reach the next one; those around it stay."""
    left = [event_metadata(leak="yes"), event_metadata(leak="again")]
    with event_metadata(own="caller's"):
        with around:
            for each in left:
                each.__enter__()
            assert Collector()()["leak"] == "again"
        assert get_metadata_from_context() == {"own": "caller's"}
        for each in left:
            each.__exit__(None, None, None)
        assert get_metadata_from_context() == {"own": "caller's"}


@pytest.mark.parametrize("correlation", ["x" * 129, "a\nb", "", None, 7])
def test_task_whose_correlation_cannot_be_stored(correlation: Any) -> None:
    """If the correlation of a task fits no column, the id of the task is used, and its events are saved."""
    with received({"correlation_id": correlation, "reason": "r"}, "task 1"):
        found = Collector()()
    assert found["correlation_id"] == "task 1"
    # What is no mapping of texts is left out as a whole.
    assert found.get("reason") == ("r" if isinstance(correlation, str) else None)


def test_opentelemetry_that_is_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """While another thread imports OpenTelemetry, there is no current span, and nothing fails."""
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", ModuleType("opentelemetry.trace"))
    with brought_along({"correlation_id": "c", "traceparent": "sent"}):
        assert Collector()()["traceparent"] == "sent"


def test_blocks_that_end_in_another_order_are_let_go() -> None:
    """Generators that are left in another order than they were begun in do not fill the context of a thread."""
    ended: list[weakref.ref[MetadataBlock]] = []

    def steps() -> Iterator[None]:
        with event_metadata(a="1") as block:
            ended.append(weakref.ref(block))
            del block
            yield

    running = steps()
    next(running)
    for _ in range(50):
        following = steps()
        next(following)
        running.close()  # type: ignore[attr-defined]
        running = following
    gc.collect()
    assert sum(each() is not None for each in ended) <= 3
    running.close()  # type: ignore[attr-defined]


def test_current_span_takes_the_place_of_a_trace_that_was_sent() -> None:
    """In a worker with a current span of OpenTelemetry's that is the trace, else the one that came with the task."""
    trace: Any = pytest.importorskip("opentelemetry.trace")
    span = trace.NonRecordingSpan(trace.SpanContext(7, 9, is_remote=False))
    with brought_along({"correlation_id": "c", "traceparent": "sent"}):
        assert Collector()()["traceparent"] == "sent"
        with trace.use_span(span):
            assert Collector()()["traceparent"] == f"00-{7:032x}-{9:016x}-00"
            with event_metadata(traceparent="mine"):
                assert Collector()()["traceparent"] == "mine"


def test_ids_are_of_version_seven_and_in_order() -> None:
    """The ids of events are UUIDs of version 7, all different and in their order."""
    ids = [each for count in (3000, 1, 2, 5000, 4096) for each in uuids_of(new_block(), count)]
    assert {each.version for each in ids} == {7}
    assert sorted(set(ids)) == ids


FORKS = """
import ctypes, os, time
from flask_eventsourcing.metadata import new_id
from flask_eventsourcing.metadata.values import new_block, uuids_of

new_id()
time.sleep(0.01)
for fork in (ctypes.CDLL(None).fork, os.fork):
    for _ in range(2):
        child = fork()
        if child == 0:
            # Without the time.
            print(uuids_of(new_block(), 1)[0].int % 2**62 >> 32, int(new_id().replace("-", ""), 16) % 2**32, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
"""


def test_forked_processes_make_different_ids() -> None:
    """Processes that were forked, also without Python as uWSGI does it, do not make the same ids at the same time."""
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert len(set(found)) == len(found) == 8
