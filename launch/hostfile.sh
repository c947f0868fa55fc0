#!/usr/bin/env bash
# A run on the hosts of a hostfile, started over ssh: HOSTFILE=hosts launch/hostfile.sh TRAIN-ARGUMENTS...
# The hostfile has a line "NAME slots=DEVICES" for each host. All hosts see the checkout, the store and the run's folder
# under the same paths, and ssh from this one to each of them asks nothing. Needs pdsh here.
#   SSH_PORT, MASTER_ADDR, MASTER_PORT                where the defaults don't do
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME            the network interface between the hosts, where there are several
# Signals are passed on to the ranks of all hosts as in launch/one_node.sh: checkpoint, exit code 85.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -d "$root/.venv/bin" ] && export PATH="$root/.venv/bin:$PATH"
hostfile=${HOSTFILE:-hostfile}
if [ ! -r "$hostfile" ]; then
    echo "launch/hostfile.sh: cannot read the hostfile '$hostfile'; name one with HOSTFILE=path" >&2
    exit 2
fi

port=${MASTER_PORT:-$((20000 + $$ % 10000))}
options=(--quiet --no_local_rank --hostfile "$hostfile" --force_multi --launcher pdsh --master_port "$port")
[ -n "${MASTER_ADDR:-}" ] && options+=(--master_addr "$MASTER_ADDR")
[ -n "${SSH_PORT:-}" ] && options+=(--ssh_port "$SSH_PORT")
# A host that no longer answers ends its connection in half a minute, where TCP alone would take hours. (ssh heeds the
# first setting that it is given: the user's.)
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -oBatchMode=yes -oServerAliveInterval=10 -oServerAliveCountMax=3"

# ssh brings no environment along; DeepSpeed exports what this file names.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
{
    env | grep -E '^(PATH|LD_LIBRARY_PATH|TMPDIR|(DS|DEEPSPEED|GPTB|HF|TORCH|NCCL|GLOO|OMP|UCX|WANDB|CUDA_HOME|XDG_CACHE)[A-Z0-9_]*)='
    cat ~/.deepspeed_env .deepspeed_env 2>/dev/null
} | grep -vE '^(DS_ENV_FILE|[^=]*(TOKEN|KEY|SECRET|PASSWORD)[^=]*)=' >"$DS_ENV_FILE" # secrets would show in ps on every host

# --quiet does not reach the other hosts: their launchers' chatter is dropped here.
exec {out}> >(trap '' INT HUP && exec grep --line-buffered -vE '\[INFO\] \[launch\.py|Setting accelerator to CPU|exits with return code = 85')
filter=$!
setsid deepspeed "${options[@]}" --module gptb_ds train "$@" >&"$out" &
launcher=$!
# shellcheck disable=SC2317  # the traps call it
ask_for_checkpoint() {
    trap 'kill -TERM "$launcher"' INT
    # One rank is enough, they agree. The port tells our launcher there from any other; the ranks are its children.
    local first mine="^[^ ]*python[^ ]* .*deepspeed[.]launcher[.]launch .*--master_port=$port "
    first=$(sed -n 's/^\([^#[:space:]]\{1,\}\)[[:space:]]\{1,\}slots=.*/\1/p' "$hostfile" | head -n 1)
    PDSH_SSH_ARGS_APPEND="$PDSH_SSH_ARGS_APPEND${SSH_PORT:+ -p $SSH_PORT}" pdsh -R ssh -w "$first" \
        "pkill -TERM -P \$(pgrep -d, -f '$mine')" >/dev/null 2>&1 && return
    kill -TERM "$launcher" # no ranks there yet, so nothing to save
}
trap ask_for_checkpoint TERM INT HUP USR1 USR2

# A signal ends a wait early; the last one tells the exit code, whatever came in between.
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done
wait "$launcher"
code=$?
exec {out}>&-
wait "$filter"
exit "$code"
