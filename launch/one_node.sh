#!/usr/bin/env bash
# A run on this machine under the deepspeed launcher: launch/one_node.sh TRAIN-ARGUMENTS...
#   N=4   take four of the GPUs (default: all of them); without GPUs four CPU ranks, each on cores of its own (default 1)
# TERM, USR1, USR2, a closed terminal and the first Ctrl-C reach the ranks, which write a checkpoint: exit code 85, and the
# same command goes on from there. A second Ctrl-C ends them at once.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -d "$root/.venv/bin" ] && export PATH="$root/.venv/bin:$PATH"

# A port of the run's own, so that two runs fit on one machine.
port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
options=(--quiet --no_local_rank --master_port "$port")
if compgen -G '/dev/nvidia[0-9]*' >/dev/null || [ -e /dev/kfd ]; then
    if [ -n "${N:-}" ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        CUDA_VISIBLE_DEVICES=$(cut -d, -f"1-$N" <<<"$CUDA_VISIBLE_DEVICES") # beside a number DeepSpeed would drop the list
        export CUDA_VISIBLE_DEVICES
    elif [ -n "${N:-}" ]; then
        options+=(--num_accelerators "$N")
    fi
else
    export DS_ACCELERATOR=cpu
    options+=(--num_accelerators "${N:-1}")
    cores=$(lscpu --parse=CORE,SOCKET | grep -v '^#' | sort -u | wc -l)
    if [ "${N:-1}" -le "$cores" ] && numactl --cpunodebind=0 --membind=0 true 2>/dev/null; then
        options+=(--bind_cores_to_rank)
    else
        # Not bound (no numactl, or a container that forbids it): at least don't let every rank start a thread on each core.
        threads=$(($(nproc) / ${N:-1}))
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    fi
fi

# The launcher gets a session of its own: on SIGTERM it would die and leave its ranks behind, so signals come here alone
# and go to the ranks (children of the launcher's child) alone.
setsid deepspeed "${options[@]}" --module gptb_ds train "$@" &
launcher=$!
# shellcheck disable=SC2317  # the traps call it
ask_for_checkpoint() {
    trap 'kill -KILL -- "-$launcher"' INT
    local nodes
    nodes=$(pgrep -d, -P "$launcher") && pkill -TERM -P "$nodes" && return
    kill -TERM -- "-$launcher" # no ranks yet, so nothing to save
}
trap ask_for_checkpoint TERM INT HUP USR1 USR2

# A signal ends a wait early; the last one tells the exit code, whatever came in between.
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done
wait "$launcher"
code=$?
# Ranks that outlived their launcher (it was killed) would hold the devices.
if kill -TERM -- "-$launcher" 2>/dev/null; then
    echo "launch/one_node.sh: the launcher is gone and left ranks behind; ending them" >&2
    for _ in {1..300}; do
        kill -0 -- "-$launcher" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL -- "-$launcher" 2>/dev/null
    [ "$code" -ne 0 ] || code=1
fi
exit "$code"
