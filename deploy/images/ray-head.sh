#!/bin/bash
# The Ray head and the runner, which must sit beside a raylet. If either ends, so does the container, and with it the
# other: Docker starts both anew, and the runner takes up its runs from the bucket.
set -euo pipefail
read -r node_ip _ < <(hostname -i)
rm -rf /tmp/ray # of an earlier start of this container

ray start --head --block \
    --node-ip-address="$node_ip" --port=6379 --node-manager-port=6380 --object-manager-port=6381 \
    --num-cpus="${WA_RAY_CPUS:-1}" --object-store-memory=200000000 \
    --include-dashboard=false --include-log-monitor=false --disable-usage-stats &
ray=$!
until healthcheck "tcp://$node_ip:6379" "tcp://$node_ip:6380" 2>/dev/null; do
    kill -0 "$ray" || { echo "ray start ended before it answered" >&2; exit 1; }
    sleep 0.2
done

wa-with-keys python -m services.trainer & # the runner alone has keys of the bucket; workers get them with what they run
runner=$!

stop() { # the runner first, while there is still a cluster; the end of this process then takes Ray along, undrained
    trap - TERM INT
    kill -TERM "$runner" && wait "$runner" || true
    exit 0
}
trap stop TERM INT

wait -n "$ray" "$runner" || true
kill -0 "$ray" 2>/dev/null && echo "the runner ended" >&2 || echo "ray ended" >&2
exit 1
