"""One AdamW step over a list of tensors, with weights and states in each dtype.

Bytes of a parameter: weight and states read and written, gradient read; held against an update in place. int8 states
count 2 scales for 32. A peer that cannot be imported is left out, and the record says why.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch

from benchmarks.ops.harness import Case, name_of
from fastmoe.optim import AdamW

RULE = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
TORCH = "torch fused"
PEERS = {  # name -> module, its optimizer on parameters, the weights and states it is run beside
    "bitsandbytes 8-bit": ("bitsandbytes.optim", lambda m, p: m.AdamW8bit(p, **RULE), [(torch.bfloat16, "int8")]),
    "torchao 8-bit": ("torchao.optim", lambda m, p: m.AdamW8bit(p, **RULE), [(torch.bfloat16, "int8")]),
    "DeepSpeed CPUAdam": (
        "deepspeed.ops.adam",
        lambda m, p: m.DeepSpeedCPUAdam(p, **RULE, adamw_mode=True, fp32_optimizer_states=p[0].dtype == torch.float32),
        [(torch.float32, "fp32"), (torch.bfloat16, "bf16")],
    ),
}


def case(count: int, shape: tuple[int, ...], dtype: torch.dtype, work: float, peers: bool = True, **options) -> Case:
    """work: bytes a parameter. options: of fastmoe.optim.AdamW."""
    # weights of the size of one update, so that an error in the update shows
    start, grads = ([(scale * torch.randn(shape)).to(dtype) for _ in range(count)] for scale in (1e-3, 1.0))

    def step(make: Callable, kind: torch.dtype = dtype) -> Callable:
        params = [tensor.to(kind, copy=True).requires_grad_() for tensor in start]
        for param, grad in zip(params, grads):
            param.grad = grad.to(kind)
        made = make(params)

        def call():
            made.step()
            return params

        return call

    def first_step():
        """From zero moments, where m / (1 - beta1) = g and v / (1 - beta2) = g^2."""
        lr, decay, eps = RULE["lr"], RULE["weight_decay"], RULE["eps"]
        pairs = ((p.double(), g.double()) for p, g in zip(start, grads))
        return [p * (1 - lr * decay) - lr * g / (g.abs() + eps) for p, g in pairs]

    fused = lambda params: torch.optim.AdamW(params, **RULE, fused=True)
    arms = {"fastmoe": step(lambda params: AdamW(params, **RULE, **options)), TORCH: step(fused)}
    if dtype != torch.float32:
        arms[f"{TORCH} float32"] = step(fused, torch.float32)
    left_out, states, master = {}, options.get("state_dtype", "fp32"), options.get("master")
    for name, (module, make, beside) in PEERS.items() if peers else ():
        if (dtype, states) not in beside:
            continue
        try:
            loaded = importlib.import_module(module)
            arms[name] = step(lambda params, make=make, loaded=loaded: make(loaded, params))
        except Exception as error:  # what is compiled at first use fails in its own ways
            left_out[name] = (
                f"cannot be used: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
    kept = f"{name_of(dtype)}, {states} states" + (f", {master}" if master else "")
    sizes = " x ".join(f"{size:,}" for size in shape)
    return Case(
        f"{kept}, {count:,} x {sizes} parameters",
        arms,
        exact=first_step,
        work=work * start[0].numel() * count,
        roof="update",
        tolerance=1e-5 if dtype == torch.float32 and states == "fp32" else 2e-2,
        left_out=left_out,
        labels={"weights": name_of(dtype), "states": states, "master": master, "bytes_a_parameter": work},
    )


def cases(quick: bool) -> Iterator[Case]:
    count, shape = (3, (10, 100)) if quick else (40, (1250, 1000))
    yield case(count, shape, torch.float32, 28)
    yield case(count, shape, torch.bfloat16, 14, state_dtype="bf16")
    yield case(count, shape, torch.float16, 14, peers=False, state_dtype="fp16")
    yield case(count, shape, torch.bfloat16, 10.25, state_dtype="int8")
    yield case(count, shape, torch.bfloat16, 12.25, peers=False, state_dtype="int8", master="residual8")
    yield case(count, shape, torch.bfloat16, 22, peers=False)
    yield case(count, shape, torch.float32, 16.25, peers=False, state_dtype="int8")
    yield case(*((20, (7,)) if quick else (10_000, (5_000,))), torch.float32, 28, peers=False)
    if not quick:
        yield case(1, (1_000_000,), torch.float32, 28, peers=False)
