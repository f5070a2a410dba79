"""The pages, as a browser uses them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from example_app.extensions import db, es

if TYPE_CHECKING:
    from flask.testing import FlaskClient
    from werkzeug.test import TestResponse

    from example_app.tests.conftest import Accounts

NOBODY = UUID(int=1)


def submit(client: FlaskClient, page: str, action: str, **fields: str) -> TestResponse:
    """Fill in a form of a page and send it."""
    token = re.search(r'name="csrf_token" value="([^"]+)"', client.get(page).text)
    assert token is not None
    return client.post(action, data={**fields, "csrf_token": token[1]})


def stored_events() -> int:
    """Count what is stored."""
    return int(db.session.query(es.StoredEvent).count())


def test_an_empty_bank_invites(client: FlaskClient) -> None:
    """Without accounts and transfers the lists say so and where to begin."""
    assert "No accounts yet" in client.get("/").text
    assert "No transfers yet" in client.get("/transfers").text


def test_an_account_is_opened_by_a_form(client: FlaskClient) -> None:
    """The form redirects to the new account's page, which greets once, and the list shows the account."""
    answer = submit(client, "/accounts/new", "/accounts/new", owner="Ada <b>", first_deposit="1234,50")
    assert answer.status_code == 303
    page = client.get(answer.headers["Location"]).text
    assert "Welcome, Ada &lt;b&gt;." in page
    assert "€1,234.50" in page
    assert "Welcome" not in client.get(answer.headers["Location"]).text
    assert "Ada &lt;b&gt;" in client.get("/").text


def test_a_bad_form_comes_back_as_it_was(client: FlaskClient) -> None:
    """A form that cannot be accepted is shown again with what was typed and the reason."""
    answer = submit(client, "/accounts/new", "/accounts/new", owner="Ada", first_deposit="a lot")
    assert answer.status_code == 422
    assert "That amount cannot be booked" in answer.text
    assert 'value="Ada"' in answer.text
    assert 'value="a lot"' in answer.text
    assert stored_events() == 0


def test_money_is_moved_by_forms(client: FlaskClient, accounts: Accounts) -> None:
    """Paying in, paying out and transferring redirect to the account and tell what was done."""
    ada, ben = accounts.open("Ada", "10.00"), accounts.open("Ben")
    page = f"/accounts/{ada}"
    for action, fields, message in (
        ("deposit", {"amount": "5"}, "€5.00 paid in."),
        ("withdraw", {"amount": "2.50", "note": "cash"}, "€2.50 paid out."),
        ("transfer", {"amount": "12.50", "recipient_id": ben}, "€12.50 sent to Ben."),
        ("close", {}, "The account is closed."),
    ):
        answer = submit(client, page, f"{page}/{action}", **fields)
        assert (answer.status_code, answer.headers["Location"]) == (303, page)
        assert message in client.get(page).text
    assert accounts.balance(ben) == "12.50"
    assert "Ben" in client.get("/transfers").text
    assert "<form" not in client.get(page).text


def test_an_overdrawn_account_says_so(client: FlaskClient, accounts: Accounts) -> None:
    """The account's page comes back with 422, what it holds, what was asked for, and the form as it was filled in."""
    page = f"/accounts/{accounts.open('Ada', '10.00')}"
    before = stored_events()
    answer = submit(client, page, f"{page}/withdraw", amount="10.01", note="A yacht")
    assert answer.status_code == 422
    assert "Not enough money in the account" in answer.text
    assert "holds €10.00, and €10.01 was asked for. Nothing was changed." in answer.text
    assert 'value="A yacht"' in answer.text
    assert stored_events() == before


@pytest.mark.parametrize(
    ("action", "fields", "status", "message"),
    [
        ("deposit", {}, 422, "That amount cannot be booked"),
        ("deposit", {"amount": "1", "note": "x" * 81}, 422, "That text cannot be used"),
        ("transfer", {"amount": "1"}, 422, "That is not an account number"),
        ("transfer", {"amount": "1", "recipient_id": str(NOBODY)}, 404, "No such account"),
        ("close", {}, 409, "The account still holds money"),
    ],
)
def test_refused_forms_say_why(
    client: FlaskClient, accounts: Accounts, action: str, fields: dict[str, str], status: int, message: str
) -> None:
    """Whatever is refused shows the account's page with the reason and stores nothing."""
    page = f"/accounts/{accounts.open('Ada', '10.00')}"
    before = stored_events()
    answer = submit(client, page, f"{page}/{action}", **fields)
    assert answer.status_code == status
    assert message in answer.text
    assert "Move money" in answer.text
    assert stored_events() == before


@pytest.mark.parametrize("token", [None, "", "wrong", "ünïcode"])
def test_a_form_from_elsewhere_is_refused(client: FlaskClient, accounts: Accounts, token: str | None) -> None:
    """A form without this session's token answers 400 and changes nothing."""
    account_id = accounts.open("Ada", "10.00")
    client.get(f"/accounts/{account_id}")
    fields = {"amount": "1"} | ({} if token is None else {"csrf_token": token})
    answer = client.post(f"/accounts/{account_id}/withdraw", data=fields)
    assert answer.status_code == 400
    assert "Nothing was changed" in answer.text
    assert accounts.balance(account_id) == "10.00"


def test_the_past_can_be_seen(client: FlaskClient, accounts: Accounts) -> None:
    """The statement shows the balance and the entries of any version, with links to its neighbours."""
    account_id = accounts.open("Ada", "10.00")
    client.post(f"/api/accounts/{account_id}/withdrawals", json={"amount": "4.00", "note": "cash"})
    path = f"/accounts/{account_id}/statement"
    now, past = client.get(path).text, client.get(f"{path}?version=2").text
    assert "As of version 3" in now
    assert "cash" in now
    assert "As of version 2" in past
    assert "cash" not in past
    assert f'href="{path}?version=1"' in past
    assert f'href="{path}?version=3"' in past
    assert 'max="3" value="2"' in past
    for version in ("0", "4", "two"):
        assert client.get(f"{path}?version={version}").status_code == 404


def test_a_long_statement_is_shown_in_parts(client: FlaskClient, accounts: Accounts) -> None:
    """A statement shows its latest entries first, twenty a page, and each page leads to its neighbours as of then."""
    account_id = accounts.open()
    for number in range(25):
        client.post(f"/api/accounts/{account_id}/deposits", json={"amount": "1.00", "note": f"note {number}."})
    path = f"/accounts/{account_id}/statement?version=25"
    first, second = client.get(path).text, client.get(f"{path}&page=2").text
    assert first.count('<li class="entry') == 20
    assert second.count('<li class="entry') == 5
    assert 'href="?version=25&amp;page=2">Older' in first
    assert 'href="?version=25&amp;page=1">Newer' in second
    assert "note 24." not in first
    assert "note 23." in first
    assert "note 3." in second
    assert "note 4." not in second
    assert client.get(f"{path}&page=3").status_code == 404


@pytest.mark.parametrize("path", ["/", "/transfers", "/balances", "/alerts"])
def test_a_page_number_that_is_no_number_is_a_bad_request(client: FlaskClient, path: str) -> None:
    """``page=x`` answers 400 with a page that says so; a number without a page is not found."""
    answer = client.get(f"{path}?page=x")
    assert (answer.status_code, answer.mimetype) == (400, "text/html")
    assert "The page is not a whole number." in answer.text
    for page in (0, 99):
        answer = client.get(f"{path}?page={page}")
        assert answer.status_code == 404
        assert "There is no such page of the list." in answer.text


def test_the_list_is_searched_and_paged(client: FlaskClient, accounts: Accounts) -> None:
    """The list shows twenty accounts a page, keeps the search while paging, and says when nobody was found."""
    for number in range(21):
        accounts.open(f"Ada {number}")
    accounts.open("Ben")
    first = client.get("/?search=ada").text
    assert first.count('class="account"') == 20
    assert "search=ada&amp;page=2" in first
    assert client.get("/?search=ada&page=2").text.count('class="account"') == 1
    assert "Nobody by that name" in client.get("/?search=%00zoe").text


@pytest.mark.parametrize("path", ["/nothing", f"/accounts/{NOBODY}", f"/accounts/{NOBODY}/statement", "/?page=9"])
def test_what_is_not_there_has_a_page(client: FlaskClient, path: str) -> None:
    """An unknown address answers 404 with a page that leads back."""
    answer = client.get(path)
    assert (answer.status_code, answer.mimetype) == (404, "text/html")
    assert "To the accounts" in answer.text


def test_a_form_for_an_unknown_account_has_a_page(client: FlaskClient) -> None:
    """A form that is sent to an account that never was answers 404 with a page that leads back."""
    answer = submit(client, "/accounts/new", f"/accounts/{NOBODY}/deposit", amount="1")
    assert answer.status_code == 404
    assert "No such account" in answer.text
    broken = submit(client, "/accounts/new", f"/accounts/{NOBODY}/deposit", amount="much")
    assert broken.status_code == 404


def test_pages_come_with_security_headers(client: FlaskClient) -> None:
    """Every page forbids foreign scripts, framing and sniffing, and the pages have no inline script or style."""
    answer = client.get("/accounts/new")
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "SameSite=Lax" in answer.headers["Set-Cookie"]
    assert "HttpOnly" in answer.headers["Set-Cookie"]
    assert "<style" not in answer.text
    assert " style=" not in answer.text
