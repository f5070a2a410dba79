"""Every error that the package raises, each with a message that names the thing and the remedy.

The class docstring is the default message, an idea seen in procrastinate. Where the ``eventsourcing``
library has an error for the case, ours is a subclass of it.
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

    It is an ``AssertionError`` too, as the deployment guide of the library's version 7 raised them.
    """


class ApplicationInitializedError(LifecycleError):
    """This process has its application already: call close_application() before init_application()."""


class ApplicationNotInitializedError(LifecycleError):
    """This process has no application yet: call init_application(...) first."""


class ApplicationConstructingError(LifecycleError):
    """The application's constructor asked for the application that it is constructing."""


class UncommittedEventsError(FlaskEventSourcingError):
    """Events were saved and then neither committed nor rolled back: call db.session.commit()."""


class RollbackOnlyError(FlaskEventSourcingError):
    """An inner unit of work failed, so the outer one was rolled back: let the inner error pass, or use a savepoint."""


class StaleAggregateError(FlaskEventSourcingError):
    """An aggregate object whose events were rolled back, or had a conflict, was saved again: read it again."""


class SharedAggregateError(FlaskEventSourcingError):
    """An aggregate object that the cache had served without a copy was saved: read it with a copy."""


class AggregateErasedError(FlaskEventSourcingError, application.AggregateNotFoundError):
    """The aggregate was erased: it cannot be read, and its id is not used again."""


class SnapshotError(FlaskEventSourcingError):
    """A snapshot cannot be taken."""


class AbortedTransactionError(FlaskEventSourcingError, persistence.OperationalError):
    """The database aborted this transaction after an error, a commit would drop its events: roll back first."""


class MissingTableError(FlaskEventSourcingError, persistence.ProgrammingError):
    """A table is missing: run the command 'init-db' or the migrations."""


class EventMetadataError(FlaskEventSourcingError, ValueError):
    """The metadata of an event cannot be recorded, so that nothing was saved."""


class IdentifierTypeError(FlaskEventSourcingError, TypeError):
    """The id of an aggregate is of another type than those of the application's tables: UUID or text."""


class EventValueError(FlaskEventSourcingError, ValueError):
    """An event has a value that not every database can store and give back as it was."""


class UnreadableEventError(FlaskEventSourcingError, persistence.DataError):
    """A row of an events table cannot be read: others have written it past this package."""


class ConstraintError(FlaskEventSourcingError, persistence.DatabaseError):
    """A constraint of an events table that is no key of its events, such as a CHECK of your own, refused an event."""


class UnsafeSequenceError(FlaskEventSourcingError, persistence.ProgrammingError):
    """The sequence of the positions is set up in a way that would break the order of the log."""


class UnsafeTableError(FlaskEventSourcingError, persistence.ProgrammingError):
    """A table of events is not as its record class has it, so that events could be lost."""


class UnsafeSettingError(FlaskEventSourcingError, persistence.ProgrammingError):
    """A setting of the database server is one with which events could be lost."""


class MissingRightError(FlaskEventSourcingError, persistence.ProgrammingError):
    """The database's role lacks a right on a table or sequence."""


class StandbyError(FlaskEventSourcingError, persistence.OperationalError):
    """This server is a standby, which does not know what writers are at work: read the log on the primary."""


class WriteTimeoutError(FlaskEventSourcingError, persistence.OperationalError):
    """Another writer held the database longer than EVENTSOURCING_LOCK_TIMEOUT seconds."""


class InheritedDatabaseError(FlaskEventSourcingError, persistence.ProgrammingError):
    """The database file, or the connection, was open when this process was forked: close it before the fork."""


class HandlerError(FlaskEventSourcingError):
    """A handler of a projection did what it must not do."""


class UnknownTopicError(HandlerError):
    """The class of an event is not found: import its module, or register its topic with ``register_topic()``."""


class ProjectionHaltedError(FlaskEventSourcingError):
    """A projection stands before an event that it cannot apply, or is paused: the message says what is to be done."""


class CheckpointMismatchError(ProjectionHaltedError):
    """A projection does not fit its log, its tables or its code: the message says which, and what is to be done."""


class ProjectionBusyError(FlaskEventSourcingError):
    """Another process is rebuilding the projection, or works on it, now."""


class CheckpointError(FlaskEventSourcingError):
    """A checkpoint cannot be changed in the way that was asked for."""


class RebuildError(FlaskEventSourcingError):
    """A projection cannot be rebuilt."""


class DeadLetterError(FlaskEventSourcingError):
    """There is no such dead letter."""


class SpanningTransactionError(FlaskEventSourcingError):
    """A transaction would span two databases: commit before, or use a session with twophase=True."""


class CommitInsideUnitError(FlaskEventSourcingError):
    """A unit of work (transaction(), transactional, retry_on_conflict) commits at its end: leave this commit out."""


class CommitOutcomeUnknownError(FlaskEventSourcingError, persistence.OperationalError):
    """The connection was lost during the commit: nobody knows whether it succeeded. Look before you do it again."""


class OldSnapshotError(FlaskEventSourcingError):
    """The session's transaction reads from a snapshot that is older: call db.session.rollback() before wait_for."""


class ImportedEventsError(FlaskEventSourcingError):
    """Events that were to be taken over from elsewhere differ from those that were stored, or cannot be read."""
