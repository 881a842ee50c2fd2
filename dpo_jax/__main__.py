"""`python -m dpo_jax`, the same as the command `dpo-jax`."""

import sys

from dpo_jax.cli import main

sys.exit(main())
