"""The infrastructure factory, with which this package is a ``PERSISTENCE_MODULE`` of the library."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NoReturn

import sqlalchemy as sa
from eventsourcing.dcb.persistence import DCBInfrastructureFactory
from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    InfrastructureFactory,
    InfrastructureFactoryError,
    ProcessRecorder,
)
from eventsourcing.utils import Environment, EnvType, resolve_topic, strtobool
from sqlalchemy import orm

from ..metadata import Collector
from .datastore import Datastore, Tables, find_datastore
from .dialects import is_in_memory, readable_address_errors
from .recorders import (
    SQLAlchemyAggregateRecorder,
    SQLAlchemyApplicationRecorder,
    SQLAlchemyProcessRecorder,
    SQLAlchemyTrackingRecorder,
)
from .tables import make_models


class SQLAlchemyFactory(InfrastructureFactory[SQLAlchemyTrackingRecorder]):
    """Makes recorders for an application.

    Within Flask the extension passes the datastore of the app. As the library's ``PERSISTENCE_MODULE`` the factory
    reads these environment variables, each also with the application's name in front, as in
    ``BANK_SQLALCHEMY_DATABASE_URI``:

    ``SQLALCHEMY_DATABASE_URI``
        The address of the database, as SQLAlchemy writes it. Required.
    ``SQLALCHEMY_SCHEMA``
        The schema of the tables.
    ``ORIGINATOR_ID_TYPE``
        ``uuid``, the default, or ``text``.
    ``EVENT_METADATA``
        Whether metadata are stored with each event, ``yes`` by default.
    ``CREATE_TABLE``
        Whether missing tables are created when the recorders are made: ``no`` by default, unlike in the library.

    :raises InfrastructureFactoryError: without a database.
    """

    DATASTORE = "FLASK_EVENTSOURCING_DATASTORE"
    SQLALCHEMY_DATABASE_URI = "SQLALCHEMY_DATABASE_URI"
    SQLALCHEMY_SCHEMA = "SQLALCHEMY_SCHEMA"
    ORIGINATOR_ID_TYPE = "ORIGINATOR_ID_TYPE"
    CREATE_TABLE = "CREATE_TABLE"
    EVENT_METADATA = "EVENT_METADATA"

    aggregate_recorder_class = SQLAlchemyAggregateRecorder
    application_recorder_class = SQLAlchemyApplicationRecorder
    tracking_recorder_class = SQLAlchemyTrackingRecorder
    process_recorder_class = SQLAlchemyProcessRecorder

    def __init__(self, env: Environment | EnvType | None) -> None:
        super().__init__(env)
        token = self.env.get(self.DATASTORE)
        self._owns_engine = token is None
        self.datastore: Datastore = self._find(token) if token is not None else self._open()

    def _find(self, token: str) -> Datastore:
        datastore = find_datastore(token)
        if datastore is None:
            raise InfrastructureFactoryError(
                f"{self.DATASTORE} names a datastore that is gone: the Flask app that it belonged to was dropped, "
                "or this is another process."
            )
        return datastore

    def _open(self) -> Datastore:
        keys = " or ".join(self.env.create_keys(self.SQLALCHEMY_DATABASE_URI))
        url = self.env.get(self.SQLALCHEMY_DATABASE_URI)
        if not url:
            raise InfrastructureFactoryError(f"There is no database: set the environment variable {keys}.")
        id_type = self.env.get(self.ORIGINATOR_ID_TYPE, "uuid").lower()
        if id_type not in ("uuid", "text"):
            raise InfrastructureFactoryError(f"{self.ORIGINATOR_ID_TYPE} must be 'uuid' or 'text'; found {id_type!r}.")
        schema = self.env.get(self.SQLALCHEMY_SCHEMA) or None
        base = orm.declarative_base()
        models = make_models(
            base, self.env.name, originator_id_type="text" if id_type == "text" else "uuid", schema=schema
        )
        with readable_address_errors(keys, InfrastructureFactoryError):
            options: dict[str, Any] = {}
            if is_in_memory(sa.make_url(url)):
                # All threads share the one connection, because it is the database.
                options = {"poolclass": sa.pool.StaticPool, "connect_args": {"check_same_thread": False}}
            engine = sa.create_engine(url, **options)
        wanted = strtobool(self.env.get(self.EVENT_METADATA) or "yes")
        return Datastore(engine, tables=lambda _: models.tables, metadata=Collector() if wanted else None)

    @cached_property
    def tables(self) -> Tables:
        """The tables of the application by their use: those that the datastore knows, or new ones."""
        known = self.datastore.tables(self.env.name)
        return make_models(orm.declarative_base(), self.env.name).tables if known is None else known

    def aggregate_recorder(self, purpose: str = "events") -> AggregateRecorder:
        """Make a recorder for ``events`` or ``snapshots``. It writes no log, so snapshots have no positions."""
        recorder = self.aggregate_recorder_class(self.datastore, self._table(purpose), self.env.name)
        recorder.replaces = purpose == "snapshots"
        return recorder

    def application_recorder(self) -> ApplicationRecorder:
        """Make the recorder of an application. The library calls it when the application is constructed."""
        cls = self._class(self.APPLICATION_RECORDER_TOPIC, self.application_recorder_class)
        recorder: ApplicationRecorder = cls(
            self.datastore,
            self._table("events"),
            self.env.name,
            tracking_table=self._table("tracking"),
            snapshots_table=self.tables.get("snapshots"),
        )
        return recorder

    def tracking_recorder(
        self, tracking_recorder_class: type[SQLAlchemyTrackingRecorder] | None = None
    ) -> SQLAlchemyTrackingRecorder:
        """Make a tracking recorder, or a view that derives from it. The library's projection runners ask for one."""
        cls = tracking_recorder_class or self._class(self.TRACKING_RECORDER_TOPIC, self.tracking_recorder_class)
        recorder: SQLAlchemyTrackingRecorder = cls(self.datastore, self._table("tracking"))
        self._create(getattr(cls, "tables", ()))
        return recorder

    def process_recorder(self) -> ProcessRecorder:
        """Make the recorder of an application that processes the events of others.

        It stores the position of the event that was processed together with the new events.
        """
        cls = self._class(self.PROCESS_RECORDER_TOPIC, self.process_recorder_class)
        recorder: ProcessRecorder = cls(
            self.datastore,
            self._table("tracking"),
            self._table("events"),
            self.env.name,
            snapshots_table=self.tables.get("snapshots"),
        )
        return recorder

    def _class(self, key: str, default: type[Any]) -> type[Any]:
        topic = self.env.get(key)
        cls: type[Any] = resolve_topic(topic) if topic else default
        if not issubclass(cls, default):
            raise InfrastructureFactoryError(
                f"{key} names {cls.__qualname__}, which is not a subclass: derive it from {default.__name__}."
            )
        return cls

    def _table(self, purpose: str) -> sa.Table:
        table = self.tables.get(purpose)
        if table is None:
            raise InfrastructureFactoryError(f"There is no table for {purpose!r}, only for {', '.join(self.tables)}.")
        self._create((table,))
        return table

    def _create(self, tables: tuple[sa.Table, ...]) -> None:
        if strtobool(self.env.get(self.CREATE_TABLE) or "no"):
            for table in tables:
                table.create(self.datastore.engine, checkfirst=True)

    def close(self) -> None:
        """Close the engine if the factory made it. That of a Flask app belongs to the app, and stays open."""
        datastore = getattr(self, "datastore", None)
        if datastore is not None and self._owns_engine:
            datastore.engine.dispose()


class DCBFactory(DCBInfrastructureFactory[Any]):
    """Refuses an application with dynamic consistency boundaries; the library looks for this class.

    :raises InfrastructureFactoryError: always.
    """

    def __init__(self, env: Environment | EnvType | None) -> None:
        super().__init__(env)
        self.dcb_recorder()

    def dcb_recorder(self) -> NoReturn:
        """Refuse it."""
        raise InfrastructureFactoryError(
            "DCB applications, with dynamic consistency boundaries, are not supported yet: set PERSISTENCE_MODULE to "
            "one of the library's own, as eventsourcing.dcb.popo."
        )
