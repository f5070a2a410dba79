"""The commands of Pyramid sites and of Django projects beside those of Flask apps."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import click
import pytest
from django.core.management.base import CommandParser

from flask_eventsourcing.cli import group
from flask_eventsourcing.contrib.django.management.commands.eventsourcing import Command
from flask_eventsourcing.contrib.pyramid.console import make_parser


def options_of_click(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Iterate over the commands of a group, each with its options."""
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from options_of_click(each, (*path, name))
    else:
        yield path, {opt for p in command.params for opt in p.opts if opt.startswith("--")}


def options_of_parser(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Iterate over the commands of a parser, each with its options."""
    groups = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    for each in groups:
        for name, found in each.choices.items():
            yield from options_of_parser(found, (*path, name))
    if not groups:
        yield path, {o for a in parser._actions for o in a.option_strings if o.startswith("--") and o != "--help"}


def django_parser() -> argparse.ArgumentParser:
    """Return what reads the command line of ``manage.py eventsourcing``."""
    parser: argparse.ArgumentParser = CommandParser()
    Command().add_arguments(parser)
    return parser


@pytest.mark.parametrize("make", [make_parser, django_parser])
def test_commands_are_those_of_flask(make: Callable[[], argparse.ArgumentParser]) -> None:
    """The command has the names and the options of ``flask eventsourcing``."""
    assert dict(options_of_parser(make())) == dict(options_of_click(group))


def test_numbers_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A number that makes no sense is refused, and the message says why."""
    for words, text in (
        (["dead-letters", "list", "--limit", "0"], "0 is less than 1"),
        (["run", "--log-every", "0"], "0 is not more than 0"),
        (["projections", "skip", "x", "y"], "invalid int value"),
    ):
        with pytest.raises(SystemExit):
            make_parser().parse_args(["site.ini", *words])
        assert text in capsys.readouterr().err
