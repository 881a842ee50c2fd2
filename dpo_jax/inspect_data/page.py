"""An inspection as one page of HTML that needs nothing else: no script, no font, no address."""

import io
import re
from importlib.resources import files
from typing import Any

import numpy as np
from etils import epath

from dpo_jax import rundir
from dpo_jax.inspect_data import said
from dpo_jax.inspect_data.facts import Inspection, Lengths
from dpo_jax.inspect_data.tokens_shown import visible
from dpo_jax.structs import BadInput

TEMPLATE = "page.html.jinja"
BEST, WORST = 168, 22  # hues: green, orange
INK = "#010203"  # stands for the page's own colour, light or dark, until the figure is written
BINS = 40
NAMELESS = {name: None for name in ("Creator", "Date", "Format", "Type")}


def place(directory: epath.Path) -> epath.Path:
    """Where the page of a run lies by default: beside its directory, under its name."""
    return directory.with_name(f"{directory.name}-inspect.html")


def write(found: Inspection, path: epath.Path) -> None:
    """Write the page, whole or not at all. Raises BadInput where there is no place for it."""
    if path.is_dir():
        raise BadInput(f"--html={path}: it is a folder; name a file")
    text = page(found)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rundir.write(path, text)
    except OSError as error:
        raise BadInput(f"--html={path}: cannot be written ({error.strerror or error})") from None


def page(found: Inspection) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined}
    environment = Environment(**options, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"visible": visible, "hue": hue}
    template = environment.from_string((files("dpo_jax.inspect_data") / TEMPLATE).read_text())
    return template.render(found=found, said=said, histogram=histogram)


def hue(rank: float | None) -> int:
    """The hue of a response, from the best to the worst; blue where nothing says."""
    return 220 if rank is None else round(rank * BEST + (1 - rank) * WORST)


def histogram(several: tuple[Lengths, ...], salt: str) -> Any:
    """Histograms of lengths, prompts and groups above responses, as SVG in the page's colours.

    salt: tells its inner names from those of the page's other figures.
    """
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    whole = [each for each in several if each.name in ("prompt", "group")]
    parts = [each for each in several if each not in whole]
    colours: dict[Any, str] = {f"{side}.color": INK for side in ("text", "xtick", "ytick")}
    colours |= {"axes.labelcolor": INK, "axes.edgecolor": INK}
    written = io.StringIO()
    with rc_context({**colours, "svg.fonttype": "none", "svg.hashsalt": salt}):
        figure = Figure(figsize=(7, 5), layout="constrained")
        for axes, group in zip(figure.subplots(2), (whole, parts), strict=True):
            top = max(int(each.tokens.max()) for each in group)
            bins = np.arange(0, top + 1 + -(-(top + 1) // BINS), -(-(top + 1) // BINS)) - 0.5
            for each in group:
                colour = f"C{7 * (each.name == 'group')}" if each in whole else _paint(each.rank)
                options: dict[str, Any] = {"histtype": "stepfilled", "color": colour}
                axes.hist(each.tokens, bins, alpha=0.25, **options)
                options["histtype"] = "step"
                axes.hist(each.tokens, bins, linewidth=1.6, label=each.name, **options)
            axes.set(xlabel="tokens", ylabel="count", facecolor="none")
            axes.legend(facecolor="none", edgecolor="none")
        figure.savefig(written, format="svg", transparent=True, metadata=NAMELESS)
    return Markup(_inline(written.getvalue()))


def _paint(rank: float | None) -> tuple[float, float, float]:
    from colorsys import hls_to_rgb

    return hls_to_rgb(hue(rank) / 360, 0.45, 0.6)


def _inline(svg: str) -> str:
    """An SVG file as an element of a page: without a head, names or addresses of its own."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r' id="[a-z\d.]+_\d+"| xmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(r' (width|height)="[\d.]+pt"', "", body)  # as wide as the page
    return body.replace("xlink:href", "href").replace(INK, "currentColor")
