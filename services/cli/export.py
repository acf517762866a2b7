"""`wa export`: published weights in the form that somebody else reads; programs are made in a child process."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from services.cli.connection import connect
from services.cli.console import answer, say
from services.cli.local import installed
from services.cli.options import ApiUrl, OneAverage, PublishedState, RunId, Token
from services.cli.results import chosen_query, download_weights, only_average
from services.cli.runs import FOLLOW_PATIENCE_S
from services.client.download import check_writable
from services.runtime.child import Child
from wa_core.catalog.packages import package_id
from wa_core.errors import ConfigurationError, InvalidInputError, NoAverageYetError, UserCodeError
from wa_core.packages import pack_folder

if TYPE_CHECKING:
    from services.client import Client
    from services.client.calls import Json

TIME_LIMIT_S = 600.0
MEMORY_LIMIT_BYTES = 16 << 30
_LOOK_S = 0.2
#: What is served as it is wanted.
_FILES = ("safetensors", "pt")

Format = Literal["safetensors", "pt", "hf", "pt2", "onnx"]


def export(
    run_id: RunId,
    *,
    file_format: Annotated[
        Format,
        typer.Option(
            "--format", help="hf is a Hugging Face folder, pt2 an archive of torch.export.", show_default=False
        ),
    ],
    average: OneAverage = None,
    at: PublishedState = "latest",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PATH", help="Where to.", show_default="named after the weights"),
    ] = None,
    package: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder of the run's recipe, for pt2 and onnx.", show_default=False),
    ] = None,
    api_url: ApiUrl = None,
    token: Token = None,
) -> None:
    """Write averaged weights in another form.

    Safetensors, .pt, a Hugging Face folder, a torch.export archive or ONNX.

    Example: wa export RUN --average swa --format hf -o my-model

    Example: wa export RUN --average swa --format onnx --package examples/moons
    """
    with connect(api_url, token, patience_s=FOLLOW_PATIENCE_S) as client:
        name = average or only_average(client, run_id)
        shown = _published(client, run_id, name, at=at)
        path = output or Path(_default_name(run_id, shown, file_format))
        generation = shown["published_generation"]
        if file_format in _FILES:
            file = f"weights.{file_format}"
            download_weights(client, run_id, name, path, file=file, generation=generation)
        elif file_format == "hf":
            _write_folder(client, run_id, name, path, generation=generation)
        else:
            run = client.run(run_id)
            code = _code_of(run, package)
            check_writable(path)
            with tempfile.TemporaryDirectory(prefix="wa-export-") as folder:
                weights = Path(folder) / "weights.safetensors"
                download_weights(client, run_id, name, weights, generation=generation)
                made = Path(folder) / f"made.{file_format}"
                _convert(_conversion(run, shown, code=code, weights=weights, made=made))
                _put(made, path)
    answer(str(path))


def _published(client: Client, run_id: str, name: str, *, at: str) -> Json:
    shown = client.average(run_id, name, **chosen_query(at))
    if shown["published_generation"] is None:
        raise NoAverageYetError(
            f"average {name} has no published weights yet; wa averages {run_id} shows how far it is"
        )
    return shown


def _default_name(run_id: str, shown: Json, file_format: str) -> str:
    stem = f"{shown['name']}-{run_id}-{shown['published_generation']}.averaged"
    return stem if file_format == "hf" else f"{stem}.{file_format}"


def _write_folder(client: Client, run_id: str, name: str, folder: Path, *, generation: int) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInputError(f"{folder} is there already and not empty; choose another place with -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(client.model_card(run_id, name, generation=generation))
        config = client.model_config(run_id, name, generation=generation)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise _not_writable(folder, error) from None
    download_weights(client, run_id, name, folder / "model.safetensors", generation=generation)


def _code_of(run: Json, package: Path | None) -> Path | None:
    """The folder of the run's recipe, if it needs one."""
    if run["recipe"] is None:
        raise InvalidInputError("the run has no recipe, so nothing here knows its model; export the safetensors")
    if run["package"] is None:
        return None
    if package is None:
        raise typer.BadParameter(
            f"the run's recipe {run['recipe']} came in a package; give its folder.", param_hint="'--package'"
        )
    if package_id(pack_folder(package)) != run["package"]:
        say(f"{package} is not what the run was trained with ({run['package']}); its recipe is used all the same")
    # Imported from where a package of it would be unpacked to.
    return package.resolve().parent if (package / "__init__.py").exists() else package.resolve()


def _conversion(run: Json, shown: Json, *, code: Path | None, weights: Path, made: Path) -> Json:
    about = {
        "weights": "averaged",
        "run_id": run["run_id"],
        "average": shown["name"],
        "generation": shown["published_generation"],
        "rule": shown["rule"],
        "sha256": shown["weights"]["sha256"],
    }
    return {
        "recipe": run["recipe"],
        "code": str(code) if code else None,
        "config": run["config"],
        "seed": run["seed"],
        "weights": str(weights),
        "format": made.suffix.removeprefix("."),
        "output": str(made),
        "about": {key: str(value) for key, value in about.items()},
    }


def _convert(conversion: Json) -> None:
    if installed("torch") is None:
        raise ConfigurationError("torch is not installed: pip install 'weight-averaging[export,recipes]'")
    child = Child([sys.executable, "-m", "services.exporter"], title="export process")
    try:
        child.ask(json.dumps(conversion).encode())
        said = json.loads(_answer_of(child))
    except (OSError, ValueError) as error:
        raise UserCodeError(f"the export process did not answer: {error}") from None
    finally:
        child.end()
    if said:
        kind = InvalidInputError if said["code"] == "export_not_supported" else UserCodeError
        raise kind(said["message"], code=said["code"])


def _answer_of(child: Child) -> bytes:
    deadline = time.monotonic() + TIME_LIMIT_S
    while not (lines := child.lines()):
        if time.monotonic() > deadline:
            raise UserCodeError(f"the model was not exported within {TIME_LIMIT_S:g} s")
        if (held := child.memory_bytes or 0) > MEMORY_LIMIT_BYTES:
            raise UserCodeError(f"exporting the model took {held >> 20} MiB of memory, more than it may")
        child.wait(_LOOK_S)
    return lines[0]


def _put(made: Path, path: Path) -> None:
    """Let the whole file appear at once."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(made.read_bytes())
        part.replace(path)
    except OSError as error:
        raise _not_writable(path, error) from None


def _not_writable(path: Path, error: OSError) -> InvalidInputError:
    reason = error.strerror or error
    return InvalidInputError(
        f"cannot write {path}: {reason}; choose another place with -o", code="output_not_writable"
    )
