#!/usr/bin/env bash
# The virtual environment of this checkout: `source launch/setup.sh ""` (or "dev") creates .venv on first use, installs
# the package with the versions of constraints.txt and puts .venv/bin first on PATH (DeepSpeed looks for ninja there).
# Re-run, it costs nothing until pyproject.toml or constraints.txt change.
gptb_ds_setup() {
    local extra=${1:-} root python stamp want
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "launch/setup.sh: needs Python 3.11 or later as '$python'; name another one with PYTHON=/path/to/python" >&2
        return 2
    fi
    stamp="$root/.venv/.installed${extra:+-$extra}"
    want=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        echo "setting up $root/.venv (a few minutes the first time)" >&2
        [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv" || return
        # torch goes first and alone: asked for by another package, pip may take a newer build with gigabytes of CUDA.
        "$root/.venv/bin/python" -m pip install -q -c "$root/constraints.txt" torch || return
        "$root/.venv/bin/python" -m pip install -q -c "$root/constraints.txt" -e "$root${extra:+[$extra]}" || return
        echo "$want" >"$stamp"
    fi
    export PATH="$root/.venv/bin:$PATH"
}
gptb_ds_setup "${1:-}"
