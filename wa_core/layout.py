"""Builds and parses every object key; nothing else knows a slash.

The map of the bucket is in `docs/format.md`. Numbers are zero-padded so that keys sort as numbers do.
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Literal

from ulid import ULID

from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from datetime import datetime

#: What averagers do for one average when they are idle; names folders, markers and routes.
JobKind = Literal["landscapes", "verifications"]

MODEL_FILE = "model.safetensors"
TRAINER_FILE = "trainer.pt"
SHADOW_FILE = "shadow.safetensors"
PICKLE_FILE = "model.pt"

RUNS = "runs/"
QUEUE = "queue/"
ACTIVE = "active/"
TELLING = "telling/"
KEYED = "idempotency/"
PACKAGES = "packages/"
TOKENS = "tokens/"
CLOCK = "probe/clock"  # put again and again, to learn the store's own time

_RUN_ID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
_TOKEN_ID = re.compile(r"[0-9a-f]{16}")
_TOKEN = re.compile(rf"{TOKENS}({_TOKEN_ID.pattern})(\.revoked)?\.json")
_CHECKPOINT_FILE = re.compile(r"[0-9]{4,}-[0-9]{12,}-[0-9a-f]{16}/[A-Za-z0-9_-][A-Za-z0-9._-]*")


def new_run_id(at: datetime) -> str:
    """A fresh run id (ULID): sorts by time."""
    return str(ULID.from_datetime(at))


def is_run_id(text: str) -> bool:
    """Whether `text` has the form of a run id."""
    return _RUN_ID.fullmatch(text) is not None


def new_nonce() -> str:
    """A random part for keys that several writers might want at once."""
    return secrets.token_hex(8)


def run_prefix(run_id: str) -> str:
    """Everything of one run."""
    if not is_run_id(run_id):
        raise InvalidInputError(
            f"{run_id!r} is not a run id; run ids are 26 characters, as POST /v1/runs returns them"
        )
    return f"{RUNS}{run_id}/"


def run_spec(run_id: str) -> str:
    """The immutable `RunSpec`."""
    return f"{run_prefix(run_id)}run.json"


def log_prefix(run_id: str) -> str:
    """All run log entries, in order."""
    return f"{run_prefix(run_id)}log/"


def log_entry(run_id: str, seq: int) -> str:
    """Run log entry `seq` (from 1)."""
    return f"{log_prefix(run_id)}{seq:010d}.json"


def checkpoint_prefix(run_id: str, *, attempt: int, step: int, nonce: str) -> str:
    """The folder of one checkpoint's files."""
    return f"{checkpoints_prefix(run_id)}{attempt:04d}-{step:012d}-{nonce}/"


def checkpoints_prefix(run_id: str) -> str:
    """All files of a run's checkpoints."""
    return f"{run_prefix(run_id)}checkpoints/"


def is_checkpoint_file(run_id: str, key: str) -> bool:
    """Whether `key` is that of a file in a checkpoint of this run."""
    prefix = checkpoints_prefix(run_id)
    return key.startswith(prefix) and _CHECKPOINT_FILE.fullmatch(key.removeprefix(prefix)) is not None


def averages_prefix(run_id: str) -> str:
    """Everything of a run's averages."""
    return f"{run_prefix(run_id)}averages/"


def generations_prefix(run_id: str, name: str) -> str:
    """The generation manifests of one average (and its assessments and blobs, which sort after them)."""
    return f"{averages_prefix(run_id)}{name}/"


def generation(run_id: str, name: str, number: int) -> str:
    """The manifest of generation `number` (from 1)."""
    return f"{generations_prefix(run_id, name)}{number:08d}.json"


def assessments_prefix(run_id: str, name: str) -> str:
    """The assessments of one average."""
    return f"{generations_prefix(run_id, name)}assessments/"


def assessment(run_id: str, name: str, generation: int) -> str:
    """The assessment of one generation."""
    return f"{assessments_prefix(run_id, name)}{generation:08d}.json"


def blob(run_id: str, name: str, *, nonce: str, file: str) -> str:
    """A file that a generation or its assessment points to."""
    return f"{blobs_prefix(run_id, name)}{nonce}/{file}"


def blobs_prefix(run_id: str, name: str) -> str:
    """All files that the records of one average point to."""
    return f"{generations_prefix(run_id, name)}blobs/"


def jobs_prefix(kind: JobKind, run_id: str, name: str) -> str:
    """The jobs of one kind for one average: requests, and a folder for what came of each."""
    return f"{generations_prefix(run_id, name)}{kind}/"


def job(kind: JobKind, run_id: str, name: str, job_id: str) -> str:
    """The request for a job."""
    return f"{jobs_prefix(kind, run_id, name)}{job_id}.json"


def job_attempts_prefix(kind: JobKind, run_id: str, name: str, job_id: str) -> str:
    """Who has taken a job."""
    return f"{jobs_prefix(kind, run_id, name)}{job_id}/attempts/"


def job_attempt(kind: JobKind, run_id: str, name: str, job_id: str, number: int) -> str:
    """Attempt `number` (from 1) at a job."""
    return f"{job_attempts_prefix(kind, run_id, name, job_id)}{number:04d}.json"


def job_progress(kind: JobKind, run_id: str, name: str, job_id: str) -> str:
    """How far a job is."""
    return f"{jobs_prefix(kind, run_id, name)}{job_id}/progress.json"


def job_result(kind: JobKind, run_id: str, name: str, job_id: str) -> str:
    """What came of a job."""
    return f"{jobs_prefix(kind, run_id, name)}{job_id}/result.json"


def job_markers(kind: JobKind) -> str:
    """The markers of all jobs of one kind."""
    return f"{kind}/"


def job_marker(kind: JobKind, run_id: str, name: str, job_id: str) -> str:
    """Marks a job from its request until there is a result; the oldest request sorts first."""
    return f"{job_markers(kind)}{job_id}-{run_id}-{name}.json"


def metrics_prefix(run_id: str, *, attempt: int | None = None) -> str:
    """All metric parts of a run, by attempt and part, or those of one attempt."""
    return f"{run_prefix(run_id)}metrics/" + (f"{attempt:04d}/" if attempt is not None else "")


def metrics_part(run_id: str, *, attempt: int, part: int) -> str:
    """One batch of metric lines."""
    return f"{metrics_prefix(run_id)}{attempt:04d}/{part:08d}.jsonl"


def logs_prefix(run_id: str, *, attempt: int, rank: int | str) -> str:
    """The log text of one rank (or of ``driver``) in one attempt."""
    return f"{run_prefix(run_id)}logs/{attempt:04d}/{rank}/"


def logs_part(run_id: str, *, attempt: int, rank: int | str, part: int) -> str:
    """One batch of log text."""
    return f"{logs_prefix(run_id, attempt=attempt, rank=rank)}{part:08d}.txt"


def event_file(run_id: str, *, attempt: int, part: int) -> str:
    """One batch of metrics for TensorBoard, which wants ``tfevents`` in the name and reads in name order."""
    return f"{run_prefix(run_id)}tensorboard/{attempt:04d}/events.out.tfevents.{part:08d}"


def log_hint(run_id: str) -> str:
    """A copy of the run log's beginning in one object."""
    return f"{run_prefix(run_id)}hints/log.json"


def generation_hint(run_id: str, name: str) -> str:
    """The number of a late generation of an average."""
    return f"{run_prefix(run_id)}hints/averages/{name}.json"


def assessment_hint(run_id: str, name: str) -> str:
    """The number of a late generation of an average that has been assessed."""
    return f"{run_prefix(run_id)}hints/assessments/{name}.json"


def heartbeat(run_id: str, who: str) -> str:
    """The heartbeat of `who` for a run."""
    return f"{run_prefix(run_id)}heartbeats/{who}.json"


def queue_marker(run_id: str, *, priority: int) -> str:
    """Marks a waiting run; lower priority numbers sort, and run, first."""
    return f"{QUEUE}{priority:02d}-{run_id}.json"


def active_marker(run_id: str) -> str:
    """Marks a run from its submission until its last average is published."""
    return f"{ACTIVE}{run_id}.json"


def telling_marker(run_id: str) -> str:
    """Marks a run with webhooks until everything has been told."""
    return f"{TELLING}{run_id}.json"


def deliveries_prefix(run_id: str) -> str:
    """What became of the events of a run, by webhook."""
    return f"{run_prefix(run_id)}webhooks/"


def delivery(run_id: str, *, webhook: int, event_id: str) -> str:
    """The `Delivery` of one event to one webhook."""
    return f"{deliveries_prefix(run_id)}{webhook:02d}/{event_id}.json"


def keyed_submission(digest: str) -> str:
    """The `KeyedSubmission` of the Idempotency-Key whose sha256 is `digest`."""
    return f"{KEYED}{digest}.json"


def package(package_id: str) -> str:
    """The zip of user code that ``sha256:…`` names."""
    return f"{PACKAGES}{package_id.removeprefix('sha256:')}.zip"


def job_of_marker(kind: JobKind, key: str) -> tuple[str, str, str] | None:
    """(run id, average, job id) of a job's marker, or None for other keys."""
    ulid = _RUN_ID.pattern
    found = re.fullmatch(rf"{kind}/({ulid})-({ulid})-([a-z0-9][a-z0-9-]*)\.json", key)
    return (found.group(2), found.group(3), found.group(1)) if found else None


def job_id_of(kind: JobKind, key: str) -> tuple[str, bool] | None:
    """(job id, whether `key` is its result) of the key of a request or a result, or None for other keys."""
    ulid = _RUN_ID.pattern
    found = re.fullmatch(rf"{RUNS}{ulid}/averages/[^/]+/{kind}/({ulid})(\.json|/result\.json)", key)
    return (found.group(1), found.group(2) != ".json") if found else None


def token(token_id: str) -> str:
    """The `TokenRecord` of a token."""
    if not _TOKEN_ID.fullmatch(token_id):
        raise InvalidInputError(f"{token_id[:100]!r} is not a token's id; ids are 16 hexadecimal digits")
    return f"{TOKENS}{token_id}.json"


def token_revocation(token_id: str) -> str:
    """The `TokenRevocation` that ends a token."""
    return f"{token(token_id).removesuffix('.json')}.revoked.json"


def token_id_of(key: str) -> str | None:
    """The id in the key of a token's record or revocation, or None for other keys."""
    found = _TOKEN.fullmatch(key)
    return found.group(1) if found else None


def is_token_revocation(key: str) -> bool:
    """Whether `key` is that of a revocation."""
    found = _TOKEN.fullmatch(key)
    return found is not None and found.group(2) is not None


def run_id_of(key: str) -> str | None:
    """The run id in a `runs/`, `queue/`, `active/` or `telling/` key, or None."""
    found = re.match(rf"(?:{RUNS}|{ACTIVE}|{TELLING}|{QUEUE}\d\d-)({_RUN_ID.pattern})(?:/|\.json$)", key)
    return found.group(1) if found else None


def number_of(key: str) -> int | None:
    """The number in the last part of a log, generation, metrics or logs key, or None for other keys."""
    found = re.fullmatch(r"(\d+)\.(?:json|jsonl|txt)", key.rpartition("/")[2])
    return int(found.group(1)) if found else None


def checkpoint_of(key: str) -> tuple[int, int] | None:
    """(attempt, step) of the checkpoint that a file belongs to, or None for other keys."""
    found = re.fullmatch(rf"{RUNS}{_RUN_ID.pattern}/checkpoints/(\d{{4,}})-(\d{{12,}})-[^/]+/[^/]+", key)
    return (int(found.group(1)), int(found.group(2))) if found else None


def blob_of(key: str) -> tuple[str, str] | None:
    """(average, file name) of a file that an average's records point to, or None for other keys."""
    found = re.fullmatch(rf"{RUNS}{_RUN_ID.pattern}/averages/([^/]+)/blobs/[^/]+/([^/]+)", key)
    return (found.group(1), found.group(2)) if found else None
