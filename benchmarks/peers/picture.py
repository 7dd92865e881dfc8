"""Bars of tokens/s: a panel for each case, an engine a bar, and the machine's limit beside each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row


def draw(path: Path | None, title: str, rows: Sequence[Row]) -> None:
    if path is None:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("tok/s"):
            name = f"{row['case']}, {row['precision']}, {row['threads']} threads"
            panels.setdefault(name, []).append(row)
    columns = min(len(panels), 5) or 1
    lines = -(-len(panels) // columns) or 1
    size = (3.2 * columns, 2.4 * lines)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, layout="constrained")
    flat = axes.flat if len(panels) > 1 else [axes]
    for place, (name, found) in zip(flat, panels.items()):
        _panel(place, name, found)
    figure.suptitle(f"{title}, tokens/s (pale: the machine's limit)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(place: Any, name: str, rows: Sequence[Row]) -> None:
    names = [row["engine"] for row in rows][::-1]
    speed = [row["tok/s"] for row in rows][::-1]
    most = [row["tok/s"] / row["of limit"] for row in rows][::-1]
    error = [row["tok/s"] * row["spread"] for row in rows][::-1]
    colors = ["tab:green" if name == "kvist" else "tab:gray" for name in names]
    place.barh(names, most, color="whitesmoke", edgecolor="lightgray")
    place.barh(names, speed, xerr=error, color=colors)
    place.set_title(name, fontsize=9)
    place.set_xlim(0)
    place.tick_params(labelsize=7)
