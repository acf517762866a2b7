"""Writes whom the store knows, and the keys by which each kind of process is known to it; runs before the store.

Usage: store_keys.py IDENTITIES KEYS. IDENTITIES becomes the file that SeaweedFS reads. KEYS has a folder for each
kind of process (in the compose file a volume that it alone shares with the store), and gets `s3.env` there. The
administrator's keys, from which all others follow, and the bucket are in the environment.
"""

# ruff: noqa: INP001  copied into an image as a script, not imported

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from services.stack.identities import GRANTS, KeyPair, key_pair, seaweed_config


def main(identities: Path, keys: Path) -> None:
    """Write all of them, for the eyes of this user alone."""
    os.umask(0o077)
    admin = KeyPair(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    identities.write_text(seaweed_config(admin=admin, bucket=os.environ["WA_BUCKET"]))
    for role in GRANTS:
        pair = key_pair(role, admin=admin)
        draft = keys / role / "s3.env.draft"
        draft.write_text(
            f"WA_S3_ACCESS_KEY={shlex.quote(pair.access_key)}\nWA_S3_SECRET_KEY={shlex.quote(pair.secret_key)}\n"
        )
        draft.replace(keys / role / "s3.env")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
