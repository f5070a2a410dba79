"""The errors that the package raises. Each message names the thing and the remedy.

The class docstring is the default message. If the ``eventsourcing`` library has an error for the same case, ours is a
subclass of it.
"""

from __future__ import annotations

from eventsourcing import application, persistence


class FlaskEventSourcingError(Exception):
    """Flask-EventSourcing failed.

    It is the base class of all errors of this package. Where the library has an error for the same case, such as
    ``IntegrityError`` for a conflict, that one is raised, or a subclass of both.
    """

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or type(self).__name__).split("\n\n")[0])


class ConfigurationError(FlaskEventSourcingError, ValueError):
    """The configuration of Flask-EventSourcing cannot be used.

    It is raised by ``init_app()``, before anything is registered, so a wrong setting is found when the app is made and
    not by the first request.
    """


class NotInitializedError(FlaskEventSourcingError, RuntimeError):
    """This Flask app has no Flask-EventSourcing state: call es.init_app(app) first.

    It is also raised outside an application context, since the state is that of the current app.
    """


class LifecycleError(FlaskEventSourcingError, AssertionError):
    """The application of this process is not in the state that the call needs.

    It is also an ``AssertionError``, which the deployment guide of the library's version 7 raises.
    """


class ApplicationInitializedError(LifecycleError):
    """This process already has its application: call close_application() before init_application().

    A second application would have a cache and connections of its own, so it is refused rather than made in silence.
    """


class ApplicationNotInitializedError(LifecycleError):
    """This process has no application yet: call init_application(...) first.

    If ``init_application()`` was called and failed, the message says with which error.
    """


class ApplicationConstructingError(LifecycleError):
    """The application's constructor asked for the application that it is constructing.

    Ask for it later, in a method, since it is not there before its constructor returns.
    """


class UncommittedEventsError(FlaskEventSourcingError):
    """Events were saved and then neither committed nor rolled back: commit them, or roll them back.

    In a request, the client gets a 500 with this error: an answer that says "done" for events that are not stored would
    be worse. Call ``db.session.commit()`` in the view, or set ``EVENTSOURCING_COMMIT``.
    """


class RollbackOnlyError(FlaskEventSourcingError):
    """An inner unit of work failed, so the outer one was rolled back: do not catch the error, or use a savepoint.

    Otherwise the outer unit would commit one half of what the two were to do together. A savepoint,
    ``db.session.begin_nested()``, lets a part fail by itself.
    """


class StaleAggregateError(FlaskEventSourcingError):
    """An aggregate object whose events were rolled back, or had a conflict, was saved again: read it again.

    The object still has the changes of the events that are not stored, so what follows them would not fit the stream.
    ``application.repository.get(aggregate_id)`` returns what is stored.
    """


class SharedAggregateError(FlaskEventSourcingError):
    """An aggregate object that the cache had served without a copy was saved: read it with a copy.

    All callers share the object in the cache, so a change of it would be seen before it is stored.
    """


class AggregateErasedError(FlaskEventSourcingError, application.AggregateNotFoundError):
    """The aggregate was erased: it cannot be read, and its id is not used again.

    It is an ``AggregateNotFoundError`` too, so code that handles an aggregate which is not there handles this one.
    """


class SnapshotError(FlaskEventSourcingError):
    """A snapshot cannot be taken.

    The application takes no snapshots, or no class of snapshots is defined for the aggregate; the message says which.
    """


class AbortedTransactionError(FlaskEventSourcingError, persistence.OperationalError):
    """The database aborted this transaction after an error, and a commit would drop its events: roll back first.

    Some databases answer the COMMIT of such a transaction with a rollback and no error, so the events would be lost in
    silence. Put a statement that may fail into a savepoint, ``db.session.begin_nested()``.
    """


class MissingTableError(FlaskEventSourcingError, persistence.ProgrammingError):
    """A table is missing: run the command 'init-db' or the migrations.

    The extension never makes tables by itself, as your migrations decide what exists in the database.
    """


class EventMetadataError(FlaskEventSourcingError, ValueError):
    """The metadata of an event cannot be recorded, so nothing was saved.

    Metadata are short texts by name. A provider of yours that raises an error has this one too, with that as its cause.
    """


class IdentifierTypeError(FlaskEventSourcingError, TypeError):
    """The id of an aggregate has another type than the ids in the application's tables, UUID or text.

    A UUID and its text would be two streams of events: where the ids are UUIDs, ``repository.get(str(account_id))`` is
    refused.
    """


class EventValueError(FlaskEventSourcingError, ValueError):
    """An event has a value that not every database can store and return unchanged.

    Nothing was saved. Otherwise an event could be stored that cannot be read again, or not on another database.
    """


class UnreadableEventError(FlaskEventSourcingError, persistence.DataError):
    """A row of an events table cannot be read: another program than this package wrote it.

    A projection halts before it, or sets it aside as a dead letter, and does not pass it over.
    """


class ConstraintError(FlaskEventSourcingError, persistence.DatabaseError):
    """A constraint of an events table, such as a CHECK of your own, refused an event. This is not a conflict.

    ``retry_on_conflict`` does not try it again, as the next try would be refused too.
    """


class UnsafeSequenceError(FlaskEventSourcingError, persistence.ProgrammingError):
    """The sequence of positions has a setting that would break the order of the log.

    It is found before the first event is stored. With ``CACHE 20``, for example, a session takes 20 positions at once,
    and a reader that is past them would skip the events that get them later.
    """


class UnsafeTableError(FlaskEventSourcingError, persistence.ProgrammingError):
    """A table of events differs from its record class in a way that could lose events.

    It is found before the first event is stored or read; the command ``check`` reports all differences. A trigger that
    keeps events out is found by the append, which stores nothing then.
    """


class UnsafeSettingError(FlaskEventSourcingError, persistence.ProgrammingError):
    """A setting of the database server could lose events.

    It is found before the first event is stored; the message names the setting and the value that it needs.
    """


class MissingRightError(FlaskEventSourcingError, persistence.ProgrammingError):
    """The database's role lacks a right on a table or sequence.

    It is found before the first event is stored or read, unless the right was revoked later. Where it
    is known, the message has the GRANT that is missing.
    """


class StandbyError(FlaskEventSourcingError, persistence.OperationalError):
    """This server is a standby, which does not see the writers: read the log on the primary.

    The log is complete up to a position that depends on the transactions in progress, and a standby does not know them.
    """


class WriteTimeoutError(FlaskEventSourcingError, persistence.OperationalError):
    """Another writer held the database longer than EVENTSOURCING_LOCK_TIMEOUT seconds.

    Keep transactions short: commit before you send a mail or wait for another service.
    """


class InheritedDatabaseError(FlaskEventSourcingError, persistence.ProgrammingError):
    """The database file, or the connection, was open when this process was forked: close it before the fork.

    Parent and child would use one connection at the same time, or end each other's locks on a file, and lose commits.
    """


class HandlerError(FlaskEventSourcingError):
    """A handler of a projection did something that handlers must not do.

    Handlers write through the session that they get. The runner commits, so that the position and the rows agree; a
    handler that commits, rolls back or saves events would break that.
    """


class UnknownTopicError(HandlerError):
    """The class of an event is not found: import its module, or register its topic with ``register_topic()``.

    The projection halts before the event, and does not pass over what a handler may need.
    """


class ProjectionHaltedError(FlaskEventSourcingError):
    """A projection has halted at an event that it cannot apply, or is paused: the message names the remedy.

    Correct the handler and start the worker again: the projection goes on with that event, and nothing is passed over.
    """


class CheckpointMismatchError(ProjectionHaltedError):
    """A projection does not fit its log, its tables or its code: the message says which, and the remedy.

    For example, the database was restored to an earlier point and the position is beyond the end of its log.
    """


class ProjectionBusyError(FlaskEventSourcingError):
    """Another process is rebuilding or running the projection.

    Try again when it has ended; the command ``status`` shows what runs.
    """


class CheckpointError(FlaskEventSourcingError):
    """A checkpoint cannot be changed in this way.

    The message says why, for example that the projection is running: pause it, or end its worker, before that.
    """


class RebuildError(FlaskEventSourcingError):
    """A projection cannot be rebuilt.

    The live tables are as they were, and readers have seen nothing of it.
    """


class DeadLetterError(FlaskEventSourcingError):
    """There is no such dead letter.

    It may have been retried or discarded meanwhile: the command ``dead-letters list`` shows what is left.
    """


class SpanningTransactionError(FlaskEventSourcingError):
    """A transaction would span two databases: commit before, or use a session with twophase=True.

    If the second commit failed, the first could not be taken back.
    """


class CommitInsideUnitError(FlaskEventSourcingError):
    """A unit of work (transaction(), transactional, retry_on_conflict) commits at its end: remove this commit.

    What comes after it would be a transaction of its own, and a later error could not roll back what was committed.
    """


class CommitOutcomeUnknownError(FlaskEventSourcingError, persistence.OperationalError):
    """The connection was lost during the commit: it is unknown whether it succeeded. Check before you try again.

    Read the aggregate: if it has the events, the commit succeeded.
    """


class OldSnapshotError(FlaskEventSourcingError):
    """The session's transaction reads from an older snapshot: end the transaction before wait_for.

    Such a transaction would not see the rows for which ``wait_for`` waits, however long it waits.
    """


class ImportedEventsError(FlaskEventSourcingError):
    """Events that were to be taken over from elsewhere differ from those that were stored, or cannot be read.

    Nothing was taken over: the import is one transaction.
    """
