"""The configuration of a Pyramid application: directives, settings, projections and commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationConflictError, ConfigurationExecutionError
from pyramid.paster import get_app
from sqlalchemy import orm

from flask_eventsourcing.contrib.pyramid import event_models, projection
from flask_eventsourcing.contrib.pyramid.console import main
from flask_eventsourcing.contrib.pyramid.site_state import IniSettings
from flask_eventsourcing.exceptions import ConfigurationError, MissingTableError
from flask_eventsourcing.persistence import DialectOptions
from flask_eventsourcing.projections import ModelProjection, on
from tests.domain import Account, Bank, Shop
from tests.pyramid_site import configured
from tests.pyramid_site.conftest import MakePyramidSite
from tests.pyramid_site.site import VETO, PyramidSite

INI = """
[app:main]
use = call:tests.pyramid_site.configured:main
sqlalchemy.url = {url}
tm.commit_veto = pyramid_tm.default_commit_veto
eventsourcing.env.IS_SNAPSHOTTING_ENABLED = y

[loggers]
keys = root
[handlers]
keys =
[formatters]
keys =
[logger_root]
level = WARNING
handlers =
"""


@pytest.fixture
def ini(tmp_path: Path) -> str:
    """The ini file of the application in ``configured``."""
    path = tmp_path / "site.ini"
    path.write_text(INI.format(url=f"sqlite:///{tmp_path}/bank.db"))
    return str(path)


def test_settings_of_the_ini_file_are_read() -> None:
    """The texts of an ini file become typed settings; the library's variables are passed on to it."""
    found = IniSettings.from_mapping(
        {
            "eventsourcing.lock_timeout": "2.5",
            "eventsourcing.postgres_notify": "false",
            "eventsourcing.projection_lock": "lease",
            "eventsourcing.metadata": "off",
            "eventsourcing.env.AGGREGATE_CACHE_MAXSIZE": "10",
            "pyramid.reload_templates": "true",
        }
    )
    program = "pyramid-eventsourcing <ini file>"
    setting = "eventsourcing.{1}"
    assert found.options == DialectOptions(lock_timeout=2.5, postgres_notify=False, program=program, setting=setting)
    assert (found.projection_lock, found.metadata, found.env) == ("lease", False, {"AGGREGATE_CACHE_MAXSIZE": "10"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lock_timout", "3", "did you mean eventsourcing.lock_timeout"),
        ("color", "red", "Unknown setting eventsourcing.color"),
        ("lock_timeout", "long", r"eventsourcing\.lock_timeout must be a number"),
        ("lock_timeout", "0", r"eventsourcing\.lock_timeout"),
        ("sqlite_wal", "maybe", r"eventsourcing\.sqlite_wal must be true or false"),
        ("projection_lock", "none", r"eventsourcing\.projection_lock must be one of"),
        ("metadata_user", 5, r"eventsourcing\.metadata_user must be true or false"),
    ],
)
def test_bad_setting_is_refused_at_the_start(new_site: MakePyramidSite, name: str, value: Any, message: str) -> None:
    """A setting that is unknown or cannot be used is named when the application starts."""
    with pytest.raises(ConfigurationError, match=message):
        new_site(**{f"eventsourcing.{name}": value})


def test_several_applications(new_site: MakePyramidSite) -> None:
    """Each call adds an application, with tables of its own; they share the request's transaction."""
    made: list[Any] = []

    def configure(config: Any) -> None:
        base = orm.declarative_base()
        made.append(event_models(base, "Shop"))
        base.metadata.create_all(config.registry["dbsession_factory"].kw["bind"])
        config.add_eventsourcing(Shop, models=made[0])

    site = new_site(configure=configure, **VETO)

    def view(request: Any) -> Any:
        request.eventsourcing[Bank].open_account()
        request.eventsourcing[Shop].open_account()
        return request.eventsourcing.application.name

    assert site.answer(view).json == "Bank"
    assert site.stored() == (1, 0)
    with site.engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(made[0].StoredEvent)) == 1


def add_shop(config: Any) -> None:
    """Add a second application."""
    config.add_eventsourcing(Shop, models=event_models(orm.declarative_base(), "Shop"))


def add_shop_again(config: Any) -> None:
    """Add the same."""
    add_shop(config)


def test_conflicting_calls_are_found(new_site: MakePyramidSite) -> None:
    """Pyramid's own configuration reports an application that is added twice."""

    def configure(config: Any) -> None:
        config.include(add_shop)
        config.include(add_shop_again)

    with pytest.raises(ConfigurationConflictError):
        new_site(configure=configure)


def test_missing_factory_is_named() -> None:
    """If nothing makes the sessions of workers, the error at the start says so."""
    models = event_models(orm.declarative_base(), "Bank")
    config = Configurator(settings=VETO)
    config.include("pyramid_tm")
    config.include("flask_eventsourcing.contrib.pyramid")
    config.add_eventsourcing(Bank, models=models)
    with pytest.raises(ConfigurationExecutionError, match="dbsession_factory"):
        config.commit()
    with pytest.raises(ConfigurationError, match=r"event_models\(Base"):
        config.add_eventsourcing(Bank, models=object())


def test_applications_are_constructed_lazily(site: PyramidSite) -> None:
    """The start constructs no application, and opens no connection; the first use does."""
    assert not any(slot.constructed for slot in site.es.host._slots.values())
    site.es.construct()
    assert all(slot.constructed for slot in site.es.host._slots.values())


def test_projection_is_found_by_a_scan(ini: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A class with ``@projection`` is registered by ``config.scan()``, and the commands run it."""
    assert main([ini, "init-db"]) == 0
    state = configured.states[-1]
    account_id = state[Bank].open_account()
    with state.transaction():
        state[Bank].deposit(account_id, 5)
    assert main([ini, "run", "--all", "--once"]) == 0
    capsys.readouterr()
    assert main([ini, "status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found["projections"]] == ["Totals"]
    assert main([ini, "rebuild", "Totals", "--drop-old"]) == 0
    assert main([ini, "check"]) == 0
    with state.transaction() as session:
        assert session.scalars(sa.select(configured.Total.amount)).all() == [5]
    assert main([ini, "snapshots", "take", str(account_id)]) == 0
    assert main([ini, "projections", "pause", "Totals", "--reason", "tea"]) == 0
    assert main([ini, "status", "--check"]) == 1
    assert main([ini, "erase", str(account_id), "--yes"]) == 0
    state.close()


def test_error_of_a_command(ini: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that fails says why, and names commands with the ini file; a wrong call prints the usage."""
    assert main([ini, "run", "--all"]) == 1
    assert f"run 'pyramid-eventsourcing {ini} init-db' or your migrations" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([ini, "rebuild", "Totals", "--clean", "--dry-run"])
    assert caught.value.code == 2


def test_messages_of_a_server_leave_room_for_the_ini_file(ini: str) -> None:
    """Where no command was given the ini file, as in a server, messages say that one belongs there."""
    app = get_app(ini)
    with pytest.raises(MissingTableError, match="run 'pyramid-eventsourcing <ini file> init-db' or your migrations"):
        app.registry["flask_eventsourcing"][Bank].open_account()
    configured.states[-1].close()


def test_ini_file_that_cannot_be_used(ini: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file or section, a bad setting and a site without an application are one line each."""
    broken, bare = tmp_path / "broken.ini", tmp_path / "bare.ini"
    text = Path(ini).read_text()
    broken.write_text(text.replace("sqlalchemy.url", "eventsourcing.lock_tmeout = 3\nsqlalchemy.url"))
    bare.write_text(text.replace("configured:main", "configured:bare"))
    for given, message in (
        (str(tmp_path / "missing.ini"), "No such file"),
        (f"{ini}#other", "No section 'other'"),
        (str(broken), "did you mean eventsourcing.lock_timeout"),
        (str(bare), "There is no application"),
    ):
        assert main([given, "status"]) == 1
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1


def test_projection_of_one_of_several_applications(new_site: MakePyramidSite) -> None:
    """``config.add_projection`` takes a projection and the application that it follows."""

    class Nothing(ModelProjection):
        @on(Account.Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            """Do nothing."""

    site = new_site(configure=lambda config: config.add_projection(Nothing, of=Bank), **VETO)
    assert [consumer.name for consumer in site.es.projections] == ["Nothing"]
    assert projection(of=Bank)(Nothing) is Nothing
