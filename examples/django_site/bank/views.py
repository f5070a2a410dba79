"""The pages: every form posts, and is answered with a redirect or with itself and what was wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from uuid import UUID

from django.contrib import messages
from django.core.paginator import Paginator
from django.db.models import Sum
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from example_app.domain import Bank, Statement
from example_app.errors import AccountNotFound, BankError, VersionNotFound
from example_app.money import money_text
from examples.django_site.bank import services
from examples.django_site.bank.forms import CloseForm, MoneyForm, OpenForm, TransferForm
from examples.django_site.bank.models import Balance, Transfer
from flask_eventsourcing.contrib.django import get_application

NEWEST_ENTRIES = 7
PER_PAGE = 20
INVALID, REFUSED = 422, 409


@require_GET
def index(request: HttpRequest) -> HttpResponse:
    """List what each account holds, as far as the projection is."""
    found = Balance.objects.order_by("closed", "owner", "account_id")
    open_accounts = Balance.objects.filter(closed=False)
    total = open_accounts.aggregate(total=Sum("amount"))["total"] or 0
    context = {"page": _page(request, found), "count": open_accounts.count(), "total": total}
    return render(request, "bank/index.html", context)


@require_GET
def transfers(request: HttpRequest) -> HttpResponse:
    """List the transfers, the latest first."""
    page = _page(request, Transfer.objects.order_by("-created_at", "id"))
    ids = {each for row in page for each in (row.sender_id, row.recipient_id)}
    return render(request, "bank/transfers.html", {"page": page, "owners": _owners(ids)})


@require_http_methods(["GET", "POST"])
def open_account(request: HttpRequest) -> HttpResponse:
    """Show the form for a new account, and open one."""
    form = OpenForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        try:
            made = services.open_account(**form.cleaned_data)
        except BankError as error:
            form.add_error(None, str(error))
        else:
            messages.success(request, f"Welcome, {made.owner}. Your account is open.")
            return redirect("account", made.id)
    status = INVALID if request.method == "POST" else 200
    return render(request, "bank/open.html", {"form": form}, status=status)


@require_GET
def account(request: HttpRequest, account_id: UUID) -> HttpResponse:
    """Show an account with its latest entries and everything that can be done with it."""
    return _account_page(request, account_id)


@require_GET
def statement(request: HttpRequest, account_id: UUID) -> HttpResponse:
    """Show what the account's history said at any of its versions."""
    bank = get_application(Bank)
    given = request.GET.get("version", "")
    try:
        found = bank.statement(account_id, int(given) if given.isdecimal() and len(given) < 10 else None)
    except (AccountNotFound, VersionNotFound) as error:
        raise Http404(str(error)) from None
    entries = found.entries[::-1]
    context = {"account": found, "entries": entries, "owners": _owners_of(entries)}
    return render(request, "bank/statement.html", context)


Done = Callable[..., Any]
ACTIONS: dict[str, tuple[Any, Done, str]] = {
    "deposit": (MoneyForm, services.deposit, "{amount} paid in."),
    "withdraw": (MoneyForm, services.withdraw, "{amount} paid out."),
    "transfer": (TransferForm, services.transfer, "{amount} sent to {owner}."),
    "close": (CloseForm, services.close_account, "The account is closed. Its history stays readable."),
}


@require_POST
def act(request: HttpRequest, account_id: UUID, action: str) -> HttpResponse:
    """Do what a form of an account's page asks for."""
    if action not in ACTIONS:
        raise Http404("There is no such form.")
    kind, do, text = ACTIONS[action]
    form = kind(request.POST)
    if not form.is_valid():
        return _account_page(request, account_id, action, form, INVALID)
    given = dict(form.cleaned_data)
    if "recipient" in given:
        given = {"recipient_id": given.pop("recipient").account_id, **given}
    try:
        changed = do(account_id, **given)
    except AccountNotFound as error:
        raise Http404(str(error)) from None
    except BankError as error:
        form.add_error(None, str(error))
        return _account_page(request, account_id, action, form, REFUSED)
    messages.success(request, text.format(amount=money_text(given.get("amount", 0)), owner=changed.owner))
    return redirect("account", account_id)


def _account_page(
    request: HttpRequest, account_id: UUID, action: str = "", form: Any = None, status: int = 200
) -> HttpResponse:
    bank = get_application(Bank)
    try:
        latest: Statement = bank.summary(account_id)
    except AccountNotFound as error:
        raise Http404(str(error)) from None
    first = max(1, latest.version - NEWEST_ENTRIES + 1)
    entries = bank.entries(account_id, first, latest.version)[::-1]
    context = {
        "account": latest,
        "entries": entries,
        "owners": _owners_of(entries),
        "recipients": Balance.objects.filter(closed=False).exclude(account_id=account_id).order_by("owner")[:500],
        "action": action,
        "form": form,
    }
    return render(request, "bank/account.html", context, status=status)


def _owners_of(entries: Iterable[Any]) -> dict[UUID, str]:
    return _owners({each.counterparty_id for each in entries if each.counterparty_id})


def _owners(ids: set[UUID]) -> dict[UUID, str]:
    return dict(Balance.objects.filter(account_id__in=ids).values_list("account_id", "owner"))


def _page(request: HttpRequest, found: Any) -> Any:
    return Paginator(found, PER_PAGE).get_page(request.GET.get("page"))
