"""FOLDER: where the real sets lie that experiments/real_*.py read, and that are not part of this
repository: data/ in the folder that DPO_JAX_SHARED names, ../shared without it."""

import os

FOLDER = os.path.join(os.environ.get("DPO_JAX_SHARED") or "../shared", "data")
