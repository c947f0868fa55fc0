#!/usr/bin/env bash
# A run under mpirun (tested with Open MPI): launch/mpirun.sh TRAIN-ARGUMENTS...
#   N=16                                          ranks (default: as many as mpirun finds slots for)
#   MPIRUN_ARGS="--hostfile hosts -x PATH"        anything else for mpirun
# The ranks ask MPI who they are (mpi4py) and talk over NCCL or gloo, so the MPI needs no CUDA.
# Signals are passed on to the ranks as in launch/one_node.sh: checkpoint, exit code 85.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -d "$root/.venv/bin" ] && export PATH="$root/.venv/bin:$PATH"

# mpirun ends its ranks on TERM but passes USR1 on; its own session keeps the terminal's Ctrl-C away from them. Its habit
# of binding a rank to one core would leave that rank one thread.
read -ra extra <<<"${MPIRUN_ARGS:-}"
setsid mpirun ${N:+-n "$N"} --bind-to none "${extra[@]}" python -m gptb_ds train "$@" &
launcher=$!
# shellcheck disable=SC2317  # the traps call it
ask_for_checkpoint() {
    trap 'kill -TERM "$launcher"' INT
    kill -USR1 "$launcher"
}
trap ask_for_checkpoint TERM INT HUP USR1 USR2

# A signal ends a wait early; the last one tells the exit code, whatever came in between.
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done
wait "$launcher"
code=$?
exit "$code"
