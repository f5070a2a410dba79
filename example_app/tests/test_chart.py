"""The line of the balance."""

from __future__ import annotations

from example_app.chart import balance_chart
from example_app.domain import Bank


def test_a_chart_keeps_room_for_what_came_later() -> None:
    """The line ends where the statement's version lies among all versions, and the highest balance is at the top."""
    with Bank(env={"PERSISTENCE_MODULE": "eventsourcing.popo"}) as bank:
        account_id = bank.open_account("Ada", 1000).id
        bank.withdraw(account_id, 500)
        chart = balance_chart(bank.statement(account_id, 2))
        assert (chart.line, chart.end_x, chart.end_y) == ("10,150 320,150 320,10", 320, 10)
        assert balance_chart(bank.statement(account_id)).end_x == 630


def test_an_account_with_one_entry_has_a_chart() -> None:
    """A new account without money is drawn, not divided by zero."""
    with Bank(env={"PERSISTENCE_MODULE": "eventsourcing.popo"}) as bank:
        assert balance_chart(bank.statement(bank.open_account("Ada").id)).line == "10,150"
