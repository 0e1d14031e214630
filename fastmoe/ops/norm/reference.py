"""What the norms mean, in plain torch."""

import torch


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def normalize(x, residual, weight_D, bias_D, eps, center):
    rows = x if residual is None else (_wide(x) + _wide(residual)).to(residual.dtype)
    mean = _wide(rows).mean(-1) if center else _wide(rows).new_zeros(rows.shape[:-1])
    centered = _wide(rows) - mean[..., None]
    rstd = torch.rsqrt(centered.square().mean(-1) + eps)
    y = centered * rstd[..., None] * _wide(weight_D)
    if bias_D is not None:
        y = y + _wide(bias_D)
    return (
        y.to(rows.dtype).contiguous(),
        rows.new_empty(0) if residual is None else rows.contiguous(),
        mean.contiguous() if center else mean.new_empty(0),
        rstd.contiguous(),
    )


def normalize_backward(dy, dsum, x, weight_D, mean, rstd, center, bias):
    unit = (_wide(x) - mean[..., None] if center else _wide(x)) * rstd[..., None]
    dunit = _wide(dy) * _wide(weight_D)
    dx = dunit - unit * (dunit * unit).mean(-1, keepdim=True)
    if center:
        dx = dx - dunit.mean(-1, keepdim=True)
    dx = dx * rstd[..., None]
    if dsum is not None:
        dx = dx + _wide(dsum)
    D = x.shape[-1]
    dweight_D = (_wide(dy) * unit).reshape(-1, D).sum(0)
    dbias_D = _wide(dy).reshape(-1, D).sum(0) if bias else dweight_D.new_empty(0)
    return dx.to(x.dtype).contiguous(), dweight_D.to(weight_D.dtype), dbias_D.to(weight_D.dtype)
