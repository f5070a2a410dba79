"""The driver's session of this process."""

from __future__ import annotations

import os
import threading
from typing import Any

from cassandra import ConsistencyLevel
from cassandra.auth import PlainTextAuthProvider
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile, Session
from cassandra.policies import DCAwareRoundRobinPolicy, FallthroughRetryPolicy, RoundRobinPolicy, TokenAwarePolicy
from cassandra.query import BoundStatement, PreparedStatement, SimpleStatement

from ..exceptions import InheritedDatabaseError
from .settings import CassandraSettings


class Connection:
    """Connects to a cluster when it is first needed, in the process that needs it.

    Nothing is sent a second time by itself: who calls knows what can be repeated.
    """

    def __init__(self, settings: CassandraSettings) -> None:
        self.settings = settings
        self.consistency: int = ConsistencyLevel.name_to_value[settings.consistency]
        self.serial_consistency: int = ConsistencyLevel.name_to_value[settings.serial_consistency]
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._session: Session | None = None
        self._prepared: dict[str, PreparedStatement] = {}

    @property
    def session(self) -> Session:
        """The session of this process.

        :raises InheritedDatabaseError: when another process made it.
        """
        if self._session is None:
            with self._lock:
                if self._session is None:
                    self._session, self._pid = self._connect(), os.getpid()
        if self._pid != os.getpid():
            raise InheritedDatabaseError(
                "The session with Cassandra was open when this process was forked: it never answers here. "
                "Close it before the fork."
            )
        return self._session

    def _connect(self) -> Session:
        settings = self.settings
        inner = DCAwareRoundRobinPolicy(settings.local_dc) if settings.local_dc else RoundRobinPolicy()
        profile = ExecutionProfile(
            load_balancing_policy=TokenAwarePolicy(inner),
            retry_policy=FallthroughRetryPolicy(),
            consistency_level=self.consistency,
            serial_consistency_level=self.serial_consistency,
            request_timeout=5.0,
        )
        options: dict[str, Any] = {}
        if settings.username is not None:
            options["auth_provider"] = PlainTextAuthProvider(settings.username, settings.password)
        cluster = Cluster(
            settings.contact_points,
            port=settings.port,
            execution_profiles={EXEC_PROFILE_DEFAULT: profile},
            ssl_context=settings.ssl_context,
            **options,
        )
        return cluster.connect()

    def prepare(self, cql: str) -> PreparedStatement:
        """Return the prepared statement of this text."""
        found = self._prepared.get(cql)
        if found is None:
            found = self._prepared[cql] = self.session.prepare(cql)
        return found

    def execute(
        self,
        statement: Any,
        parameters: Any = None,
        consistency: int | None = None,
        serial: int | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Run a statement, and return the driver's result."""
        if isinstance(statement, PreparedStatement):
            statement, parameters = statement.bind(parameters or ()), None
        elif isinstance(statement, str):
            statement = SimpleStatement(statement)
        if consistency is not None:
            statement.consistency_level = consistency
        if serial is not None and isinstance(statement, BoundStatement | SimpleStatement):
            statement.serial_consistency_level = serial
        return self.session.execute(statement, parameters, timeout=timeout or 5.0)

    def close(self) -> None:
        """Close the session, if this process made one."""
        session, self._session, self._prepared = self._session, None, {}
        if session is not None and self._pid == os.getpid():
            session.cluster.shutdown()
