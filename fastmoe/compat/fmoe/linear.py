"""Linear layers of many experts at once, over rows that stand in expert order."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import grouped_mm, linear, pad


def grouped_linear(
    x_RD: torch.Tensor, weight_EFD: torch.Tensor, bias_EF: torch.Tensor | None, ends_E: torch.Tensor
) -> torch.Tensor:
    """y[r] = weight[e] x[r] + bias[e] with e the expert whose rows end first after r; no loop over experts.

    x_RD: [R, D] in expert order. weight_EFD: [E, F, D]. bias_EF: [E, F] or None. ends_E: [E] int32, one past the last
    row of each expert; rows from ends_E[-1] on are padding, they become zero and give no gradient. Under autocast x,
    weight and bias are cast. Returns [R, F].
    """
    if torch.is_autocast_enabled(x_RD.device.type):
        dtype = torch.get_autocast_dtype(x_RD.device.type)
        x_RD, weight_EFD = x_RD.to(dtype), weight_EFD.to(dtype)
        bias_EF = None if bias_EF is None else bias_EF.to(dtype)
    if x_RD.dtype != weight_EFD.dtype:
        raise TypeError(f"fastmoe.compat.FMoELinear: inp must be {weight_EFD.dtype} like the weight, got {x_RD.dtype}")
    (E, F, D), R = weight_EFD.shape, x_RD.shape[0]
    row_R = torch.arange(R, device=x_RD.device, dtype=torch.int32)
    expert_R = torch.searchsorted(ends_E, row_R, right=True)  # E for padding
    aligned = all(size * x_RD.element_size() % 16 == 0 for size in (D, F))
    if aligned and x_RD.dtype != torch.float64:  # what grouped_mm takes
        y_RF = grouped_mm(x_RD.contiguous(), weight_EFD.transpose(1, 2), offs=ends_E)
    else:
        used = int(ends_E[-1])
        expert, place = expert_R[:used], (row_R - pad(ends_E, (1, 0))[expert_R])[:used]
        x_ECD = x_RD.new_zeros(E, int(place.max()) + 1 if used else 0, D).index_put((expert, place), x_RD[:used])
        y_RF = pad((x_ECD @ weight_EFD.transpose(1, 2))[expert, place], (0, 0, 0, R - used))
    if bias_EF is not None:
        y_RF = y_RF + bias_EF[expert_R.clamp(max=E - 1)]
    return y_RF.masked_fill((expert_R == E)[:, None], 0)


class FMoELinear(nn.Module):
    """num_expert linear layers: weight [num_expert, out_feat, in_feat], bias [num_expert, out_feat].

    rank is kept for its name only. Set upstream_init on the class for FastMoE's own initial weights, whose bound
    1/sqrt(in_feat * out_feat) is far below the usual 1/sqrt(in_feat).
    """

    upstream_init = False

    def __init__(self, num_expert: int, in_feat: int, out_feat: int, bias: bool = True, rank: int = 0):
        super().__init__()
        self.num_expert, self.in_feat, self.out_feat, self.rank = num_expert, in_feat, out_feat, rank
        self.weight = nn.Parameter(torch.empty(num_expert, out_feat, in_feat))
        self.bias = nn.Parameter(torch.empty(num_expert, out_feat)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = (self.in_feat * (self.out_feat if self.upstream_init else 1)) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, inp: torch.Tensor, fwd_expert_count: torch.Tensor) -> torch.Tensor:
        """inp: [R, in_feat] in expert order. fwd_expert_count: [num_expert], rows of each. Returns [R, out_feat]."""
        if self.num_expert == 1:
            return linear(inp, self.weight[0], None if self.bias is None else self.bias[0])
        ends_E = torch.as_tensor(fwd_expert_count, device=inp.device).cumsum(0).int()
        return grouped_linear(inp, self.weight, self.bias, ends_E)

    def extra_repr(self) -> str:
        return f"{self.num_expert}, {self.in_feat}, {self.out_feat}, bias={self.bias is not None}, rank={self.rank}"
