"""What adamw_step means, in plain torch. Absent scales and masters are empty tensors."""

import torch

from fastmoe.ops.quantize.reference import bits, decode, join, quantize_with, round_with, split


def adamw_step(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    exp_avg_scales,
    exp_avg_sq_scales,
    masters,
    steps,
    keys,
    first_rows,
    decays,
    lr,
    beta1,
    beta2,
    eps,
    grad_scale,
):
    states = zip(params, grads, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, masters)
    with torch.no_grad():
        for tensors, step, key, row, decay in zip(states, steps, keys, first_rows, decays):
            _one(*tensors, step, key, row, decay, lr, beta1, beta2, eps, grad_scale)


def _one(param, grad, m, v, m_scale, v_scale, master, step, key, row, decay, lr, beta1, beta2, eps, grad_scale):
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    rooted = m.dtype in (torch.float16, torch.int8)  # v holds its square root
    mean = decode(m, m_scale, wide) if m.dtype == torch.int8 else m.to(wide)
    square = decode(v, v_scale, wide) if m.dtype == torch.int8 else v.to(wide)
    square = square * square if rooted else square
    residual = master.numel() and master.dtype == torch.int8
    weight = join(param, master) if residual else (master if master.numel() else param).to(wide)

    g = grad.to(wide) * grad_scale
    mean = mean.lerp(g, 1 - beta1)
    square = square * beta2 + (1 - beta2) * g * g
    denominator = (square / (1 - beta2**step)).sqrt() + eps
    weight = weight * decay - lr / (1 - beta1**step) * (mean / denominator)

    kept = square.sqrt() if rooted else square
    draws = bits(key, row, param.shape or (1,), param.device).view(param.shape)
    if m.dtype == torch.int8:
        for tensor, scale, value, some in ((m, m_scale, mean, draws), (v, v_scale, kept, draws >> 8)):
            codes, scales = quantize_with(value, tensor.dtype == torch.int8, some)
            tensor.copy_(codes), scale.copy_(scales)
    elif m.dtype in (torch.bfloat16, torch.float16):
        m.copy_(round_with(mean, m.dtype, draws))
        v.copy_(round_with(kept, v.dtype, draws * 0x9E3779B1 >> 8))
    else:
        m.copy_(mean), v.copy_(square)
    if residual:
        split(weight, draws >> 16, param, master)
    elif master.numel():
        master.copy_(weight), param.copy_(weight)
    elif param.dtype in (torch.bfloat16, torch.float16):
        param.copy_(round_with(weight, param.dtype, draws >> 16))
    else:
        param.copy_(weight)
