"""Kills a training run with SIGKILL at random moments, resumes it, and compares with a run that nobody interrupted.

python benchmarks/kill_resume.py --tries 5     (status 0 when every try passes)

A try kills one to three times, anywhere between start and end, saving included. It passes when every metric outside
`perf` and every byte of the final weights and moments are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 40
SETTINGS = (
    "--model.d-model 32 --model.num-layers 2 --model.num-experts 4 --model.d-ff 32 --train.seq-len 32 "
    f"--train.batch-size 4 --train.steps {STEPS} --train.device cpu --eval.every 7 --eval.tokens 512 "
    "--checkpoint.every 6 --log.every 1"
).split()


def start(data: Path, run: Path) -> subprocess.Popen:
    words = [
        sys.executable,
        "-m",
        "fastmoe",
        "train",
        "tiny",
        *SETTINGS,
        "--data.path",
        str(data),
        "--run.dir",
        str(run),
        "--resume",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen) -> None:
    error = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"the run ended with status {process.returncode}: {error}")


def kill(process: subprocess.Popen, step: int, delay: float) -> int:
    """Kills the run once it has printed `step`, and a little later; returns the last step that it printed."""
    reached = 0
    for line in process.stdout:
        if line.startswith("step:"):
            reached = int(line.split()[1])
        if reached >= step and line.startswith(("step:", "resuming")):
            break
    time.sleep(delay)
    process.kill()
    rest = process.communicate()[0].splitlines()
    return max([reached, *(int(line.split()[1]) for line in rest if line.startswith("step:"))])


def outcome(run: Path) -> tuple[list[dict], dict[str, bytes]]:
    """Metrics without perf, and the files of the last checkpoint that hold tensors."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["perf"]
    last = run / "checkpoints" / f"step-{STEPS:08d}"
    return records, {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="a folder for the runs (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dir or Path(temporary)
        texts, data, whole = folder / "texts", folder / "data", folder / "whole"
        texts.mkdir(parents=True)
        for i in range(60):
            (texts / f"{i}.txt").write_text("".join(f"{i} times {j} is {i * j}\n" for j in range(40)))
        subprocess.run(
            [sys.executable, "-m", "fastmoe", "data", "prepare", "--input", texts, "--out", data], check=True
        )
        finish(start(data, whole))
        wanted = outcome(whole)
        passed, choose = 0, random.Random(args.seed)
        for n in range(args.tries):
            run = folder / f"try-{n}"
            killed = [
                kill(start(data, run), choose.randint(0, STEPS), choose.uniform(0, 0.03))
                for _ in range(choose.randint(1, 3))
            ]
            finish(start(data, run))
            same = outcome(run) == wanted
            passed += same
            print(f"try {n + 1}: killed after steps {killed}: {'PASS' if same else 'FAIL'}", flush=True)
    print(f"{'PASS' if passed == args.tries else 'FAIL'}: {passed} of {args.tries}")
    return 0 if passed == args.tries else 1


if __name__ == "__main__":
    sys.exit(main())
