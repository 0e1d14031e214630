"""What adamw_step means, in plain torch."""

import torch


def adamw_step(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay, grad_scale):
    with torch.no_grad():
        for param, grad, m, v in zip(params, grads, exp_avgs, exp_avg_sqs):
            g = grad.to(m.dtype) * grad_scale
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = (v / (1 - beta2**step)).sqrt_().add_(eps)
            updated = param.to(m.dtype) * (1 - lr * weight_decay) - lr / (1 - beta1**step) * (m / denominator)
            param.copy_(updated)
