"""Fold one object of a store into some averages, and print seconds and bytes read; see `benchmarks.store_fold`.

Arguments: ENDPOINT KEY_ID SECRET BUCKET KEY NUM_AVERAGES DIGESTS(0|1). The first fold, which only copies, is not
timed; the second one is.
"""

from __future__ import annotations

import json
import sys
import time

from wa_core.averaging.files.parts import ObjectPart
from wa_core.averaging.files.sources import FilesSource
from wa_core.averaging.rules import parse_rule, require_lerp
from wa_core.averaging.streamed_shadow import StreamedShadow
from wa_core.averaging.streaming import fold_source
from wa_core.store.s3 import S3Store

RULES = ("swa", "ema:half_life=10", "ema:decay=0.99", "power:sigma_rel=0.1")


def main() -> None:
    """Fold twice, time the second."""
    endpoint_url, access_key, secret_key, bucket, key, count, digests = sys.argv[1:]
    store = S3Store(bucket=bucket, endpoint_url=endpoint_url, access_key=access_key, secret_key=secret_key)
    shadows = [StreamedShadow(require_lerp(parse_rule(rule))) for rule in RULES[: int(count)]]
    for step in (1, 2):
        begin = time.perf_counter()
        report = fold_source(
            FilesSource(key, [ObjectPart(store, key)]), shadows, step=step, digests=bool(int(digests))
        )
        seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "read_bytes": report.read_bytes}))


if __name__ == "__main__":
    main()
