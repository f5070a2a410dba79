"""What the bank refuses, and the words in which it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from example_app.money import money_text

if TYPE_CHECKING:
    from uuid import UUID


class BankError(Exception):
    """The bank refuses."""

    title: ClassVar[str] = "The bank refuses"


class AccountNotFound(BankError):
    """No account has this number."""

    title = "No such account"

    def __init__(self, account_id: UUID) -> None:
        super().__init__(f"There is no account with the number {account_id}.")
        self.account_id = account_id


class VersionNotFound(BankError):
    """The account has not had this version."""

    title = "No such version"

    def __init__(self, version: int, latest: int) -> None:
        super().__init__(f"This account has the versions 1 to {latest}; there is no version {version}.")


class AccountClosed(BankError):
    """The account is closed and takes no more entries."""

    title = "The account is closed"

    def __init__(self, owner: str) -> None:
        super().__init__(f"The account of {owner} is closed and takes no more entries.")


class AccountNotEmpty(BankError):
    """An account that still holds money is not closed."""

    title = "The account still holds money"

    def __init__(self, balance: int) -> None:
        super().__init__(f"Withdraw or transfer the {money_text(balance)} in this account, then close it.")


class InsufficientFunds(BankError):
    """The account holds less than was asked for."""

    title = "Not enough money in the account"

    def __init__(self, balance: int, amount: int) -> None:
        super().__init__(
            f"The account holds {money_text(balance)}, and {money_text(amount)} was asked for. Nothing was changed."
        )
        self.balance = balance
        self.amount = amount


class InvalidAmount(BankError):
    """The amount is not one that a bank can book."""

    title = "That amount cannot be booked"


class InvalidText(BankError):
    """A name or a note is missing, too long or not printable."""

    title = "That text cannot be used"


class InvalidAccountNumber(BankError):
    """What was given as the number of an account is none."""

    title = "That is not an account number"


class MailUnavailable(BankError):
    """There is no task queue."""

    title = "Statements are not mailed here"

    def __init__(self) -> None:
        super().__init__(
            "Start a worker, and set STATEMENT_QUEUE to celery or rq for the bank; its README says how. "
            "Nothing was changed."
        )


class SameAccount(BankError):
    """A transfer needs two accounts."""

    title = "A transfer needs two accounts"

    def __init__(self) -> None:
        super().__init__("Money cannot be transferred from an account to itself.")
