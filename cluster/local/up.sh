#!/usr/bin/env bash
# A cluster of three nodes on one machine: a head that takes no work and two workers, each with its own
# processes, ports, folder and object store. Needs 8 GB of memory.
set -euo pipefail
# shellcheck source=cluster/local/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

for node in "${NODES[@]}"; do
    if alive "$node"; then
        echo "error: $node runs already, see $STATE; cluster/local/down.sh ends it" >&2
        exit 1
    fi
done
mkdir -p "$STATE"
trap 'echo "error: the cluster did not come up, logs in $STATE" >&2; "$ROOT/cluster/local/down.sh"' ERR

# A worker that is ended here need not be drained first.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
# Each node would count the machine's GPUs as its own, and two ranks would be given the same one.
export CUDA_VISIBLE_DEVICES=
# Left over from another shell, it would name another cluster.
unset RAY_ADDRESS
ray get-auth-token --generate >/dev/null

# start NODE OPTIONS...: `--block` keeps one process to wait for and to end; a session of its own
# keeps it when this shell ends.
start() {
    local node="$1" base
    base="$(ports_of "$node")"
    shift
    setsid ray start "$@" --block \
        --temp-dir "$STATE/$node" \
        --object-store-memory "${TINA_OBJECT_STORE:-268435456}" \
        --node-manager-port "$base" \
        --object-manager-port "$((base + 1))" \
        --dashboard-agent-listen-port "$((base + 2))" \
        --dashboard-agent-grpc-port "$((base + 3))" \
        --runtime-env-agent-port "$((base + 4))" \
        --metrics-export-port "$((base + 5))" \
        --min-worker-port "$((base + 100))" \
        --max-worker-port "$((base + 999))" \
        </dev/null >"$STATE/$node.log" 2>&1 &
    echo "$!" >"$STATE/$node.pid"
}

healthy() {
    alive "$1" && curl -fsS "http://127.0.0.1:$(($(ports_of "$1") + 2))/api/local_raylet_healthz"
}

start head --head --num-cpus 0 --port "$GCS_PORT" \
    --dashboard-host 127.0.0.1 --dashboard-port "$DASHBOARD_PORT" --ray-client-server-port 26010
wait_for 90 "the head" curl -fsS "http://127.0.0.1:$DASHBOARD_PORT/api/gcs_healthz"
for node in worker1 worker2; do
    # logical CPUs: what stays when one node is lost must hold the endpoint and a job
    start "$node" --address "127.0.0.1:$GCS_PORT" --num-cpus "${TINA_WORKER_CPUS:-4}"
done
for node in "${NODES[@]}"; do
    wait_for 90 "$node" healthy "$node"
    echo "$node: process $(<"$STATE/$node.pid"), ports from $(ports_of "$node")"
done
echo "up: http://127.0.0.1:$DASHBOARD_PORT, token by \`ray get-auth-token\`"
echo "next: cluster/local/walkthrough.sh"
