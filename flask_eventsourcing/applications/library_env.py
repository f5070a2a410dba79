"""Checks the values that the library reads from an application's environment, before the application is made."""

from __future__ import annotations

import base64
import binascii
import difflib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from eventsourcing.application import Application
from eventsourcing.utils import Environment, strtobool

from ..exceptions import ConfigurationError
from ..failures import resolve
from ..persistence import Datastore, Factory
from ..persistence.dialects import LIBRARY_SETTINGS

SETTING = "EVENTSOURCING_ENV"
FOREIGN_SCOPE = "SQLALCHEMY_SCOPED_SESSION_TOPIC"
CIPHER_KEY = "CIPHER_KEY"
DEFAULT_CIPHER = "eventsourcing.cipher:AESCipher"
"""The cipher that the library uses if there is a key and no topic."""
LIBRARY_CIPHERS = (DEFAULT_CIPHER, "eventsourcing.cryptography:AESCipher")
KEY_SIZES = (16, 24, 32)

TOPICS = (
    "TRANSCODER_TOPIC",
    "CIPHER_TOPIC",
    "COMPRESSOR_TOPIC",
    "MAPPER_TOPIC",
    "APPLICATION_RECORDER_TOPIC",
    "TRACKING_RECORDER_TOPIC",
    "PROCESS_RECORDER_TOPIC",
)
SWITCHES = (
    "IS_SNAPSHOTTING_ENABLED",
    "AGGREGATE_CACHE_FASTFORWARD",
    "AGGREGATE_CACHE_FASTFORWARD_SKIPPING",
    "DEEPCOPY_FROM_AGGREGATE_CACHE",
    Factory.CREATE_TABLE,
)
NUMBER = "AGGREGATE_CACHE_MAXSIZE"
KNOWN = (*TOPICS, CIPHER_KEY, *SWITCHES, NUMBER, Factory.ORIGINATOR_ID_TYPE)

ADDRESSES = (Factory.SQLALCHEMY_DATABASE_URI, Factory.SQLALCHEMY_SCHEMA)
MODULES = (Factory.PERSISTENCE_MODULE, "INFRASTRUCTURE_FACTORY", "FACTORY_TOPIC")
ALIKE, ALIKE_NAMES = 0.8, 0.7


def environment(datastore: Datastore, env: Mapping[str, str], application_name: str | None = None) -> dict[str, str]:
    """Return the environment for an application, or a runner of the library, that uses a datastore.

    :param env: what the user has configured.
    :param application_name: the name of the application, if the environment is for one.
    """
    ours = {
        Factory.PERSISTENCE_MODULE: "flask_eventsourcing.persistence",
        Factory.DATASTORE: datastore.token,
    }
    if application_name is not None:
        # Otherwise a variable of the process's environment with the application's name in front would win.
        ours |= {f"{application_name.upper()}_{key}": value for key, value in ours.items()}
    return {**env, **ours}


def check_environment(
    env: Mapping[str, str], classes: Sequence[type[Application[Any]]], setting: str = SETTING
) -> None:
    """Check what applications are going to read from their environment.

    :param env: what the user has configured.
    :param setting: how messages name it.
    :raises ConfigurationError: for a key that would be ignored or is misspelt, or a value that cannot be used; the
        message names the key, not the value.
    """
    names = [cls.name for cls in classes]
    _refuse_foreign_scope(env, classes)
    for key in env:
        problem = _why_ignored(key, names)
        if problem:
            raise ConfigurationError(f"{setting} has {key!r}, {problem}.")
    for cls in classes:
        # Its sources and their precedence, as in Application.construct_env().
        whole = Environment(cls.name, {**cls.env, **os.environ, **env})
        for key, problem in _problems(whole):
            raise ConfigurationError(f"{_named(key, whole, setting, env)} of {cls.name} {problem}.")


def _refuse_foreign_scope(env: Mapping[str, str], classes: Sequence[type[Application[Any]]]) -> None:
    # A copy, because the environment of the process refuses some names.
    for each in (env, dict(os.environ), *(cls.env for cls in classes)):
        for key in (FOREIGN_SCOPE, *(f"{cls.name.upper()}_{FOREIGN_SCOPE}" for cls in classes)):
            if key in each:
                raise ConfigurationError(
                    f"{key} is a setting of eventsourcing-sqlalchemy, and would have no effect here: remove it. "
                    "Applications use db.session; within 'with es.using(session):' they use a session of your own."
                )


def _why_ignored(key: str, names: Sequence[str]) -> str | None:
    """Return what is wrong with a key, or None; a key that resembles nothing may be read by a class of the user's."""
    prefix = next((f"{name.upper()}_" for name in names if key.upper().startswith(f"{name.upper()}_")), "")
    bare = key.upper()[len(prefix) :]
    if bare in ADDRESSES or bare.endswith(tuple(f"_{each}" for each in ADDRESSES)):
        return "which would be ignored: the events are in the app's database, see EVENTSOURCING_BINDS and _SCHEMA"
    if bare in MODULES or bare.endswith(f"_{Factory.PERSISTENCE_MODULE}"):
        return "which would be ignored: the module of persistence is always this package's"
    if bare.startswith(LIBRARY_SETTINGS):
        return "which would be ignored: it is a setting of the library's own module for that database"
    if bare in KNOWN:
        return None if key == f"{prefix}{bare}" else f"which would be ignored: write {prefix + bare!r}"
    meant = _meant(prefix, bare, names)
    return None if meant is None else f"which nothing reads: did you mean {meant!r}"


def _meant(prefix: str, bare: str, names: Sequence[str]) -> str | None:
    """Return the known key that a key resembles, or None."""
    close = difflib.get_close_matches(bare, KNOWN, n=1, cutoff=ALIKE)
    if close and not any(bare.endswith(f"_{known}") for known in KNOWN):
        return prefix + close[0]
    for known in KNOWN:
        name = bare.removesuffix(f"_{known}")
        alike = difflib.get_close_matches(name, [each.upper() for each in names], n=1, cutoff=ALIKE_NAMES)
        if name != bare and alike:
            return f"{alike[0]}_{known}"
    return None


def _named(key: str, whole: Environment, setting: str, env: Mapping[str, str]) -> str:
    found = next((each for each in whole.create_keys(key) if each in whole), key)
    return f"{setting}[{found!r}]" if found in env else f"The environment variable {found}"


def _problems(env: Environment) -> Iterator[tuple[str, str]]:
    for key in TOPICS:
        topic = env.get(key)
        if topic:
            problem = _why_unresolved(topic)
            if problem:
                yield key, f"names {topic!r}, which cannot be imported: {problem}"
    yield from _cipher_problems(env)
    for key in SWITCHES:
        if not _is_accepted(strtobool, env.get(key, "no")):
            yield key, "must be one of 'y', 'yes', 't', 'true', 'on', '1' and 'n', 'no', 'f', 'false', 'off', '0'"
    if not _is_accepted(int, env.get(NUMBER) or "0"):
        yield NUMBER, "must be a whole number"


def _is_accepted(convert: Callable[[str], Any], value: str) -> bool:
    try:
        convert(value)
    except ValueError:
        return False
    return True


def _why_unresolved(topic: str) -> str | None:
    _, error = resolve(topic)
    module = sys.modules.get(topic.partition(":")[0])
    if error is None or getattr(getattr(module, "__spec__", None), "_initializing", False):
        # The module that makes the app may still be being imported, and define the class further below.
        return None
    return str(error.__cause__ or error) or type(error).__name__


def _cipher_problems(env: Environment) -> Iterator[tuple[str, str]]:
    topic, key = env.get("CIPHER_TOPIC"), env.get(CIPHER_KEY)
    if key and not topic:
        problem = _why_unresolved(DEFAULT_CIPHER)
        if problem:
            yield CIPHER_KEY, f"needs the cipher {DEFAULT_CIPHER!r}, which cannot be imported: {problem}"
        topic = DEFAULT_CIPHER
    if topic not in LIBRARY_CIPHERS:
        return
    if not key:
        yield "CIPHER_TOPIC", f"needs a key, and {CIPHER_KEY} is not set"
        return
    try:
        size = len(base64.b64decode(key.encode()))
    except (binascii.Error, UnicodeEncodeError):
        yield CIPHER_KEY, "must be a key in base64, as AESCipher.create_key(32) makes it"
        return
    if size not in KEY_SIZES:
        yield CIPHER_KEY, f"must be a key of 16, 24 or 32 bytes in base64; it has {size}"
