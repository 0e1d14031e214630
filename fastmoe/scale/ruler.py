"""Bytes of parameters, gradients, optimizer states and activations. Sizes are bytes; 1 GB = 1e9 bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastmoe.ops.experts import Z8_BLOCK
from fastmoe.ops.quantize import BLOCK

BUCKET_BYTES = 2 * 5e8  # gradients travel in buckets of 5e8 half-precision elements


@dataclass(frozen=True)
class Regime:
    """Where the state of one parameter lives, in bytes.

    weights, grads, states: on the device, before sharding. stage: what ZeRO divides by the data-parallel size: 1 the
    states, 2 also the gradients, 3 also the weights. host: in host memory (or NVMe), divided by the data-parallel size
    when `stage` is not 0. factored: on top, the second moment as a row and a column (Adafactor), 4(n+m)/(nm) bytes for
    matrices [n, m]. working: what else the device holds, "layer" (one layer's weights, gathered), "bucket" or
    nothing. traffic: elements sent a step and parameter by the data-parallel exchange.
    Sources: Rajbhandari et al., arXiv 1910.02054; ZeRO-Offload, arXiv 2101.06840; ZeRO-Infinity, arXiv 2104.07857.
    """

    weights: float
    grads: float
    states: float
    stage: int = 0
    host: float = 0.0
    factored: bool = False
    working: str = ""
    traffic: int = 2

    def device_parts(self, dp: int = 1, matrix: tuple[int, int] | None = None) -> dict[str, float]:
        """Bytes per parameter of states, grads, weights on one of `dp` devices. matrix: (n, m), if factored."""
        if self.factored and matrix is None:
            raise ValueError("fastmoe.ruler: matrix must be (n, m) for a factored regime, got None")
        states = self.states + (4 * sum(matrix) / (matrix[0] * matrix[1]) if self.factored else 0)
        parts = {"states": states, "grads": self.grads, "weights": self.weights}
        return {name: size / dp if order < self.stage else size for order, (name, size) in enumerate(parts.items())}

    def device_bytes(self, dp: int = 1, matrix: tuple[int, int] | None = None) -> float:
        """The sum of device_parts."""
        return sum(self.device_parts(dp, matrix).values())

    def host_bytes(self, dp: int = 1) -> float:
        """Bytes per parameter in host memory, for each device."""
        return self.host / dp if self.stage else self.host


_MIXED = Regime(2, 2, 12)
_SCALE = 2 / BLOCK  # bytes a parameter of one moment's bfloat16 scales
REGIMES: dict[str, Regime] = {
    "fp32": Regime(4, 4, 8),
    "mixed": _MIXED,  # fp32 master weights and two fp32 moments
    "mixed-accumulate": replace(_MIXED, grads=4),  # gradients accumulated in fp32
    "mixed-half-moments": replace(_MIXED, states=8),  # both moments in 16 bits
    "zero1": replace(_MIXED, stage=1),
    "zero2": replace(_MIXED, stage=2),
    "zero3": replace(_MIXED, stage=3, working="layer", traffic=3),
    "adafactor": Regime(2, 2, 4, factored=True),
    # bf16 weights alone, rounded by chance; states of fastmoe.optim
    "int8": Regime(2, 2, 2 + 2 * _SCALE),
    "int8-residual8": Regime(2, 2, 3 + 2 * _SCALE),  # and a third byte of the weights
    "adafactor-bf16": Regime(2, 2, 0, factored=True),
    "host-states": Regime(2, 2, 0, host=12),
    "zero-offload": Regime(2, 0, 0, stage=2, host=14, working="bucket"),
    "zero-infinity": Regime(0, 0, 0, stage=3, host=20, working="layer", traffic=3),
}


def regime(name: str) -> Regime:
    if name not in REGIMES:
        raise ValueError(f"fastmoe.ruler: regime must be one of {', '.join(REGIMES)}, got {name!r}")
    return REGIMES[name]


def moe_rank_bytes(
    dense: float, experts: float, regime: Regime, dp: int, ep: int, matrix: tuple[int, int] | None = None
) -> float:
    """Device bytes of a rank: dense*f(DP) + (experts/EP)*f(DP/EP). With EP = DP, sharding saves nothing on experts."""
    if ep < 1 or dp % ep:
        raise ValueError(f"fastmoe.ruler: ep must divide dp = {dp}, got {ep}")
    return dense * regime.device_bytes(dp, matrix) + experts / ep * regime.device_bytes(dp // ep, matrix)


def max_params(device: float, host: float, per_device: float, per_host: float = 0.0, pooled: bool = False) -> float:
    """The most parameters that fit, at so many bytes a parameter in device and host; pooled: wherever there is room."""
    if pooled:
        return (device + host) / (per_device + per_host)
    return min(device / per_device if per_device else float("inf"), host / per_host if per_host else float("inf"))


def activation_bytes(
    tokens: int, d_model: int, recompute: str = "selective", seq_len: int = 0, heads: int = 0
) -> float:
    """Bytes that one transformer layer keeps for backward, 16-bit, dense feed-forward of 4D included.

    recompute: "none" T*D*(34 + 5*heads*seq_len/D), "selective" (or flash attention) 34*T*D, "full" 2*T*D.
    Source: Korthikanti et al., arXiv 2205.05198.
    """
    if recompute == "none":
        if seq_len < 1 or heads < 1:
            raise ValueError(
                f"fastmoe.ruler: seq_len and heads must be at least 1 for recompute='none', got {seq_len} and {heads}"
            )
        return tokens * d_model * (34 + 5 * heads * seq_len / d_model)
    if recompute not in ("selective", "full"):
        raise ValueError(f"fastmoe.ruler: recompute must be 'none', 'selective' or 'full', got {recompute!r}")
    return (34 if recompute == "selective" else 2) * tokens * d_model


def moe_activation_bytes(
    tokens: int, d_model: int, d_ff: int, top_k: int, gated: bool = True, save: str = "z"
) -> float:
    """Bytes that the expert op keeps for backward, 16-bit storage; the fused op's ~16*T*K bytes of indices are in.

    save: "all" permuted x, z and the activation (no indices), "z" x and z (fastmoe's default), "z8" x and z in 8 bits
    with a 2-byte scale for every 64 columns of d_ff, "x" x alone.
    """
    x_bytes, slots = 2 * tokens * d_model, tokens * top_k
    halves = 2 if gated else 1
    z_elements, scales = slots * halves * d_ff, slots * halves * -(-d_ff // Z8_BLOCK)
    kept = {
        "all": 2 * slots * d_model + 2 * z_elements + 2 * slots * d_ff,
        "z": x_bytes + 2 * z_elements + 16 * slots,
        "z8": x_bytes + z_elements + 2 * scales + 16 * slots,
        "x": x_bytes + 16 * slots,
    }
    if save not in kept:
        raise ValueError(f"fastmoe.ruler: save must be one of {', '.join(map(repr, kept))}, got {save!r}")
    return kept[save]
