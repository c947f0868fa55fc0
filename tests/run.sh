#!/usr/bin/env bash
# Runs the tests from nothing but a clone: sets up .venv, checks style and types, then pytest.
#   bash tests/run.sh              everything
#   bash tests/run.sh --fast       only what takes seconds
#   bash tests/run.sh tests/unit   what pytest would take
# GPTB_DS_TEST_WORKERS=N runs N test files side by side (default: one more than cores, at most 5).
# GPTB_DS_REQUIRE_ALL=1 turns "component missing, skipped" (Slurm, MPI, ssh) into a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh dev
if [ "${1:-}" = --fast ]; then
    shift
    set -- -m "not slow" "$@"
fi
ruff check .
ruff format --check .
mypy
cores=$(nproc)
# One more than cores: much of a launcher's test is waiting.
workers=${GPTB_DS_TEST_WORKERS:-$((cores < 4 ? cores + 1 : 5))}
if [ "${1:--m}" != -m ]; then
    exec python -m pytest "$@"
fi
# By file: what the tests of a file share is made once. Launchers first: those files take longest.
exec python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder tests/launch tests "$@"
