"""What linear means, in plain torch."""

import torch


def linear(x, weight_OI, bias_O):
    return torch.nn.functional.linear(x, weight_OI, bias_O).contiguous()


def linear_backward(dy, x, weight_OI, need_bias):
    """(dx, dweight, dbias). Without the weight no dx, without x no dweight: empty instead."""
    dx = dweight_OI = dbias_O = None
    dy_TO = dy.reshape(-1, dy.shape[-1])
    if weight_OI is not None:
        dx = (dy @ weight_OI).contiguous()
    if x is not None:
        dweight_OI = (dy_TO.t() @ x.reshape(-1, x.shape[-1])).contiguous()
    if need_bias:
        dbias_O = dy_TO.sum(0)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in (dx, dweight_OI, dbias_O))
