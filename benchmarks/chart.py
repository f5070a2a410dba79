"""The results as a picture that can be read on a light and on a dark page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .databases import DATABASES
from .results import Results
from .workloads import WORKLOADS, Memory

INK = "#7d8590"
"""A grey with enough contrast on white and on black."""
# name, colour, marker, size: from the least to the most important, which is drawn last.
MARKS = (
    ("bare", "#8b949e", "|", 11),
    ("own", "#3b8eea", "s", 6),
    ("this-alone", "#f0883e", "D", 6),
    ("this", "#e5534b", "o", 9),
)
LABELS = {
    "bare": "bare driver",
    "own": "the library's own module",
    "this-alone": "this package, on its own",
    "this": "this package, in a Flask-SQLAlchemy session",
}


def draw(results: Results, path: Path) -> None:
    """Draw the rates relative to eventsourcing-sqlalchemy, a panel for each database.

    :param path: the file, of a type that its suffix tells.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [database for database in results.series if "peer" in results.titles[database]]
    names = [name for name in WORKLOADS if not isinstance(WORKLOADS[name], Memory)]
    names = [name for name in names if any(name in results.series[database] for database in panels)]
    if not panels or not names:
        return
    style: Any = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "font.size": 10}
    # A fixed salt keeps the file the same for the same results.
    with rc_context({**style, "svg.fonttype": "none", "svg.hashsalt": "benchmarks", "font.family": "sans-serif"}):
        figure = Figure(figsize=(3.2 + 3.4 * len(panels), 1.8 + 0.34 * len(names)), layout="constrained")
        axes: Any = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        marks: dict[str, Any] = {}
        for axis, database in zip(axes, panels, strict=True):
            _panel(axis, results, database, names)
            marks.update(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        labels = [LABELS[name] for name, *_ in reversed(MARKS) if LABELS[name] in marks]
        columns = 2 if len(panels) > 1 else 1
        handles = [marks[label] for label in labels]
        figure.legend(handles, labels, loc="outside upper center", frameon=False, ncols=columns)
        figure.supxlabel("times the rate of eventsourcing-sqlalchemy (median, lowest to highest)", fontsize=10)
        figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axis: Any, results: Results, database: str, names: list[str]) -> None:
    axis.set_title(DATABASES[database].title, color=INK, fontweight="bold")
    for contender, colour, marker, size in MARKS:
        points = []
        for place, name in enumerate(names):
            ratios = results.ratios(database, name, contender, "peer")
            if ratios is not None and ratios.values:
                points.append((ratios.median, place, min(ratios.values), max(ratios.values)))
        if points:
            x, y, low, high = zip(*points, strict=True)
            axis.hlines(y, low, high, color=colour, linewidth=1.5, alpha=0.6)
            label = LABELS[contender]
            axis.plot(x, y, linestyle="none", color=colour, marker=marker, ms=size, mew=1.5, label=label)
    axis.axvline(1, color=INK, linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    # Between the powers of ten only 2 and 5 have their number.
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.set_yticks(range(len(names)), [WORKLOADS[name].title for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="both", color=INK, alpha=0.2, linewidth=0.8)
    axis.tick_params(length=0, which="both")
    for side in axis.spines.values():
        side.set_visible(False)
