"""`fastmoe bench routers`: one recipe with every router, at equal FLOPs a token, data and seeds."""

from __future__ import annotations

import contextlib
import datetime
import html
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastmoe.config import Config
from fastmoe.nn.router import ROUTERS, own_top_k
from fastmoe.trainer import metrics
from fastmoe.version import __version__

# name: settings of the model, beside those that keep the FLOPs equal
VARIANTS: dict[str, dict[str, object]] = {
    "topk": {},
    "topk, no balancing loss": {"router": "topk", "aux_loss_weight": 0.0},
    "topk, capacity 1.25": {"router": "topk", "capacity_factor": 1.25, "eval_capacity_factor": 0.0},
    **{name: {} for name in ROUTERS if name != "topk"},
    "prototype, dropless": {"router": "prototype", "capacity_factor": 0.0},
    "prototype, balancing loss": {"router": "prototype", "aux_loss_weight": 0.01},
    "prototype, 4 of 4": {"router": "prototype", "top_k": 4},
    "topk, 4 of 8": {"router": "topk", "top_k": 4},
    "hash, balanced": {"router": "hash", "router_options": "balanced=True"},
}
NOTES = {
    "expert-choice": "sees later tokens, so its loss is not a language model's",
    "domain": "knows each document's domain",
    "swipe": "moves tokens only between ranks: in one process it is topk without its losses",
}
_OPTIONS = {"expert-choice": "in_decoder=True", "token-rounding": "tile=64"}


def settings(name: str, base: Config) -> dict[str, object]:
    """The model settings of a variant: d_ff is what keeps top_k * d_ff, and so the FLOPs, those of base."""
    given = {"router": name, **VARIANTS[name]}
    given.setdefault("router_options", _OPTIONS.get(given["router"], ""))
    given["top_k"] = given.get("top_k") or own_top_k(given["router"])
    model = base.model
    whole = (model.top_k or own_top_k(model.router)) * model.d_ff
    return {**given, "d_ff": whole // given["top_k"]}


def compare(
    base: Config, recipe: str, names: list[str], seeds: int, out: Path, jobs: int = 1, options: Sequence[str] = ()
) -> list[dict]:
    """Trains every variant with seeds 0 to seeds-1 in folders of `out`, `jobs` at a time on all cores, and writes
    routers.json, routers.md and routers.svg there; returns the rows. Runs that are done are not repeated.

    base: what `recipe` and the options come to. options: of `fastmoe train`, for every run. Errors: ValueError for an
    unknown variant; RuntimeError with the last line of a run that failed.
    """
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"fastmoe.bench: --routers must be of {', '.join(VARIANTS)}, got {name!r}")
    if seeds < 1 or jobs < 1:
        raise ValueError(f"fastmoe.bench: --seeds and --jobs must be at least 1, got {seeds} and {jobs}")
    runs = [
        Run(
            f"{name}, seed {seed}",
            _folder(out, name, seed),
            base.train.steps,
            _words(base, recipe, name, seed, options),
        )
        for seed in range(seeds)
        for name in names
    ]
    train_all(runs, jobs)
    rows = [_row(base, out, name, seeds) for name in names]
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "version": __version__,
        "recipe": recipe,
        "steps": base.train.steps,
        "tokens": base.train.steps * base.train.batch_size * base.train.seq_len,
        "seeds": seeds,
        "jobs": jobs,
    }
    (out / "routers.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    (out / "routers.md").write_text(table(rows) + "\n")
    (out / "routers.svg").write_text(plot(rows) + "\n")
    return rows


class Run(NamedTuple):
    """A run of `fastmoe train`. words: its recipe and options, all but the folder."""

    label: str
    folder: Path
    steps: int
    words: Sequence[str]


def train_all(runs: Sequence[Run], jobs: int = 1) -> None:
    """Trains each run that is not done, `jobs` at a time on all cores; one that was interrupted goes on.

    Errors: RuntimeError with the last line of a run that failed.
    """
    waiting = list(runs)
    running: list[tuple[subprocess.Popen, Run, float]] = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end with this process
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                if summary(run.folder, run.steps) is None:
                    running.append((_start(run, jobs), run, time.perf_counter()))
            time.sleep(0.2)
            for ended in [entry for entry in running if entry[0].poll() is not None]:
                running.remove(ended)
                process, run, start = ended
                found = summary(run.folder, run.steps)
                if process.returncode or found is None:
                    log = _log(run).read_text().strip().splitlines()
                    raise RuntimeError(f"fastmoe.bench: {run.label} failed: {log[-1] if log else ''}")
                print(f"{run.label}: {found['heldout']:.3f} ({time.perf_counter() - start:.0f} s)", flush=True)
    finally:
        for process, *_ in running:
            process.terminate()
        signal.signal(signal.SIGTERM, before)


def _log(run: Run) -> Path:
    return run.folder.with_name(f"{run.folder.name}.log")


def _start(run: Run, jobs: int) -> subprocess.Popen:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "fastmoe", "train", *run.words, "--run.dir", str(run.folder), "--run.resume"]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with open(_log(run), "w") as log:
        return subprocess.Popen(
            words, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, start_new_session=True
        )


def summary(folder: Path, steps: int) -> dict | None:
    """summary.json of a run that did so many steps, None where it has not."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / "summary.json").read_text())
        return found if found["step"] == steps else None
    return None


def as_words(settings: dict[str, object]) -> list[str]:
    """{"train.batch_size": 8} as ["--train.batch-size", "8"]."""
    return [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def _words(base: Config, recipe: str, name: str, seed: int, options: Sequence[str]) -> list[str]:
    given = {
        "train.seed": seed,
        "train.steps": base.train.steps,
        "eval.every": 0,
        "checkpoint.every": 0,
        **{f"model.{key}": value for key, value in settings(name, base).items()},
    }
    return [recipe, *options, *as_words(given)]


def _row(base: Config, out: Path, name: str, seeds: int) -> dict:
    """What a variant did, over its seeds; load and drops over the last half of training, the time of a step the median
    of the fastest seed.
    """
    heldout, peak, cv, dropped, milliseconds, parameters = [], [], [], [], [], 0
    for seed in range(seeds):
        folder = _folder(out, name, seed)
        records = metrics.read(folder / "metrics.jsonl")
        late = records[len(records) // 2 :]
        heldout.append(summary(folder, base.train.steps)["heldout"])
        peak.append(statistics.mean(record["load_max_over_mean"] for record in late))
        cv.append(statistics.mean(_cv(record["load"]) for record in late))
        dropped.append(statistics.mean(record["drop_rate"] for record in late))
        milliseconds.append(1e3 * statistics.median(record["perf"]["step_seconds"] for record in records))
        parameters = json.loads((folder / "run.json").read_text())["parameters"]
    return {
        "router": name,
        "heldout": heldout,
        "mean": statistics.mean(heldout),
        "spread": max(heldout) - min(heldout),
        "max_over_mean": statistics.mean(peak),
        "load_cv": statistics.mean(cv),
        "drop_rate": statistics.mean(dropped),
        "step_ms": min(milliseconds),
        "parameters": parameters,
        "note": NOTES.get(settings(name, base)["router"], ""),
    }


def _cv(load_LE: list[list[int]]) -> float:
    """Standard deviation over mean of the experts' loads, averaged over layers."""
    return statistics.mean(statistics.pstdev(row) / (statistics.mean(row) or 1) for row in load_LE)


def table(rows: list[dict]) -> str:
    """Markdown, best held-out loss first."""
    out = io.StringIO()
    out.write("| router | held-out bits/byte (min to max) | load max/mean | CV | dropped | step ms | parameters | |\n")
    out.write("|---|---|---|---|---|---|---|---|\n")
    for row in sorted(rows, key=lambda row: row["mean"]):
        out.write(
            f"| {row['router']} | {row['mean']:.3f} ({min(row['heldout']):.3f} to {max(row['heldout']):.3f}) "
            f"| {row['max_over_mean']:.2f} | {row['load_cv']:.2f} | {row['drop_rate']:.1%} | {row['step_ms']:.0f} "
            f"| {row['parameters']:,} | {row['note']} |\n"
        )
    return out.getvalue().rstrip()


def plot(rows: list[dict]) -> str:
    """SVG: a row a router, best first, a dot a seed and a bar at the mean."""
    rows = sorted(rows, key=lambda row: row["mean"])
    values = [value for row in rows for value in row["heldout"]]
    low, high = min(values), max(values)
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
    left, right, top, height = 200, 660, 30, 20
    bottom = top + height * len(rows)
    x = lambda value: left + (value - low) / (high - low) * (right - left)
    parts = [f'<text x="{left}" y="18">held-out bits/byte, lower is better; a dot a seed, a bar the mean</text>']
    for i in range(6):
        at = low + (high - low) * i / 5
        parts.append(f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{top}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(at):.1f}" y="{bottom + 16}" text-anchor="middle">{at:.3f}</text>')
    for i, row in enumerate(rows):
        y = top + height * (i + 0.5)
        mark = " *" if row["note"] else ""
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{html.escape(row["router"])}{mark}</text>')
        parts += [f'<circle cx="{x(v):.1f}" cy="{y}" r="3.5" fill="#0072B2" opacity=".7"/>' for v in row["heldout"]]
        at = x(row["mean"])
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y - 7}" y2="{y + 7}" stroke="#D55E00" stroke-width="2"/>')
    notes = dict.fromkeys(f"* {row['router']}: {row['note']}" for row in rows if row["note"])
    for i, note in enumerate(notes):
        parts.append(f'<text x="8" y="{bottom + 38 + 16 * i}" fill="#555">{html.escape(note)}</text>')
    size = f"680 {bottom + 40 + 16 * len(notes)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>'
    )
