"""An example of every body that the API takes and gives, for its description; tests hold them against it."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

RUN_ID = "01KAXJ9Q4W5T6Y7B8C9D0E1F2G"
_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

SUBMISSION: Json = {
    "recipe": "services.recipes.digits:Digits",
    "config": {"epochs": 12, "lr": 0.1},
    "scaling": {"num_workers": 2},
    "checkpoint": {"every_steps": 20, "keep_last": 3},
    "averages": [{"name": "swa", "rule": "swa:start_step=100"}, {"name": "ema", "rule": "ema:half_life=60"}],
    "labels": {"team": "vision"},
}
RESUMPTION: Json = {"from_step": 1200, "lr_scale": 0.5, "skip_batches": 200}
ADDITION: Json = {"name": "late", "rule": "ema:half_life=60", "dry_run": True}

RUN: Json = {
    "run_id": RUN_ID,
    "state": "running",
    "desired_state": "succeeded",
    "averaging_state": "published",
    "reason": None,
    "trainer": "service",
    "recipe": "services.recipes.digits:Digits",
    "package": None,
    "config": {"epochs": 12, "lr": 0.1},
    "scaling": {"num_workers": 2, "use_gpu": False},
    "checkpoint": {"every_steps": 20, "keep_last": 3, "keep_every_steps": None, "keep_best": None},
    "training": {},
    "averages": [{"name": "swa", "rule": "swa:start_step=100", "accumulator_dtype": "float64"}],
    "labels": {"team": "vision"},
    "priority": 50,
    "max_failures": 2,
    "deadlines": {"queue_s": None, "run_s": None, "stall_s": 900.0},
    "owner": "default",
    "seed": 0,
    "step": 140,
    "total_steps": 264,
    "eta_s": 31.0,
    "attempt": 1,
    "metrics": {"loss": 0.12},
    "created_at": "2026-11-25T08:30:00Z",
    "updated_at": "2026-11-25T08:31:10Z",
}
AVERAGE: Json = {
    "name": "swa",
    "rule": "swa:start_step=100",
    "generation": 3,
    "n_averaged": 3,
    "first_step": 100,
    "last_step": 140,
    "behind": 0,
    "coefficients": {"100": 1 / 3, "120": 1 / 3, "140": 1 / 3},
    "evaluation": {
        "raw": {"loss": 0.131, "accuracy": 0.961, "step": 140},
        "averaged": {"loss": 0.118, "accuracy": 0.966, "step": 140},
        "before_recalibration": {"loss": 0.127, "accuracy": 0.962, "step": 140},
        "comparison": None,
        "won": None,
    },
    "batchnorm": {"status": "recalibrated", "num_layers": 3, "num_batches": 4, "num_samples": 256},
    "rejected": [],
    "skipped": [],
    "weights": {
        "sha256": _SHA256,
        "size_bytes": 154_320,
        "url": f"/v1/runs/{RUN_ID}/averages/swa/weights.safetensors?generation=3",
    },
    "published_generation": 3,
    "best_generation": 3,
    "rebuilt": None,
    "warnings": [],
}
PREDICTION: Json = {"how": "replay", "profile_error": 0.0, "noise_gain": 1.0, "reads": 7, "read_bytes": 1_080_240}
CHECKPOINT: Json = {
    "seq": 5,
    "step": 60,
    "epoch": 2,
    "attempt": 1,
    "lr": 0.1,
    "metrics": {"loss": 0.31},
    "size_bytes": 154_320,
    "sha256": _SHA256,
    "is_abandoned": False,
    "created_at": "2026-11-25T08:30:40Z",
}
EVENT: Json = {
    "seq": 2,
    "previous": _SHA256,
    "at": "2026-11-25T08:30:05Z",
    "attempt": 1,
    "state": "starting",
    "kind": "attempt_started",
    "runner_id": "runner-1",
    "resumed_from": None,
}
LOG_LINE: Json = {"attempt": 1, "rank": "0", "text": "epoch 2: loss 0.31"}
METRICS: Json = {"attempt": 1, "step": 60, "loss": 0.31, "lr": 0.1}
PACKAGE: Json = {
    "package": f"sha256:{_SHA256}",
    "size_bytes": 812,
    "unpacked_bytes": 2104,
    "num_files": 2,
    "modules": ["moons"],
}
GENERATION: Json = {
    "generation": 3,
    "step": 140,
    "n_averaged": 3,
    "created_at": "2026-11-25T08:31:02Z",
    "last_step": 140,
    "checkpoint_committed_at": "2026-11-25T08:31:01Z",
    "published_at": "2026-11-25T08:31:04Z",
    "lag_s": 3.0,
    "evaluation": AVERAGE["evaluation"],
    "batchnorm": AVERAGE["batchnorm"],
}
LANDSCAPE: Json = {
    "landscape_id": RUN_ID,
    "kind": "line",
    "points": 5,
    "state": "succeeded",
    "progress": 1.0,
    "reason": None,
    "generation": 3,
    "axis": [-0.25, 0.125, 0.5, 0.875, 1.25],
    "axis_y": [],
    "losses": [0.16, 0.127, 0.12, 0.118, 0.119],
    "train_losses": [],
    "markers": [],
    "is_recalibrated": True,
    "num_heldout": 360,
    "num_train": 0,
    "created_at": "2026-11-25T08:40:00Z",
    "finished_at": "2026-11-25T08:40:20Z",
}
VERIFICATION: Json = {
    "verification_id": RUN_ID,
    "generation": 3,
    "state": "succeeded",
    "progress": 1.0,
    "is_equal": True,
    "reason": None,
    "num_checkpoints": 3,
    "is_state_equal": True,
    "is_served_equal": True,
    "num_recalibrated": 21,
    "created_at": "2026-11-25T08:41:00Z",
    "finished_at": "2026-11-25T08:41:04Z",
    "took_s": 3.2,
}
DELIVERY: Json = {
    "delivery_id": "00-log-0000000012",
    "webhook": 0,
    "host": "example.com",
    "event": "succeeded",
    "event_id": "log-0000000012",
    "outcome": "delivered",
    "at": "2026-11-25T08:40:00Z",
    "status": 204,
    "num_tries": 1,
    "message": "",
}
INSTANCES: Json = {"instances": [{"prompt": "The data set", "max_new_characters": 20}]}
PREDICTIONS: Json = {
    "predictions": [{"continuation": " of the targets of t", "next": {" ": 0.41, "s": 0.22}}],
    "run_id": RUN_ID,
    "average": "swa",
    "generation": 3,
    "sha256": _SHA256,
}
COEFFICIENTS: Json = {
    "run_id": RUN_ID,
    "average": "swa",
    "generation": 3,
    "rule": "swa:start_step=100",
    "sha256": _SHA256,
    "data": [{"step": step, "coefficient": 0.5, "sha256": _SHA256} for step in (100, 120)],
}
MODEL_CONFIG: Json = {
    "recipe": "services.recipes.digits:Digits",
    "package": None,
    "config": {"epochs": 12, "lr": 0.1},
    "seed": 0,
    "weights": "averaged",
    "run_id": RUN_ID,
    "average": "swa",
    "generation": 3,
    "rule": "swa:start_step=100",
}
TOKEN: Json = {
    "token_id": "237b19ce33262c1e",
    "name": "alice",
    "prefix": "wa_237b19ce33262c1e",
    "last_four": "ff36",
    "scopes": ["runs:read"],
    "created_at": "2026-11-25T08:30:00Z",
    "expires_at": None,
}

REQUESTS: dict[str, Json] = {
    "submit_run": SUBMISSION,
    "resume_run": RESUMPTION,
    "add_average": ADDITION,
    "preview_average": {"rule": "ema:half_life=60"},
    "ask_for_landscape": {"kind": "line", "points": 31},
    "create_token": {"name": "alice", "scopes": ["runs:read"], "expires_in_s": 2_592_000},
    "predict": INSTANCES,
}

ANSWERS: dict[str, Json] = {
    "submit_run": RUN | {"state": "queued", "averaging_state": "waiting", "step": 0, "attempt": 0, "eta_s": None},
    "list_runs": {"data": [RUN], "has_more": True, "next": RUN_ID},
    "show_run": RUN,
    "cancel_run": RUN | {"desired_state": "cancelled"},
    "pause_run": RUN | {"state": "pausing", "desired_state": "paused"},
    "resume_run": RUN | {"state": "queued"},
    "list_checkpoints": {"data": [CHECKPOINT], "has_more": False, "next": None},
    "list_events": {"data": [EVENT], "has_more": False, "next": 2},
    "read_logs": {"data": [LOG_LINE], "has_more": False, "next": "1-3-17"},
    "read_metrics": {"data": [METRICS], "has_more": False, "next": "1-3-17"},
    "list_averages": {"data": [AVERAGE], "has_more": False, "next": None},
    "show_average": AVERAGE,
    "add_average": AVERAGE | {"name": "late", "weights": None, "prediction": PREDICTION},
    "upload_package": PACKAGE,
    "list_generations": {"data": [GENERATION], "has_more": False, "next": 3},
    "preview_average": {
        "rule": "ema:half_life=60",
        "coefficients": {"20": 0.44, "40": 0.56},
        "prediction": PREDICTION,
        "reason": None,
    },
    "ask_for_landscape": LANDSCAPE
    | {"state": "queued", "progress": 0.0, "axis": [], "losses": [], "generation": None, "finished_at": None},
    "list_landscapes": {"data": [LANDSCAPE | {"axis": [], "losses": []}]},
    "show_landscape": LANDSCAPE,
    "verify_average": VERIFICATION
    | {
        "state": "queued",
        "progress": 0.0,
        "is_equal": None,
        "num_checkpoints": 0,
        "is_state_equal": None,
        "is_served_equal": None,
        "num_recalibrated": 0,
        "finished_at": None,
        "took_s": None,
    },
    "list_verifications": {"data": [VERIFICATION]},
    "show_verification": VERIFICATION,
    "list_deliveries": {"data": [DELIVERY], "has_more": False, "next": None},
    "predict": PREDICTIONS,
    "show_coefficients": COEFFICIENTS,
    "show_config": MODEL_CONFIG,
    "create_token": TOKEN | {"secret": "wa_237b19ce33262c1e_…"},
    "list_tokens": {"data": [TOKEN]},
    "livez": {"status": "ok"},
    "readyz": {"status": "ok", "checks": {"store_answers": "ok"}},
    "show_version": {"version": "0.1.0", "format": 1},
}

# The code that a status most often has.
PROBLEM_CODES = {
    "400": "body_not_json",
    "401": "auth_missing",
    "403": "scope_missing",
    "404": "run_not_found",
    "408": "body_too_slow",
    "409": "already_finished",
    "412": "content_changed",
    "413": "body_too_large",
    "415": "unsupported_media_type",
    "416": "range_not_satisfiable",
    "422": "invalid_request",
    "429": "rate_limited",
    "431": "headers_too_large",
    "500": "internal",
    "501": "prediction_not_supported",
    "502": "prediction_failed",
    "503": "storage_unavailable",
    "504": "prediction_timeout",
}
