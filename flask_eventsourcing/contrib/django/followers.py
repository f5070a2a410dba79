"""The library's ``System`` in a Django project: its runner, and a command that brings followers up to date."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from django.apps import apps
from django.conf import settings
from django.db import transaction
from eventsourcing.system import Follower, Runner

from ...applications import environment
from ...exceptions import ConfigurationError
from .hosting import site

SETTING = "EVENTSOURCING_RUNNER"


def runner_env() -> Mapping[str, str]:
    """Return the environment for a runner of a ``System``, so that its applications use the databases of the setting.

    The setting must have every application of the system::

        runner = SingleThreadedRunner(system, env=runner_env())

    :raises ConfigurationError: when the setting cannot be used.
    """
    found = site()
    env: dict[str, str] = {}
    for name, one in found.configured.items():
        prefix = f"{name.upper()}_"
        env |= {key if key.upper().startswith(prefix) else f"{prefix}{key}": value for key, value in one.env.items()}
        if name in found.apart:
            env = found.apart[name].store.environment(env, name)
        else:
            env = environment(found.database(name).datastore, env, name)
    return env


def find_runner() -> Runner[Any]:
    """Return the runner that ``EVENTSOURCING_RUNNER`` names, or the only one that is an attribute of an ``AppConfig``.

    The setting is ``app_label.attribute``, or the dotted path of a function that returns the runner.

    :raises ConfigurationError: when there is none, or there are several.
    """
    named = getattr(settings, SETTING, None)
    if named is not None:
        return _named(named)
    found = [
        value
        for config in apps.get_app_configs()
        for value in (getattr(config, name) for name in dir(config) if not name.startswith("_"))
        if isinstance(value, Runner)
    ]
    if len(found) != 1:
        raise ConfigurationError(
            f"{len(found) or 'No'} runner{'s' if found else ''} of a System found as attributes of AppConfig classes: "
            f"let {SETTING} name one, as 'app_label.attribute', or as the dotted path of a function that returns it."
        )
    return found[0]


def _named(path: Any) -> Runner[Any]:
    where, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    runner: Any = None
    try:
        runner = getattr(apps.get_app_config(where), name, None)
    except LookupError:
        if where:
            function = getattr(importlib.import_module(where), name, None)
            runner = function() if callable(function) else None
    if not isinstance(runner, Runner):
        raise ConfigurationError(
            f"{SETTING} is {path!r}, and must be 'app_label.attribute' of a runner, or the dotted path of a function "
            "that returns one, such as 'project.runners.get_runner'."
        )
    return runner


def sync_follower(follower: Follower[Any], leaders: Iterable[str], using: str) -> Mapping[str, int]:
    """Process the events of the leaders that a follower has not seen; each event is one transaction with its position.

    :param leaders: their names.
    :param using: the alias of the follower's database.
    :return: how many events of each leader were processed.
    """
    counts = dict.fromkeys(leaders, 0)
    for leader in counts:
        start = follower.recorder.max_tracking_id(leader)
        for found in follower.pull_notifications(leader, start, inclusive_of_start=False):
            notifications = follower.filter_received_notifications(found)
            for event, tracking in follower.convert_notifications(leader, notifications):
                with transaction.atomic(using=using):
                    follower.process_event(event, tracking)
                counts[leader] += 1
    return counts
