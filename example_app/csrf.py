"""Protection of the forms against pages of other sites (CSRF): a random token in the session and in every form.

Why a token, although the session cookie is ``SameSite=Lax`` and browsers of today send ``Origin``: it rests on nothing
but the signed session, so it also holds for old browsers, behind proxies that rewrite headers, and against another
site on a neighbouring subdomain, which counts as the same site.
"""

from __future__ import annotations

import hmac
import secrets

from flask import abort, request, session
from markupsafe import Markup

FIELD = "csrf_token"


def csrf_field() -> Markup:
    """Return the hidden field for a form."""
    token = session.setdefault(FIELD, secrets.token_urlsafe(32))
    return Markup('<input type="hidden" name="{}" value="{}">').format(FIELD, token)


def check_csrf() -> None:
    """Refuse a form whose token is not the session's."""
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    expected, given = session.get(FIELD, ""), request.form.get(FIELD, "")
    if not expected or not hmac.compare_digest(expected.encode(), given.encode()):
        abort(400, "This form is too old or comes from elsewhere. Nothing was changed; go back, reload and try again.")
