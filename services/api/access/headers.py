"""What every answer tells a browser: load nothing from elsewhere, be shown in no frame, take no type for another.

The page's scripts and styles are files of ours, so no inline script runs, whoever wrote it into a name or a log.
A route may say otherwise for its own answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    b"content-security-policy": CONTENT_SECURITY_POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    # With no-referrer, browsers would send our forms with `Origin: null`, like those of a stranger.
    b"referrer-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
}
#: Where routes and dependencies put headers for an answer that somebody else makes.
ADDED = "added_headers"


class SecurityHeaders:
    """Wraps the application; see the module's docstring."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        added: dict[bytes, bytes] = {}
        scope.setdefault("state", {})[ADDED] = added

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message["headers"]}
                wanted = (_HEADERS | added).items()
                ours = [(name, value) for name, value in wanted if name not in known]
                message = {**message, "headers": [*message["headers"], *ours]}
            await send(message)

        await self._app(scope, receive, with_headers)
