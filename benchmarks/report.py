"""Renders benchmarks/results/*/*.json as RESULTS.md: python -m benchmarks.report [RESULTS_DIR] [OUT]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.machine import ROOT

INTRO = """# Results

Made by `python -m benchmarks.report` from the files in `benchmarks/results`; `python -m benchmarks.run` measures. Every
arm was compared with float64 before it was timed, all arms of a case ran in turn in one process, and a time is the
median. *of limit* is the op's own bytes or FLOPs over time, as a part of what the machine reached in the same run:
`torch.mm` in float32 for FLOPs, a streaming triad or an update in place for bytes. *fastmoe is* says how many times as
fast fastmoe was as that arm; below 1 it was slower.
"""
NO_GPU = "GPU figures are not measured yet.\n"


def render(results: Path) -> str:
    """The markdown text for every machine and family under `results`."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*/*.json"))]
    lines = [INTRO]
    if not any(record["machine"]["device"] != "cpu" for record in records):
        lines.append(NO_GPU)
    for name in dict.fromkeys(record["machine"]["name"] for record in records):
        lines.append(f"## {name}\n")
        for record in records:
            if record["machine"]["name"] == name:
                lines += family_lines(record)
    return "\n".join(lines)


def family_lines(record: dict) -> list[str]:
    machine, roofs, others = record["machine"], record["roofs"], record["others_cpus"]
    state = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    busy = " **The machine was in use by others.**" if record["busy"] else ""
    peers = "".join(f", {name} {version}" for name, version in machine["peers"].items())
    lines = [
        f"### {record['family']}\n",
        f"{record['date']}, commit {machine['commit'][:12]}{state}, extension {machine['extension']}, "
        f"torch {machine['torch']}{peers}, Python {machine['python']}, {machine['cpu']} "
        f"({', '.join(machine['instruction_sets'])}), threads: {machine['threads']}, {machine['memory_gib']} GiB; "
        f"limits: mm {roofs['mm']:.0f} GFLOP/s, triad {roofs['triad']:.0f} GB/s, update {roofs['update']:.0f} GB/s; "
        f"others used {others['before']:.2f} CPUs before and {others['after']:.2f} after.{busy}\n",
        "| case | arm | ms (min to max) | rate | of limit | peak MiB | error | fastmoe is |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in record["cases"]:
        for name, arm in case["arms"].items():
            cells = [
                case["case"] if name == "fastmoe" else "",
                name,
                "**wrong**",
                "",
                "",
                "",
                f"{arm['error']:.0e}",
                "",
            ]
            if "ms" in arm:
                cells[2] = f"{digits(arm['ms'])} ({digits(arm['ms_min'])} to {digits(arm['ms_max'])})"
                cells[3:5] = f"{digits(arm['rate'])} {case['unit']}", f"{arm['of_roof']:.0%}"
                cells[5] = "" if arm["peak_mib"] is None else f"{arm['peak_mib']:.0f}"
                cells[7] = f"{arm['fastmoe_is']:.2f}x" if name != "fastmoe" and "fastmoe_is" in arm else ""
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def digits(value: float) -> str:
    """Three significant digits, no exponent: 1234.5 -> 1234, 12.345 -> 12.3, 0.01234 -> 0.0123."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


if __name__ == "__main__":
    results, out = (sys.argv[1:] + [None, None])[:2]
    text = render(Path(results) if results else ROOT / "benchmarks" / "results")
    Path(out or ROOT / "RESULTS.md").write_text(text)
