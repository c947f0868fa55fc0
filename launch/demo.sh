#!/usr/bin/env bash
# The whole of GPTB-DS in a few minutes, from nothing but Python 3.11 and git: prepares the standard library's
# sources, trains a recurrent transformer on them with DeepSpeed (2 CPU ranks, or all GPUs), evaluates it, draws the loss
# curve and prints text that the model generates. Run again, it continues, or says that it is done.
# Arguments are handed on to `gptb-ds train`, e.g. `bash launch/demo.sh --train.updates 10000`.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh ""

store=data/stdlib-bpe run=runs/demo
gptb-ds prepare --source stdlib --tokenizer bpe:2048 --out "$store"

# Without GPUs: two ranks on the CPU.
python -c 'import sys, torch; sys.exit(torch.cuda.device_count() == 0)' || export N=${N:-2}
bash launch/one_node.sh --config demo --deepspeed_config ds_configs/zero1.json "$@" --data.path "$store" --run.dir "$run"

echo
# All of the held-out text: documents read as wholes, and in the pieces of training, which each start without a memory.
gptb-ds evaluate "$run" --data "$store" --reset-every
gptb-ds plot "$run" --out "$run/loss.png"
echo
echo "The model writes:"
gptb-ds generate "$run" --prompt $'import os\n\n\ndef ' --max-new-tokens 400 --temperature 0.6 --seed 1
