from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from services.api.app import create_app
from support.api import TOKEN, ApiRun, submission

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.store.memory import MemoryStore

SAME = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def browser(store: MemoryStore) -> Iterator[TestClient]:
    """A browser that keeps cookies, in front of an API with tokens."""
    app = create_app(store=store, token=TOKEN, read_token="look")
    with TestClient(app, follow_redirects=False) as client:
        yield client


def signed_in(browser: TestClient, token: str = TOKEN) -> TestClient:
    """The browser after its form was sent."""
    answer = browser.post("/session", data={"token": token}, headers=SAME)
    assert answer.status_code == 303, answer.text
    return browser


def test_a_session_opens_the_api(browser: TestClient) -> None:
    """The form's token leads to `/`, with a cookie that no script reads and no other site sends."""
    answer = browser.post("/session", data={"token": TOKEN}, headers=SAME)

    assert (answer.status_code, answer.headers["Location"]) == (303, "/")
    assert answer.headers["Cache-Control"] == "no-store"
    cookie = answer.headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert TOKEN not in cookie
    assert browser.get("/v1/runs").status_code == 200
    assert browser.post("/v1/runs", json=submission(), headers=SAME).status_code == 202


def test_the_start_shows_runs_to_those_who_may_read_them(browser: TestClient, store: MemoryStore) -> None:
    """Without a session, and with one that opens models alone, the public start shows no run."""
    run_id = ApiRun(store).run_id
    wanted = {"name": "models", "scopes": ["models:read"]}
    token = browser.post("/v1/tokens", json=wanted, headers={"Authorization": f"Bearer {TOKEN}"}).json()["secret"]

    shown = [browser.get("/").text, *(signed_in(browser, sent).get("/").text for sent in (token, "look"))]

    assert [run_id in text for text in shown] == [False, False, True]
    assert "Sign in" in shown[1]


def test_a_session_over_tls_stays_there(store: MemoryStore) -> None:
    """Signed in over https, the cookie is never sent over http."""
    with TestClient(create_app(store=store, token=TOKEN), base_url="https://testserver") as client:
        answer = client.post("/session", data={"token": TOKEN}, follow_redirects=False)

    assert "Secure" in answer.headers["Set-Cookie"].split("; ")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (SAME, 202),
        ({"Origin": "http://testserver"}, 202),
        ({}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://testserver"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://testserver.evil.example"}, 403),
        ({"Origin": "http://testserver:81"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
    ],
)
def test_only_our_own_page_changes_something(browser: TestClient, headers: dict[str, str], status: int) -> None:
    """With a cookie, what changes something must come from this origin; looking need not."""
    signed_in(browser)

    answer = browser.post("/v1/runs", json=submission(), headers=headers)
    looked = browser.get("/v1/runs", headers=headers)

    assert answer.status_code == status
    assert status == 202 or answer.json()["code"] == "cross_site"
    assert looked.status_code == 200


def test_a_bearer_token_counts_first(browser: TestClient) -> None:
    """A program's own token decides, whatever cookie comes along; no origin is asked of it."""
    signed_in(browser, "look")

    full = browser.post("/v1/runs", json=submission(), headers={"Authorization": f"Bearer {TOKEN}"})
    wrong = browser.get("/v1/runs", headers={"Authorization": "Bearer wrong"})

    assert (full.status_code, wrong.status_code) == (202, 401)


def test_a_session_has_its_tokens_scopes(browser: TestClient) -> None:
    """Bad input 3: a session opens what its token opens, and no more."""
    signed_in(browser, "look")

    answer = browser.post("/v1/runs", json=submission(), headers=SAME)

    assert (answer.status_code, answer.json()["code"]) == (403, "scope_missing")


def test_a_session_ends_with_its_token(browser: TestClient) -> None:
    """Bad input 2: a session of a token that was revoked opens nothing more."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    token = browser.post("/v1/tokens", json={"name": "eve", "scopes": ["runs:read"]}, headers=headers).json()
    signed_in(browser, token["secret"])
    assert browser.get("/v1/runs").status_code == 200

    browser.delete(f"/v1/tokens/{token['token_id']}", headers=headers)

    assert browser.get("/v1/runs").status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "status"), [("POST", "/session:end", 303), ("DELETE", "/session", 204)]
)
def test_signing_out_forgets_the_token(browser: TestClient, method: str, path: str, status: int) -> None:
    """After signing out the browser has no cookie any more."""
    signed_in(browser)

    answer = browser.request(method, path, headers=SAME)

    assert answer.status_code == status
    assert browser.get("/v1/runs").status_code == 401


@pytest.mark.parametrize("form", [{"token": "wrong"}, {"token": ""}, {}, {"tokn": TOKEN}])
def test_a_wrong_token_begins_no_session(browser: TestClient, form: dict[str, str]) -> None:
    """Bad inputs 1 and 2: without one of the service's tokens there is no cookie."""
    form_type = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = browser.post("/session", data=form, headers=SAME | form_type)

    assert (answer.status_code, answer.json()["code"]) == (401, "auth_invalid")
    assert "Set-Cookie" not in answer.headers


def test_another_site_cannot_sign_anybody_in(browser: TestClient) -> None:
    """A form on another site does not put its own token into a visitor's browser."""
    answer = browser.post("/session", data={"token": TOKEN}, headers={"Sec-Fetch-Site": "cross-site"})

    assert (answer.status_code, answer.json()["code"]) == (403, "cross_site")


@pytest.mark.parametrize("cookie", ["x", "%%%", "=", "AAAA", "wrong", "4pyT", "_" * 5000])
def test_a_foreign_cookie_is_no_session(browser: TestClient, cookie: str) -> None:
    """Bad inputs 1 and 2: a cookie that we did not set opens nothing and breaks nothing."""
    answer = browser.get("/v1/runs", headers={"Cookie": f"wa_session={cookie}"})

    assert answer.status_code == 401


def test_an_open_service_asks_for_no_session(api: TestClient) -> None:
    """Where no token is wanted, the form leads to `/` and sets nothing."""
    answer = api.post("/session", data={"token": "anything"}, follow_redirects=False)

    assert (answer.status_code, "Set-Cookie" in answer.headers) == (303, False)
