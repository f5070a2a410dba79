"""Make ``eventsourcing_django.sql``, with eventsourcing-django 0.6 in an environment of its own.

::

    python -m venv former
    former/bin/pip install "eventsourcing-django==0.6" "eventsourcing==9.4.6" "Django<5.2" cryptography
    former/bin/python tests/django_host/former/make_eventsourcing_django.py

It stores what a bank and a shop of ``domain.py`` do, in the one table of that package, and writes the tables as SQL.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
CIPHER_KEY = "Y2lwaGVyIG9mIHRoZSB0ZXN0cyB0aGF0IGlzIG5vbmU="
ENV = {
    "PERSISTENCE_MODULE": "eventsourcing_django",
    "IS_SNAPSHOTTING_ENABLED": "y",
    "BANK_COMPRESSOR_TOPIC": "eventsourcing.compressor:ZlibCompressor",
    "BANK_CIPHER_TOPIC": "eventsourcing.cipher:AESCipher",
    "BANK_CIPHER_KEY": CIPHER_KEY,
}


def main() -> None:
    """Write the dump."""
    import django
    from django.conf import settings

    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    settings.configure(DATABASES={"default": database}, INSTALLED_APPS=["eventsourcing_django"], USE_TZ=True)
    django.setup()
    from django.core.management import call_command
    from django.db import connection

    call_command("migrate", verbosity=0)
    store()
    lines = [f"{line}\n" for line in connection.connection.iterdump() if "django_migrations" not in line]
    (FOLDER / "eventsourcing_django.sql").write_text("".join(lines))


def store() -> None:
    """Store events: those of three applications among each other, a snapshot, and positions that are missing."""
    from django.apps import apps
    from eventsourcing.system import SingleThreadedRunner, System

    sys.path.insert(0, str(FOLDER.parents[2]))
    from tests.django_host.former.domain import Account, Bank, Shop

    class Archive(Bank):
        """An application that nobody takes along."""

    runner: Any = SingleThreadedRunner(System(pipes=[[Bank, Shop]]), env=ENV)
    runner.start()
    bank = runner.get(Bank)
    archive = Archive(env=ENV)
    for owner in ("Ada", "Bob"):
        bank.open_account(owner)
        archive.open_account(owner)
    for amount in ("1.10", "2.20", "3.30"):
        bank.deposit("Ada", amount)
    bank.open_account("Cyd")
    # An account that was deleted by hand, among the others.
    stored_events: Any = apps.get_model("eventsourcing_django", "StoredEventRecord")
    stored_events.objects.filter(originator_id=Account.create_id("Bob"), application_name="Bank").delete()
    bank.deposit("Ada", "4.40")
    runner.stop()
    # Events that the shop has not seen yet.
    late = Bank(env=ENV)
    late.open_account("Mallory")
    late.open_account("Dan")


if __name__ == "__main__":
    main()
