"""How commands find projections by their names.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from eventsourcing.domain import AggregateCreated

from flask_eventsourcing.projections import ModelProjection, on
from tests.bank import Site, make_site
from tests.domain import Bank, Shop


def projection(name: str, *, inline: bool = False) -> type[ModelProjection]:
    """Make a projection class of that name."""

    class Made(ModelProjection):
        @on(AggregateCreated)
        def opened(self, event: Any, session: Any) -> None:
            """Do nothing."""

    Made.name = name
    Made.inline = inline
    Made.__qualname__ = name
    return Made


def run(site: Site, *arguments: str) -> tuple[int, str]:
    """Run a command and return its exit code and what it prints."""
    result = site.app.test_cli_runner().invoke(args=["eventsourcing", *arguments])
    return result.exit_code, result.output


@pytest.fixture
def site(tmp_path: Path) -> Any:
    """A site with two applications and no projection yet."""
    made = make_site(f"sqlite:///{tmp_path / 'bank.db'}", Bank, Shop)
    yield made
    made.close()


def test_no_projection(site: Site) -> None:
    """Without any projection, commands say so and how to register one; the status is good."""
    for arguments in (("run",), ("run", "--all"), ("run", "Balances")):
        code, output = run(site, *arguments)
        assert code == 1
        assert "No projection is registered: register its class, in a Flask app with @es.projection" in output
    assert run(site, "status", "--check") == (0, "No projection is registered.\n")


def test_the_only_projection_needs_no_name(site: Site) -> None:
    """Where there is only one projection that needs a worker, ``run`` runs it."""
    site.es.projection(of=Bank)(projection("Only"))
    site.es.projection(of=Bank)(projection("Within", inline=True))
    assert run(site, "init-db")[0] == 0
    site.opened()
    assert run(site, "run", "--once")[0] == 0
    with site.app.app_context():
        assert {each.name: each.position for each in site.es.health().projections} == {"Only": 1, "Within": 1}


def test_only_inline_projections(site: Site) -> None:
    """Where all projections are inline there is nothing to run, and that is said."""
    site.es.projection(of=Bank)(projection("Within", inline=True))
    code, output = run(site, "run", "--all")
    assert code == 1
    assert "all projections are inline" in output


def test_the_same_name_in_two_applications(site: Site) -> None:
    """For a name that two applications have, the command asks for the application's name before it."""
    for of in (Bank, Shop):
        site.es.projection(of=of)(projection("Balances"))
    assert run(site, "init-db")[0] == 0
    code, output = run(site, "run", "Balances", "--once")
    assert code == 1
    assert "write Bank.Balances or Shop.Balances" in output
    site.opened()
    assert run(site, "run", "Bank.Balances", "--once")[0] == 0
    code, output = run(site, "run", "Nobody")
    assert "Registered: Bank.Balances, Shop.Balances." in output
