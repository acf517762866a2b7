"""Download an object with boto3, and with FIRST also load it and fold it into one average; prints seconds.

Arguments: ENDPOINT KEY_ID SECRET BUCKET KEY PATH [FIRST]; FIRST is a checkpoint that the average holds already.
"""

import json
import sys
import time

import boto3
from botocore.config import Config

endpoint, access_key, secret_key, bucket, key, path, *first = sys.argv[1:]
client = boto3.client(
    "s3",
    endpoint_url=endpoint,
    aws_access_key_id=access_key,
    aws_secret_access_key=secret_key,
    region_name="us-east-1",
    config=Config(s3={"addressing_style": "path"}),
)
if first:
    from safetensors.torch import load_file

    shadow = {name: tensor.clone() for name, tensor in load_file(first[0]).items()}
begin = time.perf_counter()
with open(path, "wb") as file:  # noqa: PTH123 - the usual script
    file.writelines(client.get_object(Bucket=bucket, Key=key)["Body"].iter_chunks(1 << 20))
if first:
    for name, tensor in load_file(path).items():
        shadow[name].lerp_(tensor, 0.1)
print(json.dumps({"seconds": time.perf_counter() - begin}))
