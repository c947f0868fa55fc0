#!/usr/bin/env bash
# Everything that needs a real GPU, in one command of under ten minutes: bash tests/gpu.sh [REPORT.json [PART...]]
# Prints a table and writes the report (default: gpu-report.json). Uses the Python at hand (PYTHON=... for another one),
# with torch and transformers; without deepspeed its part is left out with a line. Where there is no GPU, it says so.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v python || command -v python3)}
if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: skipped, torch sees no GPU here"
    exit 0
fi
exec env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" -m tests.gpu.report "$@"
