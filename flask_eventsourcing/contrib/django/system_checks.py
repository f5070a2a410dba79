"""The system checks of ``manage.py check``, for the setting, the record classes and their tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning
from django.db import connections, router
from django.db.migrations.executor import MigrationExecutor
from eventsourcing.persistence import PersistenceError

from ...applications import check_environment
from ...exceptions import ConfigurationError
from ...persistence.dialects import DIALECTS
from .configuring import EXAMPLE, SETTING, Configured, configured
from .hosting import site
from .in_cassandra import new_store
from .records import Records, all_records, records_of


def check_setting(app_configs: Any = None, **_: Any) -> list[CheckMessage]:
    """Check the setting, the classes that it names, their record classes, and the options of the databases."""
    if not hasattr(settings, SETTING):
        hint = f"Write for example {EXAMPLE}"
        return [Warning(f"{SETTING} is not set, so that there is no application.", hint=hint, id="eventsourcing.W001")]
    try:
        found = configured()
    except ConfigurationError as error:
        return [Error(str(error), hint=f"Write for example {EXAMPLE}", id="eventsourcing.E001")]
    messages: list[CheckMessage] = []
    for each in found.values():
        messages += _check_application(each)
    for alias in sorted({each.alias for each in found.values() if not each.is_apart}):
        messages += _check_options(alias)
    messages += _without_application(found)
    return messages


def _check_application(one: Configured) -> list[CheckMessage]:
    try:
        application_class = one.application_class()
        check_environment(one.env, [application_class], f"{SETTING}[{one.name!r}]['ENV']")
    except ConfigurationError as error:
        return [Error(str(error), hint=f"Correct {SETTING}[{one.name!r}].", id="eventsourcing.E002")]
    if one.is_apart:
        return _check_apart(one)
    try:
        records = records_of(one.name)
    except ConfigurationError as error:
        hint = f"Call event_models(__name__, {one.name!r}) there, then run makemigrations and migrate."
        return [Error(str(error), hint=hint, id="eventsourcing.E003")]
    return _check_router(one, records)


def _check_apart(one: Configured) -> list[CheckMessage]:
    try:
        new_store(one.cassandra, None, {})
    except ConfigurationError as error:
        return [
            Error(str(error), hint="Install one driver, the one that goes with the server.", id="eventsourcing.E007")
        ]
    records = all_records().get(one.name)
    if records is None:
        return []
    if records.has_events:
        return [
            Error(
                f"{records.module} declares tables for the events of {one.name}, which are in Cassandra.",
                hint=f"With projections, write projection_models(__name__, {one.name!r}) instead; without, remove it.",
                id="eventsourcing.E008",
            )
        ]
    return _check_router(one, records)


def _check_router(one: Configured, records: Records) -> list[CheckMessage]:
    refused = [model for model in records.models if not router.allow_migrate_model(one.alias, model)]
    if refused:
        return [
            Error(
                f"No router lets {refused[0]._meta.label} migrate in {one.alias!r}, where the events of {one.name} are "
                "to be.",
                hint=f"Set {SETTING}[{one.name!r}]['DATABASE'] to the alias that DATABASE_ROUTERS allow, or change "
                "them.",
                id="eventsourcing.E004",
            )
        ]
    return []


def _without_application(found: Collection[str]) -> list[CheckMessage]:
    return [
        Warning(
            f"{records.module} declares the tables of {name!r}, and {SETTING} has no such application.",
            hint=f'Add "{name}": {{"APPLICATION": "…"}} to {SETTING}, or take event_models(…) away.',
            id="eventsourcing.W002",
        )
        for name, records in all_records().items()
        if name not in found
    ]


def _check_options(alias: str) -> list[CheckMessage]:
    wrapper: Any = connections[alias]
    known = DIALECTS.get(wrapper.vendor)
    settings_dict = wrapper.settings_dict
    missing = (
        () if known is None else known.missing_options(str(settings_dict["NAME"]), settings_dict.get("OPTIONS", {}))
    )
    return [
        Warning(
            f"DATABASES[{alias!r}]: {each.text}",
            hint=f"Write in DATABASES[{alias!r}]['OPTIONS']: {each.lines}",
            id="eventsourcing.W003",
        )
        for each in missing
    ]


def check_databases(app_configs: Any = None, databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """Compare the tables that exist with the record classes. ``migrate`` makes the others."""
    if not databases or not hasattr(settings, SETTING):
        return []
    try:
        found = site()
    except ConfigurationError:
        # The other check reports it.
        return []
    messages: list[CheckMessage] = []
    for alias in databases:
        if alias in found.databases:
            messages += _check_tables(found.databases[alias])
    return messages


def _check_tables(database: Any) -> list[CheckMessage]:
    messages: list[CheckMessage] = []
    dialect = database.datastore.dialect
    try:
        connection = database.units.current().connection()
        settings_hint = "The documentation's page on Django has the settings."
        messages += [_message(each, each.text, settings_hint) for each in dialect.check_settings(connection)]
        for records in database.records.values():
            findings = [each for table in records.mirror.all() for each in dialect.check_table(connection, table) or ()]
            hint = "Let a migration make the table as the record class has it; event_models(…) says how."
            if findings and _awaits_migrations(connections[database.alias], records):
                # Only a warning, because an error would keep migrate from running.
                findings = [each._replace(is_fault=False) for each in findings]
                hint = "Run migrate: a migration of the app is not applied."
            messages += [_message(each, f"{records.name}: {each.text}", hint) for each in findings]
    except PersistenceError as error:
        messages.append(Error(str(error), hint="Look at DATABASES.", id="eventsourcing.E006"))
    return messages


def _awaits_migrations(wrapper: Any, records: Records) -> bool:
    """Whether migrations after the first one may still make the tables as they should be."""
    executor = MigrationExecutor(wrapper)
    labels = {each._meta.app_label for each in records.models} & {app for app, _ in executor.loader.applied_migrations}
    return bool(executor.migration_plan([each for label in labels for each in executor.loader.graph.leaf_nodes(label)]))


def _message(finding: Any, text: str, hint: str) -> CheckMessage:
    kind, number = (Error, "E005") if finding.is_fault else (Warning, "W004")
    return kind(text, hint=hint, id=f"eventsourcing.{number}")
