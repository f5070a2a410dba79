"""A month's statement as a mail: composed from the history, and handed to a mail server or put into a folder."""

from __future__ import annotations

import os
import smtplib
from email.message import EmailMessage
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from flask import current_app

from example_app.domain import Bank
from example_app.extensions import es
from example_app.money import change_text, money_text

if TYPE_CHECKING:
    from example_app.domain import Entry, Statement

KINDS = {
    "opened": "Account opened",
    "closed": "Account closed",
    "deposit": "Deposit",
    "withdrawal": "Withdrawal",
    "transfer_sent": "Transfer sent",
    "transfer_received": "Transfer received",
}
SECONDS = 30.0


def mail_statement(account_id: str, recipient: str, month: str, number: str) -> str:
    """Compose and deliver the statement of a month, ``"2026-11"``, and say where it went.

    :param number: the same when a task is run again, so that the mail can be told from another one.
    """
    message = compose(es[Bank].statement(UUID(account_id)), recipient, month, number)
    return deliver(message, number)


def compose(statement: Statement, recipient: str, month: str, number: str) -> EmailMessage:
    """Return the mail with the entries of a month and the balances before and after it."""
    earlier = [entry for entry in statement.entries if f"{entry.recorded_at:%Y-%m}" < month]
    entries = [entry for entry in statement.entries if f"{entry.recorded_at:%Y-%m}" == month]
    before = earlier[-1].balance if earlier else 0
    after = entries[-1].balance if entries else before
    message = EmailMessage()
    message["From"] = current_app.config["MAIL_SENDER"]
    message["To"] = recipient
    message["Subject"] = f"Your statement for {month}"
    message["Message-ID"] = f"<{number}@statements.invalid>"
    lines = [
        f"Statement of {statement.owner} for {month}",
        "",
        f"Balance before: {money_text(before)}",
        *([_line(entry) for entry in entries] or ["There were no entries."]),
        f"Balance after: {money_text(after)}",
    ]
    message.set_content("\n".join(lines) + "\n")
    return message


def _line(entry: Entry) -> str:
    amount = change_text(entry.amount) if entry.amount else ""
    return f"{entry.recorded_at:%d %b %H:%M}  {KINDS[entry.kind]:<18} {amount:>14}  {entry.note}".rstrip()


def deliver(message: EmailMessage, number: str) -> str:
    """Send a mail through ``MAIL_SERVER``, ``host:port``; without one, put it into the instance folder's ``outbox``."""
    server = current_app.config["MAIL_SERVER"]
    if server:
        host, _, port = server.partition(":")
        with smtplib.SMTP(host, int(port or 25), timeout=SECONDS) as connection:
            connection.send_message(message)
        return str(server)
    folder = Path(current_app.instance_path) / "outbox"
    folder.mkdir(parents=True, exist_ok=True)
    # Of the same name when the task runs again, and whole whenever somebody looks.
    path, draft = folder / f"{number}.eml", folder / f"{number}.{os.getpid()}.draft"
    draft.write_bytes(message.as_bytes())
    draft.replace(path)
    return str(path)
