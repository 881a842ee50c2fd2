"""The command `dpo-jax`, also `python -m dpo_jax`."""

import sys

from dpo_jax import heap


def start() -> int:
    """Run the command in a process whose memory and devices are set up for it, and return its exit
    status."""
    heap.tuned()
    from dpo_jax import cli, parallel  # behind it, for the process begins again

    parallel.part_cpu()
    return cli.main()


if __name__ == "__main__":
    sys.exit(start())
