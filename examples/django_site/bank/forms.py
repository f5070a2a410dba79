"""What clients send."""

from __future__ import annotations

from typing import Any

from django import forms

from example_app.money import parse_amount
from examples.django_site.bank.models import Balance


class AmountField(forms.CharField):
    """An amount as people write it, in cents."""

    def clean(self, value: Any) -> int:
        """Return the cents; 0 for an amount that may be left out.

        :raises ValidationError: when it is no amount.
        """
        text = super().clean(value)
        try:
            return parse_amount(text) if text else 0
        except ValueError as error:
            raise forms.ValidationError(str(error)) from None


class OpenForm(forms.Form):
    """A new account."""

    owner = forms.CharField(max_length=80)
    first_deposit = AmountField(required=False)


class MoneyForm(forms.Form):
    """Money that comes or goes."""

    amount = AmountField()
    note = forms.CharField(max_length=80, required=False)


class TransferForm(MoneyForm):
    """Money that goes to another account."""

    recipient = forms.ModelChoiceField(Balance.objects.filter(closed=False))


class CloseForm(forms.Form):
    """Nothing but the will to close."""
