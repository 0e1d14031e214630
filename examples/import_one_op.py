"""One op of fastmoe inside another framework's layer: no modules, no configuration, weights in Hugging Face's layout.

python examples/import_one_op.py
"""

import torch

from fastmoe.ops import moe_mlp

T, D, F, E, K = 64, 32, 48, 8, 2  # tokens, width, expert width, experts, experts a token
x_TD = torch.randn(T, D, requires_grad=True)
gate_up_proj = torch.randn(E, 2 * F, D).mul_(D**-0.5).requires_grad_()  # gate rows first
down_proj = torch.randn(E, D, F).mul_(F**-0.5).requires_grad_()

router_TE = torch.randn(T, E).softmax(1)  # any router: ids [T, K] and weights [T, K]; an id of -1 adds nothing
topk_weights_TK, topk_ids_TK = router_TE.topk(K, 1)

y_TD = moe_mlp(x_TD, topk_ids_TK, topk_weights_TK, gate_up_proj, down_proj)
y_TD.square().mean().backward()
print(f"y {list(y_TD.shape)}, gradient of gate_up_proj {list(gate_up_proj.grad.shape)}")

fused = torch.compile(
    moe_mlp, fullgraph=True, backend="aot_eager"
)  # a registered operator: compiles without graph breaks
torch.testing.assert_close(fused(x_TD, topk_ids_TK, topk_weights_TK, gate_up_proj, down_proj), y_TD)
