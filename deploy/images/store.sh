#!/bin/sh
# SeaweedFS, with an identity for each kind of process that calls. Its WebDAV, file and administration pages ask for
# none, so they are off; of what is left, only S3 (8333) may be published.
set -eu
: "${AWS_ACCESS_KEY_ID:?set the access key: without credentials the store accepts every request}"
: "${AWS_SECRET_ACCESS_KEY:?set the secret key: without credentials the store accepts every request}"
: "${WA_BUCKET:?name the bucket to create}"
python /src/store_keys.py /tmp/s3.json /keys
exec weed mini \
    -dir=/data \
    -ip=127.0.0.1 \
    -ip.bind=0.0.0.0 \
    -s3.port=8333 \
    -s3.port.iceberg=0 \
    -s3.port.lance=0 \
    -bucket="$WA_BUCKET" \
    -s3.config=/tmp/s3.json \
    -s3.iam=false \
    -s3.autoCreateBucket=false \
    -disableHttp \
    -webdav=false \
    -admin.ui=false \
    -volume.preStopSeconds=0 \
    -master.telemetry=false
