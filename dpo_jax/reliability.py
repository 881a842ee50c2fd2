"""The reliability figure: how often pairs are in order against how sure the scores were of it."""

from typing import Any

import numpy as np
from etils import epath

from dpo_jax.agreement import CONFIDENCE, calibration_error, reliability


def draw(path: epath.Path, gap_B: np.ndarray, title: str) -> None:
    """Write the figure as PNG: the bins of `agreement.reliability` with their intervals over the
    diagonal, and how many pairs each holds below.

    gap_B: score of the better response less that of the worse, at least one not 0.
    """
    from matplotlib.figure import Figure

    bins = reliability(gap_B)
    x, y, low, high, count = (
        np.array([getattr(each, name) for each in bins], float)
        for name in ("confidence", "accuracy", "low", "high", "n")
    )
    figure = Figure(figsize=(6, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.plot([0.5, 1], [0.5, 1], color="0.5", linestyle="--", label="calibrated")
    bars: Any = [y - low, high - y]
    label = f"share in order, {CONFIDENCE:.0%} interval"
    upper.errorbar(x, y, bars, marker="o", capsize=3, label=label)
    upper.set_ylabel("share of pairs in order")
    upper.set_title(title)
    upper.legend(loc="upper left", fontsize="small")
    edges = [each.floor for each in bins]
    drawn = lower.bar(
        edges, count, [b.ceiling - b.floor for b in bins], align="edge", edgecolor="w"
    )
    lower.bar_label(drawn, fontsize="x-small")
    lower.margins(y=0.2)
    lower.set_ylabel("pairs")
    lower.set_xlabel("confidence: sigmoid(|margin|)")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    said = (
        f"Expected calibration error {calibration_error(gap_B):.3f} over {count.sum():.0f} pairs."
    )
    figure.supxlabel(f"{said} Pairs of one ranking count as independent.", fontsize="small")
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=150)
