"""moe_mlp, one full step (forward and backward). FLOPs: 18 T K D F, held against the machine's torch.mm rate.

Shapes T, D, F, E, K: A few wide experts, B more narrow ones, C many small ones, D thousands of tiny ones; on a GPU S1
to S7. Routing: uniform, Zipf (exponent 1), all to one expert. In bfloat16 on the CPU some peers run on float32 copies
too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks import peers
from benchmarks.ops.harness import TOLERANCE, Case, Outputs, name_of, topk_ids, with_grads
from benchmarks.peers import Layer, Shape
from fastmoe import native, ops

SHAPES = {
    "A": Shape(4096, 512, 1024, 32, 2),
    "B": Shape(2048, 512, 256, 32, 4),
    "C": Shape(2048, 256, 128, 256, 8),
    "D": Shape(4096, 128, 64, 4096, 2),
}
GPU_SHAPES = {
    "S1": Shape(24576, 1536, 256, 128, 8),
    "S2": Shape(32768, 4096, 256, 256, 16),
    "S3": Shape(32768, 4096, 1024, 128, 8),
    "S4": Shape(32768, 2048, 768, 128, 8),
    "S5": Shape(8192, 2048, 512, 512, 10),
    "S6": Shape(4096, 7168, 2048, 32, 8),
    "S7": Shape(8192, 4096, 14336, 8, 2),
}
TINY = {"tiny": Shape(64, 64, 32, 8, 2)}
ROUTINGS = ("uniform", "Zipf", "all-to-one")
UPCAST = ("torch loop", "torch grouped_mm", "transformers grouped_mm")


class Problem:
    """Inputs of a layer at a shape and with given ids, and its step in any dtype.

    huge_pages: on a CPU they lie in huge pages for every arm, as the weights of fastmoe.nn.Experts do; else where torch
    puts them.
    """

    def __init__(
        self, shape: Shape, ids_TK: torch.Tensor, dtype: torch.dtype = torch.float32, huge_pages: bool = False
    ):
        T, D, F, E, K = self.shape = shape
        self.ids_TK, self.dtype, device = ids_TK, dtype, ids_TK.device
        place = native.huge_pages if huge_pages else lambda tensor: tensor
        draw = lambda *size: place(torch.empty(*size, device=device, dtype=dtype)).normal_()
        self.x_TD, self.weights_TK = draw(T, D), torch.rand(T, K, device=device).to(dtype)
        self.gate_up_proj, self.down_proj = draw(E, 2 * F, D).div_(D**0.5), draw(E, D, F).div_(F**0.5)
        self.dy_TD = draw(T, D)
        self.touched = torch.bincount(ids_TK.view(-1), minlength=E).nonzero().view(-1)

    def step(self, layer: Layer) -> Callable[[], Outputs]:
        """A call of forward and backward of the layer: y and the gradients of x, weights and both projections."""
        inputs = (self.x_TD, self.weights_TK, self.gate_up_proj, self.down_proj)
        return with_grads(lambda x, *rest: [layer(x, self.ids_TK, *rest)], inputs, [self.dy_TD])

    def exact(self) -> Outputs:
        """A step in float64, some experts and rows at a time; the projections' gradients of touched experts only."""
        _, D, F, E, K = self.shape
        flat_R, weights_R, chunk = self.ids_TK.view(-1), self.weights_TK.view(-1), max(1, (1 << 26) // (3 * D * F))
        order_R, counts_E = flat_R.argsort(stable=True), torch.bincount(flat_R, minlength=E)
        double = {"dtype": torch.float64, "device": flat_R.device}
        y_TD, dx_TD, dweights_R = (torch.zeros(like.shape, **double) for like in (self.x_TD, self.x_TD, flat_R))
        gate_up, down = (
            torch.zeros(len(self.touched), *like.shape[1:], **double) for like in (self.gate_up_proj, self.down_proj)
        )
        for i, experts in enumerate(self.touched.split(chunk)):
            slots_r, order_R = order_R.tensor_split([int(counts_E[experts].sum())])
            for slots in slots_r.split(1 << 16):
                token = slots // K
                counts = torch.bincount(torch.searchsorted(experts, flat_R[slots]), minlength=len(experts))
                inputs = (self.x_TD[token], weights_R[slots], self.gate_up_proj[experts], self.down_proj[experts])
                leaves = [tensor.double().requires_grad_() for tensor in inputs]
                y_RD = leaves[1][:, None] * peers.loop(leaves[0], counts, *leaves[2:])
                dx_RD, dweights_R[slots], *grads = torch.autograd.grad(y_RD, leaves, self.dy_TD[token].double())
                y_TD.index_add_(0, token, y_RD.detach())
                dx_TD.index_add_(0, token, dx_RD)
                for out, grad in zip((gate_up, down), grads):
                    out[i * chunk : (i + 1) * chunk] += grad
        return [y_TD, dx_TD, dweights_R.view_as(self.ids_TK), gate_up, down]

    def compared(self, outputs: Outputs) -> Outputs:
        """A step's outputs as `exact` gives them; NaN where an untouched expert has a gradient other than zero."""
        return [*outputs[:3], *(self._rows(grad) for grad in outputs[3:])]

    def _rows(self, grad: torch.Tensor) -> torch.Tensor:
        if grad.is_sparse:
            grad = grad.coalesce()
            same = torch.equal(grad.indices().view(-1), self.touched)
            return grad.values() if same else torch.full_like(grad.values(), torch.nan)
        rows = grad if len(self.touched) == len(grad) else grad[self.touched]
        return rows if torch.count_nonzero(rows) == torch.count_nonzero(grad) else torch.full_like(rows, torch.nan)


def fresh(step: Callable[[], Outputs]) -> Callable[[], Outputs]:
    """The step without memory kept from earlier calls."""

    def call() -> Outputs:
        native.empty_cache()
        return step()

    return call


def draw_ids(shape: Shape, routed: str, device: str) -> torch.Tensor:
    T, _, _, E, K = shape
    if routed == "all-to-one":
        return torch.full((T, K), E - 1, device=device)
    return topk_ids(T, K, E, 1.0 if routed == "Zipf" else 0.0, device)


def case(
    name: str,
    shape: Shape,
    routed: str,
    dtype: torch.dtype,
    device: str = "cpu",
    slow: dict[str, str] | None = None,
    huge_pages: bool = False,
) -> Case:
    """One shape with all its peers. slow: arms to leave out, and why."""
    T, D, F, E, K = shape
    problem = Problem(shape, draw_ids(shape, routed, device), dtype, huge_pages)
    found, left_out = peers.arms(shape, dtype, device)
    layers = {"fastmoe": ops.moe_mlp, **found}
    if dtype != torch.float32 and device == "cpu":
        layers |= {f"{peer} in float32": peers.in_float32(found[peer]) for peer in UPCAST if peer in found}
    arms = {arm: problem.step(layer) for arm, layer in layers.items()}
    if name == "D":
        arms["fastmoe, fresh buffers"] = fresh(arms["fastmoe"])
    for arm in arms.keys() & (slow or {}):
        left_out[arm] = slow[arm]
        del arms[arm]
    return Case(
        f"{name} {name_of(dtype)} {routed}{', huge pages' * huge_pages} T{T} D{D} F{F} E{E} K{K}",
        arms,
        problem.exact,
        work=18 * T * K * D * F,
        roof="mm",
        tolerance=TOLERANCE[dtype],
        compared=problem.compared,
        labels={"shape": name, "dtype": name_of(dtype), "routing": routed, "huge_pages": huge_pages},
        left_out=left_out,
    )


def cases(quick: bool) -> Iterator[Case]:
    for name, shape in (TINY if quick else SHAPES).items():
        for dtype in TOLERANCE:
            slow = {}
            for routed in ROUTINGS:
                made = case(name, shape, routed, dtype, slow=slow)
                yield made
                slow |= {arm: f"{why} with {routed} routing" for arm, why in made.slow.items() if arm != "fastmoe"}
                del made
        if not quick:
            yield case(name, shape, "uniform", torch.float32, slow=slow, huge_pages=True)
