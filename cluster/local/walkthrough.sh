#!/usr/bin/env bash
# From images to an endpoint on the cluster of up.sh, by `ray job submit` and `serve deploy` alone; then
# a worker is lost, and job and endpoint go on. CONFIG= another preset, NAME= an earlier run to go on with.
set -euo pipefail
# shellcheck source=cluster/local/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

CONFIG="${CONFIG:-configs/quickstart.yaml}"
STORAGE="${STORAGE:-$ROOT/runs}"
NAME="${NAME:-walkthrough-$(date +%Y%m%d-%H%M%S)}"
CLASSES="${CLASSES:-\"three\", \"five\", \"eight\"}"
BODY="{\"classes\": [$CLASSES]}"
SERVICE="http://127.0.0.1:$SERVE_PORT"
export RAY_ADDRESS="http://127.0.0.1:$DASHBOARD_PORT"
export RAY_DASHBOARD_ADDRESS="$RAY_ADDRESS"

cd "$ROOT"
for node in "${NODES[@]}"; do
    alive "$node" || {
        echo "error: $node does not run: cluster/local/up.sh" >&2
        exit 1
    }
done

asker=""
cleanup() {
    [[ -z "$asker" ]] || kill "$asker" 2>/dev/null || true
}
trap cleanup EXIT

step() {
    printf '\n== %s (%d s)\n' "$*" "$SECONDS"
}

# submit RAY-OPTIONS... -- JOB NAME FLAGS...
submit() {
    local options=()
    while [[ "$1" != -- ]]; do
        options+=("$1")
        shift
    done
    local job="$2" name="$3"
    shift 3
    ray job submit --working-dir . --runtime-env-json "$(python -m ray_jobs.job)" "${options[@]}" -- \
        python -m "ray_jobs.$job" --config "$CONFIG" --storage "$STORAGE" --name "$name" "$@"
}

step "build_zoo"
submit -- build_zoo "$NAME" --cluster.zoo_workers 2
step "train, a rank on each worker"
# above half of a worker's CPUs, so that no node takes two; what is left is for the zoo's reader
submit -- train "$NAME" --cluster.train_workers 2 --cluster.train_cpus 3
step "evaluate"
submit -- evaluate "$NAME" --cluster.zoo_workers 2

step "serve deploy"
sed "s|@RUN@|$STORAGE/$NAME|" cluster/local/serve.yaml >"$STATE/serve.yaml"
serve deploy "$STATE/serve.yaml"
wait_for 240 "the endpoint" curl -fsS "$SERVICE/readyz"
both_run() {
    serve status | python -c '
import sys, yaml
app = yaml.safe_load(sys.stdin)["applications"]["tina"]
counts = [d["replica_states"].get("RUNNING", 0) for d in app["deployments"].values()]
sys.exit(counts != [2, 2])'
}
wait_for 240 "two replicas of each deployment" both_run
serve status

step "weights"
curl -fsS "$SERVICE/v1/models" -H 'content-type: application/json' -H 'accept: application/vnd.safetensors' \
    -d "$BODY" -o "$STATE/mine.safetensors"
ls -l "$STATE/mine.safetensors"
[[ "$CONFIG" != configs/quickstart.yaml ]] \
    || tina classify "$STATE/mine.safetensors" serve/static/samples/digits-five.png

step "a job and requests, while a worker is lost"
# a line per request: second, status. Another seed each: no answer comes from a cache.
ask() {
    local seed=0 status
    while true; do
        seed=$((seed + 1))
        status="$(curl -sS -o /dev/null -w '%{http_code}' --max-time 60 "$SERVICE/v1/models" \
            -H 'content-type: application/json' -d "{\"classes\": [$CLASSES], \"seed\": $seed}" 2>/dev/null || true)"
        echo "$SECONDS ${status:-000}"
        sleep 0.5
    done
}
ask >"$STATE/requests.log" &
asker=$!
job="$NAME-loss-$$"
submit --no-wait --submission-id "$job" -- build_zoo "$NAME-loss" --cluster.zoo_workers 4
begun() {
    compgen -G "$STORAGE/$NAME-loss/zoo/part-*.parquet"
}
wait_for 300 "the first block of p-models" begun
victim="$(pgrep -P "$(<"$STATE/worker2.pid")" raylet)"
lost=$SECONDS
kill -KILL "$victim"
echo "worker2: its raylet, process $victim, was killed at second $lost"
ray job logs --follow "$job"
ray job status "$job" | tee "$STATE/status.log"
grep -qi succeeded "$STATE/status.log"

answers() {
    awk -v lost="$lost" '$1 > lost + 5 && $2 == 201 { n++ } END { exit n < 10 }' "$STATE/requests.log"
}
wait_for 120 "ten answers after the loss" answers
kill "$asker"
asker=""
echo "requests before and after the loss, by status:"
awk -v lost="$lost" '{ n[($1 <= lost ? "before " : "after  ") $2]++ } END { for (k in n) print "  " k, n[k] }' \
    "$STATE/requests.log" | sort
serve status

step "done: report in $STORAGE/$NAME/report.json, endpoint at $SERVICE, cluster/local/down.sh ends all"
