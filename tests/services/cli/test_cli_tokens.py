from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from support.command import Service, Wa

SECRET = f"wa_{'0' * 16}_{'a' * 64}"
TOKEN: dict[str, Any] = {
    "token_id": "0" * 16,
    "name": "ci",
    "prefix": f"wa_{'0' * 16}",
    "last_four": "aaaa",
    "scopes": ["runs:read", "runs:write"],
    "created_at": "2026-11-22T08:00:00Z",
    "expires_at": None,
}


def test_a_token_is_made_and_printed_once(wa: Wa, service: Service) -> None:
    """Stdout is the token alone, for `$(wa tokens create …)`; the rest is said on stderr."""
    service.says("/v1/tokens", TOKEN | {"secret": SECRET}, method="POST", status=201)

    done = wa(*("tokens", "create", "ci", "--scope", "runs:read", "--scope", "runs:write", "--expires", "30d"))

    assert (done.returncode, done.stdout) == (0, f"{SECRET}\n")
    assert "not shown again" in done.stderr
    body = {"name": "ci", "scopes": ["runs:read", "runs:write"], "expires_in_s": 30 * 86_400}
    assert service.requests == [("POST", "/v1/tokens", body)]


def test_tokens_are_listed_without_secrets(wa: Wa, service: Service) -> None:
    """People see whose a token is and what it opens; programs get the same as JSON."""
    service.says("/v1/tokens", {"data": [TOKEN]})

    shown, read = wa("tokens", "list"), wa("tokens", "list", "--json")

    assert [word in shown.stdout for word in ("0" * 16, "ci", "runs:read, runs:write", "aaaa")] == [True] * 4
    (found,) = json.loads(read.stdout)["data"]
    assert (found["token_id"], "secret" in found) == ("0" * 16, False)


def test_a_token_is_revoked_by_its_id(wa: Wa, service: Service) -> None:
    """The id from the list is all that it takes."""
    service.says(f"/v1/tokens/{'0' * 16}", None, method="DELETE", status=204)

    done = wa("tokens", "revoke", "0" * 16)

    assert (done.returncode, done.stdout) == (0, f"{'0' * 16} is revoked\n")
    assert [request[:2] for request in service.requests] == [("DELETE", f"/v1/tokens/{'0' * 16}")]


@pytest.mark.parametrize(
    "arguments",
    [("create", "ci"), ("create", "ci", "--scope", "admin", "--expires", "soon"), ("revoke",), ("mint", "ci")],
)
def test_a_wrong_call_is_explained(wa: Wa, arguments: tuple[str, ...]) -> None:
    """76 and 77: exit 2 with the place, and nothing is sent."""
    done = wa("tokens", *arguments)

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
