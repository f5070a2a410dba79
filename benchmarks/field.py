"""Who takes part."""

from __future__ import annotations

from .bare import BarePostgreSQL, BareSQLite
from .contenders import Contender, OwnPostgreSQL, OwnSQLite, Peer, This, ThisAlone

CONTENDERS: tuple[type[Contender], ...] = (This, ThisAlone, OwnSQLite, OwnPostgreSQL, Peer, BareSQLite, BarePostgreSQL)


def contenders(database: str) -> list[type[Contender]]:
    """The contenders on a database whose packages are installed."""
    return [contender for contender in CONTENDERS if database in contender.databases and not contender.missing()]


def absent(database: str) -> list[str]:
    """A line about each contender on a database that is left out."""
    return [
        f"{contender.title} is left out: {', '.join(contender.missing())} is not installed."
        for contender in CONTENDERS
        if database in contender.databases and contender.missing()
    ]


def contender(name: str, database: str) -> type[Contender]:
    """Find a contender on a database."""
    return next(each for each in contenders(database) if each.name == name)
