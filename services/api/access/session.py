"""A browser's session: the token itself, in a cookie that no script can read and no other site can send.

It keeps no state, so every replica knows it, and it ends with the token that it holds (ADR 20). Whatever a cookie
asks to be changed must come from a page of this very origin.
"""

import base64
import binascii
from urllib.parse import urlsplit

from fastapi import Request, Response

from services.api.problems import HttpProblem

COOKIE = "wa_session"


def token_in_cookie(request: Request) -> str | None:
    """The token of a request's session, if it has one."""
    sent = request.cookies.get(COOKIE)
    if not sent:
        return None
    try:
        return base64.b64decode(sent.encode() + b"==", altchars=b"-_").decode()
    except (binascii.Error, ValueError):  # not of our making; whoever sends it has no session
        return None


def begin_session(request: Request, response: Response, token: str) -> None:
    """Let a browser send `token` from now on, until it is closed."""
    value = base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")
    _set_cookie(request, response, value, max_age=None)


def end_session(request: Request, response: Response) -> None:
    """Let a browser forget its session."""
    _set_cookie(request, response, "", max_age=0)


def check_same_origin(request: Request, *, must_say: bool = True) -> None:
    """Refuse a request that another site's page has sent.

    Browsers say so in ``Sec-Fetch-Site``, or, on addresses that they do not trust, in ``Origin``.

    Args:
        request: what came.
        must_say: whether a request with neither is refused as well.

    Raises:
        HttpProblem: 403 ``cross_site``.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        is_ours = site in {"same-origin", "none"}  # none: the person, by an address or a bookmark
    elif origin is not None:
        is_ours = bool(origin) and urlsplit(origin).netloc == request.headers.get("host")
    else:
        is_ours = not must_say
    if not is_ours:
        raise HttpProblem(
            "the session's cookie came with a request that no page of this service has sent",
            status=403,
            code="cross_site",
        )


def _set_cookie(request: Request, response: Response, value: str, *, max_age: int | None) -> None:
    is_https = request.url.scheme == "https"
    response.set_cookie(COOKIE, value, max_age=max_age, secure=is_https, httponly=True, samesite="strict")
