import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, rms_norm

from fastmoe import nn, testing
from fastmoe.config import ModelConfig
from tests.nn.test_moe import activated, shake_biases

SMALL = ModelConfig(
    vocab_size=50,
    d_model=16,
    num_layers=3,
    num_heads=4,
    max_seq_len=64,
    num_dense_layers=1,
    d_ff_dense=24,
    num_experts=4,
    top_k=2,
    d_ff=8,
    init_std=0.2,
)
VARIANTS = {
    "plain": SMALL,
    "grouped_heads": replace(SMALL, num_kv_heads=2),
    "shared": replace(SMALL, num_shared_experts=1),
    "capacity": replace(SMALL, capacity_factor=0.8),
    "all_dense": replace(SMALL, num_dense_layers=3),
    "tied": replace(SMALL, tie_embeddings=True),
    "sigmoid": replace(SMALL, router_options="score='sigmoid'", num_dense_layers=0),
    "biased": replace(SMALL, activation="clamped_swiglu", bias=True, num_shared_experts=1, save_activations="x"),
    "ungated": replace(SMALL, activation="relu2", num_shared_experts=1),
}


def make(config, seed=0):
    torch.manual_seed(seed)
    model = nn.Transformer(config)
    shake_biases(model)
    return model


def batch(B=2, S=17, V=50):
    ids = torch.randint(0, V, (B, S + 1), generator=testing.generator())
    return ids[:, :-1], ids[:, 1:].clone()


def oracle_logits(model, ids_BS):
    """The dense part spelled out (attention position by position), the feed-forwards by the module."""
    config = model.config
    B, S = ids_BS.shape
    N, M, H = config.num_heads, config.num_kv_heads or config.num_heads, config.d_model // config.num_heads
    x_BSD, aux = model.embedding[ids_BS], 0
    for block in model.layers:
        h_BSD = rms_norm(x_BSD, (config.d_model,), block.attention_norm.weight, config.norm_eps)
        qkv = (h_BSD @ block.attention.qkv_proj.t()).view(B, S, N + 2 * M, H)
        turned = qkv.clone()
        for s in range(S):
            for i in range(H // 2):
                angle = torch.tensor(s * config.rope_theta ** (-2 * i / H), dtype=x_BSD.dtype)
                a, b = qkv[:, s, : N + M, i], qkv[:, s, : N + M, i + H // 2]
                turned[:, s, : N + M, i] = a * angle.cos() - b * angle.sin()
                turned[:, s, : N + M, i + H // 2] = b * angle.cos() + a * angle.sin()
        rows = []
        for s in range(S):
            heads = []
            for n in range(N):
                m = n // (N // M)
                k_BSH, v_BSH = turned[:, : s + 1, N + m], turned[:, : s + 1, N + M + m]
                p_BS = torch.softmax((k_BSH @ turned[:, s, n, :, None])[..., 0] / H**0.5, 1)
                heads.append((p_BS[..., None] * v_BSH).sum(1))
            rows.append(torch.cat(heads, 1))
        x_BSD = x_BSD + torch.stack(rows, 1) @ block.attention.out_proj.t()
        h_BSD = rms_norm(x_BSD, (config.d_model,), block.feed_forward_norm.weight, config.norm_eps)
        if isinstance(block.feed_forward, nn.MoE):
            out = block.feed_forward(h_BSD)
            x_BSD, aux = x_BSD + out.y, aux + out.aux_loss
        else:
            dense = block.feed_forward
            z = h_BSD @ dense.gate_up_proj.t() + (dense.gate_up_bias if config.bias else 0)
            y_BSD = activated(z, config.activation) @ dense.down_proj.t() + (dense.down_bias if config.bias else 0)
            x_BSD = x_BSD + y_BSD
    return rms_norm(x_BSD, (config.d_model,), model.norm.weight, config.norm_eps) @ model.head.t(), aux


@pytest.mark.parametrize("name", VARIANTS)
def test_transformer_by_the_formulas(name):
    model, (ids_BS, targets_BS) = make(VARIANTS[name]), batch(S=9)
    targets_BS[0, :3] = -100
    twin = make(VARIANTS[name]).double()
    out = model(ids_BS, targets_BS)
    logits_BSV, aux = oracle_logits(twin, ids_BS)
    loss = cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.aux_loss.double(), torch.as_tensor(aux, dtype=torch.float64), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(model(ids_BS).logits_BSV.double(), logits_BSV, rtol=1e-4, atol=1e-5)
    (out.loss + out.aux_loss).backward()
    (loss + aux).backward()
    for (label, param), param64 in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(
            param.grad.double(), param64.grad, rtol=1e-3, atol=1e-5, msg=lambda m, label=label: f"{label}: {m}"
        )


def test_shapes_of_the_output():
    model, (ids_BS, targets_BS) = make(SMALL), batch()
    out = model(ids_BS, targets_BS)
    assert out.logits_BSV is None and out.loss.shape == () and out.load_LE.shape == (2, 4)
    assert out.load_LE.sum(1).tolist() == [2 * 17 * 2] * 2 and out.dropped_L.tolist() == out.nan_tokens_L.tolist() == [
        0,
        0,
    ]
    dense = make(VARIANTS["all_dense"])(ids_BS, targets_BS)
    assert dense.load_LE.shape == (0, 4) and dense.aux_loss == 0
    assert int(make(VARIANTS["capacity"])(ids_BS, targets_BS).dropped_L.sum()) > 0
    assert (
        make(VARIANTS["tied"]).head is make(SMALL).head
        or make(VARIANTS["tied"]).num_parameters() == model.num_parameters() - 800
    )


def test_one_token():
    out = make(SMALL)(torch.tensor([[3]]), torch.tensor([[4]]))
    (out.loss + out.aux_loss).backward()
    assert out.loss.isfinite()


@pytest.mark.parametrize("name", ["plain", "grouped_heads", "shared"])
@pytest.mark.parametrize("chunks", [[1] * 12, [12], [5, 7], [5, 1, 1, 5], [1, 11], [3, 3, 3, 3]], ids=str)
def test_cache_equals_no_cache(name, chunks):
    model, (ids_BS, _) = make(VARIANTS[name]), batch(S=12)
    with torch.no_grad():
        want = model(ids_BS).logits_BSV
        cache, start = model.new_cache(2, 12), 0
        for chunk in chunks:
            logits_B1V = model(ids_BS[:, start : start + chunk], cache=cache).logits_BSV
            start += chunk
            assert logits_B1V.shape == (2, 1, 50) and cache.length == start
            torch.testing.assert_close(logits_B1V[:, 0], want[:, start - 1], rtol=1e-5, atol=1e-5)


def test_a_later_token_changes_no_earlier_logit():
    model, (ids_BS, _) = make(SMALL), batch(S=12)
    changed = ids_BS.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 50
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids_BS).logits_BSV[:, :8], model(changed).logits_BSV[:, :8], rtol=1e-6, atol=1e-6
        )


def gradients(model, ids_BS, targets_BS):
    with testing.Recorder() as recorder:
        out = model(ids_BS, targets_BS)
        (out.loss + out.aux_loss).backward()
    return out, {name: param.grad for name, param in model.named_parameters()}, recorder


@pytest.mark.parametrize("name", ["plain", "shared", "capacity"])
def test_checkpointing_gives_the_same_bits_and_routes_once(name):
    ids_BS, targets_BS = batch()
    plain, recomputed = make(VARIANTS[name]), make(VARIANTS[name])
    recomputed.checkpointed = True
    want_out, want, plain_calls = gradients(plain, ids_BS, targets_BS)
    got_out, got, calls = gradients(recomputed, ids_BS, targets_BS)
    testing.assert_bit_equal(got_out.loss.detach(), want_out.loss.detach(), "loss")
    assert torch.equal(got_out.load_LE, want_out.load_LE)
    for label in want:
        testing.assert_bit_equal(got[label], want[label], label)
    assert (calls.count("topk_gate"), calls.count("build_routing")) == (2, 2), "once a step and MoE layer"
    assert (plain_calls.count("moe_mlp"), calls.count("moe_mlp")) == (2, 4), "the experts are recomputed"


def test_checkpointing_under_autocast():
    ids_BS, targets_BS = batch()
    results = []
    for checkpointed in (False, True):
        model = make(SMALL)
        model.checkpointed = checkpointed
        with torch.autocast("cpu", torch.bfloat16):
            out = model(ids_BS, targets_BS)
        (out.loss + out.aux_loss).backward()
        results.append([param.grad for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_no_grad_runs_no_backward_work():
    model, (ids_BS, targets_BS) = make(SMALL), batch()
    model.checkpointed = True
    with testing.Recorder() as recorder, torch.no_grad():
        model(ids_BS, targets_BS)
    assert all(out[1].numel() == 0 for name, _, out in recorder.calls if name in ("moe_mlp", "linear_cross_entropy"))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiles_whole(checkpointed):
    torch._dynamo.reset()
    (ids_BS, targets_BS), eager, compiled = batch(), make(VARIANTS["shared"]), make(VARIANTS["shared"])
    eager.checkpointed = compiled.checkpointed = checkpointed
    want_out, want, _ = gradients(eager, ids_BS, targets_BS)
    out = torch.compile(compiled, fullgraph=True, backend="aot_eager")(ids_BS, targets_BS)
    (out.loss + out.aux_loss).backward()
    torch.testing.assert_close(out.loss, want_out.loss, rtol=1e-6, atol=1e-6)
    assert torch.equal(out.load_LE, want_out.load_LE)
    for label, param in compiled.named_parameters():
        torch.testing.assert_close(
            param.grad, want[label], rtol=1e-5, atol=1e-6, msg=lambda m, label=label: f"{label}: {m}"
        )


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_compiles_with_inductor():
    torch._dynamo.reset()
    config = replace(SMALL, num_layers=1, num_dense_layers=0)
    (ids_BS, targets_BS), eager, compiled = batch(S=8), make(config), make(config)
    _, want, _ = gradients(eager, ids_BS, targets_BS)
    out = torch.compile(compiled, fullgraph=True)(ids_BS, targets_BS)
    (out.loss + out.aux_loss).backward()
    for label, param in compiled.named_parameters():
        torch.testing.assert_close(
            param.grad, want[label], rtol=1e-4, atol=1e-5, msg=lambda m, label=label: f"{label}: {m}"
        )


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        *[
            (f"fastmoe.Transformer: {name} must be at least 1, got 0", {name: 0})
            for name in ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", "num_experts")
        ],
        ("fastmoe.Transformer: num_dense_layers must be in 0..3 (num_layers), got 4", {"num_dense_layers": 4}),
        ("fastmoe.Transformer: num_dense_layers must be in 0..3 (num_layers), got -1", {"num_dense_layers": -1}),
        ("fastmoe.Transformer: d_ff_dense must be at least 1, got 0", {"d_ff_dense": 0}),
        ("fastmoe.TopKRouter: top_k must be in 1..4 (num_experts), got 0", {"top_k": 0}),
        ("fastmoe.TopKRouter: top_k must be in 1..4 (num_experts), got 5", {"top_k": 5}),
        ("fastmoe.Attention: num_heads must divide d_model", {"num_heads": 3}),
        (
            "fastmoe.Attention: num_heads must divide d_model",
            {"num_heads": 16},
        ),  # heads of one element have no halves to rotate
        ("fastmoe.Attention: num_heads must divide d_model", {"num_kv_heads": 3}),
    ],
)
def test_bad_settings(message, changes):
    with pytest.raises(ValueError) as error:
        nn.Transformer(replace(SMALL, **changes))
    assert message in str(error.value)


def test_too_many_positions():
    with pytest.raises(
        ValueError, match=r"fastmoe\.Transformer: ids_BS must end within max_seq_len = 64, got 0 \+ 65 positions"
    ):
        make(SMALL)(torch.zeros(1, 65, dtype=torch.int64))


def test_a_full_cache_names_itself():
    model = make(SMALL)
    cache = model.new_cache(1, 4)
    with pytest.raises(ValueError, match=r"fastmoe\..*cache"), torch.no_grad():
        model(torch.zeros(1, 6, dtype=torch.int64), cache=cache)


def test_a_target_outside_the_vocabulary_names_the_op():
    with pytest.raises(ValueError, match=r"fastmoe\.linear_cross_entropy: targets_T"):
        make(SMALL)(torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), 50))


def test_the_config_says_what_experts_save():
    ids_BS, targets_BS = batch()
    kept, grads = {}, {}
    for save in ("z", "z8"):
        _, grads[save], recorder = gradients(make(replace(SMALL, save_activations=save)), ids_BS, targets_BS)
        kept[save] = [out[1].dtype for name, _, out in recorder.calls if name == "moe_mlp"]
    assert kept == {"z": [torch.float32] * 2, "z8": [torch.int8] * 2}
    for label, want in grads["z"].items():
        assert (grads["z8"][label] - want).norm() <= 3e-2 * want.norm(), label


def test_matrices_are_all_but_norms_and_biases():
    model = make(replace(SMALL, num_layers=2, bias=True, num_shared_experts=1))
    left_out = {name for name, _ in model.named_parameters()} - model.matrices().keys()
    norms = {f"layers.{i}.{kind}_norm.weight" for i in (0, 1) for kind in ("attention", "feed_forward")} | {
        "norm.weight"
    }
    places = ("layers.0.feed_forward", "layers.1.feed_forward.experts", "layers.1.feed_forward.shared")
    assert left_out == norms | {f"{place}.{side}_bias" for place in places for side in ("gate_up", "down")}


@pytest.mark.parametrize("activation, halves", [("geglu", 2), ("gelu", 1)])
def test_flops_follow_the_activation(activation, halves):
    config = replace(SMALL, num_dense_layers=0, num_layers=1, activation=activation, bias=True)
    attention, experts, router, head = 4 * 16 * 16, 2 * (halves + 1) * 16 * 8, 4 * 16, 50 * 16
    assert make(config).flops_per_token(10) == 6 * (attention + experts + router + head) + 6 * 10 * 16


def test_flops_count_the_active_weights():
    config = replace(SMALL, num_dense_layers=0, num_layers=1)
    attention, experts, router, head = 4 * 16 * 16, 2 * 3 * 16 * 8, 4 * 16, 50 * 16
    assert make(config).flops_per_token(10) == 6 * (attention + experts + router + head) + 6 * 10 * 16
