"""The command `dpo-jax`, also `python -m dpo_jax`."""

import sys

from dpo_jax import heap


def start() -> int:
    """Run the command in a process whose memory is set up for it, and return its exit status."""
    heap.tuned()
    from dpo_jax.cli import main  # behind it, for the process begins again

    return main()


if __name__ == "__main__":
    sys.exit(start())
