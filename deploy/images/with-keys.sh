#!/bin/sh
# Runs a command with the keys by which the store knows this kind of process (deploy/images/store_keys.py wrote them).
set -eu
[ -r /keys/s3.env ] || { echo "/keys/s3.env is not there; mount this service's volume of keys, and start the store first" >&2; exit 1; }
. /keys/s3.env
export WA_S3_ACCESS_KEY WA_S3_SECRET_KEY
exec "$@"
