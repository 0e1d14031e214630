from __future__ import annotations

import torch

from fastmoe import ops, testing
from fastmoe.ops.registry import OPS

SHAPE = testing.Shape(6, 8, 4, 3, 2, 1)


def test_every_registered_op():
    T, D, F, E, K, _ = SHAPE
    x_TD, logits_TE = testing.draw(T, D).requires_grad_(), testing.draw(T, E, seed=1).requires_grad_()
    gate_up, down = (testing.draw(*shape, seed=2).requires_grad_() for shape in ((E, 2 * F, D), (E, D, F)))
    with testing.Recorder() as recorder:
        weights_TK, ids_TK, probs_TE, _ = ops.topk_gate(logits_TE, K)
        capped = ops.build_routing(ids_TK, E, capacity=3)
        y_TD = ops.moe_mlp(x_TD, ids_TK, weights_TK, gate_up, down, routing=capped)
        z_TD = ops.unpermute(ops.permute(x_TD, capped), ops.build_routing(ids_TK, E), weights_TK)
        ops.build_routing_from_experts(torch.tensor([0, 2, 1, 2]), torch.tensor([0, 2, 4]), 3)
        (y_TD.square().sum() + z_TD.square().sum() + probs_TE.square().sum()).backward()
    checked = set()
    for name, args, _ in recorder.calls:
        assert OPS[name].ran["cpu"][0] == "triton"
        args = [arg.detach() if name.endswith("_backward") and isinstance(arg, torch.Tensor) else arg for arg in args]
        torch.library.opcheck(OPS[name].overload, args)
        checked.add(name)
    assert checked == {name for name, op in OPS.items() if op.family in ("gating", "permutation", "experts")}
