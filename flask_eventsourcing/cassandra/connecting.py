"""The driver's session of this process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from eventsourcing.persistence import OperationalError

from ..exceptions import ConfigurationError, InheritedDatabaseError, MissingRightError
from ..lifecycle import ProcessLock, keep_for_ever
from .drivers import check_drivers, check_process
from .schema import CassandraSettings

# Two projects install a package of this name, so that half of it might be of each.
check_drivers()

from cassandra import (  # noqa: E402
    AuthenticationFailed,
    ConsistencyLevel,
    DependencyException,
    OperationTimedOut,
    ProtocolVersion,
    UnresolvableContactPoints,
)

try:
    from cassandra.cluster import (
        EXEC_PROFILE_DEFAULT,
        Cluster,
        ExecutionProfile,
        NoHostAvailable,
        ResponseFuture,
        Session,
    )
except DependencyException as _error:
    raise ConfigurationError(
        "The driver of Cassandra was installed without its extension for libev, and this Python has no asyncore, which "
        "would do instead: install libev with its headers, as libev-dev, and then the driver again, or a wheel of it."
    ) from _error
from cassandra.auth import PlainTextAuthProvider  # noqa: E402
from cassandra.policies import (  # noqa: E402
    ConvictionPolicy,
    DCAwareRoundRobinPolicy,
    ExponentialReconnectionPolicy,
    FallthroughRetryPolicy,
    LoadBalancingPolicy,
    RoundRobinPolicy,
    TokenAwarePolicy,
    WrapperPolicy,
)
from cassandra.pool import Host  # noqa: E402
from cassandra.query import BoundStatement, PreparedStatement, SimpleStatement  # noqa: E402

from .errors import UNKNOWN  # noqa: E402

TIMEOUT = 5.0
"""Seconds for an answer, unless told otherwise."""
SHORT_TIMEOUT = 3.0
"""Seconds for an answer where another node can be asked instead."""
GRACE = 2.0
"""Seconds that the driver gets to report a timeout by itself; it depends on the machine's clock."""
RECONNECT, LONGEST_RECONNECT = 0.5, 5.0
"""Seconds between tries to reach a node that is down. By the driver's defaults they grow to minutes, and end."""


SILENT, TROUBLED = 30.0, 2.0
"""Seconds for which a node is asked last: after it gave no answer, and after it answered that it could not do it."""


class _LastResort(WrapperPolicy):  # type: ignore[misc]
    """Asks nodes last that failed lately, so that a request is repeated on other nodes first.

    The driver takes a node that hangs, or has lost its network, for up for a minute, and asks it first for some rows.
    """

    def __init__(self, order: LoadBalancingPolicy) -> None:
        super().__init__(order)
        self._until: dict[Any, float] = {}

    def note(self, node: Host, seconds: float) -> None:
        """Ask a node last for some time."""
        self._until[node.endpoint] = time.monotonic() + seconds

    def make_query_plan(self, working_keyspace: str | None = None, query: Any = None) -> Iterator[Host]:
        """Yield the nodes in the order in which they are asked."""
        last: list[Host] = []
        now = time.monotonic()
        for node in self._child_policy.make_query_plan(working_keyspace, query):
            if self._until.get(node.endpoint, now) > now:
                last.append(node)
            else:
                yield node
        yield from last


class _DownAtOnce(ConvictionPolicy):  # type: ignore[misc]
    """Takes a node for down after any failed connection, so that the driver tries it again later.

    The driver's own policy takes a node that does not answer in time for up, and never connects with it again.
    """

    def add_failure(self, connection_exc: Exception) -> bool:
        """Whether the node is down."""
        return True

    def reset(self) -> None:
        """Do nothing: no failure is kept."""


@dataclass(frozen=True)
class _Held:
    pid: int
    session: Session
    order: _LastResort
    prepared: dict[str, PreparedStatement] = field(default_factory=dict)


class Connection:
    """Connects to a cluster when it is first needed, in the process that needs it.

    It sends no statement twice by itself, since only the caller knows what can be repeated. After :meth:`close`, the
    next use connects again. A session that was open when the process was forked belongs to the parent: the child would
    get no answers on it, so that it refuses the session and leaves it open.
    """

    def __init__(self, settings: CassandraSettings) -> None:
        self.settings = settings
        self.consistency: int = ConsistencyLevel.name_to_value[settings.consistency]
        self.serial_consistency: int = ConsistencyLevel.name_to_value[settings.serial_consistency]
        self.timeout: float = min(SHORT_TIMEOUT, settings.patience / 2)
        """Seconds for the answer to a statement of a save or a read, which is sent again otherwise."""
        self._lock = ProcessLock()
        self._held: _Held | None = None
        self._failed: tuple[float, OperationalError] | None = None
        """When no node could be reached, and the error."""

    @property
    def session(self) -> Session:
        """The session of this process.

        :raises ConfigurationError: in the master of uWSGI, and where a data centre has to be chosen.
        :raises InheritedDatabaseError: when another process made it.
        :raises MissingRightError: when the nodes refuse user name and password.
        :raises OperationalError: when no node can be reached.
        """
        return self._own().session

    @property
    def is_open(self) -> bool:
        """Whether this process has a session now."""
        return self._held is not None and self._held.pid == os.getpid()

    def _own(self) -> _Held:
        held = self._held
        if held is None:
            asked = time.monotonic()
            with self._lock:
                if self._held is None:
                    self._held = _Held(os.getpid(), *self._connect_since(asked))
                held = self._held
        if held.pid != os.getpid():
            # Its finalizers would close the connections of the parent.
            keep_for_ever(held)
            raise InheritedDatabaseError(
                "The session with Cassandra was open when this process was forked, and never answers in a child: "
                "construct the application in the child, or close it before the fork."
            )
        return held

    def _connect_since(self, asked: float) -> tuple[Session, _LastResort]:
        """Connect, unless another thread has tried while this one waited for it."""
        failed = self._failed
        if failed is not None and failed[0] > asked:
            raise OperationalError(str(failed[1])) from failed[1]
        try:
            return self._connect()
        except OperationalError as error:
            self._failed = time.monotonic(), error
            raise

    def _connect(self) -> tuple[Session, _LastResort]:
        check_process()
        settings = self.settings
        inner = DCAwareRoundRobinPolicy(settings.local_dc) if settings.local_dc else RoundRobinPolicy()
        order = _LastResort(TokenAwarePolicy(inner))
        profile = ExecutionProfile(
            load_balancing_policy=order,
            retry_policy=FallthroughRetryPolicy(),
            consistency_level=self.consistency,
            serial_consistency_level=self.serial_consistency,
            request_timeout=TIMEOUT,
        )
        options: dict[str, Any] = {}
        if settings.username is not None:
            options["auth_provider"] = PlainTextAuthProvider(settings.username, settings.password)
        with self._told():
            cluster = Cluster(
                settings.contact_points,
                port=settings.port,
                # The version of Cassandra 5.0. To negotiate it takes two more connections, with a warning for each.
                protocol_version=ProtocolVersion.V5,
                execution_profiles={EXEC_PROFILE_DEFAULT: profile},
                ssl_context=settings.ssl_context,
                # A garbage collection of a node may take longer than the two seconds of the driver's default.
                control_connection_timeout=TIMEOUT,
                # It would wait for every node, also one that hangs. A node without the statement asks for it.
                prepare_on_all_hosts=False,
                conviction_policy_factory=_DownAtOnce,
                reconnection_policy=ExponentialReconnectionPolicy(RECONNECT, LONGEST_RECONNECT, max_attempts=None),
                **options,
            )
            # Its threads would go on for ever.
            with ExitStack() as failed:
                failed.callback(cluster.shutdown)
                session = cluster.connect()
                # The timeout for preparing a statement. With profiles, no public name sets it.
                session._default_timeout = self.timeout
                self._check_centres({str(each.datacenter) for each in cluster.metadata.all_hosts()})
                failed.pop_all()
            return session, order

    def _check_centres(self, names: set[str]) -> None:
        """Check that the nodes that take part in a save are always the same.

        Otherwise each data centre would order the saves that reach it, and two writers of one version would both win.
        """
        settings = self.settings
        is_local = any(each.startswith("LOCAL_") for each in (settings.consistency, settings.serial_consistency))
        if len(names) > 1 and settings.local_dc is None and is_local:
            raise ConfigurationError(
                f"Cassandra has several data centres, {', '.join(sorted(names))}, and with {settings.consistency} and "
                f"{settings.serial_consistency} each could accept the same version: set LOCAL_DC to one of them."
            )

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except UnresolvableContactPoints as error:
            raise OperationalError(
                f"Cassandra cannot be reached {self._where}: no such name. Correct the contact points."
            ) from error
        except NoHostAvailable as error:
            # The error of each node, or, if none was asked, the nodes themselves.
            causes = list(error.errors.values()) if isinstance(error.errors, Mapping) else []
            why = "; ".join(dict.fromkeys(str(each) for each in causes)) or str(error)
            if any(isinstance(each, AuthenticationFailed) for each in causes):
                raise MissingRightError(f"Cassandra refuses the login {self._where}: {why}") from error
            raise OperationalError(f"Cassandra cannot be reached {self._where}: {why}") from error

    @property
    def _where(self) -> str:
        settings = self.settings
        centre = f", data centre {settings.local_dc}" if settings.local_dc else ""
        return f"at {', '.join(settings.contact_points)}, port {settings.port}{centre}"

    def prepare(self, cql: str) -> PreparedStatement:
        """Return the prepared statement of this text."""
        held = self._own()
        found = held.prepared.get(cql)
        if found is None:
            with _noted(held.order):
                found = held.prepared[cql] = held.session.prepare(cql)
        return found

    def execute(
        self,
        statement: Any,
        parameters: Any = None,
        consistency: int | None = None,
        serial: int | None = None,
        timeout: float | None = None,
        host: Host | None = None,
        paging_state: bytes | None = None,
    ) -> Any:
        """Run a statement, and return the driver's result.

        :param host: the node to ask, instead of one that the driver chooses.
        :param paging_state: the ``paging_state`` of the answer whose next page this is.
        """
        if isinstance(statement, PreparedStatement):
            statement, parameters = statement.bind(parameters or ()), None
        elif isinstance(statement, str):
            statement = SimpleStatement(statement)
        if consistency is not None:
            statement.consistency_level = consistency
        if serial is not None and isinstance(statement, BoundStatement | SimpleStatement):
            statement.serial_consistency_level = serial
        held, timeout = self._own(), timeout or TIMEOUT
        sent = held.session.execute_async(statement, parameters, timeout=timeout, host=host, paging_state=paging_state)
        with _noted(held.order, sent):
            return answer(sent, timeout)

    def execute_all(self, statements: Sequence[Any], timeout: float) -> None:
        """Send statements that are bound, all at once, and wait until each of them is done."""
        held = self._own()
        for sent in [held.session.execute_async(each, timeout=timeout) for each in statements]:
            with _noted(held.order, sent):
                answer(sent, timeout)

    def nodes(self) -> list[Host]:
        """Return the nodes of the cluster, always in one order."""
        return sorted(self.session.cluster.metadata.all_hosts(), key=lambda each: str(each.endpoint))

    def close(self) -> None:
        """Close the session, if this process made one; it may be called again."""
        with self._lock:
            held, self._held = self._held, None
            if held is None:
                return
            if held.pid == os.getpid():
                held.session.cluster.shutdown()
            else:
                keep_for_ever(held)


@contextmanager
def _noted(order: _LastResort, sent: ResponseFuture | None = None) -> Iterator[None]:
    """Note the node that has failed in the block."""
    try:
        yield
    except OperationTimedOut as error:
        if error.last_host is not None:
            order.note(error.last_host, SILENT)
        raise
    except UNKNOWN:
        if sent is not None and sent.coordinator_host is not None:
            order.note(sent.coordinator_host, TROUBLED)
        raise


def answer(sent: ResponseFuture, timeout: float) -> Any:
    """Return the answer to a request.

    The driver's own wait has no end if the machine's clock is set back meanwhile, or if the driver's thread is stuck.

    :param timeout: the seconds after which the driver itself tells that there is none.
    """
    told = threading.Event()
    sent.add_callbacks(lambda _: told.set(), lambda _: told.set())
    if not told.wait(timeout + GRACE):
        raise OperationTimedOut({"the driver": f"There was no answer for {timeout + GRACE:g} s."})
    return sent.result()
