"""Draw measurements as SVG (matplotlib), the same way each time, so that a new run changes only what it measured."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, List

__all__ = ["figure"]


@contextlib.contextmanager
def figure(path: str, panels: int, x_label: str, y_label: str) -> Iterator[List[Any]]:
    """Yield the axes of ``panels`` plots, one below the other, then write them to ``path``."""
    import matplotlib

    matplotlib.use("svg")
    # Ids and dates would differ in each run.
    matplotlib.rcParams.update({"svg.hashsalt": "sekuire", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(panels, 1, figsize=(7.5, 2.6 * panels), squeeze=False)
    flat = [row[0] for row in axes]
    try:
        for one in flat:
            one.set_xlabel(x_label)
            one.set_ylabel(y_label)
            one.grid(alpha=0.3)
        yield flat
        for one in flat:
            if one.get_legend_handles_labels()[0]:
                one.legend(fontsize=8)
            if one.get_yscale() == "linear" and not one.yaxis_inverted():
                one.set_ylim(bottom=0)
        drawing.tight_layout()
        drawing.savefig(path, metadata={"Date": None})
    finally:
        pyplot.close(drawing)
