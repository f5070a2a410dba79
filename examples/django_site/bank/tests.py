"""What a visitor of the site can rely on: ``python examples/django_site/manage.py test examples.django_site``."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

from django.core.management import call_command
from django.test import TransactionTestCase

from example_app.domain import Bank
from examples.django_site.bank.models import Balance, BankRecords, Transfer
from flask_eventsourcing.contrib.django import get_application


class SiteTests(TransactionTestCase):
    """The pages. The worker has connections of its own, so that a test's transaction would hide the events from it."""

    def open_account(self, owner: str = "Ada", first_deposit: str = "10") -> UUID:
        """Open an account and return its id."""
        answer = self.client.post("/accounts/new", {"owner": owner, "first_deposit": first_deposit})
        assert answer.status_code == 302, answer.text
        return UUID(answer["Location"].removeprefix("/accounts/"))

    def act(self, account_id: UUID, action: str, **posted: Any) -> Any:
        """Send a form of an account's page."""
        return self.client.post(f"/accounts/{account_id}/{action}", posted)

    def project(self) -> None:
        """Bring the read models up to date."""
        call_command("eventsourcing", "run", "--once", verbosity=0)

    def balance(self, account_id: UUID) -> int:
        """Return what an account holds, in cents."""
        return get_application(Bank).get_account(account_id).balance

    def test_money_in_and_out(self) -> None:
        """What a visitor pays in and out is on the account's page, and its statement tells every version."""
        account = self.open_account()
        self.assertRedirects(self.act(account, "deposit", amount="2.50", note="Egg money"), f"/accounts/{account}")
        self.act(account, "withdraw", amount="1")
        page = self.client.get(f"/accounts/{account}").text
        self.assertIn("€11.50", page)
        self.assertIn("Egg money", page)
        self.assertIn("€12.50", self.client.get(f"/accounts/{account}/statement?version=3").text)
        self.assertEqual(self.client.get(f"/accounts/{account}/statement?version=9").status_code, 404)

    def test_transfer_is_all_or_nothing(self) -> None:
        """A transfer stores the events of both accounts and its row, and one that is refused nothing."""
        sender, recipient = self.open_account(), self.open_account("Bob", "")
        self.project()
        self.act(sender, "transfer", recipient=recipient, amount="4")
        refused = self.act(sender, "transfer", recipient=recipient, amount="400")
        self.assertContains(refused, "The account holds €6.00", status_code=409)
        self.assertEqual((self.balance(sender), self.balance(recipient)), (600, 400))
        self.assertEqual(Transfer.objects.count(), 1)
        self.assertContains(self.client.get("/transfers"), "Bob")

    def test_bad_forms(self) -> None:
        """What is no amount, no name or no account is refused with a reason, and nothing is stored."""
        account = self.open_account()
        stored = BankRecords.StoredEvent.objects.count()
        self.assertContains(self.act(account, "deposit", amount="1e5"), "An amount is written like", status_code=422)
        self.assertContains(self.act(account, "transfer", amount="1", recipient="x"), "Recipient", status_code=422)
        self.assertEqual(self.act(account, "close").status_code, 409)
        self.assertEqual(self.client.post("/accounts/new", {"owner": "a\u0085b"}).status_code, 422)
        self.assertEqual(self.client.post("/accounts/new", {"owner": "Ada", "first_deposit": "-1"}).status_code, 422)
        self.assertEqual(BankRecords.StoredEvent.objects.count(), stored)

    def test_unknown_account(self) -> None:
        """There is no page and no form for an account that there is not."""
        self.assertEqual(self.client.get(f"/accounts/{uuid4()}").status_code, 404)
        self.assertEqual(self.act(uuid4(), "deposit", amount="1").status_code, 404)
        self.assertEqual(self.act(self.open_account(), "rob", amount="1").status_code, 404)

    def test_closing(self) -> None:
        """An empty account is closed, takes no more, and stays readable."""
        account = self.open_account(first_deposit="")
        self.act(account, "close")
        self.assertEqual(self.act(account, "deposit", amount="1").status_code, 409)
        self.project()
        self.assertContains(self.client.get("/"), "Closed")
        self.assertContains(self.client.get(f"/accounts/{account}"), "Account closed")

    def test_projection(self) -> None:
        """The first page lists what the projection has, after a worker has run."""
        self.open_account("Ada <b>")
        self.assertContains(self.client.get("/"), "No accounts yet")
        self.project()
        page = self.client.get("/")
        self.assertContains(page, "Ada &lt;b&gt;")
        self.assertContains(page, "€10.00")
        self.assertEqual(Balance.objects.get().amount, 1000)

    def test_migrations(self) -> None:
        """The migrations make what the models say."""
        call_command("makemigrations", "--check", "--dry-run", verbosity=0)
        call_command("check", databases=["default"])
