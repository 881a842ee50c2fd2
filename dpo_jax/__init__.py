"""Preference alignment in JAX: `from dpo_jax import losses` for the losses, `run` for a whole run.

Importing this package imports nothing else; its files import what they need.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo_jax.experiment import Experiment
    from dpo_jax.train import Result


def run(experiment: "Experiment", *, directory: str | None = None) -> "Result":
    """Train an experiment, making its parents and data where they are missing: `train.run`."""
    from dpo_jax import train

    return train.run(experiment, directory=directory)
