"""Whole models: fastmoe's logits, loss and gradients against eager's."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from fastmoe import testing
from fastmoe.integrations import disable, enable
from fastmoe.integrations.transformers import register
from tests.integrations.models import CONFIGS, V, build, close, experts_of, gradients, step, tokens

every_model = pytest.mark.parametrize("name", CONFIGS)


def same_as_eager(model, run, save="z"):
    """run(model) gives named tensors: eager's first, then fastmoe's, which must have run, then eager's again."""
    want = run(model)
    enable(model, save)
    with testing.Recorder() as recorder:
        got = run(model)
    assert recorder.count("moe_mlp") and recorder.count("moe_mlp") % len(experts_of(model)) == 0
    close(got, want)
    disable(model)
    again = run(model)
    assert all(torch.equal(again[key], want[key]) for key in want)
    return recorder


@every_model
@pytest.mark.parametrize("save", ["z", "x"])
def test_logits_loss_and_every_gradient(name, save):
    same_as_eager(build(name), lambda model: step(model, tokens(2, 17)), save)


@every_model
def test_one_token(name):
    """With one key the gradients of queries and keys are what rounding leaves of 0, which differs between machines."""
    scores = ("q_proj", "k_proj", "q_norm", "k_norm", "q_a_", "q_b_")

    def run(model):  # no next token to learn from
        model.zero_grad()
        logits = model(tokens(1, 1)).logits
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        grads = gradients(model)
        return {"logits": logits.detach(), **{n: g for n, g in grads.items() if not any(s in n for s in scores)}}

    same_as_eager(build(name), run)


@every_model
def test_every_slot_to_one_expert(name):
    """The router's choice replaced by one expert: duplicates in a row, and experts without a token.

    Slots weigh differently, or the router's gradient would be what rounding leaves of 0.
    """

    def all_to_one(module, args):
        x_TD, ids_TK, weights_TK = args
        return x_TD, torch.full_like(ids_TK, 2), weights_TK * torch.arange(1, ids_TK.shape[1] + 1)

    model = build(name)
    for experts in experts_of(model).values():
        experts.register_forward_pre_hook(all_to_one)

    def run(model):
        out = step(model, tokens(2, 17))
        for path in experts_of(model):
            for key in ("gate_up_proj", "down_proj"):
                grad = out[f"{path}.{key}"]
                assert grad[2].any() and not grad[:2].any() and not grad[3:].any()
        return out

    same_as_eager(model, run)


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name, side):
    ids_BS, mask_BS = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    for row, length in enumerate((12, 7, 1)):
        mask_BS[row, slice(length, None) if side == "right" else slice(0, 12 - length)] = 0
    ids_BS = ids_BS.where(mask_BS == 1, 0)
    labels_BS = ids_BS.where(mask_BS == 1, -100)
    same_as_eager(build(name), lambda model: step(model, ids_BS, attention_mask=mask_BS, labels=labels_BS))


@every_model
def test_frozen_experts(name):
    model = build(name)
    for experts in experts_of(model).values():
        experts.requires_grad_(False)
    recorder = same_as_eager(model, lambda model: step(model, tokens(2, 9)))
    assert all(weight.grad is None for experts in experts_of(model).values() for weight in experts.parameters())
    backwards = [out for call, _, out in recorder.calls if call == "moe_mlp_backward"]
    assert backwards and all(out[0].numel() and not any(grad.numel() for grad in out[2:]) for out in backwards)


@every_model
def test_two_backwards_accumulate(name):
    def run(model):
        step(model, tokens(2, 9))
        model(tokens(2, 9, seed=1), labels=tokens(2, 9, seed=1)).loss.backward()
        return gradients(model)

    same_as_eager(build(name), run)


@every_model
def test_gradient_checkpointing(name):
    def run(model):
        model.train()
        without = step(model, tokens(2, 9), use_cache=False)
        model.gradient_checkpointing_enable()
        out = step(model, tokens(2, 9), use_cache=False)
        model.gradient_checkpointing_disable()
        close(out, without, 0 if model.config._experts_implementation == "fastmoe" else 1e-6)
        return out

    model = build(name)
    recorder = same_as_eager(model, run)
    assert recorder.count("moe_mlp") == 3 * len(experts_of(model))  # the recomputation runs it again


@every_model
def test_generate(name):
    model, prompt = build(name), tokens(2, 5)

    def run(model):
        out = model.generate(
            prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        return {"ids": out.sequences, **dict(enumerate(out.logits))}

    recorder = same_as_eager(model.eval(), run)
    assert recorder.count("moe_mlp") == 8 * len(experts_of(model)) and not recorder.count("moe_mlp_backward")


@every_model
def test_compiles_in_one_graph(name):
    model = build(name, num_hidden_layers=1, first_k_dense_replace=0)
    enable(model)
    ids_BS = tokens(2, 9)
    want = step(model, ids_BS, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    out = compiled(ids_BS, labels=ids_BS, use_cache=False)
    out.loss.backward()
    close({"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients(model)}, want)
    torch._dynamo.reset()


def accuracy_step(model, ids_BS, autocast=False):
    """Token losses instead of their mean, whose error is one draw; and the experts that were chosen."""
    chosen = []
    hooks = [
        experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1].sort(-1).values))
        for experts in experts_of(model).values()
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = step(model, ids_BS)
    for hook in hooks:
        hook.remove()
    out["loss"] = F.cross_entropy(
        out["logits"][:, :-1].flatten(0, 1).double(), ids_BS[:, 1:].flatten(), reduction="none"
    )
    return out, torch.cat(chosen)


@every_model
@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_as_close_to_float64_as_eager_in_bf16(name, mode):
    """RMS error over some batches at most twice eager's, for logits, token losses and every gradient.

    A batch where rounding changes the choice of an expert is another function and tells nothing: it is left out.
    """
    model = build(name)
    if mode == "bfloat16":
        model = model.bfloat16()
    exact_model, batches, errors = copy.deepcopy(model).double(), 0, {}
    for seed in range(8):
        ids_BS = tokens(2, 9, seed=seed)
        exact, chosen = accuracy_step(exact_model, ids_BS)
        eager, eager_chosen = accuracy_step(model, ids_BS, mode == "autocast")
        enable(model)
        got, got_chosen = accuracy_step(model, ids_BS, mode == "autocast")
        disable(model)
        if torch.equal(chosen, eager_chosen) and torch.equal(chosen, got_chosen):
            batches += 1
            for key, want in exact.items():
                assert got[key].dtype == eager[key].dtype
                pair = torch.stack([(out[key].double() - want).square().sum() for out in (got, eager)])
                errors[key] = errors.get(key, 0) + pair
    assert batches >= 3
    for key, (ours, theirs) in errors.items():
        assert ours.sqrt() <= 2 * theirs.sqrt(), key


@every_model
def test_weights_are_shared_and_the_state_dict_round_trips(name):
    model, other = build(name), build(name, std=0.1)
    before, keys = {key: weight.data_ptr() for key, weight in model.named_parameters()}, list(model.state_dict())
    enable(model)
    assert {key: weight.data_ptr() for key, weight in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    other.load_state_dict(model.state_dict())
    close({"logits": other(tokens(1, 9)).logits}, {"logits": model(tokens(1, 9)).logits})
    for experts in experts_of(model).values():  # what the layers compute with is what the model holds
        nn.init.zeros_(experts.down_proj)
    other.load_state_dict(model.state_dict())
    close({"logits": other(tokens(1, 9)).logits}, {"logits": model(tokens(1, 9)).logits})


@every_model
def test_by_name_and_through_saved_files(name, tmp_path):
    register()
    model = build(name, "fastmoe")
    assert model.config._experts_implementation == "fastmoe"
    model.save_pretrained(tmp_path)
    want = model(tokens(1, 9)).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="fastmoe")
    assert loaded.config._experts_implementation == "fastmoe" and torch.equal(loaded(tokens(1, 9)).logits, want)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._experts_implementation == "grouped_mm"
    enable(plain)
    assert torch.equal(plain(tokens(1, 9)).logits, want)


def test_it_trains_like_eager():
    """Three optimizer steps: parameters stay together."""
    models = [build("qwen3_moe", std=0.1) for _ in range(2)]
    enable(models[1])
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(3):
            step(model, tokens(2, 9, seed=seed) % V)
            optimizer.step()
    close(models[1].state_dict(), models[0].state_dict())
