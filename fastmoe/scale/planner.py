"""Does a model fit a machine? Bytes of every device and host, from the formulas of ruler.py."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from fastmoe.config import ModelConfig, parse_bytes
from fastmoe.scale import ruler
from fastmoe.scale.presets import PRESETS, Preset, from_config, preset


@dataclass(frozen=True)
class Machine:
    """Devices in all, bytes of each; bytes of host memory and devices of each host."""

    devices: int
    device_memory: float
    host_memory: float = 0.0
    devices_per_host: int = 1


@dataclass(frozen=True)
class Plan:
    """What one device and one host hold, in bytes. A table when printed.

    device: name -> bytes of a device. host: bytes of a host that the regime puts there. overflow: bytes that a device
    lacks, which must move to its host. fits: as it stands. fits_with_offload: or once the overflow has moved.
    """

    name: str
    regime: str
    sizes: dict[str, int]
    params_per_device: float
    device: dict[str, float]
    host: float
    overflow: float
    machine: Machine

    @property
    def device_bytes(self) -> float:
        return sum(self.device.values())

    @property
    def fits(self) -> bool:
        return self.overflow == 0 and self.host <= self.machine.host_memory

    @property
    def fits_with_offload(self) -> bool:
        return self.host + self.overflow * self.machine.devices_per_host <= self.machine.host_memory or self.fits

    @property
    def verdict(self) -> str:
        if self.fits:
            return "fits"
        if self.fits_with_offload:
            return f"must offload {_gb(self.overflow)} of each device to its host"
        if not self.overflow:
            return f"does not fit: a host lacks {_gb(self.host - self.machine.host_memory)}"
        lack = self.host + self.overflow * self.machine.devices_per_host - self.machine.host_memory
        return f"must offload {_gb(self.overflow)} of each device, for which a host lacks {_gb(lack)}"

    def __str__(self) -> str:
        machine, sizes = self.machine, " ".join(f"{name}={size}" for name, size in self.sizes.items())
        host_parts = [("for the regime", self.host)] if self.host else []
        if self.overflow:
            host_parts.append(("offloaded", self.overflow * machine.devices_per_host))
        rows = [
            f"{self.name} on {machine.devices} devices, {sizes}, {self.regime}: "
            f"{self.params_per_device:,.0f} parameters a device"
        ]
        for title, parts, room in (
            ("device", list(self.device.items()), machine.device_memory),
            ("host", host_parts, machine.host_memory),
        ):
            rows += [f"  {title:<8}{name:<16}{_gb(size):>12}" for name, size in parts]
            rows.append(f"  {title:<8}{'of':<16}{_gb(room):>12}")
        return "\n".join([*rows, self.verdict])


def plan(
    model: Preset | ModelConfig | str,
    machine: Machine,
    *,
    pp: int = 1,
    tp: int = 1,
    ep: int | None = None,
    regime: str = "mixed",
    tokens: int = 0,
    recompute: str = "selective",
    save: str = "z",
    shared_layers: bool = False,
) -> Plan:
    """Bytes per device and host for one way to lay a model out; says whether it fits.

    machine.devices = pp * dp * tp; ep divides dp and the experts (None: their greatest common divisor). tp divides all
    but the routed experts, ep these alone. regime: a name of ruler.REGIMES. tokens: of one micro-batch on one device,
    for activations (0 leaves them out; with pipelining the first stage holds pp micro-batches). recompute, save: as in
    ruler.activation_bytes and moe_activation_bytes. shared_layers: all layers share one layer's parameters, the first
    stage of Pseudo-to-Real (Lin et al., arXiv 2110.03888).

    Errors: ValueError for an unknown preset or regime and for sizes that do not divide.
    """
    shape = preset(model) if isinstance(model, str) else from_config(model) if isinstance(model, ModelConfig) else model
    rules = ruler.regime(regime)
    positive = {"devices": machine.devices, "devices_per_host": machine.devices_per_host, "pp": pp, "tp": tp}
    for name, size in positive.items():
        if size < 1:
            raise ValueError(f"fastmoe.plan: {name} must be at least 1, got {size}")
    if machine.devices % (pp * tp):
        raise ValueError(f"fastmoe.plan: pp * tp must divide devices = {machine.devices}, got {pp} * {tp}")
    if pp > shape.num_layers:
        raise ValueError(f"fastmoe.plan: pp must be at most the {shape.num_layers} layers, got {pp}")
    if shared_layers and pp > 1:
        raise ValueError(f"fastmoe.plan: pp must be 1 with shared_layers, got {pp}")
    dp, E = machine.devices // (pp * tp), shape.num_experts
    ep = (math.gcd(dp, E) if E else 1) if ep is None else ep
    if ep < 1 or dp % ep or E % ep:
        raise ValueError(f"fastmoe.plan: ep must divide dp = {dp} and the {E} experts, got {ep}")

    layers = 1 if shared_layers else shape.num_layers / pp
    routed = shape.num_moe_layers * E * shape.matrices * shape.d_model * shape.d_ff
    dense = shape.total_params - routed
    if shared_layers:
        outside = shape.embeddings * shape.vocab_size * shape.d_model
        dense, routed = outside + (dense - outside) / shape.num_layers, routed / max(shape.num_moe_layers, 1)
    dense, routed = dense / (pp * tp), routed / (pp * ep)

    matrix = (shape.d_ff, shape.d_model)
    of_dense, of_routed = rules.device_parts(dp, matrix), rules.device_parts(dp // ep, matrix)
    device = {part: dense * of_dense[part] + routed * of_routed[part] for part in ("weights", "grads", "states")}
    if rules.working:
        device["working"] = 2 * (dense + routed) / layers if rules.working == "layer" else ruler.BUCKET_BYTES
    if tokens:
        kept = shape.num_layers * ruler.activation_bytes(tokens, shape.d_model, recompute)
        if recompute != "full" and shape.top_k:
            kept += shape.num_moe_layers * ruler.moe_activation_bytes(
                tokens, shape.d_model, shape.d_ff, shape.top_k + shape.num_shared_experts, shape.matrices == 3, save
            )
        device["activations"] = kept
    host = (dense * rules.host_bytes(dp) + routed * rules.host_bytes(dp // ep)) * machine.devices_per_host
    overflow = max(0.0, sum(device.values()) - machine.device_memory)
    return Plan(shape.name, regime, dict(pp=pp, dp=dp, ep=ep, tp=tp), dense + routed, device, host, overflow, machine)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def main(argv: list[str]) -> int:
    """`fastmoe plan PRESET ...`: prints the plan; 0 where it fits, if need be with offload, else 1."""
    parser = argparse.ArgumentParser(
        "fastmoe plan",
        description="Say whether a model fits a machine.",
        epilog="presets: " + ", ".join(PRESETS),
        allow_abbrev=False,
    )
    parser.add_argument("preset", metavar="PRESET")
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--device-memory", required=True, metavar="SIZE", help="of one device, as 32GB or 24GiB")
    parser.add_argument("--host-memory", default="0", metavar="SIZE", help="of one host (default: 0)")
    parser.add_argument("--devices-per-host", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, help="default: as many as divide both the experts and dp")
    parser.add_argument("--regime", default="mixed", help=", ".join(ruler.REGIMES) + " (default: mixed)")
    parser.add_argument("--tokens", type=int, default=0, help="of one micro-batch on one device, for activations")
    parser.add_argument("--recompute", default="selective", help="selective or full (default: selective)")
    parser.add_argument("--shared-layers", action="store_true", help="layers share one layer's parameters")
    args = parser.parse_args(argv)
    device, host = parse_bytes(args.device_memory), parse_bytes(args.host_memory)
    machine = Machine(args.devices, device, host, args.devices_per_host)
    result = plan(
        args.preset,
        machine,
        pp=args.pp,
        tp=args.tp,
        ep=args.ep,
        regime=args.regime,
        tokens=args.tokens,
        recompute=args.recompute,
        shared_layers=args.shared_layers,
    )
    print(result)
    return 0 if result.fits_with_offload else 1
