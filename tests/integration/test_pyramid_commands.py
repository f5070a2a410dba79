"""The command of Pyramid sites beside that of Flask apps."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import click

from flask_eventsourcing.cli import group
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


def test_commands_are_those_of_flask() -> None:
    """The command has the names and the options of ``flask eventsourcing``."""
    assert dict(options_of_parser(make_parser())) == dict(options_of_click(group))
