"""The JSON API."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from example_app.extensions import db, es
from example_app.models import AccountSummary, Transfer

if TYPE_CHECKING:
    from flask.testing import FlaskClient
    from werkzeug.test import TestResponse

    from example_app.tests.conftest import Accounts


def assert_problem(answer: TestResponse, status: int, name: str | None = None) -> None:
    """Check that an answer is a problem document with this status and type."""
    assert (answer.status_code, answer.content_type) == (status, "application/problem+json")
    problem = answer.get_json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert problem["type"] == (f"urn:example:bank:{name}" if name else "about:blank")


def stored_events() -> int:
    """Count what is stored."""
    return int(db.session.query(es.StoredEvent).count())


def test_an_account_is_opened(client: FlaskClient) -> None:
    """Opening answers 201 with the account and where to find it."""
    answer = client.post("/api/accounts", json={"owner": "Ada", "first_deposit": "12.50"})
    assert answer.status_code == 201
    account = answer.get_json()
    assert (account["owner"], account["balance"], account["currency"]) == ("Ada", "12.50", "EUR")
    assert client.get(answer.headers["Location"]).get_json() == account


def test_accounts_are_listed(client: FlaskClient, accounts: Accounts) -> None:
    """The list has the account that changed last first, and can be searched and paged."""
    ada, ben = accounts.open("Ada"), accounts.open("Ben")
    client.post(f"/api/accounts/{ada}/deposits", json={"amount": "5.00"})
    listed = client.get("/api/accounts").get_json()
    assert [(a["id"], a["balance"], a["version"]) for a in listed["accounts"]] == [(ada, "5.00", 2), (ben, "0.00", 1)]
    assert [a["id"] for a in client.get("/api/accounts?search=bE").get_json()["accounts"]] == [ben]
    assert client.get("/api/accounts?search=%25").get_json()["total"] == 0
    second = client.get("/api/accounts?per_page=1&page=2").get_json()
    assert ([a["id"] for a in second["accounts"]], second["pages"], second["total"]) == ([ben], 2, 2)


@pytest.mark.parametrize("page", ["0", "-1", "2", "99999999999999999999999"])
def test_a_page_that_is_not_there_is_not_found(client: FlaskClient, page: str) -> None:
    """Pages before the first and after the last answer 404."""
    assert_problem(client.get(f"/api/accounts?page={page}"), 404)


@pytest.mark.parametrize("page", ["x", "", "1.5", "1e3", "\N{ARABIC-INDIC DIGIT TWO}", "1_0"])
def test_a_page_that_is_no_number_is_a_bad_request(client: FlaskClient, accounts: Accounts, page: str) -> None:
    """A page or a size that is not a whole number answers 400, in every list."""
    statement = f"/api/accounts/{accounts.open()}/statement"
    for path in ("/api/accounts", statement):
        assert_problem(client.get(path, query_string={"page": page}), 400)
        assert_problem(client.get(path, query_string={"per_page": page}), 400)


def test_a_statement_has_pages(client: FlaskClient, accounts: Accounts) -> None:
    """The entries come page by page, the first one first, each with the balance after it, and nothing is left out."""
    account_id = accounts.open("Ada", "10.00")
    for _ in range(5):
        client.post(f"/api/accounts/{account_id}/deposits", json={"amount": "1.00"})
    path = f"/api/accounts/{account_id}/statement"
    found = [client.get(f"{path}?per_page=3&page={page}").get_json() for page in (1, 2, 3)]
    assert [(each["page"], each["pages"], each["total"], each["balance"]) for each in found] == [
        (page, 3, 7, "15.00") for page in (1, 2, 3)
    ]
    entries = [entry for each in found for entry in each["entries"]]
    assert entries == client.get(path).get_json()["entries"]
    assert [entry["balance"] for entry in entries] == ["0.00", "10.00", "11.00", "12.00", "13.00", "14.00", "15.00"]
    assert client.get(f"{path}?version=2&per_page=3").get_json()["total"] == 2
    for page in ("0", "4", "99999999999999999999999"):
        assert_problem(client.get(f"{path}?per_page=3&page={page}"), 404)


def test_deposits_and_withdrawals_change_the_balance(client: FlaskClient, accounts: Accounts) -> None:
    """Each answers 201 with the account as it then is."""
    path = f"/api/accounts/{accounts.open()}"
    deposit = client.post(f"{path}/deposits", json={"amount": "20.00", "note": "salary"})
    withdrawal = client.post(f"{path}/withdrawals", json={"amount": 5})
    assert (deposit.status_code, deposit.get_json()["balance"]) == (201, "20.00")
    assert (withdrawal.status_code, withdrawal.get_json()["balance"]) == (201, "15.00")
    assert client.get(withdrawal.headers["Location"]).get_json()["version"] == 3


def test_numbers_are_never_floats(client: FlaskClient, accounts: Accounts) -> None:
    """An amount that is a JSON number is taken digit by digit, so ten times 0.10 is exactly 1.00."""
    account_id = accounts.open()
    for _ in range(10):
        client.post(f"/api/accounts/{account_id}/deposits", data=b'{"amount": 0.10}', content_type="application/json")
    assert accounts.balance(account_id) == "1.00"


def test_a_transfer_writes_both_accounts_and_its_row(client: FlaskClient, accounts: Accounts) -> None:
    """A transfer answers 201, moves the money, and can be read again."""
    ada, ben = accounts.open("Ada", "10.00"), accounts.open("Ben")
    order = {"sender_id": ada, "recipient_id": ben, "amount": "4.00", "note": " lunch "}
    answer = client.post("/api/transfers", json=order)
    assert answer.status_code == 201
    assert client.get(answer.headers["Location"]).get_json() == answer.get_json()
    assert answer.get_json()["note"] == "lunch"
    assert (accounts.balance(ada), accounts.balance(ben)) == ("6.00", "4.00")
    rows = db.session.query(AccountSummary).order_by(AccountSummary.owner).all()
    assert [row.balance for row in rows] == [600, 400]
    assert db.session.query(Transfer).one().sender.owner == "Ada"


def test_an_overdraft_stores_nothing(client: FlaskClient, accounts: Accounts) -> None:
    """A withdrawal or a transfer above the balance answers 422 with both amounts, and no event or row is stored."""
    ada, ben = accounts.open("Ada", "10.00"), accounts.open("Ben")
    before = stored_events()
    withdrawal = client.post(f"/api/accounts/{ada}/withdrawals", json={"amount": "10.01"})
    order = {"sender_id": ada, "recipient_id": ben, "amount": "10.01"}
    for answer in (withdrawal, client.post("/api/transfers", json=order)):
        assert_problem(answer, 422, "insufficient-funds")
        assert (answer.get_json()["balance"], answer.get_json()["amount"]) == ("10.00", "10.01")
    assert stored_events() == before
    assert db.session.query(Transfer).count() == 0
    assert accounts.balance(ada) == "10.00"


def test_a_transfer_fails_whole(client: FlaskClient, accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the row of a transfer cannot be written, the events of both accounts are not stored either."""
    ada, ben = accounts.open("Ada", "10.00"), accounts.open("Ben")
    monkeypatch.setattr("example_app.services.Transfer", lambda **values: Transfer(**{**values, "amount": None}))
    before = stored_events()
    answer = client.post("/api/transfers", json={"sender_id": ada, "recipient_id": ben, "amount": "4.00"})
    assert_problem(answer, 503)
    assert stored_events() == before
    assert (accounts.balance(ada), accounts.balance(ben)) == ("10.00", "0.00")


def test_closing(client: FlaskClient, accounts: Accounts) -> None:
    """An account with money answers 409, an empty one is closed, and then it takes nothing but can be read."""
    account_id = accounts.open("Ada", "1.00")
    path = f"/api/accounts/{account_id}"
    assert_problem(client.delete(path), 409, "account-not-empty")
    client.post(f"{path}/withdrawals", json={"amount": "1.00"})
    assert client.delete(path).status_code == 204
    assert_problem(client.delete(path), 409, "account-closed")
    assert_problem(client.post(f"{path}/deposits", json={"amount": "1.00"}), 409, "account-closed")
    assert client.get(path).get_json()["closed"] is True
    assert client.get("/api/accounts").get_json()["accounts"][0]["closed"] is True


def test_a_statement_as_of_any_version(client: FlaskClient, accounts: Accounts) -> None:
    """A statement has the entries and the balance of the version asked for, or of now."""
    account_id = accounts.open("Ada", "10.00")
    client.post(f"/api/accounts/{account_id}/withdrawals", json={"amount": "4.00", "note": "cash"})
    path = f"/api/accounts/{account_id}/statement"
    now, past = client.get(path).get_json(), client.get(f"{path}?version=2").get_json()
    assert (now["version"], now["latest_version"], now["balance"]) == (3, 3, "6.00")
    assert (past["version"], past["latest_version"], past["balance"]) == (2, 3, "10.00")
    assert past["entries"] == now["entries"][:2]
    assert now["entries"][2]["kind"] == "withdrawal"
    assert (now["entries"][2]["amount"], now["entries"][2]["balance"]) == ("-4.00", "6.00")
    assert_problem(client.get(f"{path}?version=0"), 404, "version-not-found")
    assert_problem(client.get(f"{path}?version=4"), 404, "version-not-found")
    assert_problem(client.get(f"{path}?version=99999999999999999999999"), 404, "version-not-found")
    assert_problem(client.get(f"{path}?version=two"), 422)


def test_unknown_things_are_not_found(client: FlaskClient, accounts: Accounts) -> None:
    """An account, a transfer or an address that is not there answers 404 as a problem document."""
    nobody, ada = f"/api/accounts/{uuid4()}", accounts.open("Ada", "1.00")
    assert_problem(client.get(nobody), 404, "account-not-found")
    assert_problem(client.get(f"{nobody}/statement"), 404, "account-not-found")
    assert_problem(client.post(f"{nobody}/deposits", json={"amount": "1.00"}), 404, "account-not-found")
    assert_problem(client.delete(nobody), 404, "account-not-found")
    order = {"sender_id": ada, "recipient_id": str(uuid4()), "amount": "1.00"}
    assert_problem(client.post("/api/transfers", json=order), 404, "account-not-found")
    assert_problem(client.get(f"/api/transfers/{uuid4()}"), 404)
    assert_problem(client.get("/api/nothing"), 404)


@pytest.mark.parametrize("amount", [None, "", "0", "-1", "1.234", "1e3", "NaN", True, [1], {}, 1.005, 10**40])
def test_bad_amounts_are_refused(client: FlaskClient, accounts: Accounts, amount: object) -> None:
    """What is no amount answers 422 and stores nothing."""
    account_id = accounts.open()
    before = stored_events()
    answer = client.post(f"/api/accounts/{account_id}/deposits", json={"amount": amount})
    assert_problem(answer, 422, "invalid-amount")
    assert stored_events() == before


@pytest.mark.parametrize("owner", [None, "", " ", 5, "x" * 81, "\x00", "\ud800"])
def test_bad_names_are_refused(client: FlaskClient, owner: object) -> None:
    """What is no name answers 422 and opens nothing."""
    assert_problem(client.post("/api/accounts", json={"owner": owner}), 422, "invalid-text")
    assert client.get("/api/accounts").get_json()["total"] == 0


def test_bad_transfers_are_refused(client: FlaskClient, accounts: Accounts) -> None:
    """A transfer to the same account, or with a number that is none, answers 422."""
    ada = accounts.open("Ada", "1.00")
    same = {"sender_id": ada, "recipient_id": ada, "amount": "1.00"}
    assert_problem(client.post("/api/transfers", json=same), 422, "same-account")
    for number in (None, "", "ada", 7):
        order = {"sender_id": ada, "recipient_id": number, "amount": "1.00"}
        assert_problem(client.post("/api/transfers", json=order), 422, "invalid-account-number")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"NaN", b"[1]", b"null", b"[" * 60_000])
def test_a_body_that_is_no_json_object_is_refused(client: FlaskClient, body: bytes) -> None:
    """Anything but a JSON object answers 400."""
    assert_problem(client.post("/api/accounts", data=body, content_type="application/json"), 400)


def test_other_kinds_of_requests_are_refused(client: FlaskClient) -> None:
    """A form answers 415, a method that is not offered 405 with those that are, and a huge body 413."""
    assert_problem(client.post("/api/accounts", data={"owner": "Ada"}), 415)
    refused = client.put("/api/accounts", json={})
    assert_problem(refused, 405)
    assert "POST" in refused.headers["Allow"]
    assert_problem(client.post("/api/accounts", json={"owner": "x" * 70_000}), 413)
