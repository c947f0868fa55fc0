"""Owns nothing: what every rank of a distributed test imports, loaded once before the ranks are forked."""

import gptb_ds.model.modeling
import gptb_ds.training.engine
import gptb_ds.training.world  # noqa: F401
