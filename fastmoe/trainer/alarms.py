"""Alarms: rules over a run's records that name what is wrong with its routing, why that may be and what helps.

A rule is a function of the records (metrics.jsonl) and the model's settings. Layers count from 0, dense ones included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastmoe.config import ModelConfig
from fastmoe.nn.router import own_top_k
from fastmoe.trainer.metrics import HOT

WINDOW = 100  # steps that a rule must hold; a shorter run raises no alarm
SHARE = 0.9  # of those steps in which it must hold
DROPPED = 0.1  # of the slots
GROWTH, GROWN = 10.0, 3.0  # logit norm: times the start, and the least that counts as grown
LARGE = 30.0  # logit norm, whatever the start
FEW_ROWS, FEW_IDLE = 8, 0.05  # past MAX_COUNTS experts: mean tokens of one, share of them idle, below which all is well


class Alarm(NamedTuple):
    layer: int
    first: int  # step
    last: int
    what: str
    causes: str
    remedies: str

    def __str__(self) -> str:
        count = self.last - self.first + 1
        steps = f"{count} steps ({self.first} to {self.last})"
        return f"layer {self.layer}: {self.what} for {steps}; likely causes: {self.causes}; remedies: {self.remedies}"


def find(records: Sequence[dict], model: ModelConfig) -> list[Alarm]:
    """Every alarm, by layer. Of a layer where all tokens go to K experts it is not said that others are idle."""
    records = [record for record in records if record.get("layers")]
    if len(records) < WINDOW:
        return []
    collapsed = collapse(records, model)
    layers = {alarm.layer for alarm in collapsed}
    uneven = [alarm for rule in (idle, hot) for alarm in rule(records, model) if alarm.layer not in layers]
    return sorted(collapsed + uneven + drops(records, model) + logits(records, model), key=lambda alarm: alarm.layer)


def idle(records: Sequence[dict], model: ModelConfig) -> list[Alarm]:
    """Experts without a token in every step of a window; past MAX_COUNTS experts, at least so many in each."""
    E, found = model.num_experts, []
    for i, dead_N in enumerate(_series(records, "dead")):
        if "load" in records[0]:
            zero_NE = np.array([record["load"][i] for record in records]) == 0
            sums_NE = np.cumsum(np.vstack([np.zeros((1, E), int), zero_NE]), 0)
            count_W = (sums_NE[WINDOW:] - sums_NE[:-WINDOW] == WINDOW).sum(1)
            least = 1
        else:
            mean_N = np.array([np.mean(record["load_quantiles"][i]) for record in records])
            count_W = np.lib.stride_tricks.sliding_window_view(dead_N * (mean_N >= FEW_ROWS), WINDOW).min(1)
            least = max(1, FEW_IDLE * E)
        if count_W.max(initial=0) >= least:
            span = _join(count_W == count_W.max())
            found.append(
                _alarm(records, model, i, span, f"{int(count_W.max())} of {E} experts idle", *_uneven(model, "idle"))
            )
    return found


def hot(records: Sequence[dict], model: ModelConfig) -> list[Alarm]:
    """An expert with more than HOT times the mean load."""
    found = []
    for i, peak_N in enumerate(_series(records, "max_over_mean")):
        span = _longest(peak_N > HOT)
        if span:
            who = "the busiest expert"
            if "load" in records[0]:
                load_E = np.sum([record["load"][i] for record in records[slice(*span)]], 0)
                who = f"expert {int(load_E.argmax())}"
            what = f"{who} gets {np.median(peak_N[slice(*span)]):.1f} times the mean load"
            found.append(_alarm(records, model, i, span, what, *_uneven(model, "hot")))
    return found


def drops(records: Sequence[dict], model: ModelConfig) -> list[Alarm]:
    """More than DROPPED of a layer's slots past the experts' capacity."""
    factor = "the router's own" if model.capacity_factor is None else f"{model.capacity_factor:g}"
    causes = f"--model.capacity-factor ({factor}) is below what the load needs, or the load is uneven (see max/mean)"
    remedies = "a larger --model.capacity-factor, or 0 to drop nothing; `fastmoe routing` on a recorded run says which"
    found = []
    for i, rate_N in enumerate(_series(records, "drop_rate")):
        span = _longest(rate_N > DROPPED)
        if span:
            what = f"{np.mean(rate_N[slice(*span)]):.0%} of the slots dropped"
            found.append(_alarm(records, model, i, span, what, causes, remedies))
    return found


def logits(records: Sequence[dict], model: ModelConfig) -> list[Alarm]:
    """The logits' norm at the end is large, or has grown over the run. Ends are medians of a fifth of a window."""
    weight = "the router's own" if model.z_loss_weight is None else f"{model.z_loss_weight:g}"
    causes = f"nothing holds the logits (--model.z-loss-weight is {weight}), or a high --optim.lr"
    remedies = "--model.z-loss-weight 0.001 or more, a lower --optim.lr, a longer --optim.warmup-steps"
    found, few = [], WINDOW // 5
    for i, norm_N in enumerate(_series(records, "logit_norm")):
        start, end = float(np.median(norm_N[:few])), float(np.median(norm_N[-few:]))
        if end > LARGE or (end > GROWN and end > GROWTH * start):
            what = f"the router's logits went from {start:.3g} to {end:.3g} (root mean square)"
            found.append(_alarm(records, model, i, (0, len(records)), what, causes, remedies))
    return found


def collapse(records: Sequence[dict], model: ModelConfig) -> list[Alarm]:
    """All tokens go to the same K experts: the load's entropy is that of K even experts, or less."""
    E, K = model.num_experts, model.top_k or own_top_k(model.router)
    found = []
    for i, entropy_N in enumerate(_series(records, "entropy")):
        span = _longest(E**entropy_N < 1.1 * K) if E > 1.1 * K else None
        if span:
            what = f"nearly all tokens go to the same {K} of {E} experts"
            found.append(_alarm(records, model, i, span, what, *_uneven(model, "collapse")))
    return found


def _uneven(model: ModelConfig, kind: str) -> tuple[str, str]:
    """Likely causes and remedies of an uneven load."""
    if model.router == "hash":
        return (
            "the table gives frequent tokens to few experts",
            "--model.router-options balanced=True in a new run, or another --model.router",
        )
    if model.router == "domain":
        return (
            "few of the data's documents are of these domains, or none",
            "as many --model.num-experts as domains, or --data.path with all of them",
        )
    weight = "the router's own" if model.aux_loss_weight is None else f"{model.aux_loss_weight:g}"
    causes = f"the balancing loss is off or weak (--model.aux-loss-weight is {weight})"
    remedies = "--model.aux-loss-weight 0.01 or more, --model.router deepseek-v3 (a bias balances) or base (exact)"
    if kind == "idle":
        return f"{causes}, or more experts than the data need", f"{remedies}, fewer --model.num-experts"
    if kind == "hot":
        return f"{causes}, or many tokens that look alike", remedies
    return f"{causes}, or a high --optim.lr in the first steps", f"{remedies}, a longer --optim.warmup-steps"


def _series(records: Sequence[dict], key: str) -> Iterator[np.ndarray]:
    """Of each MoE layer a metric at every record."""
    yield from np.array([record["layers"][key] for record in records]).T


def _longest(held_N: np.ndarray) -> tuple[int, int] | None:
    """The longest run of records, from and to, covered by windows of which SHARE held; its ends held."""
    sums = np.concatenate([[0], held_N.cumsum()])
    good_W = sums[WINDOW:] - sums[:-WINDOW] >= SHARE * WINDOW
    if not good_W.any():
        return None
    start, end = _join(good_W)
    at = start + np.flatnonzero(held_N[start:end])
    return int(at[0]), int(at[-1]) + 1


def _join(good_W: np.ndarray) -> tuple[int, int]:
    """Windows by their first record to the longest run that neighbours cover; of equal ones the last."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], good_W, [0]])))
    start, end = max(zip(edges[::2], edges[1::2]), key=lambda run: (run[1] - run[0], run[0]))
    return int(start), int(end) - 1 + WINDOW


def _alarm(records: Sequence[dict], model: ModelConfig, layer: int, span: tuple[int, int], *texts: str) -> Alarm:
    first, last = records[span[0]]["step"], records[span[1] - 1]["step"]
    return Alarm(model.num_dense_layers + layer, first, last, *texts)
