"""Measures the ops against torch's and records the figures.

python -m benchmarks.run [FAMILY ...] [--quick] [--allow-busy] [--seconds 6] [--out benchmarks/results]

Writes OUT/<machine>/<family>.json. On a machine that others use it refuses, unless --allow-busy, which is recorded.
--quick: tiny shapes, one sample, nothing recorded: do all arms run and agree? Exit status 1 when an arm was wrong.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import sys
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.ops import harness

FAMILIES = [path.stem.removeprefix("bench_") for path in sorted((Path(__file__).parent / "ops").glob("bench_*.py"))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one sample, nothing recorded")
    parser.add_argument("--allow-busy", action="store_true", help="measure beside other processes; the record says so")
    parser.add_argument("--seconds", type=float, default=6.0, help="per case, all arms together (default 6)")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    unknown = set(args.families) - set(FAMILIES)
    if unknown:
        parser.error(f"FAMILY must be of {', '.join(FAMILIES)}, got {', '.join(sorted(unknown))}")
    wrong = 0
    for family in args.families or FAMILIES:
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
        roofs = machine.roofs(args.quick)
        print(
            family
            if args.quick
            else f"{family}: limits {', '.join(f'{name} {rate:.0f}' for name, rate in roofs.items())}"
        )
        records = []
        for case in importlib.import_module(f"benchmarks.ops.bench_{family}").cases(args.quick):
            record = harness.measure(case, roofs, 0 if args.quick else args.seconds)
            records.append(record)
            wrong += print_record(record, args.quick)
        if not args.quick:
            after = machine.others_load(1.0)
            write(
                args.out,
                family,
                {
                    "roofs": roofs,
                    "others_cpus": {"before": busy, "after": after},
                    "busy": max(busy, after) > machine.BUSY,
                    "cases": records,
                },
            )
    return 1 if wrong else 0


def print_record(record: dict, quick: bool) -> int:
    """Prints a line an arm; returns how many arms were wrong."""
    print(f"  {record['case']}")
    for name, arm in record["arms"].items():
        if "ms" not in arm:
            print(f"    {name:30} WRONG: error {arm['error']:.1e} against float64", flush=True)
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
    return sum("ms" not in arm for arm in record["arms"].values())


def write(out: Path, family: str, record: dict) -> None:
    described = machine.describe()
    path = out / str(described["name"]) / f"{family}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path.write_text(json.dumps({"family": family, "date": date, "machine": described, **record}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
