"""The databases on which the library's own tests run, none of them overridden or skipped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar
from unittest import TestCase
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.pool import StaticPool

from flask_eventsourcing.models import Models, make_models
from flask_eventsourcing.persistence import Datastore
from tests.servers import require_mysqlclient

BACKENDS = ("sqlite-file", "sqlite-memory", "postgresql", "postgresql-psycopg2", "mariadb", "mariadb-mysqlclient")
FURTHER = ("sqlite-memory", "postgresql-psycopg2", "mariadb-mysqlclient")
"""Those that differ from another by the driver or the pool only: for long runs."""


def url_for(backend: str, folder: Path, request: pytest.FixtureRequest) -> str:
    """Return the URL of a fresh database of a kind."""
    if backend == "sqlite-file":
        return f"sqlite:///{folder / uuid4().hex}.db"
    if backend == "sqlite-memory":
        return "sqlite://"
    if backend == "mariadb-mysqlclient":
        require_mysqlclient()
    url: str = request.getfixturevalue("mariadb_url" if backend.startswith("mariadb") else "postgres_url")
    driver = {"postgresql-psycopg2": "postgresql+psycopg2", "mariadb-mysqlclient": "mysql+mysqldb"}.get(backend)
    return sa.make_url(url).set(drivername=driver).render_as_string(hide_password=False) if driver else url


class OnBackend:
    """Gives a ``unittest`` class of the library a database of the kind ``backend``."""

    backend: ClassVar[str]
    makes_datastore: ClassVar[Callable[[ExitStack, sa.Engine, Models], Datastore] | None] = None
    """Makes the datastore of a host, in the place of one without a host; the stack closes what it opens."""
    url: str
    stack: ExitStack

    @pytest.fixture(autouse=True)
    def database(
        self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[None]:
        """A fresh database, named in the environment, and the end of every engine that was made for it."""
        self.url = url_for(self.backend, tmp_path, request)
        self.engines: list[sa.Engine] = []
        create_engine = sa.create_engine

        def remember(*args: Any, **kwargs: Any) -> sa.Engine:
            engine = create_engine(*args, **kwargs)
            self.engines.append(engine)
            return engine

        monkeypatch.setattr(sa, "create_engine", remember)
        monkeypatch.setenv("PERSISTENCE_MODULE", "flask_eventsourcing.persistence")
        monkeypatch.setenv("SQLALCHEMY_DATABASE_URI", self.url)
        monkeypatch.setenv("CREATE_TABLE", "y")
        before = set(threading.enumerate())
        with ExitStack() as self.stack:
            yield
            for thread in set(threading.enumerate()) - before:
                # Some of the library's tests leave their readers to end by themselves.
                thread.join(10)
        for engine in self.engines:
            engine.dispose()

    def create_datastore(self) -> tuple[Datastore, Models]:
        """Return a datastore with fresh tables, and their models."""
        options: dict[str, Any] = {"pool_size": 20}
        if self.backend == "sqlite-memory":
            options = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
        engine = sa.create_engine(self.url, **options)
        base = orm.declarative_base()
        models = make_models(base, "")
        base.metadata.drop_all(engine)
        base.metadata.create_all(engine)
        make = type(self).makes_datastore
        return Datastore(engine) if make is None else make(self.stack, engine, models), models


def on_each_backend(
    namespace: dict[str, Any],
    *cases: type[TestCase],
    place: str = "On",
    backends: Collection[str] = BACKENDS,
    further: Collection[str] = FURTHER,
    **attributes: Any,
) -> None:
    """Add, for each case and each backend, a class to a test module's namespace.

    :param place: what its name says between the case and the backend.
    :param further: the backends that are for long runs only.
    """
    for case in cases:
        for backend in backends:
            name = f"Test{case.__name__.removesuffix('TestCase')}{place}{backend.title().replace('-', '')}"
            body = {"backend": backend, "__module__": namespace["__name__"], "__test__": True, **attributes}
            if backend in further:
                body["pytestmark"] = pytest.mark.long
            namespace[name] = type(name, (case,) if issubclass(case, OnBackend) else (OnBackend, case), body)
