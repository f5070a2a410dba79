"""The image of the balance."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from example_app.chart import WIDTH, balance_chart
from example_app.domain import Bank

if TYPE_CHECKING:
    from flask.testing import FlaskClient

    from example_app.tests.conftest import Accounts


def line(image: str) -> list[tuple[float, float]]:
    """Return the points of the image's line."""
    (path,) = re.findall(r'<path [^>]*\bd="([^"]+)"', image)
    numbers = [float(number) for number in re.findall(r"[0-9.]+(?:E-[0-9]+)?", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_a_chart_keeps_room_for_what_came_later() -> None:
    """The line ends where the statement's version lies among all versions, and steps at each of them."""
    with Bank(env={"PERSISTENCE_MODULE": "eventsourcing.popo"}) as bank:
        account_id = bank.open_account("Ada", 1000).id
        bank.withdraw(account_id, 500)
        past, now = (line(balance_chart(bank.statement(account_id, version))) for version in (2, None))
        assert past == now[:4]
        assert past[-1][0] < now[-1][0] < WIDTH
        heights = [top for _, top in now]
        assert heights[0] == heights[1] > heights[4] == heights[5] > heights[2] == heights[3]


def test_an_account_with_one_entry_has_a_chart() -> None:
    """A new account without money is drawn, as a flat line."""
    with Bank(env={"PERSISTENCE_MODULE": "eventsourcing.popo"}) as bank:
        (begin, top), (end, other_top) = line(balance_chart(bank.statement(bank.open_account("Ada").id)))
        assert begin < end
        assert top == other_top


def test_the_chart_is_an_image_that_runs_nothing(client: FlaskClient, accounts: Accounts) -> None:
    """The statement shows the image of its version, which has no script or style and a policy that admits none."""
    path = f"/accounts/{accounts.open('Ada', '10.00')}/statement"
    assert f'src="{path}.svg?version=1"' in client.get(f"{path}?version=1").text
    answer = client.get(f"{path}.svg?version=1")
    assert (answer.status_code, answer.mimetype) == (200, "image/svg+xml")
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "script" not in answer.text
    assert "style" not in answer.text
    assert 'width="960"' in answer.text
    assert 'width="440"' in client.get(f"{path}.svg?size=narrow").text
    assert client.get(f"{path}.svg?version=9").status_code == 404
