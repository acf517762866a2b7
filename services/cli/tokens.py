"""`wa tokens`: make, list and revoke tokens of a service."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.connection import connect
from services.cli.console import answer, print_json, print_table, say
from services.cli.help_texts import ReadableGroup
from services.cli.options import ApiUrl, AsJson, Token
from services.cli.suggestions import SuggestingCommand

if TYPE_CHECKING:
    from services.client.answers import Token as TokenAnswer

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

_HELP = """Make, list and revoke tokens; takes a token with the scope admin.

Example: wa tokens create ci --scope runs:read
"""

tokens = typer.Typer(cls=ReadableGroup, no_args_is_help=True, help=_HELP)


@tokens.command("create", cls=SuggestingCommand)
def create(
    name: Annotated[str, typer.Argument(help="Whose it is: the owner of the runs that it submits.")],
    *,
    scope: Annotated[
        list[str],
        typer.Option(
            "--scope", metavar="SCOPE", help="runs:read, runs:write, runs:code, models:read or admin; may repeat."
        ),
    ],
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="How long it holds, such as 12h or 30d; for ever without.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
    api_url: ApiUrl = None,
    token: Token = None,
) -> None:
    """Make a token, and print it: it is shown this once.

    Example: wa tokens create ci --scope runs:read --scope runs:write --expires 30d
    """
    with connect(api_url, token) as client:
        made = client.create_token(name, scope, expires_in_s=_seconds(expires))
    if as_json:
        print_json(made.model_dump(mode="json"))
        return
    answer(made.secret or "")
    say(f"Keep it: it is not shown again. Revoke it with `wa tokens revoke {made.token_id}`.")


@tokens.command("list", cls=SuggestingCommand)
def list_tokens(*, as_json: AsJson = False, api_url: ApiUrl = None, token: Token = None) -> None:
    """List the tokens that were made and not revoked, without their secrets.

    Example: wa tokens list
    """
    with connect(api_url, token) as client:
        found = client.tokens()
    if as_json:
        print_json({"data": [one.model_dump(mode="json", exclude={"secret"}) for one in found]})
        return
    print_table(["ID", "NAME", "SCOPES", "ENDS WITH", "CREATED", "EXPIRES"], [_row(one) for one in found])


@tokens.command("revoke", cls=SuggestingCommand)
def revoke(
    token_id: Annotated[str, typer.Argument(help="Its id, as `wa tokens list` shows it.", metavar="ID")],
    *,
    as_json: AsJson = False,
    api_url: ApiUrl = None,
    token: Token = None,
) -> None:
    """Revoke a token, for good; every replica of the service refuses it within 5 seconds.

    Example: wa tokens revoke 0123456789abcdef
    """
    with connect(api_url, token) as client:
        client.revoke_token(token_id)
    print_json({"token_id": token_id, "is_revoked": True}) if as_json else answer(f"{token_id} is revoked")


def _row(one: TokenAnswer) -> list[object]:
    times = [at.isoformat(timespec="seconds") if at else None for at in (one.created_at, one.expires_at)]
    return [one.token_id, one.name, ", ".join(one.scopes), one.last_four, *times]


def _seconds(text: str | None) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no time; write for example 12h or 30d.", param_hint="'--expires'")
    return int(found[1]) * _UNITS_S[found[2]]
