"""What a run's configuration leaves open, decided before the run: by its backbone, its past, or the machine."""

from __future__ import annotations

from gptb_ds.config import Config
from gptb_ds.distributed.world import World
from gptb_ds.model_choice import with_backbone
from gptb_ds.training.compilation import with_compilation
from gptb_ds.training.kept_choice import with_kept_order
from gptb_ds.training.precision import with_precision
from gptb_ds.training.sizes import with_sizes


def decided(config: Config, world: World) -> Config:
    """`config` with what rank 0 finds in the place of each "auto" (but `train.graph`'s, which the engine tries out).

    All ranks call it. Each decision rests on those before it: tokens/s by lanes are measured in the precision.

    Raises ValueError for a backbone, a store or a value that can't be used.
    """
    config = world.on_rank0(with_backbone, config)
    config = world.on_rank0(with_kept_order, config)
    config = world.on_rank0(with_precision, config, world.device)
    config = world.on_rank0(with_sizes, config, world.device, world.size, world.ranks_here(), print)
    return world.on_rank0(with_compilation, config, world.device)
