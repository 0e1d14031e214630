"""One self-contained HTML page about a run: inline SVG and a few lines of script; it opens without a network."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median

from fastmoe import config as configs
from fastmoe.trainer import metrics

MAX_POINTS = 600
_COLUMNS, _ROWS, _LEVELS = 120, 512, 17  # heat map: steps, rows, colors

_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1d1f23; --soft: #6a6f78; --rule: #e7e6e2;
  --a: #3454d1; --b: #e8590c; --c: #8a8f98; }
@media (prefers-color-scheme: dark) { :root { --page: #121316; --card: #1a1c20; --ink: #e9e9e6; --soft: #9aa0a9; --rule: #2b2e34;
  --a: #8ea6ff; --b: #ffa25c; --c: #777d87; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 26px; font-weight: 650; letter-spacing: -.02em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 14px; font-weight: 600; margin: 0 0 2px; }
p { margin: 0; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; margin: 24px 0 12px; }
.tile, section { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 24px; font-weight: 620; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.tile span, .tile i { display: block; color: var(--soft); font-size: 12.5px; font-style: normal; }
.grid { display: grid; grid-template-columns: repeat(12, 1fr); gap: 12px; }
section { padding: 16px 18px; grid-column: span 12; min-width: 0; }
section p { font-size: 12.5px; }
@media (min-width: 760px) { section.half { grid-column: span 6; } }
svg { display: block; width: 100%; height: auto; margin-top: 8px; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.half svg text { font-size: 12px; }
.gridline { stroke: var(--rule); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.faint { opacity: .28; stroke-width: 1.2; }
.dashed { stroke-dasharray: 5 4; stroke-width: 1.5; }
.a { stroke: var(--a); } .b { stroke: var(--b); } .c { stroke: var(--c); }
circle.b { fill: var(--card); stroke-width: 2; }
.cursor { stroke: var(--soft); stroke-width: 1; visibility: hidden; }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 12.5px; color: var(--soft); }
.key span::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin: 0 6px 3px 0;
  background: var(--c); }
.key .ka::before { background: var(--a); } .key .kb::before { background: var(--b); }
#tip { position: fixed; pointer-events: none; display: none; background: var(--ink); color: var(--page); border-radius: 7px;
  padding: 6px 10px; font-size: 12.5px; line-height: 1.45; white-space: pre; font-variant-numeric: tabular-nums; z-index: 1; }
pre { margin: 8px 0 0; font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.settings { columns: 250px; column-gap: 28px; margin-top: 8px; }
table { width: 100%; border-collapse: collapse; break-inside: avoid; margin-bottom: 14px; font-size: 12.5px; }
th { text-align: left; padding: 3px 0; border-bottom: 1px solid var(--rule); }
td { padding: 2px 0; color: var(--soft); } td + td { text-align: right; color: var(--ink); overflow-wrap: anywhere; }
.changed td { font-weight: 650; color: var(--ink); }
"""

_SCRIPT = """
const tip = document.getElementById('tip');
const show = (event, text) => {
  tip.textContent = text;
  tip.style.display = 'block';
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + 'px';
  tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 12) + 'px';
};
const number = v => v == null ? '\\u2013' : Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString('en') : +v.toPrecision(4) + '';
for (const svg of document.querySelectorAll('svg[data-plot]')) {
  const d = JSON.parse(svg.dataset.plot), box = svg.viewBox.baseVal, cursor = svg.querySelector('.cursor');
  svg.onmouseleave = () => { tip.style.display = 'none'; if (cursor) cursor.style.visibility = 'hidden'; };
  svg.onmousemove = event => {
    const at = svg.getBoundingClientRect();
    const px = (event.clientX - at.left) / at.width * box.width, py = (event.clientY - at.top) / at.height * box.height;
    const part = (px - d.left) / (d.right - d.left);
    if (part < 0 || part > 1) return svg.onmouseleave();
    if (d.rows) {
      const column = Math.min(d.x.length - 1, Math.floor(part * d.x.length));
      const row = d.rows.findIndex(r => py >= r[0] && py < r[0] + d.height);
      if (row < 0) return svg.onmouseleave();
      return show(event, `step ${d.x[column]}\\n${d.rows[row][1]}\\n${d.values[row][column].toFixed(2)} \\u00d7 the mean`);
    }
    const wanted = d.x[0] + part * (d.x[d.x.length - 1] - d.x[0]);
    let i = 0;
    while (i + 1 < d.x.length && Math.abs(d.x[i + 1] - wanted) <= Math.abs(d.x[i] - wanted)) i++;
    const span = d.x[d.x.length - 1] - d.x[0] || 1, x = d.left + (d.x[i] - d.x[0]) / span * (d.right - d.left);
    cursor.setAttribute('x1', x); cursor.setAttribute('x2', x); cursor.style.visibility = 'visible';
    show(event, [`step ${d.x[i]}`, ...d.series.filter(s => s[1][i] != null).map(s => `${s[0]}  ${number(s[1][i])}`)].join('\\n'));
  };
}
"""


def report(run_dir: str | Path) -> Path:
    """Writes `<run_dir>/report.html` from run.json, metrics.jsonl and, of a finished run, summary.json; returns its path.

    ValueError where the folder is no run or has no finished step.
    """
    run_dir = Path(run_dir)
    try:
        run = json.loads((run_dir / "run.json").read_bytes())
        records = metrics.read(run_dir / "metrics.jsonl")
    except (OSError, ValueError) as error:
        raise ValueError(f"fastmoe.report: DIR must be the folder of a run, got {str(run_dir)!r}: {error}") from None
    if not records:
        raise ValueError(f"fastmoe.report: {run_dir} has no finished step yet")
    summary = {}
    if (run_dir / "summary.json").exists():
        summary = json.loads((run_dir / "summary.json").read_bytes())
        summary = summary if summary["step"] == records[-1]["step"] else {}
    path = run_dir / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(_page(run_dir, run, records, summary), encoding="utf-8")
    temporary.replace(path)
    return path


def _page(run_dir: Path, run: dict, records: list[dict], summary: dict) -> str:
    unit, name = f"bits/{run['unit']}", run_dir.resolve().name
    few = [_mean(chunk) for chunk in _chunks(records, MAX_POINTS)]
    steps = [record["step"] for record in few]
    loss = [record["loss"] / math.log(2) for record in few]
    heldout = {record["step"]: record["heldout"] for record in records if "heldout" in record}
    heldout = [next((value for step, value in heldout.items() if low < step <= high), None)
               for low, high in zip([0, *steps], steps)]  # fmt: skip
    series = [("training, this step", "line a faint", loss), ("training, smoothed", "line a", _smooth(loss)),
              ("held-out", "dots b", heldout)]  # fmt: skip
    key = '<span class="ka">training</span><span class="kb">held-out</span>'
    if summary.get("order2") is not None:
        series.append(("order-2 model, held-out", "line c dashed", [summary["order2"]] * len(steps)))
        key += "<span>order-2 model, held-out</span>"

    def perf(key: str) -> list[float]:
        return [record["perf"][key] for record in few]

    halves = [("learning-rate", "Learning rate", "", [record["lr"] for record in few]),
              ("grad-norm", "Gradient norm", "before clipping", [record["grad_norm"] for record in few]),
              ("throughput", "Tokens per second", "", perf("tokens_per_second")),
              ("memory", "Peak memory", "GiB", perf("memory_gib")),
              ("max-load", "Expert load, max / mean", "of the most uneven layer; 1 is even",
               [record["load_max_over_mean"] for record in few]),
              ("drop-rate", "Drop rate", "% of slots past an expert's capacity", [100 * record["drop_rate"] for record in few])]  # fmt: skip
    charts = [f'<section id="loss"><h2>Loss, {unit}</h2><div class="key">{key}</div>{_chart("Loss", steps, series, 1060, 300)}</section>']
    charts += [f'<section id="{id_}" class="half"><h2>{title}</h2><p>{note or "&nbsp;"}</p>'
               f"{_chart(title, steps, [(title, 'line a', values)], 520, 190)}</section>" for id_, title, note, values in halves]  # fmt: skip
    sample = summary.get("sample")
    if sample:
        charts.append(f'<section id="sample"><h2>Sample</h2><p>what the model writes at temperature 0.8</p><pre>{escape(sample)}</pre></section>')
    charts.insert(1, _heat_map(records, run["config"]["model"]["num_dense_layers"]))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastmoe: {escape(name)}</title><style>{_STYLE}{_palette()}</style></head>
<body><main><h1>{escape(name)}</h1><p>step {records[-1]["step"]:,} of {run["config"]["train"]["steps"]:,} · {escape(run["machine"])}</p>
<div class="tiles">{_tiles(run, records, summary, unit)}</div>
<div class="grid">{"".join(charts)}<section id="config"><h2>Settings</h2><p>bold: not the default</p>{_settings(run["config"])}</section></div>
</main><div id="tip"></div><script>{_SCRIPT}</script></body></html>
"""


def _tiles(run: dict, records: list[dict], summary: dict, unit: str) -> str:
    last, perf = records[-1], [record["perf"] for record in records]
    known = [record["heldout"] for record in records if "heldout" in record]
    heldout, order2 = summary.get("heldout", known[-1] if known else None), summary.get("order2")
    seconds = summary.get("seconds", sum(p["step_seconds"] for p in perf))
    epochs = last["tokens"] / run["train_tokens"]
    tiles = [
        ("held-out", f"{heldout:.3f}" if heldout is not None else "–", f"{unit}{'' if summary else ', so far'}"),
        ("order-2 model", f"{order2:.3f}" if order2 is not None else "–",
         f"{unit}; the model is {order2 - heldout:+.3f} ahead" if order2 is not None else unit),
        ("training loss", f"{last['loss'] / math.log(2):.3f}", f"{unit} ({last['loss']:.3f} nats), last step"),
        ("tokens per second", f"{median(p['tokens_per_second'] for p in perf):,.0f}",
         f"{100 * median(p['mfu'] for p in perf):.0f}% of the measured peak"),
        ("parameters", _short(run["parameters"]), f"{_short(run['active_parameters'])} active a token"),
        ("tokens seen", _short(last["tokens"]), f"{epochs:.2f} epochs of {_short(run['train_tokens'])}"),
        ("training time", f"{int(seconds) // 60}:{int(seconds) % 60:02d}", f"{1000 * median(p['step_seconds'] for p in perf):.0f} ms a step"),
        ("peak memory", f"{max(p['memory_gib'] for p in perf):.2f} GiB", run["config"]["train"]["dtype"]),
    ]  # fmt: skip
    return "".join(f'<div class="tile"><span>{title}</span><b>{value}</b><i>{escape(note)}</i></div>' for title, value, note in tiles)


def _chart(title: str, steps: Sequence[int], series: list[tuple[str, str, list]], width: int, height: int) -> str:
    """series: (name, css classes starting with line or dots, a value or None for each step)."""
    left, right, top, bottom = 52, width - 8, 8, height - 24
    ys = [y for _, _, values in series for y in values if y is not None]
    low, high, ticks = _axis(min(ys), max(ys))

    def x(step: float) -> float:
        return left + (step - steps[0]) / ((steps[-1] - steps[0]) or 1) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    parts = [f'<line class="gridline" x1="{left}" x2="{right}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
             f'<text x="{left - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{_label(t)}</text>' for t in ticks]  # fmt: skip
    first, last = steps[0], steps[-1]
    marks = sorted({first, last, *(t for t in _axis(first, last)[2] if first < t < last and (last - t) > (last - first) / 12)})
    parts += [f'<text x="{x(t):.1f}" y="{height - 6}" text-anchor="{"end" if t == last else "middle"}">{t:,.0f}</text>'
              for t in marks if t == last or (x(t) - left < (right - left) * 0.94)]  # fmt: skip
    for _, classes, values in series:
        points = [(x(step), y(value)) for step, value in zip(steps, values) if value is not None]
        if classes.startswith("dots"):
            parts += [f'<circle class="{classes[5:]}" cx="{px:.1f}" cy="{py:.1f}" r="4"/>' for px, py in points]
        else:
            parts.append(f'<polyline class="{classes}" points="{" ".join(f"{px:.1f},{py:.1f}" for px, py in points)}"/>')
    parts.append(f'<line class="cursor" y1="{top}" y2="{bottom}"/>')
    plot = {"left": left, "right": right, "x": steps,
            "series": [(name, [v if v is None else float(f"{v:.5g}") for v in values]) for name, _, values in series]}  # fmt: skip
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}" data-plot="{_attribute(plot)}">{"".join(parts)}</svg>'


def _heat_map(records: list[dict], first_layer: int) -> str:
    """Rows: experts by layer. Columns: steps. Color: an expert's tokens over the layer's mean, log scale from 1/4 to 4."""
    head = '<section id="load"><h2>Expert load by layer and step</h2>'
    key = "load" if "load" in records[0] else "load_quantiles"
    if not records[0][key]:
        return f"{head}<p>this model has no MoE layer</p></section>"
    layers, experts = len(records[0][key]), len(records[0][key][0])
    chunks = _chunks(records, _COLUMNS)
    columns = [[[sum(record[key][layer][e] for record in chunk) / len(chunk) for e in range(experts)] for layer in range(layers)]
               for chunk in chunks]  # fmt: skip
    names = [f"expert {e}" if key == "load" else f"quantile {e}/{experts - 1} of the experts" for e in range(experts)]
    whole = layers * experts > _ROWS
    names = ["the busiest expert"] if whole else names
    height = max(2.0, min(14.0, 400 / (layers * len(names))))
    left, right, top, gap = 60, 1052, 4, 0 if whole else 5
    rows, labels, values = [], [], []
    for layer in range(layers):
        start = top + layer * (len(names) * height + gap)
        middle = start + len(names) * height / 2 + 4
        if layers <= 24 or layer % 4 == 0:
            labels.append(f'<text x="{left - 8}" y="{middle:.1f}" text-anchor="end">layer {first_layer + layer}</text>')
        shares = [[value * experts / (sum(column[layer]) or 1) for value in column[layer]] for column in columns]
        shares = [[max(share)] for share in shares] if whole else shares
        for e, name in enumerate(names):
            rows.append((round(start + e * height, 2), f"layer {first_layer + layer}, {name}"))
            values.append([round(share[e], 2) for share in shares])
    cell, paths = (right - left) / len(columns), [""] * _LEVELS
    for (y, _), row in zip(rows, values):
        for column, value in enumerate(row):
            paths[_level(value)] += f"M{left + column * cell:.1f} {y}h{cell + 0.3:.1f}v{height + 0.1:.1f}h-{cell + 0.3:.1f}z"
    bottom = top + layers * (len(names) * height + gap)
    first, last = records[0]["step"], records[-1]["step"]
    axis = (f'<text x="{left}" y="{bottom + 14:.0f}">{first:,}</text>'
            f'<text x="{right}" y="{bottom + 14:.0f}" text-anchor="end">{last:,}</text>')  # fmt: skip
    cells = "".join(f'<path class="h{level}" d="{path}"/>' for level, path in enumerate(paths) if path)
    scale = "".join(f'<rect class="h{i}" x="{i * 12}" y="0" width="12.3" height="10"/>' for i in range(_LEVELS))
    ticks = "".join(f'<text x="{6 + i * 48}" y="24" text-anchor="middle">{text}</text>' for i, text in enumerate(("¼×", "½×", "1×", "2×", "4×")))
    plot = {"left": left, "right": right, "x": [chunk[-1]["step"] for chunk in chunks], "rows": rows, "height": height, "values": values}
    return (
        f"{head}<p>tokens of an expert over its layer's mean; 1× is even</p>"
        f'<svg viewBox="-6 0 220 28" style="width:220px" role="img" aria-label="Color scale">{scale}{ticks}</svg>'
        f'<svg viewBox="0 0 1060 {bottom + 20:.0f}" role="img" aria-label="Expert load" data-plot="{_attribute(plot)}">'
        f"{labels and ''.join(labels)}{cells}{axis}</svg></section>"
    )


def _settings(config: dict) -> str:
    default = configs.flat(configs.Config())
    tables = []
    for group, values in config.items():
        rows = "".join(f'<tr{"" if default.get(f"{group}.{name}") == value else " class=changed"}><td>{name}</td>'
                       f"<td>{escape(str(value))}</td></tr>" for name, value in values.items())  # fmt: skip
        tables.append(f"<table><tr><th colspan=2>{group}</th></tr>{rows}</table>")
    return f'<div class="settings">{"".join(tables)}</div>'


def _palette() -> str:
    def mix(a: str, b: str, share: float) -> str:
        channels = ((int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for i in (1, 3, 5))
        return "#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in channels)

    def rules(cold: str, even: str, warm: str) -> str:
        middle = _LEVELS // 2
        colors = [mix(even, cold if i < middle else warm, abs(i - middle) / middle) for i in range(_LEVELS)]
        return "".join(f".h{i}{{fill:{color}}}" for i, color in enumerate(colors))

    dark = rules("#4f9dff", "#24272c", "#ff7a45")
    return f"{rules('#1f5fbf', '#f1efe9', '#d9480f')}@media (prefers-color-scheme: dark){{{dark}}}"


def _level(ratio: float) -> int:
    middle = _LEVELS // 2
    return middle + round(max(-2.0, min(2.0, math.log2(max(ratio, 0.01)))) * middle / 2)


def _chunks(records: list[dict], count: int) -> list[list[dict]]:
    count = min(count, len(records))
    return [records[i * len(records) // count : (i + 1) * len(records) // count] for i in range(count)]


def _mean(chunk: list[dict]) -> dict:
    """Means of the numbers, at the last step of the chunk."""

    def mean(values: list[dict]) -> dict:
        return {key: sum(value[key] for value in values) / len(values) for key, x in values[0].items() if isinstance(x, int | float)}

    return {**mean([{**record, "heldout": 0} for record in chunk]), "perf": mean([record["perf"] for record in chunk]),
            "step": chunk[-1]["step"]}  # fmt: skip


def _smooth(values: list[float]) -> list[float]:
    """Mean over a window of 1/20 of the points around each."""
    half = len(values) // 40
    return [sum(near) / len(near) for i in range(len(values)) for near in [values[max(0, i - half) : i + half + 1]]]


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Bounds and about five round tick values for data from low to high."""
    if high - low < 1e-12:
        low, high = min(0, 2 * low), max(0, 2 * high) or 1
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def _label(value: float) -> str:
    return _short(value) if abs(value) >= 1e4 else f"{value:.4g}"


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.4g}"


def _attribute(value: dict) -> str:
    return escape(json.dumps(value, separators=(",", ":")))
