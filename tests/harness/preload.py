"""What every rank of a test imports, loaded once in the process that ranks are forked from.

Without it a rank of a test spends most of its time on imports: 3 of its 4 seconds.
"""

import gc
import importlib

for _name in (
    "gptb_ds.cli",
    "gptb_ds.commands.train",
    "gptb_ds.training.setup",
    # Imported by DeepSpeed's start: `zero.utils.is_zero_supported_optimizer` does, for every optimizer.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "transformers.modeling_utils",
):
    importlib.import_module(_name)

# DeepSpeed's start collects garbage several times. Without this each rank would go through all that was imported each
# time, and, by the marks that it leaves there, get a copy of its own.
gc.freeze()
