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
    """Have a SQLAlchemy pool look at the process before it hands out, closes or remakes anything.

    Its events come after it has taken its lock, which another thread may have held at the time of a fork. The pool is
    made by ``create_engine()``, which the user or Flask-SQLAlchemy calls. It can go when SQLAlchemy's pools know forks
    themselves; its documentation ("Using Connection Pools with Multiprocessing or os.fork()") leaves them to hooks that
    uWSGI does not run.
    """
    # On the one pool, not on its class, which others use.
    vars(pool).update(connect=connect, dispose=dispose, recreate=recreate)


def engine_pool(engine: Any, pool: Any) -> None:
    """Give an engine the pool of this process.

    ``Engine.dispose(close=False)`` would ask the inherited pool to be made again. It can go together with
    :func:`pool_per_process`.
    """
    engine.pool = pool


def left_connection(record: Any, fairy: Any, substitute: Any) -> None:
    """Part a pool's record from the connection that it inherited, and give who still holds that a substitute.

    What is without a record is not given back to the pool, whose lock may be held for ever. The recipe is that of
    SQLAlchemy's documentation for inherited connections, but for connections that are in use. It can go together with
    :func:`pool_per_process`.
    """
    record.fairy_ref = record.dbapi_connection = None
    if fairy is not None:
        fairy.dbapi_connection, fairy._connection_record = substitute, None


def dialect_rollback(dialect: Any, do_rollback: Callable[[Any], None]) -> None:
    """Have a SQLAlchemy dialect roll back by another function.

    A node of a cluster tells a client at its next statement, be it ROLLBACK, that another one has overtaken it, and
    SQLAlchemy has no event that could take the error away. It can go when ``handle_error`` covers rollbacks.
    """
    dialect.do_rollback = do_rollback


def driver_method(driver: Any, name: str, method: Callable[..., Any]) -> None:
    """Have a driver's connection call another function as one of its methods, which does what its own does.

    SQLAlchemy has events for what it ends itself. It can go when drivers tell which transaction is open.
    """
    setattr(driver, name, method)


def connection_dialect(connection: Any, dialect: Any) -> None:
    """Have one SQLAlchemy connection compile its statements with a dialect of its own.

    ``schema_translate_map`` renames schemas, not tables. It can go when SQLAlchemy has such a map of tables.
    """
    connection.dialect = dialect


def repository_class(repository: Any, repository_class: type[Any]) -> None:
    """Let an application's repository be of a class of ours.

    The library makes it in ``Application.__init__()`` and keeps it in a private attribute; to override
    ``construct_repository()`` would take a subclass of the user's application. It can go when the library has a class
    attribute for it, as it has for the notification log.
    """
    repository.__class__ = repository_class


def repository_cache(repository: Any, cache: Any) -> None:
    """Put a cache around that of an application's repository, for the same reason; it can go with the other."""
    repository.cache = cache


def application_method(application: Any, name: str, method: Callable[..., Any]) -> None:
    """Have an application call another function as one of its methods.

    A subclass of the user's application would not be the class that runners, topics and pickles name, and the library
    has no hook around ``save()`` or ``_record()``. It can go when it has.
    """
    setattr(application, name, method)


def leader_lead(leader_class: Any, lead: Callable[[Any, Any], None]) -> None:
    """Have the library's ``Leader`` take its followers by another function.

    The library's runners construct leaders, and subclasses for them, by themselves, so there is no object that could
    be changed, and a leader prompts its followers within ``save()``. It can go when the library has a hook for the time
    at which followers are prompted.
    """
    leader_class.lead = lead


def follower_follow(follower_class: Any, follow: Callable[[Any, str, Any], None]) -> None:
    """Have the library's ``Follower`` follow a log by another function, which notes whose events it processes.

    A runner constructs followers by itself, and what they save is caused by what they process. It can go when the
    library hands the notification to ``process_event()``.
    """
    follower_class.follow = follow


def session_scope(registry: Any, scope: Callable[[], Any]) -> None:
    """Have Flask-SQLAlchemy's ``scoped_session`` tell processes apart.

    An application context that was pushed before a fork is the same object in the child, and the session with it. The
    scope is an argument of ``SQLAlchemy()``, which the user calls. It can go when Flask-SQLAlchemy's own scope has the
    process id in it.
    """
    registry.scopefunc = scope


def lite_get_session(extension: Any, get_session: Callable[..., Any]) -> None:
    """Have Flask-SQLAlchemy-Lite tell processes apart, for the same reason.

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
    """Within it, a SQLAlchemy session says that it flushes, to which a ``get_bind()`` looks that sends reads elsewhere.

    So SQLAlchemy's documentation has it ("Custom Vertical Partitioning"), and a session cannot be asked in another way
    where it is going to write. It can go when ``get_bind()`` has an argument that says so.
    """
    before, session._flushing = session._flushing, True
    try:
        yield
    finally:
        session._flushing = before


def finalize_request(app: Any, finalize: Callable[..., Any]) -> None:
    """Have a Flask app finish its answers by another function, which does what its own does first.

    An ``after_request`` function cannot be the last: those that were registered before it run after it, as the
    receivers of ``request_finished`` do, and what these raise goes by the user's error handlers. It can go when Flask
    has a hook that comes after all of them and may change the answer.
    """
    app.finalize_request = finalize


def handle_user_exception(app: Any, handle: Callable[..., Any]) -> None:
    """Have a Flask app call its error handlers by another function, which does what its own does at last.

    ``got_request_exception`` is sent for an error without a handler of its own only. It can go when Flask has a signal
    for every error in a view.
    """
    app.handle_user_exception = handle


def forget_class(model: Any) -> None:
    """Have a declarative base forget a mapped class and its table, as if it had never been made.

    SQLAlchemy's ``registry.dispose()`` does so for all classes of a base. It can go when it has a function for one.
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
    """Set what a Celery task runs, or mark a task or a request as one that has its unit of work.

    Celery makes the task of the user's function, and its signals before and after a run cannot be around it. It can go
    when there is a hook around ``Task.run()``.
    """
    setattr(task, name, value)


def job_perform(job: Any, perform: Callable[[], Any] | None) -> None:
    """Have an RQ job performed by another function, or by its own again.

    RQ calls ``job.perform()`` within its time limit and before it stores the result, and has no hook there. It can go
    when a worker has one.
    """
    if perform is None:
        del vars(job)["perform"]
    else:
        vars(job)["perform"] = perform


def job_callback(job: Any, kind: str, wrapped: Callable[[str], Callable[..., Any]]) -> None:
    """Have an RQ job's callback called by another function, which is made from its name.

    RQ calls what is to happen after a job outside ``job.perform()``, and has no hook there. It can go when a worker has
    one.

    :param kind: ``success``, ``failure`` or ``stopped``.
    """
    name = getattr(job, f"_{kind}_callback_name", None)
    if name:
        setattr(job, f"_{kind}_callback", wrapped(name))


@contextmanager
def queue_jobs(queues: Iterable[Any], prepare: Callable[[Any], object]) -> Iterator[None]:
    """Within it, RQ's queues have a class of jobs that calls a function with each job that is fetched.

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
    """Have one of Django's connections call another function as one of its methods, which does what its own does.

    Django has functions that are called after a commit. It tells nobody of a rollback, whether that was asked for or
    comes of an error that was swallowed, nor of a commit where autocommit is switched off, of a rollback to a savepoint
    without a block, or of a connection that is closed; and after a function that fails it forgets the others. It can go
    when it does.
    """
    setattr(connection, name, method)


def django_atomic_exit(atomic_class: Any, leaving: Callable[[Any, Any], AbstractContextManager[object] | None]) -> None:
    """Have Django's blocks tell how they are left.

    :param leaving: takes the alias and the class of the exception, or None, and returns what is entered around Django's
        own method, or None for a block of which nobody wants to know.

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
    """Have a connection of Django's tell of its statements, or not any more.

    Django's own ``execute_wrapper()`` is for a block, which does not end with the transaction, and takes the last one
    away. It can go when there is one that takes away its own.
    """
    if watch in connection.execute_wrappers:
        connection.execute_wrappers.remove(watch)
    if watched:
        connection.execute_wrappers.insert(0, watch)


def django_pool(pools: dict[str, Any], pool: Any) -> None:
    """Have Django forget a pool of connections, so that it makes another one.

    Django keeps pools for a process and those that it forks, which then use one session of the server together. A pool
    could only be closed, and that would end its parent's sessions. It can go when Django's pools know forks.
    """
    for alias in [alias for alias, known in pools.items() if known is pool]:
        pools.pop(alias, None)


@contextmanager
def session_methods(plain: Any, session: Any, get: Callable[..., Any], observe: Callable[[], object]) -> Iterator[None]:
    """Within it, a session finds rows by another function, unless its class or its user has one already.

    SQLAlchemy makes twenty calls for a row that the session has, which is a sixth of what a projection does with an
    event. It can go when SQLAlchemy makes a few.

    It calls a further function before it forgets what was set and not flushed: SQLAlchemy's events come after that.

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
