from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from services.api.access.guard import GuardLimits, Hosts
from services.api.app import create_app
from wa_core.store.memory import MemoryStore

EVERYWHERE = "0.0.0.0"  # noqa: S104  compared with, not bound to


@pytest.mark.parametrize(
    ("bound", "more", "good", "bad"),
    [
        ("127.0.0.1", "", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000"], ["10.0.0.7", "api"]),
        ("10.0.0.7", "", ["10.0.0.7:8000", "127.0.0.1"], ["10.0.0.8", "evil.example"]),
        (
            EVERYWHERE,
            "",
            ["10.0.0.7", "[fe80::1]:80", "127.0.0.1"],
            ["api", "1.evil.example", "10.0.0.7.evil.example"],
        ),
        (EVERYWHERE, "api, Weights.Example", ["api:8000", "weights.example"], ["a.weights.example", "example"]),
        ("127.0.0.1", "*.example.org", ["a.b.example.org"], ["example.org", "evilexample.org"]),
        ("127.0.0.1", "*", ["anything.example"], [""]),
    ],
)
def test_which_names_are_ours(bound: str, more: str, good: list[str], bad: list[str]) -> None:
    """36: loopback, the bound address and what was named are ours; a name that ends or begins like it is not."""
    hosts = Hosts(bound=bound, more=more.split(","))

    assert [host for host in good if not hosts.allows(host)] == []
    assert [host for host in [*bad, "", ":80", "["] if hosts.allows(host)] == []


@pytest.mark.parametrize("path", ["/", "/livez", "/v1/runs", "/nothing"])
def test_36_an_unknown_host_is_refused(path: str) -> None:
    """36: what was meant for another name answers 400 `unknown_host` on every path, and says what to do."""
    limits = GuardLimits(hosts=Hosts(bound="127.0.0.1"))
    with TestClient(create_app(store=MemoryStore(), guard=limits), base_url="http://localhost") as client:
        refused = client.get(path, headers={"Host": "rebound.evil.example"})
        good = client.get("/livez")

    assert (refused.status_code, refused.json()["code"]) == (400, "unknown_host")
    assert "WA_ALLOWED_HOSTS" in refused.json()["hint"]
    assert good.status_code == 200


def test_two_hosts_are_none(store: MemoryStore) -> None:
    """36: of two names nobody knows which one a proxy has looked at."""
    limits = GuardLimits(hosts=Hosts(bound="127.0.0.1"))
    with TestClient(create_app(store=store, guard=limits), base_url="http://localhost") as client:
        answer = client.get("/livez", headers=[("Host", "localhost"), ("Host", "localhost")])

    assert answer.json()["code"] == "unknown_host"


@pytest.mark.parametrize(
    "headers", [{f"X-{number}": "x" for number in range(200)}, {"X": "x" * 140_000}, {"Cookie": "a=b; " * 30_000}]
)
def test_too_many_headers_are_refused(api: TestClient, headers: dict[str, str]) -> None:
    """Bad input 7: many headers, or large ones, answer 431; the next request works."""
    answer = api.get("/v1/runs", headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (431, "headers_too_large")
    assert api.get("/v1/runs").status_code == 200


def test_every_answer_tells_browsers_what_not_to_do(api: TestClient) -> None:
    """Whatever is answered, refusals included: nothing from elsewhere, no inline script, no frame, no sniffing."""
    answers = [api.get(path) for path in ("/livez", "/v1/runs", "/nothing", "/v1/runs?limit=x", "/openapi.json")]
    answers += [api.post("/v1/runs", content=b"{"), api.put("/v1/runs")]
    answers += [api.get("/livez", headers={"X": "x" * 40_000})]

    for answer in answers:
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Server" not in answer.headers
