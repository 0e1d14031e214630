"""What attention means, in plain torch."""

import torch

from fastmoe.ops.attention import BLOCK


def visible(Sq, Sk, mask, left, right, device):
    """[Sq, Sk] bool: the keys that a query sees. Query i stands at i + Sk - Sq."""
    at_S = torch.arange(Sq, device=device)[:, None] + Sk - Sq
    keys_S = torch.arange(Sk, device=device)
    seen_SS = (keys_S >= at_S - left) & (keys_S <= at_S + right)
    if mask is not None:
        seen_SS &= mask.repeat_interleave(BLOCK, 0)[:Sq].repeat_interleave(BLOCK, 1)[:, :Sk]
    return seen_SS


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _repeated(x_BMSH, N):
    return _wide(x_BMSH).repeat_interleave(N // x_BMSH.shape[1], 1)


def _laid_out(x_BNSH, like):
    """In like's dtype; in memory [B, S, N, H]."""
    return x_BNSH.to(like.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _scores(q_BNSH, k_BNSH, mask, left, right, scale):
    s_BNSS = _wide(q_BNSH) @ k_BNSH.transpose(-1, -2) * scale
    seen_SS = visible(q_BNSH.shape[2], k_BNSH.shape[2], mask, left, right, q_BNSH.device)
    return s_BNSS.masked_fill(~seen_SS, -torch.inf)


def _weights(s_BNSS, lse_BNS):
    """exp(s - lse); zero where a query sees no key."""
    return (s_BNSS - lse_BNS.masked_fill(lse_BNS == -torch.inf, torch.inf)[..., None]).exp()


def attention(q_BNSH, k_BMSH, v_BMSH, mask, left, right, scale):
    N = q_BNSH.shape[1]
    s_BNSS = _scores(q_BNSH, _repeated(k_BMSH, N), mask, left, right, scale)
    lse_BNS = s_BNSS.logsumexp(-1).contiguous()
    return _laid_out(_weights(s_BNSS, lse_BNS) @ _repeated(v_BMSH, N), q_BNSH), lse_BNS


def attention_backward(dout_BNSH, dlse_BNS, q_BNSH, k_BMSH, v_BMSH, out_BNSH, lse_BNS, mask, left, right, scale):
    N, M = q_BNSH.shape[1], k_BMSH.shape[1]
    k_BNSH, v_BNSH, dout = _repeated(k_BMSH, N), _repeated(v_BMSH, N), _wide(dout_BNSH)
    p_BNSS = _weights(_scores(q_BNSH, k_BNSH, mask, left, right, scale), lse_BNS)
    delta_BNS = (dout * _wide(out_BNSH)).sum(-1)
    if dlse_BNS is not None:
        delta_BNS = delta_BNS - dlse_BNS
    ds_BNSS = p_BNSS * (dout @ v_BNSH.transpose(-1, -2) - delta_BNS[..., None]) * scale
    dk_BNSH, dv_BNSH = ds_BNSS.transpose(-1, -2) @ _wide(q_BNSH), p_BNSS.transpose(-1, -2) @ dout
    return (
        _laid_out(ds_BNSS @ k_BNSH, q_BNSH),
        *(_laid_out(grad.unflatten(1, (M, N // M)).sum(2), k_BMSH) for grad in (dk_BNSH, dv_BNSH)),
    )


def rope(qkv_BSAH, N, M, start, theta):
    q_BSNH, k_BSMH, v_BSMH = _wide(qkv_BSAH).split((N, M, M), 2)
    turned = *(_turn(x, start, theta, 1) for x in (q_BSNH, k_BSMH)), v_BSMH
    return tuple(_laid_out(x.transpose(1, 2), qkv_BSAH) for x in turned)


def rope_backward(dq_BNSH, dk_BMSH, dv_BMSH, start, theta):
    grads = *(_turn(_wide(x).transpose(1, 2), start, theta, -1) for x in (dq_BNSH, dk_BMSH)), dv_BMSH.transpose(1, 2)
    return torch.cat([x.to(dq_BNSH.dtype) for x in grads], 2)


def _turn(x_BSNH, start, theta, direction):
    S, H = x_BSNH.shape[1], x_BSNH.shape[3]
    cos_SH, sin_SH = (x[:, None] for x in angles(start, S, H, theta, x_BSNH))
    left, right = x_BSNH.chunk(2, -1)
    sin_SH = sin_SH * direction
    return torch.cat([left * cos_SH - right * sin_SH, right * cos_SH + left * sin_SH], -1)


def angles(start, S, H, theta, like):
    """Cosine and sine [S, H / 2] in float32, whatever the dtype of the angles' use: they are part of the definition."""
    half = torch.arange(0, H, 2, device=like.device, dtype=torch.float32) / H
    angle_SH = torch.outer(torch.arange(start, start + S, device=like.device).float(), theta**-half)
    return angle_SH.cos().to(like.dtype), angle_SH.sin().to(like.dtype)
