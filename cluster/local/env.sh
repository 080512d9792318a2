# shellcheck shell=bash disable=SC2034
# What up.sh, down.sh and walkthrough.sh share; sourced by them, which use its variables.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# Logs, sockets and process ids. Short: a socket's whole path must stay below 107 characters.
STATE="${TINA_CLUSTER:-/tmp/tina-cluster}"
GCS_PORT="${TINA_GCS_PORT:-6390}"
DASHBOARD_PORT="${TINA_DASHBOARD_PORT:-8265}"
SERVE_PORT=8000 # as in serve.yaml
NODES=(head worker1 worker2)

if [[ -d "$ROOT/.venv/bin" ]]; then
    export PATH="$ROOT/.venv/bin:$PATH"
    # where `make install` left DeepSpeed's operator
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$ROOT/.venv/torch_extensions}"
fi
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0

# Ports of a node: its own thousand from 26000 on, as all share one address.
ports_of() {
    case "$1" in
        head) echo 26000 ;;
        worker1) echo 27000 ;;
        worker2) echo 28000 ;;
        *)
            echo "no such node: $1" >&2
            return 1
            ;;
    esac
}

# Whether the process that `up.sh` started for a node lives.
alive() {
    local file="$STATE/$1.pid"
    [[ -f "$file" ]] && kill -0 "$(<"$file")" 2>/dev/null
}

# wait_for SECONDS WHAT COMMAND...: until the command succeeds.
wait_for() {
    local limit=$((SECONDS + $1)) what="$2"
    shift 2
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS >= limit)); then
            echo "error: $what: not in time" >&2
            return 1
        fi
        sleep 1
    done
}
