"""Drawn programs that save, commit and roll back in every way get no wrong answer and no wrong state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.unit_django import DJANGO_KINDS, DjangoDriver, DjangoStages
from tests.integration.unit_ends import SessionDriver
from tests.integration.unit_stages import CACHES, Setting, Stages
from tests.integration.unit_steps import BLOCKS, KINDS, Step, Violation
from tests.length import IS_LONG, examples

WAITING: frozenset[str] = frozenset()
"""What is not drawn yet."""
DRAWN: dict[str, frozenset[str]] = defaultdict(lambda: KINDS - WAITING, django=DJANGO_KINDS)
OFTEN = ("save", "save", "save", "read", "orm commit", "orm rollback")
"""What makes the other steps interesting."""
NUMBERS = (3, 3, 3, 3, 0, 4, 5, 2, 1)
"""Mostly the first account, and mostly changed."""
SAVEPOINTS = ("orm savepoint", "connection savepoint", "text savepoint", "release", "roll back to", "roll back to")
SETTINGS = settings(
    deadline=None,
    database=None,
    # One database serves all the examples; each has its own accounts in it.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
PREFIXES = count(1)
HOSTS = (
    "flask",
    pytest.param("plain scoped_session", marks=pytest.mark.long),
    pytest.param("plain sessionmaker", marks=pytest.mark.long),
    pytest.param("zope scoped_session", marks=pytest.mark.long),
    pytest.param("zope sessionmaker", marks=pytest.mark.long),
    "django",
)


SAVE, AGAIN, UNCHANGED, OTHER = Step("save", 3), Step("save", 3), Step("save", 0), Step("save", 4)
"""The first account with a change, or without one; the second account."""
READ, COMMIT, ROLLBACK, OVERTAKEN = Step("read"), Step("orm commit"), Step("orm rollback"), Step("conflict")
CONFLICT = Step("save", 3, caught=True)


def _each(kinds: Sequence[str], *steps: Step | None) -> list[tuple[Step, ...]]:
    """Return a program for each kind of step, which takes the place of None."""
    return [tuple(step or Step(kind) for step in steps) for kind in kinds]


def _within(block: str, kinds: Sequence[str], *steps: Step | None) -> list[tuple[Step, ...]]:
    """Return the same within a block."""
    return [(Step(block, body=program),) for program in _each(kinds, *steps)]


ROLLBACKS = ("orm rollback", "connection rollback", "text rollback", "driver rollback")
COMMITS = ("orm commit", "connection commit", "text commit", "driver commit", "ddl")
CLOSES = ("close", "reset", "remove", "with")
BEGIN = ("orm savepoint", "connection savepoint", "text savepoint")
BACK, RELEASE = Step("roll back to"), Step("release")
SHORTEST: list[tuple[Step, ...]] = [
    *_each(ROLLBACKS, SAVE, None, AGAIN, COMMIT),
    *_each(ROLLBACKS, SAVE, None, UNCHANGED),
    *_each(ROLLBACKS, Step("open"), Step("save", 2), None, Step("save", 5), READ, COMMIT),
    *_each(ROLLBACKS, SAVE, None),
    *_each(ROLLBACKS, SAVE, None, READ, SAVE, COMMIT, READ),
    *_each(BEGIN, SAVE, None),
    *_each(BEGIN, None, SAVE, BACK),
    *_each(BEGIN, None, SAVE, BACK, COMMIT),
    *_each(BEGIN, SAVE, None, SAVE, BACK, AGAIN, COMMIT),
    *_each(BEGIN, OTHER, None, SAVE, BACK, READ, AGAIN, COMMIT, SAVE, COMMIT),
    *_each(BEGIN, SAVE, None, SAVE, RELEASE, SAVE, COMMIT),
    *_each(BEGIN, SAVE, None, READ, BACK, SAVE, COMMIT),
    *_each(BEGIN, Step("orm savepoint"), None, SAVE, RELEASE, BACK, COMMIT),
    (Step("savepoint", 0, True, (SAVE, Step("row error"))), AGAIN, COMMIT),
    (READ, OVERTAKEN, CONFLICT, ROLLBACK, UNCHANGED, COMMIT),
    (READ, OVERTAKEN, Step("retry", body=(SAVE,))),
    (Step("change"), OVERTAKEN, Step("retry", body=(UNCHANGED,))),
    (Step("retry", body=(OTHER, READ, OVERTAKEN, SAVE)),),
    (SAVE, Step("savepoint", body=(SAVE, COMMIT)), READ),
    (SAVE, Step("change")),
    (SAVE, COMMIT, Step("change")),
    *_each(COMMITS, SAVE, None),
    *_each(COMMITS, SAVE, None, SAVE, ROLLBACK),
    *_each(COMMITS, Step("orm savepoint"), SAVE, None, Step("close", caught=True)),
    *_each(COMMITS, SAVE, None, SAVE, COMMIT),
    *_each(CLOSES, SAVE, None),
    *_each(CLOSES, SAVE, None, COMMIT),
    *_each(CLOSES, SAVE, None, AGAIN, COMMIT),
    *_each(CLOSES, SAVE, COMMIT, None),
    *_within("unit", (*ROLLBACKS, *CLOSES), OTHER, None, SAVE),
    *_within("retry", (*ROLLBACKS, *CLOSES), OTHER, None, SAVE),
    *_within("unit", ROLLBACKS, OTHER, None),
    (SAVE, Step("unit")),
    *_within("unit", COMMITS, OTHER, None, Step("fault")),
    *_within("retry", COMMITS, READ, OTHER, None, OVERTAKEN, SAVE),
    *_within("begin", ("save", "row", "read"), SAVE, None, SAVE),
    (Step("unit", caught=True, body=(SAVE, READ, COMMIT)), UNCHANGED),
    (SAVE, COMMIT, Step("statement error", caught=True), Step("unit", body=(SAVE,))),
    (Step("unit", body=(SAVE, Step("orm savepoint"), Step("text rollback"), Step("fault"))),),
    (SAVE, Step("savepoint", body=(Step("orm savepoint"), Step("text rollback"), ROLLBACK))),
    (Step("orm savepoint"), Step("unit", body=(Step("driver rollback"), Step("text savepoint"), SAVE))),
]
"""What failed once, in as few steps as that takes."""
SETTINGS_OF_FLASK = (
    Setting(),
    Setting("view", cache="plain"),
    Setting("view", "request", "fast-forwarded"),
    Setting("view", "save"),
    Setting("context", "save", "plain"),
)
SETTINGS_OF_DJANGO = (
    Setting(mode="manual"),
    Setting("view", "atomic", "plain"),
    Setting("context", "autocommit", "fast-forwarded"),
    Setting("view", "manual"),
)


def settings_of(host: str) -> Sequence[Setting]:
    """Return what is around each of the shortest programs."""
    if host == "django":
        found: Sequence[Setting] = SETTINGS_OF_DJANGO
    else:
        found = SETTINGS_OF_FLASK if host == "flask" else (Setting(), Setting(cache="plain"))
    return found if IS_LONG else found[:2]


def steps(drawn: Collection[str], depth: int = 2, most: int = 9) -> Any:
    """Draw lists of steps, with blocks in blocks."""
    numbers, caught = st.sampled_from(NUMBERS), st.booleans()
    kinds = [kind for kind in sorted(drawn) if kind not in BLOCKS]
    groups = [[kind for kind in group if kind in drawn] for group in (OFTEN, SAVEPOINTS, kinds)]
    step = st.builds(Step, st.one_of([st.sampled_from(group) for group in groups if group]), numbers, caught)
    blocks = [kind for kind in BLOCKS if kind in drawn]
    if depth and blocks:
        body = steps(drawn, depth - 1, 5).map(tuple)
        step = step | st.builds(Step, st.sampled_from(blocks), numbers, caught, body)
    return st.lists(step, max_size=most)


def situations(host: str) -> Any:
    """Draw what is around a program."""
    caches = st.sampled_from(sorted(CACHES))
    if host == "django":
        modes = st.sampled_from(("manual", "atomic", "autocommit"))
        return st.builds(Setting, st.sampled_from(("context", "view")), modes, caches, st.sampled_from((200, 409)))
    if host != "flask":
        return st.builds(Setting, cache=caches)
    modes = st.sampled_from(("explicit", "request", "save"))
    return st.builds(Setting, st.sampled_from(("context", "view")), modes, caches, st.sampled_from((200, 409)))


def kinds(program: Sequence[Step]) -> set[str]:
    """Return the kinds of steps in a program."""
    return {kind for step in program for kind in (step.kind, *kinds(step.body))}


def take(stages: Stages, program: Sequence[Step], setting: Setting) -> None:
    """Run a program and hold it against the model."""
    driver = DjangoDriver if stages.host == "django" else SessionDriver
    driver(stages[setting], f"{next(PREFIXES)} ").run(program, setting)


def check(stages: Stages, host: str, drawn: Collection[str], number: int, *, always_the_same: bool) -> None:
    """Run drawn programs."""

    @settings(SETTINGS, max_examples=number, derandomize=always_the_same)
    @given(steps(drawn), situations(host))
    def run(program: list[Step], setting: Setting) -> None:
        take(stages, program, setting)

    run()


@pytest.fixture
def stages(uri: str, host: str) -> Iterator[Stages]:
    """The sites of a host on a database."""
    made = DjangoStages(uri, host) if host == "django" else Stages(uri, host)
    yield made
    made.close()


@pytest.mark.parametrize("host", HOSTS)
def test_shortest_programs(stages: Stages, host: str) -> None:
    """The same holds for the shortest programs for which it once did not."""
    failed = []
    for program in SHORTEST:
        if not kinds(program) <= DRAWN[host]:
            continue
        for setting in settings_of(host):
            try:
                take(stages, program, setting)
            except Violation as violation:
                failed.append(f"{program}, {setting}: {violation}")
    assert failed == []


@pytest.mark.parametrize("host", HOSTS)
def test_drawn_programs(stages: Stages, host: str) -> None:
    """What is said to be stored is stored and nothing else is, streams can be read, stale objects are refused."""
    check(stages, host, DRAWN[host], examples(40 if host == "flask" else 15), always_the_same=True)


@pytest.mark.torture
@pytest.mark.parametrize("host", HOSTS)
def test_many_drawn_programs(stages: Stages, host: str) -> None:
    """The same holds for many more programs, which are others each time."""
    check(stages, host, DRAWN[host], 1500 if host == "flask" else 500, always_the_same=False)
