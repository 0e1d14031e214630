import math
import re

import pytest
import torch

from fastmoe.nn import losses
from fastmoe.testing import draw


def test_load_balancing_by_hand():
    probs_TE = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]])
    load_E = torch.tensor([3, 1, 0])  # of T * K = 4 slots
    mean_E = [0.3, 0.5, 0.2]
    want = 3 * (3 / 4 * mean_E[0] + 1 / 4 * mean_E[1])
    assert float(losses.load_balancing_loss(probs_TE, load_E)) == pytest.approx(want)
    assert float(losses.load_balancing_loss(probs_TE, load_E, "token")) == pytest.approx(2 * want)  # K times it


def test_load_balancing_of_first_choices_is_gshards():
    """E^2 times the mean over experts of c_e / S * m_e."""
    probs_TE, E = draw(9, 5).softmax(1), 5
    first_E = torch.bincount(probs_TE.argmax(1), minlength=E)
    want = E**2 * (first_E / 9 * probs_TE.mean(0)).mean()
    torch.testing.assert_close(losses.load_balancing_loss(probs_TE, first_E), want)


def test_load_balancing_is_least_when_even():
    E, T = 4, 8
    even = losses.load_balancing_loss(torch.full((T, E), 1 / E), torch.full((E,), T // E))
    skewed = losses.load_balancing_loss(torch.tensor([[0.7, 0.1, 0.1, 0.1]]).repeat(T, 1), torch.tensor([T, 0, 0, 0]))
    assert even == 1 and float(skewed) == pytest.approx(2.8)


class Others:
    """A group of two: all_reduce adds what the other one has."""

    rank, size = 0, 2

    def __init__(self, others):
        self.others = others

    def all_reduce(self, tensor):
        return tensor + torch.tensor(self.others, dtype=tensor.dtype)


@pytest.mark.parametrize("per", ["assignment", "token"])
def test_load_balancing_over_ranks(per):
    """Shares are those of the joined batch: mean over tokens of the ranks' losses is the loss of all of them."""
    probs_TE = draw(10, 3, dtype=torch.float32).softmax(1)
    loads = [torch.tensor([5, 1, 2]), torch.tensor([2, 8, 2])]  # of 4 and 6 tokens, K = 2
    halves = probs_TE.split([4, 6])
    mine = losses.load_balancing_loss(halves[0], loads[0], per, Others([*loads[1].tolist(), 6]))
    theirs = losses.load_balancing_loss(halves[1], loads[1], per, Others([*loads[0].tolist(), 4]))
    torch.testing.assert_close((4 * mine + 6 * theirs) / 10, losses.load_balancing_loss(probs_TE, sum(loads), per))


def test_sequence_balance_by_hand():
    probs_TE = torch.tensor([[0.2, 0.8], [0.4, 0.4], [0.9, 0.3], [0.5, 0.5]])  # scores need not sum to 1
    ids_TK = torch.tensor([[1], [0], [0], [-1]])
    first = 2 * (1 / 2 * (0.2 + 0.5) / 2 + 1 / 2 * (0.8 + 0.5) / 2)
    second = 2 * (1 / 2 * (0.75 + 0.5) / 2)
    found = losses.sequence_balance_loss(probs_TE, ids_TK, 2)
    assert float(found) == pytest.approx((first + second) / 2)
    uniform = losses.sequence_balance_loss(torch.full((8, 4), 0.3), torch.tensor([[0, 1], [2, 3]]).repeat(4, 1), 2)
    assert float(uniform) == pytest.approx(1)
    none = losses.sequence_balance_loss(torch.zeros(2, 2), torch.tensor([[0], [1]]), 1)  # sigmoids that are all 0
    assert none == 0
    with pytest.raises(
        ValueError, match=re.escape("sequence_balance_loss: num_sequences must be a divisor of 4 (tokens), got 3")
    ):
        losses.sequence_balance_loss(probs_TE, ids_TK, 3)


def test_cv_squared_by_hand():
    assert float(losses.cv_squared(torch.tensor([1.0, 2.0, 3.0]))) == pytest.approx(
        1 / 4
    )  # unbiased variance 1, mean 2
    assert losses.cv_squared(torch.tensor([5.0])) == 0 and losses.cv_squared(torch.zeros(3)) == 0


def test_importance_by_hand():
    weights_TK = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]])
    ids_TK = torch.tensor([[0, 2], [2, -1], [-1, -1]])
    torch.testing.assert_close(losses.importance(weights_TK, ids_TK, 4), torch.tensor([0.6, 0.0, 1.3, 0.0]))


def test_smooth_load_by_hand():
    """Noise of deviation 2; expert 0 is chosen, so its rival is the second best, that of others the best."""
    clean_TE, noisy_TE, std_TE = (
        torch.tensor([[1.0, 0.5, 0.0]]),
        torch.tensor([[2.0, 1.0, -1.0]]),
        torch.full((1, 3), 2.0),
    )
    phi = lambda x: (1 + math.erf(x / 2**0.5)) / 2
    want = [phi((1.0 - 1.0) / 2), phi((0.5 - 2.0) / 2), phi((0.0 - 2.0) / 2)]
    found_E = losses.smooth_load(clean_TE, noisy_TE, std_TE, torch.tensor([[0]]))
    torch.testing.assert_close(found_E, torch.tensor(want))
    assert losses.smooth_load(clean_TE, noisy_TE, std_TE, torch.tensor([[0, 1, 2]])).tolist() == [1.0] * 3
    nan_TE = torch.full((1, 3), torch.nan)  # such a token has the ids -1 on a GPU
    assert losses.smooth_load(nan_TE, nan_TE, std_TE, torch.tensor([[-1]])).isnan().all()


def test_smooth_load_is_what_new_noise_would_choose():
    T, E, N = 3, 4, 40000
    clean_TE, std = draw(T, E), 0.8
    noisy_TE = clean_TE + std * draw(T, E, seed=1)
    ids_TK = noisy_TE.topk(2).indices
    found_E, want_E = losses.smooth_load(clean_TE, noisy_TE, torch.tensor(std), ids_TK), torch.zeros(E)
    for e in range(E):
        again_NTE = noisy_TE.repeat(N, 1, 1)
        again_NTE[:, :, e] = clean_TE[:, e] + std * draw(N, T, seed=2 + e)
        want_E[e] = (again_NTE.topk(2).indices == e).sum() / N
    torch.testing.assert_close(found_E, want_E, rtol=0, atol=0.02)


def test_z_loss_by_hand():
    logits_TE = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    assert float(losses.z_loss(logits_TE)) == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)
    assert losses.z_loss(torch.tensor([[1000.0, 0.0]])) == 1e6


IDS = torch.tensor([[0, 3], [2, 1], [3, -1], [1, 0], [0, 2], [3, 2]])
CALLS = {
    "load_balancing_loss": lambda z: losses.load_balancing_loss(z.softmax(1), torch.tensor([3, 2, 3, 3])),
    "load_balancing_loss, tokens": lambda z: losses.load_balancing_loss(
        z.softmax(1), torch.tensor([3, 2, 3, 3]), "token"
    ),
    "sequence_balance_loss": lambda z: losses.sequence_balance_loss(z.sigmoid(), IDS, 2),
    "cv_squared": lambda z: losses.cv_squared(z.exp().sum(0)),
    "importance": lambda z: losses.cv_squared(losses.importance(z[:, :2].softmax(1), IDS, 4)),
    "smooth_load": lambda z: losses.cv_squared(
        losses.smooth_load(
            z,
            z + draw(6, 4, dtype=torch.float32, seed=1).double(),
            z.exp() + 0.1,
            (z + draw(6, 4, seed=1).double()).topk(2).indices,
        )
    ),
    "z_loss": losses.z_loss,
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name):
    assert torch.autograd.gradcheck(CALLS[name], draw(6, 4).double().requires_grad_())


def test_no_tokens():
    z_TE, ids_TK = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 2, dtype=torch.int64)
    found = [
        losses.load_balancing_loss(z_TE.softmax(1), torch.zeros(4, dtype=torch.int64)),
        losses.sequence_balance_loss(z_TE.softmax(1), ids_TK, 1),
        losses.sequence_balance_loss(z_TE.softmax(1), ids_TK, 0),
        losses.sequence_balance_loss(z_TE.softmax(1), ids_TK, 3),
        losses.cv_squared(losses.importance(z_TE[:, :2], ids_TK, 4)),
        losses.cv_squared(losses.smooth_load(z_TE, z_TE, torch.tensor(1.0), ids_TK)),
        losses.z_loss(z_TE),
    ]
    assert torch.stack(found).tolist() == [0] * len(found)
    sum(found).backward()
    assert z_TE.grad.shape == (0, 4)
