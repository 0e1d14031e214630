"""Pictures of the results, one a family and machine, four for the sweeps: SVG that depends on the figures alone."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

STYLE = {
    "svg.hashsalt": "fastmoe",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
# Okabe and Ito's colours that people who see few colours tell apart, yellow left out; fastmoe's is the first
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*<>"
plain = FuncFormatter(lambda value, _: f"{value:g}")


def draw(record: dict, folder: Path) -> list[Path]:
    """Draws a family's record into folder; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    sweeps = dict.fromkeys(case["labels"]["sweep"] for case in record["cases"] if "sweep" in case.get("labels", {}))
    with matplotlib.rc_context(STYLE):
        if not sweeps:
            return [_save(_ratios(record), folder / f"{record['family']}.svg")]
        return [_save(_sweep(record, sweep), folder / f"sweep_{sweep}.svg") for sweep in sweeps]


def _save(figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    pyplot.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def _looks(records: list[dict]) -> dict[str, dict[str, str]]:
    """Colour and marker of every arm of some cases."""
    names = dict.fromkeys(["fastmoe", *(arm for case in records for arm in case["arms"])])
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)
    }


def _ratios(record: dict):
    """A row a case, a mark an arm: how many times as fast fastmoe is."""
    cases = [case for case in record["cases"] if any("fastmoe_is" in arm for arm in case["arms"].values())]
    figure, axes = pyplot.subplots(figsize=(7, 0.8 + 0.24 * max(1, len(cases))))
    looks = _looks(cases)
    for name, look in looks.items():
        arms = [(case["arms"].get(name, {}), y) for y, case in enumerate(cases)]
        points = [(arm["fastmoe_is"], y) for arm, y in arms if "fastmoe_is" in arm]
        if name != "fastmoe" and points:
            axes.plot(*zip(*points), linestyle="", markersize=5, label=name, **look)
    axes.axvline(1, color=COLORS[0], linewidth=1.5, label="fastmoe")
    ratios = [arm["fastmoe_is"] for case in cases for arm in case["arms"].values() if "fastmoe_is" in arm]
    low, high = min([0.7, *ratios]) / 1.15, max([2, *ratios]) * 1.15
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    ticks = [step * 2.0**power for power in range(-8, 12) for step in (1, 1.5)]
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter(plain)
    axes.set_yticks(range(len(cases)), [case["case"] for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlabel("fastmoe is so many times as fast as the arm (right of the line: faster)")
    axes.set_title(f"{record['family']}, {record['machine']['name']}", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _sweep(record: dict, sweep: str):
    """Time of a step against what the sweep goes over; dashed, over E: the time of the bytes nobody can avoid."""
    cases = [case for case in record["cases"] if case["labels"].get("sweep") == sweep and case["arms"]]
    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    ats = [case["labels"]["at"] for case in cases]
    categories = any(isinstance(at, str) for at in ats)
    xs = list(range(len(ats))) if categories else ats
    for name, look in _looks(cases).items():
        points = [(x, case["arms"][name]["ms"]) for x, case in zip(xs, cases) if "ms" in case["arms"].get(name, {})]
        if points:
            axes.plot(*zip(*points), markersize=5, label=name, **look)
    if cases[0]["labels"]["axis"] == "E":
        floor = [case["labels"]["touched_bytes"] / record["roofs"]["triad"] / 1e6 for case in cases]
        axes.plot(xs, floor, color="#666666", linestyle="--", label="weights and gradients at the streaming rate")
    if categories:
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(plain)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(plain)
    axes.set_xticks(xs, [f"{at // 1024}k" if isinstance(at, int) and at % 1024 == 0 else str(at) for at in ats])
    axes.minorticks_off()
    shapes = dict.fromkeys(cases[i]["case"].split(": ")[1] for i in (0, -1))
    axes.set_xlabel(f"{cases[0]['labels']['axis']}   ({' to '.join(shapes)})")
    axes.set_ylabel("ms a step, forward and backward")
    axes.set_title(f"{sweep}, {record['machine']['name']}", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)
    return figure


def curves(arms: dict[str, list[tuple[int, list[float]]]], path: Path, first_step: int) -> Path:
    """Held-out loss over training steps from first_step on: a line at the mean of an arm's seeds in a band from the
    least to the largest. arms: name -> (step, a value a seed) in order.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(7, 4))
        for i, (name, points) in enumerate(arms.items()):
            late = [(step, values) for step, values in points if step >= first_step]
            steps, color = [step for step, _ in late], COLORS[i % len(COLORS)]
            axes.plot(steps, [sum(v) / len(v) for _, v in late], color=color, label=name, linewidth=1.2)
            axes.fill_between(
                steps, [min(v) for _, v in late], [max(v) for _, v in late], color=color, alpha=0.15, linewidth=0
            )
        axes.set_xlabel("step")
        axes.set_ylabel("held-out bits/byte")
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)
        return _save(figure, path)
