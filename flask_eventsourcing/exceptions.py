"""The errors that the package raises. Each message names the thing and the remedy.

The class docstring is the default message. If the ``eventsourcing`` library has an error for the same case, ours is a
subclass of it.
"""

from __future__ import annotations

from eventsourcing import application, persistence


class FlaskEventSourcingError(Exception):
    """Flask-EventSourcing failed."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or type(self).__name__).split("\n\n")[0])


class ConfigurationError(FlaskEventSourcingError, ValueError):
    """The configuration of Flask-EventSourcing cannot be used."""


class NotInitializedError(FlaskEventSourcingError, RuntimeError):
    """This Flask app has no Flask-EventSourcing state: call es.init_app(app) first."""


class LifecycleError(FlaskEventSourcingError, AssertionError):
    """The application of this process is not in the state that the call needs.

    It is also an ``AssertionError``, which the deployment guide of the library's version 7 raises.
    """


class ApplicationInitializedError(LifecycleError):
    """This process already has its application: call close_application() before init_application()."""


class ApplicationNotInitializedError(LifecycleError):
    """This process has no application yet: call init_application(...) first."""


class ApplicationConstructingError(LifecycleError):
    """The application's constructor asked for the application that it is constructing."""


class UncommittedEventsError(FlaskEventSourcingError):
    """Events were saved and then neither committed nor rolled back: commit them, or roll them back."""


class RollbackOnlyError(FlaskEventSourcingError):
    """An inner unit of work failed, so the outer one was rolled back: do not catch the error, or use a savepoint."""


class StaleAggregateError(FlaskEventSourcingError):
    """An aggregate object whose events were rolled back, or had a conflict, was saved again: read it again."""


class SharedAggregateError(FlaskEventSourcingError):
    """An aggregate object that the cache had served without a copy was saved: read it with a copy."""


class AggregateErasedError(FlaskEventSourcingError, application.AggregateNotFoundError):
    """The aggregate was erased: it cannot be read, and its id is not used again."""


class SnapshotError(FlaskEventSourcingError):
    """A snapshot cannot be taken."""


class AbortedTransactionError(FlaskEventSourcingError, persistence.OperationalError):
    """The database aborted this transaction after an error, and a commit would drop its events: roll back first."""


class MissingTableError(FlaskEventSourcingError, persistence.ProgrammingError):
    """A table is missing: run the command 'init-db' or the migrations."""


class EventMetadataError(FlaskEventSourcingError, ValueError):
    """The metadata of an event cannot be recorded, so nothing was saved."""


class IdentifierTypeError(FlaskEventSourcingError, TypeError):
    """The id of an aggregate has another type than the ids in the application's tables, UUID or text."""


class EventValueError(FlaskEventSourcingError, ValueError):
    """An event has a value that not every database can store and return unchanged."""


class UnreadableEventError(FlaskEventSourcingError, persistence.DataError):
    """A row of an events table cannot be read: another program than this package wrote it."""


class ConstraintError(FlaskEventSourcingError, persistence.DatabaseError):
    """A constraint of an events table, such as a CHECK of your own, refused an event. This is not a conflict."""


class UnsafeSequenceError(FlaskEventSourcingError, persistence.ProgrammingError):
    """The sequence of positions has a setting that would break the order of the log."""


class UnsafeTableError(FlaskEventSourcingError, persistence.ProgrammingError):
    """A table of events differs from its record class in a way that could lose events."""


class UnsafeSettingError(FlaskEventSourcingError, persistence.ProgrammingError):
    """A setting of the database server could lose events."""


class MissingRightError(FlaskEventSourcingError, persistence.ProgrammingError):
    """The database's role lacks a right on a table or sequence."""


class StandbyError(FlaskEventSourcingError, persistence.OperationalError):
    """This server is a standby, which does not see the writers: read the log on the primary."""


class WriteTimeoutError(FlaskEventSourcingError, persistence.OperationalError):
    """Another writer held the database longer than EVENTSOURCING_LOCK_TIMEOUT seconds."""


class InheritedDatabaseError(FlaskEventSourcingError, persistence.ProgrammingError):
    """The database file, or the connection, was open when this process was forked: close it before the fork."""


class HandlerError(FlaskEventSourcingError):
    """A handler of a projection did something that handlers must not do."""


class UnknownTopicError(HandlerError):
    """The class of an event is not found: import its module, or register its topic with ``register_topic()``."""


class ProjectionHaltedError(FlaskEventSourcingError):
    """A projection has halted at an event that it cannot apply, or is paused: the message names the remedy."""


class CheckpointMismatchError(ProjectionHaltedError):
    """A projection does not fit its log, its tables or its code: the message says which, and the remedy."""


class ProjectionBusyError(FlaskEventSourcingError):
    """Another process is rebuilding or running the projection."""


class CheckpointError(FlaskEventSourcingError):
    """A checkpoint cannot be changed in this way."""


class RebuildError(FlaskEventSourcingError):
    """A projection cannot be rebuilt."""


class DeadLetterError(FlaskEventSourcingError):
    """There is no such dead letter."""


class SpanningTransactionError(FlaskEventSourcingError):
    """A transaction would span two databases: commit before, or use a session with twophase=True."""


class CommitInsideUnitError(FlaskEventSourcingError):
    """A unit of work (transaction(), transactional, retry_on_conflict) commits at its end: remove this commit."""


class CommitOutcomeUnknownError(FlaskEventSourcingError, persistence.OperationalError):
    """The connection was lost during the commit: it is unknown whether it succeeded. Check before you try again."""


class OldSnapshotError(FlaskEventSourcingError):
    """The session's transaction reads from an older snapshot: end the transaction before wait_for."""


class ImportedEventsError(FlaskEventSourcingError):
    """Events that were to be taken over from elsewhere differ from those that were stored, or cannot be read."""
