#!/usr/bin/env bash
# Ends the cluster of up.sh: its three processes by their ids, and no other Ray on this machine.
set -euo pipefail
# shellcheck source=cluster/local/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

gone() {
    ! alive "$1"
}

# workers first: they would report the loss of their head
for node in worker2 worker1 head; do
    if alive "$node"; then
        pid="$(<"$STATE/$node.pid")"
        kill -TERM "$pid"
        wait_for 30 "$node" gone "$node" || kill -KILL "$pid"
        echo "$node: ended"
    fi
    rm -f "$STATE/$node.pid"
done
echo "down: logs stay in $STATE"
