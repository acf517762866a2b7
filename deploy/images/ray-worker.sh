#!/bin/bash
# A Ray node that joins the head. It ends when the head is gone for good; Docker then starts it again to join the new one.
set -euo pipefail
read -r node_ip _ < <(hostname -i)
rm -rf /tmp/ray # of an earlier start of this container
exec ray start --block --address="${RAY_ADDRESS:?name the head, as host:port}" \
    --node-ip-address="$node_ip" --node-manager-port=6380 --object-manager-port=6381 \
    --num-cpus="${WA_RAY_CPUS:-1}" --object-store-memory=200000000 \
    --include-log-monitor=false --disable-usage-stats
