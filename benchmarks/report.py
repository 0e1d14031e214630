"""Renders benchmarks/results/*/*.json as RESULTS.md, with plots: python -m benchmarks.report [RESULTS_DIR] [OUT]

Comparisons of whole trainings (`fastmoe bench routers`) lie in <machine>/training: NAME.json, NAME.md and NAME.svg;
what benchmarks/offload.py prints in <machine>/offload/NAME.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from benchmarks.machine import ROOT

INTRO = """# Results

Made by `make results` from the files in `benchmarks/results`; `make bench` and `make bench-gpu` measure. Every arm was
compared with float64 before it was timed, all arms of a case ran in turn in one process, and a time is the median. *of
limit* is the op's own bytes or FLOPs over time, as a part of what the machine reached in the same run: `torch.mm` for
FLOPs (float32 2048^3 on a CPU, bfloat16 8192^3 on a GPU), a streaming triad or an update in place for bytes. *fastmoe
is* says how many times as fast fastmoe was as that arm; below 1 it was slower. *peak* is by how much one call raised
the memory in use.
"""
NO_GPU = "GPU figures are not measured yet. The adapters of ScatterMoE, Liger and SonicMoE have never run.\n"
SWEEPS = """*traffic* is the time in ms that weights and gradients of the experts with tokens take at the streaming
triad's rate: read forward, read backward, written once. Where E grows, *without* is the time less that; *of first* is
the ratio of that, elsewhere of the time, to the sweep's first point.
"""


def render(results: Path, plots: dict[tuple[str, str], list[str]], beside: Path) -> str:
    """The markdown text for every machine and family under `results`. plots: (machine, family) to links of pictures;
    links are relative to `beside`.
    """
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*/*.json"))]
    lines = [INTRO]
    if not any(record["machine"]["device"] != "cpu" for record in records):
        lines.append(NO_GPU)
    for name in dict.fromkeys(record["machine"]["name"] for record in records):
        lines.append(f"## {name}\n")
        for record in records:
            if record["machine"]["name"] == name:
                lines += family_lines(record)
                for link in plots.get((name, record["family"]), []):
                    lines.append(f"![{Path(link).stem} on {name}]({link})\n")
        lines += offload_lines(sorted((results / name / "offload").glob("*.json")))
        for path in sorted(results.glob("*/training/*.json")):
            if path.parts[-3] == name:
                lines += training_lines(path, os.path.relpath(path.with_suffix(".svg"), beside))
    return "\n".join(lines)


OFFLOAD = """### offload

`benchmarks/offload.py`: a model of experts that mostly lies on disk, trained for a few steps. *bytes a parameter* are
those of weights and optimizer states, without gradients. *rate* is what the disk gave while it was read from and
written to, *copy* a plain O_DIRECT copy of files of the same size. *hidden* is the part of the disk's time that
computing did not wait for.

| model | parameters | budgets | bytes a parameter | of these host, disk | peak RSS | s a step | rate | copy | hidden |
|---|---|---|---|---|---|---|---|---|---|
"""


def offload_lines(paths: list[Path]) -> list[str]:
    rows = []
    for path in paths:
        run = json.loads(path.read_text())
        last, copy, gib = run["steps"][-1], run["plain_copy_bytes_per_second"], 1 << 30
        speed = lambda rates: ", ".join(f"{kind} {rates[kind] / 1e9:.1f}" for kind in ("read", "write")) + " GB/s"
        rows.append(
            _row(
                [
                    path.stem,
                    f"{run['parameters']:,}",
                    ", ".join(f"{tier} {size / gib:.0f} GiB" for tier, size in run["budgets"].items()),
                    f"{sum(run['bytes'].values()) / run['parameters']:.2f}",
                    ", ".join(f"{run['bytes'].get(tier, 0) / run['parameters']:.2f}" for tier in ("host", "disk")),
                    f"{run['peak_rss'] / gib:.2f} GiB",
                    f"{last['seconds']:.1f}",
                    speed(last["bytes_per_second"]),
                    speed(copy),
                    f"{last['io_hidden']:.0%}",
                ]
            )
        )
    return [OFFLOAD + "\n".join(rows) + "\n"] if rows else []


def training_lines(path: Path, picture: str) -> list[str]:
    """A comparison of trainings: what was trained, its table and its picture."""
    record = json.loads(path.read_text())
    seeds = f"seeds 0 to {record['seeds'] - 1}"
    return [
        f"### {path.stem}\n",
        f"{record['date']}, fastmoe {record['version']}: recipe {record['recipe']}, {record['steps']} steps of "
        f"{record['tokens'] // record['steps']:,} tokens, {seeds}; {record['jobs']} runs at a time shared the cores.\n",
        path.with_suffix(".md").read_text(),
        f"![{path.stem}]({picture})\n",
    ]


def family_lines(record: dict) -> list[str]:
    """One family on one machine: a line about the run, the table, what was left out."""
    sweeps = any("sweep" in case.get("labels", {}) for case in record["cases"])
    table = sweep_table(record) if sweeps else case_table(record)
    return [f"### {record['family']}\n", about(record), *table, "", *left_out(record)]


def about(record: dict) -> str:
    machine, roofs, others = record["machine"], record["roofs"], record["others_cpus"]
    state = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    peers = "".join(f", {name} {version}" for name, version in machine["peers"].items())
    backend = f", FASTMOE_BACKEND={machine['backend']}" if machine.get("backend") else ""
    device = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    isa = f", fastmoe on {machine['isa']}" if machine.get("isa") else ""
    busy = " **The machine was in use by others.**" if record["busy"] else ""
    return (
        f"{record['date']}, commit {machine['commit'][:12]}{state}, extension {machine['extension']}{isa}{backend}, "
        f"torch {machine['torch']}{peers}, Python {machine['python']}, {device}{machine['cpu']} "
        f"({', '.join(machine['instruction_sets'])}), threads: {machine['threads']}, {machine['memory_gib']} GiB; "
        f"limits: mm {roofs['mm']:.0f} GFLOP/s, triad {roofs['triad']:.0f} GB/s, update {roofs['update']:.0f} GB/s; "
        f"others used {others['before']:.2f} CPUs before and {others['after']:.2f} after.{busy}\n"
    )


def case_table(record: dict) -> list[str]:
    uniform = {}  # (shape, dtype, huge pages, arm) -> ms
    for case in record["cases"]:
        for name, arm in case["arms"].items():
            if case.get("labels", {}).get("routing") == "uniform" and "ms" in arm:
                uniform[_key(case, name)] = arm["ms"]
    routed = bool(uniform)
    lines = [
        "| case | arm | ms (min to max) | rate | of limit | peak MiB | error | fastmoe is |" + " of uniform |" * routed,
        "|---|---|---|---|---|---|---|---|" + "---|" * routed,
    ]
    for case in record["cases"]:
        for i, (name, arm) in enumerate(case["arms"].items()):
            cells = [case["case"] if i == 0 else "", name, *[""] * 6, *[""] * routed]
            if "error" in arm:
                cells[6] = f"{arm['error']:.0e}"
            if "ms" not in arm:
                cells[2] = arm.get("failed", "**wrong**").replace("|", "/")
            else:
                tokens = case.get("labels", {}).get("tokens")
                cells[2:5] = times(arm), f"{digits(arm['rate'])} {case['unit']}", f"{arm['of_roof']:.0%}"
                if tokens:
                    cells[3] += f", {tokens / arm['ms'] * 1e3:,.0f} tokens/s"
                cells[5] = "" if arm["peak_mib"] is None else f"{arm['peak_mib']:.0f}"
                cells[7] = f"{arm['fastmoe_is']:.2f}x" if name != "fastmoe" and "fastmoe_is" in arm else ""
                if base := uniform.get(_key(case, name)):
                    cells[8] = f"{arm['ms'] / base:.2f}"
            lines.append(_row(cells))
    return lines


def _key(case: dict, arm: str) -> tuple:
    labels = case.get("labels", {})
    return labels.get("shape"), labels.get("dtype"), labels.get("huge_pages", False), arm


def sweep_table(record: dict) -> list[str]:
    lines = [
        SWEEPS,
        "| point | arm | ms (min to max) | traffic | without | of first | rate | of limit | peak MiB | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = {}  # (sweep, arm) -> ms
    for case in record["cases"]:
        for i, (name, arm) in enumerate(case["arms"].items()):
            cells = [case["case"] if i == 0 else "", name, *[""] * 8]
            if "error" in arm:
                cells[9] = f"{arm['error']:.0e}"
            if "ms" not in arm:
                cells[2] = arm.get("failed", "**wrong**").replace("|", "/")
            else:
                traffic = case["labels"]["touched_bytes"] / record["roofs"]["triad"] / 1e6
                over_experts = case["labels"]["axis"] == "E"
                net = arm["ms"] - traffic * over_experts
                base = first.setdefault((case["labels"]["sweep"], name), net)
                cells[2:4] = times(arm), digits(traffic)
                cells[4] = digits(net) if over_experts else ""
                cells[5:8] = f"{net / base:.2f}", f"{digits(arm['rate'])} {case['unit']}", f"{arm['of_roof']:.0%}"
                cells[8] = "" if arm["peak_mib"] is None else f"{arm['peak_mib']:.0f}"
            lines.append(_row(cells))
    return lines


def left_out(record: dict) -> list[str]:
    """Which arms were not run, in which cases and why."""
    reasons, cases = {}, [case["case"].split(":")[0] for case in record["cases"]]  # (arm, why) -> cases
    for case, name in zip(record["cases"], cases):
        for arm, why in case.get("left_out", {}).items():
            reasons.setdefault((arm, why), []).append(name)
    lines = []
    for (arm, why), found in reasons.items():
        where = "" if found == cases else f" ({'; '.join(found)})"
        lines.append(f"- {arm}{where}: {why}")
    return ["Not run:\n", *lines, ""] if lines else []


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def times(arm: dict) -> str:
    if arm["samples"] == 1:
        return f"{digits(arm['ms'])} (once)"
    return f"{digits(arm['ms'])} ({digits(arm['ms_min'])} to {digits(arm['ms_max'])})"


def digits(value: float) -> str:
    """Three significant digits, no exponent: 1234.5 -> 1234, 12.345 -> 12.3, 0.01234 -> 0.0123."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def draw(results: Path, beside: Path) -> dict[tuple[str, str], list[str]]:
    """Draws every record into <machine>/plots; returns links relative to `beside` by machine and family."""
    from benchmarks import plots

    links = {}
    for path in sorted(results.glob("*/*.json")):
        record = json.loads(path.read_text())
        files = plots.draw(record, path.parent / "plots")
        links[record["machine"]["name"], record["family"]] = [os.path.relpath(file, beside) for file in files]
    return links


def main(argv: list[str]) -> None:
    results = Path(argv[0]) if argv else ROOT / "benchmarks" / "results"
    out = Path(argv[1]) if argv[1:] else ROOT / "RESULTS.md"
    beside = out.resolve().parent
    out.write_text(render(results, draw(results, beside), beside))


if __name__ == "__main__":
    main(sys.argv[1:])
