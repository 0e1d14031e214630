"""What rms_norm means, in plain torch."""

import torch


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x, weight_D, eps):
    rstd = torch.rsqrt(_wide(x).square().mean(-1) + eps)
    return (_wide(x) * rstd[..., None] * _wide(weight_D)).to(x.dtype).contiguous(), rstd.contiguous()


def rms_norm_backward(dy, x, weight_D, rstd):
    unit = _wide(x) * rstd[..., None]
    dunit = _wide(dy) * _wide(weight_D)
    dx = rstd[..., None] * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
    dweight_D = (_wide(dy) * unit).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype).contiguous(), dweight_D.to(weight_D.dtype)
