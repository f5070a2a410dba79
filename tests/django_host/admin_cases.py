"""The tests of the admin, for the project of the documentation: ``manage.py test`` runs them there."""

from __future__ import annotations

from typing import Any
from unittest import mock

from bank.domain import Account, Bank  # type: ignore[import-not-found]
from bank.models import BankRecords  # type: ignore[import-not-found]
from bank.projections import Balances  # type: ignore[import-not-found]
from django.contrib.auth.models import Permission, User
from django.contrib.contenttypes.models import ContentType

from flask_eventsourcing.contrib.django import admin, get_application
from flask_eventsourcing.contrib.django.testing import EventSourcingTestCase, run_projections

EVENTS = "/admin/bank/bankstoredevent/"
LETTERS = "/admin/bank/bankdeadletter/"
CHECKPOINTS = "/admin/bank/bankprojection/"


FAILS: list[bool] = []
_opened: Any = Balances.handlers.functions[Account.Opened]


def opened(self: Any, event: Any) -> None:
    """Handle the event, or fail."""
    if FAILS:
        raise ValueError("wrong")
    _opened(self, event)


Balances.handlers.functions[Account.Opened] = opened
Balances.on_failure, Balances.retries = "dead-letter", 0


class AdminTest(EventSourcingTestCase):
    """What people see, and may do."""

    def setUp(self) -> None:
        """Set an event aside."""
        super().setUp()
        self.account = get_application(Bank).open_account("Ada Secret")
        FAILS.append(True)
        run_projections("Balances")
        FAILS.clear()
        self.letter = BankRecords.DeadLetter.objects.get()

    def enter(self, *permissions: str, superuser: bool = False) -> None:
        """Log somebody in."""
        user = User.objects.create(username="somebody", is_staff=True, is_superuser=superuser)
        for each in permissions:
            user.user_permissions.add(Permission.objects.get(codename=each))
        self.client.force_login(user)

    def test_read_only(self) -> None:
        """A superuser sees every model, can change none, and sees no state of an event."""
        self.enter(superuser=True)
        for page in (EVENTS, LETTERS, CHECKPOINTS):
            assert self.client.get(page).status_code == 200
            assert self.client.get(f"{page}add/").status_code == 403
        event = BankRecords.StoredEvent.objects.get()
        for page, key in ((EVENTS, event.pk), (LETTERS, self.letter.pk), (CHECKPOINTS, "Balances")):
            shown = self.client.get(f"{page}{key}/change/")
            assert shown.status_code == 200
            self.assertNotContains(shown, "Secret")
            self.assertNotContains(shown, 'name="_save"')
            assert self.client.post(f"{page}{key}/change/", {"topic": "x"}).status_code == 403
            assert self.client.post(f"{page}{key}/delete/", {"post": "yes"}).status_code == 403

    def test_search(self) -> None:
        """A search finds events by the exact id of the aggregate, and finds no others."""
        self.enter("view_bankstoredevent")
        self.assertContains(self.client.get(EVENTS, {"q": str(self.account.id)}), "Account.Opened")
        self.assertContains(self.client.get(EVENTS, {"q": "bank.domain:Account.Opened"}), str(self.account.id))
        self.assertNotContains(self.client.get(EVENTS, {"q": "ccc"}), "Account.Opened")

    def test_what_is_not_shown_is_not_found(self) -> None:
        """A state, or the token of a runner, cannot be guessed part by part from the rows that an address finds."""
        self.enter(superuser=True)
        for page, query in ((EVENTS, "state__contains"), (EVENTS, "state"), (CHECKPOINTS, "token__startswith")):
            assert self.client.get(page, {query: "Secret"}).status_code == 400
        self.assertContains(self.client.get(EVENTS, {"originator_version": "1"}), str(self.account.id))

    def test_many_rows(self) -> None:
        """However long the log is, a page counts a limited number of rows, of which it has the last ones."""
        self.enter("view_bankstoredevent")
        later = [get_application(Bank).open_account(owner) for owner in ("Eve", "Zoe")]
        with mock.patch.object(admin, "MOST_ROWS", 2), mock.patch.object(admin.EventAdmin, "list_per_page", 1):
            shown = [self.client.get(EVENTS, {"p": number}) for number in (1, 2)]
        for page, account in zip(shown, reversed(later), strict=True):
            self.assertContains(page, str(account.id))
            assert page.context["cl"].result_count == 2

    def test_permissions(self) -> None:
        """A user with the permission to view one model sees no other, and can change nothing."""
        self.enter("view_bankdeadletter")
        assert self.client.get(EVENTS).status_code == 403
        assert self.client.get(LETTERS).status_code == 200
        for action in ("retry", "discard", "delete_selected"):
            self.act(action)
        assert BankRecords.DeadLetter.objects.exists()
        names = set(Permission.objects.filter(content_type=self.content_type()).values_list("codename", flat=True))
        assert names == {"view_bankdeadletter", "retry_bankdeadletter", "discard_bankdeadletter"}

    def content_type(self) -> Any:
        """Return that of the dead letters."""
        return ContentType.objects.get_for_model(BankRecords.DeadLetter)

    def act(self, action: str) -> Any:
        """Call an action for the letter."""
        return self.client.post(LETTERS, {"action": action, "_selected_action": [self.letter.pk]}, follow=True)

    def test_retry(self) -> None:
        """The action for a retry applies the event, and its message is that of the command."""
        from bank.models import Balance

        self.enter("view_bankdeadletter", "retry_bankdeadletter")
        self.assertContains(self.act("retry"), f"{self.letter.pk} applied")
        assert not BankRecords.DeadLetter.objects.exists()
        assert Balance.objects.get().account_id == self.account.id

    def test_discard(self) -> None:
        """The action for a discard gives the event up."""
        self.enter("view_bankdeadletter", "discard_bankdeadletter")
        self.act("discard")
        assert not BankRecords.DeadLetter.objects.exists()
