"""Trains one small MoE with every optimizer and state dtype, over seeds, and compares the held-out loss.

python -m benchmarks.optimizers [--steps 2000] [--seeds 3] [--arms NAME ...] [--jobs 1] [--out DIR] [--options ...]

Every run has a folder in DIR; those that are done are not repeated, one that was interrupted goes on from its newest
checkpoint. Writes DIR/optimizers.json, optimizers.md and optimizers.svg. All arms compute in bfloat16 and share data,
initial weights (by seed) and schedule; weights in bfloat16 also make the residual stream bfloat16.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import fastmoe
from benchmarks import machine
from fastmoe.trainer import checkpoint, metrics
from fastmoe.trainer.compare import Run, as_words, summary, train_all

RECIPE = "tiny"
MODEL = {
    "model.d_model": 64,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.d_ff": 128,
    "train.batch_size": 4,
    "train.seq_len": 128,
    "train.dtype": "bf16",
    "eval.tokens": 16384,
}
INT8 = {"optim.state_dtype": "int8"}
BF16 = {"train.param_dtype": "bf16"}
ARMS: dict[str, dict[str, object]] = {
    "AdamW fp32": {},
    "AdamW, bf16 states": {"optim.state_dtype": "bf16"},
    "AdamW, fp16 states": {"optim.state_dtype": "fp16"},
    "AdamW, int8 states": INT8,
    "AdamW, int8 states, bf16 weights": {**INT8, **BF16},
    "AdamW, int8 states, bf16 weights, residual8": {**INT8, **BF16, "optim.master": "residual8"},
    "Adafactor": {"optim.name": "adafactor"},
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="default 2000")
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME", help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"), help="default runs/optimizers")
    parser.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="last: options of `fastmoe train` for every run"
    )
    args = parser.parse_args(argv)
    for name in ("steps", "seeds", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    every = max(1, args.steps // 20)
    shared = {**MODEL, "train.steps": args.steps, "eval.every": every, "checkpoint.every": 5 * every}
    runs = [
        Run(
            f"{name}, seed {seed}",
            _folder(args.out, name, seed),
            args.steps,
            [RECIPE, *as_words({**shared, **ARMS[name], "train.seed": seed}), *args.options],
        )
        for seed in range(args.seeds)
        for name in args.arms
    ]
    train_all(runs, args.jobs)
    rows = [_row(args.out, name, args.seeds, args.steps) for name in args.arms]
    tokens = args.steps * MODEL["train.batch_size"] * MODEL["train.seq_len"]
    about = {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "version": fastmoe.__version__}
    about |= {"recipe": f"a small {RECIPE}", "steps": args.steps, "tokens": tokens, "seeds": args.seeds}
    about |= {"jobs": args.jobs, "options": args.options, "machine": machine.describe()}
    (args.out / "optimizers.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    (args.out / "optimizers.md").write_text(table(rows) + "\n")
    from benchmarks import plots

    plots.curves({row["arm"]: row["curve"] for row in rows}, args.out / "optimizers.svg", args.steps // 10)
    print(table(rows))
    return 0


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def _row(out: Path, name: str, seeds: int, steps: int) -> dict:
    """What an arm did, over its seeds. curve: [step, held-out bits of every seed] ..."""
    heldout, milliseconds, curve = [], [], {}
    for seed in range(seeds):
        folder = _folder(out, name, seed)
        records = metrics.read(folder / "metrics.jsonl")
        for record in records:
            if "heldout" in record:
                curve.setdefault(record["step"], []).append(record["heldout"])
        heldout.append(summary(folder, steps)["heldout"])
        milliseconds.append(1e3 * statistics.median(record["perf"]["step_seconds"] for record in records))
    parameters = json.loads((folder / "run.json").read_text())["parameters"]
    return {
        "arm": name,
        "heldout": heldout,
        "mean": statistics.mean(heldout),
        "bytes_per_parameter": _stored(checkpoint.steps(folder / "checkpoints")[-1]) / parameters,
        "step_ms": statistics.median(milliseconds),
        "parameters": parameters,
        "curve": sorted(curve.items()),
    }


def _stored(path: Path) -> int:
    """Bytes of a checkpoint's weights and optimizer states."""
    return sum(file.stat().st_size for kind in ("model", "optimizer") for file in path.glob(f"{kind}-*.safetensors"))


def table(rows: Sequence[dict]) -> str:
    """Markdown; against the first arm, seed by seed."""
    lines = [
        "| optimizer | bytes a parameter, without gradient | held-out bits/byte (min to max) "
        f"| against {rows[0]['arm']} | step ms |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        change = statistics.mean(a - b for a, b in zip(row["heldout"], rows[0]["heldout"]))
        lines.append(
            f"| {row['arm']} | {row['bytes_per_parameter']:.2f} | {row['mean']:.4f} ({min(row['heldout']):.4f} to "
            f"{max(row['heldout']):.4f}) | {change:+.4f} | {row['step_ms']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
