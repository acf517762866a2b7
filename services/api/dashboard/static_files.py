"""The page's own files: style, scripts, vendored libraries. For everybody: nothing of a run is in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi.staticfiles import StaticFiles

if TYPE_CHECKING:
    from starlette.responses import Response

STATIC = Path(__file__).with_name("static")


class PageFiles(StaticFiles):
    """Files that browsers keep, and ask about each time: after an upgrade no old script meets a new page."""

    def __init__(self) -> None:
        super().__init__(directory=STATIC)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:  # noqa: ANN401  as the parent takes them
        """The answer with a file in it, or that it has not changed."""
        answer = super().file_response(*args, **kwargs)
        answer.headers["Cache-Control"] = "no-cache"
        return answer
