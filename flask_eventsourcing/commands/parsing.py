"""Reads the command line with ``argparse``, for hosts that have no other way: the commands are those of the list."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any

from .listing import Group, Parameter


def add_commands(parser: Any, group: Group) -> None:
    """Add the commands of a group. The result of the parser has the given command as ``listed``.

    :param parser: an ``argparse.ArgumentParser``.
    """
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for each in group.commands:
        first, *_ = each.help.partition("\n\n")
        made = commands.add_parser(each.name, help=first, description=each.help)
        if isinstance(each, Group):
            add_commands(made, each)
            continue
        made.set_defaults(listed=each)
        for parameter in each.parameters:
            _add(made, parameter)


def _add(parser: Any, parameter: Parameter) -> None:
    options: dict[str, Any] = {"help": parameter.help}
    if parameter.kind is bool:
        parser.add_argument(parameter.name, dest=parameter.destination, action="store_true", **options)
        return
    options |= {"type": _Kind(parameter), "metavar": parameter.metavar, "default": parameter.default}
    if parameter.is_option:
        parser.add_argument(parameter.name, dest=parameter.destination, required=parameter.required, **options)
        return
    if parameter.many or not parameter.required:
        options["nargs"] = ("+" if parameter.required else "*") if parameter.many else "?"
    options["metavar"] = parameter.single
    parser.add_argument(parameter.destination, **options)


class _Kind:
    """Reads a value from the command line."""

    def __init__(self, parameter: Parameter) -> None:
        self._parameter = parameter
        # What argparse calls it in its message.
        self.__name__ = parameter.kind.__name__

    def __call__(self, text: str) -> Any:
        """Return the value.

        :raises ArgumentTypeError: for a number that is too small.
        """
        value = self._parameter.kind(text)
        least = self._parameter.least
        if least is None:
            return value
        if self._parameter.kind is float and not value > least:
            raise ArgumentTypeError(f"{text} is not more than {least}")
        if value < least:
            raise ArgumentTypeError(f"{text} is less than {least}")
        return value
