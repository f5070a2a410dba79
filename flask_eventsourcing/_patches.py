"""The changes that this package makes to objects of other projects, one function for each.

Nothing else in the package sets an attribute or the class of an object that belongs to another project. Each function
says why there is no other way, and what would make it unnecessary. None of them imports what it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any


def pool_per_process(
    pool: Any, connect: Callable[[], Any], dispose: Callable[[], None], recreate: Callable[[], Any]
) -> None:
    """Make a SQLAlchemy pool check the process before it hands out, closes or replaces a connection.

    Its events come after it has taken its lock, which another thread may have held at the time of a fork. The pool is
    made by ``create_engine()``, which the user or Flask-SQLAlchemy calls. It can go when SQLAlchemy's pools know forks
    themselves; its documentation ("Using Connection Pools with Multiprocessing or os.fork()") leaves them to hooks that
    uWSGI does not run.
    """
    # On this one pool, because others use its class.
    vars(pool).update(connect=connect, dispose=dispose, recreate=recreate)


def engine_pool(engine: Any, pool: Any) -> None:
    """Give an engine the pool of this process.

    ``Engine.dispose(close=False)`` would ask the inherited pool to be made again. It can go together with
    :func:`pool_per_process`.
    """
    engine.pool = pool


def left_connection(record: Any, fairy: Any, substitute: Any) -> None:
    """Separate a pool's record from the connection that it inherited, and give code that still holds it a substitute.

    A connection without a record is not given back to the pool, whose lock may be held for ever. The recipe is that of
    SQLAlchemy's documentation for inherited connections, but for connections that are in use. It can go together with
    :func:`pool_per_process`.
    """
    record.fairy_ref = record.dbapi_connection = None
    if fairy is not None:
        fairy.dbapi_connection, fairy._connection_record = substitute, None


def dialect_rollback(dialect: Any, do_rollback: Callable[[Any], None]) -> None:
    """Make a SQLAlchemy dialect roll back by another function.

    A node of a cluster tells a client at its next statement, which may be ROLLBACK, that another transaction has won,
    and no event of SQLAlchemy can remove that error. It can go when ``handle_error`` covers rollbacks.
    """
    dialect.do_rollback = do_rollback


def driver_method(driver: Any, name: str, method: Callable[..., Any]) -> None:
    """Make a driver's connection call another function as one of its methods. It also does what the method did.

    SQLAlchemy has events only for transactions that it ends itself. It can go when drivers tell which transaction is
    open.
    """
    setattr(driver, name, method)


def connection_dialect(connection: Any, dialect: Any) -> None:
    """Make one SQLAlchemy connection compile its statements with a dialect of its own.

    ``schema_translate_map`` renames schemas, not tables. It can go when SQLAlchemy has such a map of tables.
    """
    connection.dialect = dialect


def repository_class(repository: Any, repository_class: type[Any]) -> None:
    """Change the class of an application's repository.

    The library makes it in ``Application.__init__()`` and keeps it in a private attribute; to override
    ``construct_repository()`` would take a subclass of the user's application. It can go when the library has a class
    attribute for it, as it has for the notification log.
    """
    repository.__class__ = repository_class


def repository_cache(repository: Any, cache: Any) -> None:
    """Put a cache around that of an application's repository, for the same reason; it can go with the other."""
    repository.cache = cache


def application_method(application: Any, name: str, method: Callable[..., Any]) -> None:
    """Make an application call another function as one of its methods.

    A subclass of the user's application would not be the class that runners, topics and pickles name, and the library
    has no hook around ``save()`` or ``_record()``. It can go when it has.
    """
    setattr(application, name, method)


def leader_lead(leader_class: Any, lead: Callable[[Any, Any], None]) -> None:
    """Make the library's ``Leader`` add its followers by another function.

    The library's runners construct leaders, and subclasses for them, by themselves, so there is no object that could
    be changed, and a leader prompts its followers within ``save()``. It can go when the library has a hook for the time
    at which followers are prompted.
    """
    leader_class.lead = lead


def follower_follow(follower_class: Any, follow: Callable[[Any, str, Any], None]) -> None:
    """Make the library's ``Follower`` follow a log by another function, which notes whose events it processes.

    A runner constructs followers by itself, and an event that they process causes the events that they save. It can go
    when the library hands the notification to ``process_event()``.
    """
    follower_class.follow = follow


def session_scope(registry: Any, scope: Callable[[], Any]) -> None:
    """Make Flask-SQLAlchemy's ``scoped_session`` distinguish processes.

    An application context that was pushed before a fork is the same object in the child, and the session with it. The
    scope is an argument of ``SQLAlchemy()``, which the user calls. It can go when Flask-SQLAlchemy's own scope has the
    process id in it.
    """
    registry.scopefunc = scope


def lite_get_session(extension: Any, get_session: Callable[..., Any]) -> None:
    """Make Flask-SQLAlchemy-Lite distinguish processes, for the same reason.

    It has no scope that could be given. It can go when the sessions that it keeps in ``flask.g`` have the process id.
    """
    extension.get_session = get_session


def lite_sessions(context: Any, sessions: dict[str, Any]) -> None:
    """Make sessions those of the current application context, where Flask-SQLAlchemy-Lite keeps them in ``flask.g``.

    It has no other way to bring a session of one's own. It can go when it has.
    """
    context._sqlalchemy_sessions = sessions


@contextmanager
def as_if_flushing(session: Any) -> Iterator[None]:
    """Make a SQLAlchemy session seem to flush in the block, for a ``get_bind()`` that sends reads to another engine.

    SQLAlchemy's documentation shows such a ``get_bind()`` ("Custom Vertical Partitioning"), and no other name tells it
    that the session is going to write. It can go when ``get_bind()`` has an argument that says so.
    """
    before, session._flushing = session._flushing, True
    try:
        yield
    finally:
        session._flushing = before


def finalize_request(app: Any, finalize: Callable[..., Any]) -> None:
    """Make a Flask app finish its responses by another function, which first does what the app's own method does.

    An ``after_request`` function cannot be the last: functions that were registered before it and receivers of
    ``request_finished`` run after it, and their errors go to the user's error handlers. It can go when Flask has a hook
    that comes after all of them and may change the response.
    """
    app.finalize_request = finalize


def handle_user_exception(app: Any, handle: Callable[..., Any]) -> None:
    """Make a Flask app call its error handlers by another function, which at last does what the app's own method does.

    ``got_request_exception`` is sent only for an error without a handler of its own. It can go when Flask has a signal
    for every error in a view.
    """
    app.handle_user_exception = handle


def forget_class(model: Any) -> None:
    """Make a declarative base forget a mapped class and its table, as if they had never been made.

    SQLAlchemy's ``registry.dispose()`` does that for all classes of a base. It can go when SQLAlchemy can do it for one
    class.
    """
    model.__table__.metadata.remove(model.__table__)
    model.registry._dispose_cls(model)


def task_registry_class(tasks: Any, registry_class: type[Any]) -> None:
    """Give a Celery app's registry of tasks another class.

    A base class for tasks would miss those that have another one, and Celery has no signal for a task that is
    registered. It can go when it has.
    """
    tasks.__class__ = registry_class


def task_attribute(task: Any, name: str, value: Any) -> None:
    """Set the function that a Celery task runs, or mark a task or a request that has its unit of work.

    Celery makes the task of the user's function, and its signals come before and after a run, not around it. It can go
    when there is a hook around ``Task.run()``.
    """
    setattr(task, name, value)


def job_perform(job: Any, perform: Callable[[], Any] | None) -> None:
    """Make RQ perform a job by another function, or by the job's own again.

    RQ calls ``job.perform()`` within its time limit and before it stores the result, and has no hook there. It can go
    when a worker has one.
    """
    if perform is None:
        del vars(job)["perform"]
    else:
        vars(job)["perform"] = perform


def job_callback(job: Any, kind: str, wrapped: Callable[[str], Callable[..., Any]]) -> None:
    """Make RQ call an RQ job's callback by another function, which is made from the callback's name.

    RQ calls the callbacks of a job outside ``job.perform()``, and has no hook there. It can go when a worker has one.

    :param kind: ``success``, ``failure`` or ``stopped``.
    """
    name = getattr(job, f"_{kind}_callback_name", None)
    if name:
        setattr(job, f"_{kind}_callback", wrapped(name))


@contextmanager
def queue_jobs(queues: Iterable[Any], prepare: Callable[[Any], object]) -> Iterator[None]:
    """Give RQ's queues in the block a class of jobs that calls a function with each job that is fetched.

    RQ fetches a job whose worker has died, and calls its failure callback, in one method. It can go together with
    :func:`job_callback`.
    """

    def fetching(job_class: Any) -> Any:
        def fetch(cls: Any, *args: Any, **kwargs: Any) -> Any:
            job = job_class.fetch.__func__(cls, *args, **kwargs)
            prepare(job)
            return job

        return type(job_class.__name__, (job_class,), {"fetch": classmethod(fetch)})

    classes = [(queue, queue.job_class) for queue in queues]
    try:
        for queue, job_class in classes:
            queue.job_class = fetching(job_class)
        yield
    finally:
        for queue, job_class in classes:
            queue.job_class = job_class


def django_method(connection: Any, name: str, method: Callable[..., Any]) -> None:
    """Make one of Django's connections call another function as one of its methods. It also does what the method did.

    Django calls functions after a commit. It has no hook for a rollback, whether code asked for it or it follows a
    swallowed error, nor for a commit with autocommit off, a rollback to a savepoint without a block, or a closed
    connection; and if one function fails, it forgets the others. It can go when Django has such hooks.
    """
    setattr(connection, name, method)


def django_atomic_exit(atomic_class: Any, leaving: Callable[[Any, Any], AbstractContextManager[object] | None]) -> None:
    """Make Django's blocks tell how code leaves them.

    :param leaving: takes the alias and the class of the exception, or None. It returns a context that is entered around
        Django's own method, or None if nothing is to be done.

    It can go when Django says whether an exception has rolled a block back.
    """
    leave = atomic_class.__exit__

    @wraps(leave)
    def told(block: Any, exc_type: Any, exc_value: Any, traceback: Any) -> Any:
        around = leaving(block.using, exc_type)
        if around is None:
            return leave(block, exc_type, exc_value, traceback)
        with around:
            return leave(block, exc_type, exc_value, traceback)

    atomic_class.__exit__ = told


def django_watch(connection: Any, watch: Callable[..., Any], *, watched: bool) -> None:
    """Begin to watch the statements of one of Django's connections, or stop watching them.

    Django's own ``execute_wrapper()`` is for a block, which does not end with the transaction, and at its end it
    removes the last wrapper, whichever that is. It can go when a wrapper can be added and removed by itself.
    """
    if watch in connection.execute_wrappers:
        connection.execute_wrappers.remove(watch)
    if watched:
        connection.execute_wrappers.insert(0, watch)


def django_pool(pools: dict[str, Any], pool: Any) -> None:
    """Make Django forget a pool of connections, so that it makes another one.

    Django keeps pools for a process and those that it forks, which then use one session of the server together. A pool
    could only be closed, and that would end its parent's sessions. It can go when Django's pools know forks.
    """
    for alias in [alias for alias, known in pools.items() if known is pool]:
        pools.pop(alias, None)


@contextmanager
def session_methods(plain: Any, session: Any, get: Callable[..., Any], observe: Callable[[], object]) -> Iterator[None]:
    """Make a session find rows by another function in the block, unless its class or its user has one already.

    SQLAlchemy makes twenty calls for a row that the session has, which is a sixth of what a projection does with an
    event. It can go when SQLAlchemy makes a few.

    It also calls a function before the session forgets values that were not flushed: SQLAlchemy's events come after
    that.

    :param plain: SQLAlchemy's class.
    """

    def observing(method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            observe()
            return method(*args, **kwargs)

        return called

    kind, before = type(session), vars(session)
    forgetting = ("expire", "expire_all", "expunge", "expunge_all", "refresh")
    methods = {name: observing(getattr(session, name)) for name in forgetting}
    if kind.get is plain.get and kind._identity_lookup is plain._identity_lookup and "get" not in before:
        methods["get"] = get
    kept = {name: before[name] for name in methods if name in before}
    before.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del before[name]
        before.update(kept)
