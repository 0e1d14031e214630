"""One self-contained HTML page about a run: inline SVG and a few lines of script; it opens without a network."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median

from fastmoe import config as configs
from fastmoe.trainer import alarms, metrics

MAX_POINTS = 600
_COLUMNS, _ROWS, _LEVELS = 120, 512, 17  # heat map: steps, rows, colors

_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1d1f23; --soft: #6a6f78; --rule: #e7e6e2;
  --a: #3454d1; --b: #e8590c; --c: #8a8f98; }
@media (prefers-color-scheme: dark) {
  :root { --page: #121316; --card: #1a1c20; --ink: #e9e9e6; --soft: #9aa0a9; --rule: #2b2e34;
    --a: #8ea6ff; --b: #ffa25c; --c: #777d87; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 26px; font-weight: 650; letter-spacing: -.02em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 14px; font-weight: 600; margin: 0 0 2px; }
p { margin: 0; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; margin: 24px 0 12px; }
.tile, section { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 24px; font-weight: 620; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
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
.key { margin-right: 16px; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin: 0 6px 3px 0; background: var(--c); }
.ka::before { background: var(--a); } .kb::before { background: var(--b); }
#tip { position: fixed; z-index: 1; display: none; pointer-events: none; background: var(--ink); color: var(--page);
  border-radius: 7px; padding: 6px 10px; font-size: 12.5px; line-height: 1.45; white-space: pre;
  font-variant-numeric: tabular-nums; }
pre { margin: 8px 0 0; font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.settings { columns: 250px; column-gap: 28px; margin-top: 8px; }
table { width: 100%; border-collapse: collapse; break-inside: avoid; margin-bottom: 14px; font-size: 12.5px; }
th { text-align: left; padding: 3px 0; border-bottom: 1px solid var(--rule); }
td { padding: 2px 0; color: var(--soft); } td + td { text-align: right; color: var(--ink); overflow-wrap: anywhere; }
.changed td { font-weight: 650; color: var(--ink); }
.layers th + th { text-align: right; padding-left: 8px; } .layers td { font-variant-numeric: tabular-nums; }
.layers i { color: var(--soft); font-style: normal; }
.alarms { border-color: var(--b); margin-top: 16px; }
.alarms ul { margin: 0; padding-left: 18px; }
.alarms li { margin-top: 8px; font-size: 13.5px; overflow-wrap: anywhere; }
.alarms i { display: block; color: var(--soft); font-style: normal; }
"""

_SCRIPT = """
const tip = document.getElementById('tip');
const show = (event, text) => {
  tip.textContent = text;
  tip.style.display = 'block';
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + 'px';
  tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 12) + 'px';
};
const number = v => Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString('en') : `${+v.toPrecision(4)}`;
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
      const share = d.values[row][column].toFixed(2);
      return show(event, `step ${d.x[column]}\\n${d.rows[row][1]}\\n${share} \\u00d7 the mean`);
    }
    const wanted = d.x[0] + part * (d.x[d.x.length - 1] - d.x[0]);
    let i = 0;
    while (i + 1 < d.x.length && Math.abs(d.x[i + 1] - wanted) <= Math.abs(d.x[i] - wanted)) i++;
    const span = d.x[d.x.length - 1] - d.x[0] || 1, x = d.left + (d.x[i] - d.x[0]) / span * (d.right - d.left);
    cursor.setAttribute('x1', x); cursor.setAttribute('x2', x); cursor.style.visibility = 'visible';
    const shown = d.series.filter(([, values]) => values[i] != null);
    show(event, [`step ${d.x[i]}`, ...shown.map(([name, values]) => `${name}  ${number(values[i])}`)].join('\\n'));
  };
}
"""


def report(run_dir: str | Path) -> Path:
    """Writes `<run_dir>/report.html` from run.json, metrics.jsonl and, of a finished run, summary.json; returns it.

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

    def chart(id_: str, title: str, note: str, values: list[float]) -> str:
        return _section(
            id_, title, note or "&nbsp;", _chart(title, steps, [(title, "line a", values)], 520, 190), "half"
        )

    loss, key = _loss(steps, few, records, summary)
    parts = [
        _section("loss", f"Loss, {unit}", key, _chart("Loss", steps, loss, 1060, 300)),
        _heat_map(records, run["config"]["model"]["num_dense_layers"]),
        chart("learning-rate", "Learning rate", "", [record["lr"] for record in few]),
        chart("grad-norm", "Gradient norm", "before clipping", [record.get("grad_norm") for record in few]),
        chart("throughput", "Tokens per second", "", [record["perf"]["tokens_per_second"] for record in few]),
        chart("memory", "Peak memory", "GiB", [record["perf"]["memory_gib"] for record in few]),
        chart(
            "max-load",
            "Expert load, max / mean",
            "of the most uneven layer; 1 is even",
            [record["load_max_over_mean"] for record in few],
        ),
        chart(
            "drop-rate",
            "Drop rate",
            "% of slots past an expert's capacity",
            [100 * record["drop_rate"] for record in few],
        ),
    ]
    routed = [record for record in records if record.get("layers")]
    found = []
    if routed:
        found = alarms.find(routed, configs.from_dict(run["config"]).model)
        chunks = _chunks(routed, MAX_POINTS)
        ends = [chunk[-1]["step"] for chunk in chunks]
        for id_, title, note, key in (
            ("entropy", "Load entropy", "of the most uneven layer, over log E; 1 is even", "entropy"),
            ("logit-norm", "Router logits", "root mean square, of the layer with the largest", "logit_norm"),
        ):
            worst = [metrics.worst(key)(_mean_rows([record["layers"][key] for record in chunk])) for chunk in chunks]
            parts.append(_section(id_, title, note, _chart(title, ends, [(title, "line a", worst)], 520, 190), "half"))
        parts.append(_layers(routed, run["config"]["model"]["num_dense_layers"]))
    if summary.get("sample"):
        body = f"<pre>{escape(summary['sample'])}</pre>"
        parts.append(_section("sample", "Sample", "what the model writes at temperature 0.8", body))
    parts.append(_section("config", "Settings", "bold: not the default", _settings(run["config"])))
    done = f"step {records[-1]['step']:,} of {run['config']['train']['steps']:,}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastmoe: {escape(name)}</title><style>{_STYLE}{_palette()}</style></head>
<body><main><h1>{escape(name)}</h1><p>{done} · {escape(run["machine"])}</p>
{_alarms(found) if found else ""}
<div class="tiles">{_tiles(run, records, summary, unit)}</div>
<div class="grid">{"".join(parts)}</div>
</main><div id="tip"></div><script>{_SCRIPT}</script></body></html>
"""


def _section(id_: str, title: str, note: str, body: str, classes: str = "") -> str:
    return f'<section id="{id_}" class="{classes}"><h2>{title}</h2><p>{note}</p>{body}</section>'


def _alarms(found: list[alarms.Alarm]) -> str:
    items = "".join(
        f"<li><b>layer {alarm.layer}</b>: {escape(alarm.what)}, steps {alarm.first:,} to {alarm.last:,}"
        f"<i>Likely causes: {escape(alarm.causes)}.</i><i>Remedies: {escape(alarm.remedies)}.</i></li>"
        for alarm in found
    )
    return _section("alarms", "Alarms", "windows of steps with poor routing", f"<ul>{items}</ul>", "alarms")


def _layers(records: list[dict], first_layer: int) -> str:
    """A table of each MoE layer's metrics at the end and their worst."""
    last = records[-20:]
    columns = {
        "max/mean": ("max_over_mean", 1, ".2f"),
        "CV": ("cv", 1, ".2f"),
        "entropy": ("entropy", 1, ".3f"),
        "idle": ("dead", 1, ".3g"),
        "hot": ("hot", 1, ".3g"),
        "dropped %": ("drop_rate", 100, ".1f"),
        "logits": ("logit_norm", 1, ".3g"),
        **{
            key.replace("_", " "): (key, 1, ".3g")
            for key in records[0]["layers"]
            if key.startswith("loss_") and all(key in record["layers"] for record in records)
        },
    }
    cells_L = [[f"layer {first_layer + i}"] for i in range(len(last[0]["layers"]["dead"]))]
    for key, scale, form in columns.values():
        end_L = _mean_rows([record["layers"][key] for record in last])
        worst_L = map(metrics.worst(key), zip(*(record["layers"][key] for record in records)))
        for cells, end, worst in zip(cells_L, end_L, worst_L):
            cells.append(f"{scale * end:{form}} <i>{scale * worst:{form}}</i>")
    head = "".join(f"<th>{name}</th>" for name in ("", *columns))
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells in cells_L)
    note = f"mean of the last {len(last)} steps, then the worst step of the run"
    return _section("layers", "Layers", note, f'<table class="layers"><tr>{head}</tr>{rows}</table>')


def _loss(
    steps: list[int], few: list[dict], records: list[dict], summary: dict
) -> tuple[list[tuple[str, str, list]], str]:
    """Series of the loss chart, in bits, and its key."""
    known = {record["step"]: record["heldout"] for record in records if "heldout" in record}
    heldout = []
    for low, high in zip([0, *steps], steps):
        heldout.append(next((value for step, value in known.items() if low < step <= high), None))
    bits = [record["loss"] / math.log(2) for record in few]
    series = [
        ("training, this step", "line a faint", bits),
        ("training, smoothed", "line a", _smooth(bits)),
        ("held-out", "dots b", heldout),
    ]
    key = '<span class="key ka">training</span><span class="key kb">held-out</span>'
    if summary.get("order2") is not None:
        series.append(("order-2 model, held-out", "line c dashed", [summary["order2"]] * len(steps)))
        key += '<span class="key">order-2 model, held-out</span>'
    return series, key


def _tiles(run: dict, records: list[dict], summary: dict, unit: str) -> str:
    last, perf = records[-1], [record["perf"] for record in records]
    known = [record["heldout"] for record in records if "heldout" in record]
    heldout, order2 = summary.get("heldout", known[-1] if known else None), summary.get("order2")
    seconds = int(summary.get("seconds", sum(p["step_seconds"] for p in perf)))
    rate, mfu, step_seconds = (median(p[key] for p in perf) for key in ("tokens_per_second", "mfu", "step_seconds"))
    epochs = last["tokens"] / run["train_tokens"]
    tiles = [
        ("held-out", "–" if heldout is None else f"{heldout:.3f}", f"{unit}{'' if summary else ', so far'}"),
        ("order-2 model", "–" if order2 is None else f"{order2:.3f}", f"{unit}, by counting"),
        ("training loss", f"{last['loss'] / math.log(2):.3f}", f"{unit} ({last['loss']:.3f} nats), last step"),
        ("tokens per second", f"{rate:,.0f}", f"{100 * mfu:.0f}% of the measured peak"),
        ("parameters", _short(run["parameters"]), f"{_short(run['active_parameters'])} active a token"),
        ("tokens seen", _short(last["tokens"]), f"{epochs:.2f} epochs of {_short(run['train_tokens'])}"),
        ("training time", f"{seconds // 60}:{seconds % 60:02d}", f"minutes; {1000 * step_seconds:.0f} ms a step"),
        (
            "peak memory",
            f"{max(p['memory_gib'] for p in perf):.2f} GiB",
            f"computing in {run['config']['train']['dtype']}",
        ),
    ]
    return "".join(
        f'<div class="tile"><span>{title}</span><b>{value}</b><i>{escape(note)}</i></div>'
        for title, value, note in tiles
    )


def _text(x: float, y: float, content: str, anchor: str = "end") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def _svg(width: float, height: float, title: str, plot: dict, body: str) -> str:
    """plot: what the script needs for the tooltip."""
    data = escape(json.dumps(plot, separators=(",", ":")))
    return f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{title}" data-plot="{data}">{body}</svg>'


def _chart(title: str, steps: Sequence[int], series: list[tuple[str, str, list]], width: int, height: int) -> str:
    """series: (name, css classes starting with line or dots, a value or None for each step)."""
    left, right, top, bottom = 52, width - 8, 8, height - 24
    known = [y for _, _, values in series for y in values if y is not None] or [0.0]
    low, high, ticks = _axis(min(known), max(known))
    first, last = steps[0], steps[-1]

    def x(step: float) -> float:
        return left + (step - first) / ((last - first) or 1) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    parts = []
    for tick in ticks:
        parts.append(f'<line class="gridline" x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_text(left - 8, y(tick) + 4, _label(tick)))
    for tick in [first, *_axis(first, last)[2]]:
        if tick == first or first + (last - first) * 0.06 < tick < last - (last - first) * 0.08:
            parts.append(_text(x(tick), height - 6, f"{tick:,.0f}", "middle"))
    parts += [_text(right, height - 6, f"{last:,}")] if last > first else []
    for _, classes, values in series:
        points = [(x(step), y(value)) for step, value in zip(steps, values) if value is not None]
        if classes.startswith("dots"):
            parts += [f'<circle class="{classes[5:]}" cx="{px:.1f}" cy="{py:.1f}" r="4"/>' for px, py in points]
        else:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
            parts.append(f'<polyline class="{classes}" points="{path}"/>')
    parts.append(f'<line class="cursor" y1="{top}" y2="{bottom}"/>')
    short = [(name, [v if v is None else float(f"{v:.5g}") for v in values]) for name, _, values in series]
    return _svg(width, height, title, {"left": left, "right": right, "x": steps, "series": short}, "".join(parts))


def _heat_map(records: list[dict], first_layer: int) -> str:
    """Rows: experts by layer. Columns: steps. Color: an expert's tokens over the layer's mean, log scale, 1/4 to 4."""
    title = "Expert load by layer and step"
    key = "load" if "load" in records[0] else "load_quantiles"
    if not records[0][key]:
        return _section("load", title, "this model has no MoE layer", "")
    layers, experts = len(records[0][key]), len(records[0][key][0])
    chunks = _chunks(records, _COLUMNS)
    names = [f"expert {e}" if key == "load" else f"quantile {e}/{experts - 1} of the experts" for e in range(experts)]
    busiest = layers * experts > _ROWS
    names = ["the busiest expert"] if busiest else names
    height = max(2.0, min(14.0, 400 / (layers * len(names))))
    left, right, top, gap = 60, 1052, 4, 0 if busiest else 5
    cell = (right - left) / len(chunks)
    rows, values, labels, paths = [], [], [], [""] * _LEVELS
    for layer in range(layers):
        start = top + layer * (len(names) * height + gap)
        if layer % math.ceil(13 / (len(names) * height + gap)) == 0:
            labels.append(_text(left - 8, start + len(names) * height / 2 + 4, f"layer {first_layer + layer}"))
        shares = [_shares(chunk, key, layer, busiest) for chunk in chunks]
        for e, name in enumerate(names):
            rows.append((round(start + e * height, 2), f"layer {first_layer + layer}, {name}"))
            values.append([round(share[e], 2) for share in shares])
    for (y, _), row in zip(rows, values):
        for column, value in enumerate(row):
            box = f"h{cell + 0.3:.1f}v{height + 0.1:.1f}h-{cell + 0.3:.1f}z"
            paths[_level(value)] += f"M{left + column * cell:.1f} {y}{box}"
    bottom = top + layers * (len(names) * height + gap)
    steps = [chunk[-1]["step"] for chunk in chunks]
    plot = {"left": left, "right": right, "x": steps, "rows": rows, "height": height, "values": values}
    cells = "".join(f'<path class="h{level}" d="{path}"/>' for level, path in enumerate(paths) if path)
    axis = _text(left, bottom + 14, f"{records[0]['step']:,}", "start") + _text(right, bottom + 14, f"{steps[-1]:,}")
    picture = _svg(1060, bottom + 20, "Expert load", plot, "".join(labels) + cells + axis)
    return _section("load", title, "tokens of an expert over its layer's mean; 1× is even", _color_scale() + picture)


def _shares(chunk: list[dict], key: str, layer: int, busiest: bool) -> list[float]:
    """Each expert's (or quantile's) tokens over the mean, averaged over the records; of the busiest alone if asked."""
    shares = []
    for record in chunk:
        mean = sum(record[key][layer]) / len(record[key][layer]) or 1
        share = [value / mean for value in record[key][layer]]
        shares.append([max(share)] if busiest else share)
    return _mean_rows(shares)


def _color_scale() -> str:
    boxes = "".join(f'<rect class="h{i}" x="{i * 12}" y="0" width="12.3" height="10"/>' for i in range(_LEVELS))
    ticks = "".join(_text(6 + i * 48, 24, text, "middle") for i, text in enumerate(("¼×", "½×", "1×", "2×", "4×")))
    return f'<svg viewBox="-6 0 220 28" style="width:220px" role="img" aria-label="Color scale">{boxes}{ticks}</svg>'


def _settings(config: dict) -> str:
    default = configs.flat(configs.Config())
    tables = []
    for group, values in config.items():
        rows = "".join(
            f"<tr{'' if default.get(f'{group}.{name}') == value else ' class=changed'}><td>{name}</td>"
            f"<td>{escape(str(value))}</td></tr>"
            for name, value in values.items()
        )
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
        known = {key: [v[key] for v in values if isinstance(v.get(key), int | float)] for key in values[0]}
        return {key: sum(numbers) / len(numbers) for key, numbers in known.items() if numbers}

    return {
        **mean([{**record, "heldout": 0} for record in chunk]),
        "perf": mean([record["perf"] for record in chunk]),
        "step": chunk[-1]["step"],
    }


def _mean_rows(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows)]


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
