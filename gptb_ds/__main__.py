"""`python -m gptb_ds VERB` is `gptb-ds VERB`, so that every launcher can start it."""

import sys

from gptb_ds.cli import main

sys.exit(main())
