"""What adafactor_step means, in plain torch. Absent states are empty tensors."""

import torch

from fastmoe.ops.quantize.reference import bits, narrow, widen


def adafactor_step(
    params,
    grads,
    rows,
    columns,
    squares,
    masters,
    steps,
    keys,
    first_rows,
    lr,
    decay_rate,
    eps_square,
    eps_weight,
    clip_threshold,
    weight_decay,
    grad_scale,
):
    rule = lr, decay_rate, eps_square, eps_weight, clip_threshold, weight_decay, grad_scale
    with torch.no_grad():
        for tensors in zip(params, grads, rows, columns, squares, masters, steps, keys, first_rows):
            if tensors[0].numel():
                _one(*tensors, *rule)


def _one(param, grad, row, column, square, master, step, key, first_row, lr, decay_rate, eps_square, eps_weight, *rest):
    clip_threshold, weight_decay, grad_scale = rest
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    weight = widen(param, master, wide)
    dims = tuple(range(-min(2, param.dim()), 0))  # of one matrix
    rms = lambda x: x.square().mean(dims, keepdim=True).sqrt()

    g = grad.to(wide) * grad_scale
    beta, new = 1 - step**-decay_rate, g * g + eps_square
    if param.dim() < 2:
        square.mul_(beta).add_(new, alpha=1 - beta)
        update = g / square.sqrt()
    else:
        row.mul_(beta).add_(new.mean(-1), alpha=1 - beta)
        column.mul_(beta).add_(new.mean(-2), alpha=1 - beta)
        share = row / row.mean(-1, keepdim=True)
        update = g / share.sqrt()[..., None] / column.sqrt()[..., None, :]
    update = update / (rms(update) / clip_threshold).clamp(min=1)
    rate = lr if lr is not None else rms(weight).clamp(min=eps_weight) * min(1e-2, step**-0.5)
    weight = weight - rate * (update + weight_decay * weight)
    draws = None if param.dtype == wide else bits(key, first_row, param.shape or (1,), param.device).view(param.shape)
    narrow(weight, draws, param, master)
