"""Measures the ops against torch's and records the figures.

python -m benchmarks.run [FAMILY ...] [--quick] [--device cuda] [--isa avx2] [--allow-busy] [--seconds 6] [--out DIR]

Writes OUT/<machine>/<family>.json. On a machine that others use it refuses, unless --allow-busy, which is recorded.
--quick: tiny shapes, one sample, nothing recorded: do all arms run and agree? --isa avx2: torch and the extension as
they would run on a machine without AVX-512, recorded as a machine of its own. Exit status 1 when an arm was wrong or
raised, or when there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.ops import harness

OPS = [path.stem.removeprefix("bench_") for path in sorted((Path(__file__).parent / "ops").glob("bench_*.py"))]
FAMILIES = {"cpu": [*OPS, "sweeps", "train_tiny"], "cuda": ["experts", "metadata"]}


def cases_of(family: str, device: str) -> Callable[[bool], Iterator[harness.Case]]:
    if device == "cuda":
        return getattr(importlib.import_module("benchmarks.gpu"), family)
    return importlib.import_module(f"benchmarks.ops.bench_{family}" if family in OPS else f"benchmarks.{family}").cases


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES["cpu"]))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one sample, nothing recorded")
    parser.add_argument("--device", choices=sorted(FAMILIES), default="cpu", help="default cpu")
    parser.add_argument("--isa", choices=sorted(machine.ISAS), help="keep torch and fastmoe to this instruction set")
    parser.add_argument("--allow-busy", action="store_true", help="measure beside other processes; the record says so")
    parser.add_argument("--seconds", type=float, default=6.0, help="per case, all arms together (default 6)")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    known = FAMILIES[args.device]
    unknown = set(args.families) - set(known)
    if unknown:
        parser.error(f"FAMILY must be of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda needs a GPU, torch sees none", file=sys.stderr)
        return 1
    if args.isa:
        machine.limit_isa(args.isa)
    wrong = 0
    for family in args.families or known:
        busy = machine.others_load(0.1 if args.quick else 2.0)
        if busy > machine.BUSY and not (args.quick or args.allow_busy):
            print(
                f"benchmarks: the machine must be idle, got {busy:.2f} CPUs in use by others "
                "(--allow-busy measures all the same)",
                file=sys.stderr,
            )
            return 2
        torch.manual_seed(0)
        torch.set_num_threads(1 if args.quick else torch.get_num_threads())
        roofs = machine.roofs(args.quick, args.device)
        limits = ", ".join(f"{name} {rate:.0f}" for name, rate in roofs.items())
        print(family if args.quick else f"{family}: limits {limits}")
        records = []
        for case in cases_of(family, args.device)(args.quick):
            record = harness.measure(case, roofs, 0 if args.quick else args.seconds, args.device)
            del case  # before the next one takes memory
            records.append(record)
            wrong += print_record(record, args.quick)
        if not args.quick:
            after = machine.others_load(1.0)
            described = machine.describe(args.device, args.isa)
            load = {"others_cpus": {"before": busy, "after": after}, "busy": max(busy, after) > machine.BUSY}
            write(args.out, {"family": family, "machine": described, "roofs": roofs, **load, "cases": records})
    return 1 if wrong else 0


def print_record(record: dict, quick: bool) -> int:
    """Prints a line an arm; returns how many arms were wrong or raised."""
    print(f"  {record['case']}")
    wrong = 0
    for name, arm in record["arms"].items():
        if "ms" not in arm:
            wrong += 1
            reason = arm.get("failed") or f"WRONG: error {arm['error']:.1e} against float64"
            print(f"    {name:30} {reason}", flush=True)
            continue
        if quick:
            print(f"    {name:30} error {arm['error']:.0e}", flush=True)
            continue
        ratio = f"  fastmoe is {arm['fastmoe_is']:.2f}x" if name != "fastmoe" and "fastmoe_is" in arm else ""
        print(
            f"    {name:30} {arm['ms']:10.3f} ms  {arm['rate']:8.2f} {record['unit']}  {arm['of_roof']:5.0%} of "
            f"{record['roof']}  error {arm['error']:.0e}  peak {arm['peak_mib'] or 0:.0f} MiB{ratio}",
            flush=True,
        )
    for name, reason in record["left_out"].items():
        print(f"    {name:30} left out: {reason}", flush=True)
    return wrong


def write(out: Path, record: dict) -> None:
    path = out / record["machine"]["name"] / f"{record['family']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path.write_text(json.dumps({"date": date, **record}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
