"""PPO against loops that follow the papers' formulas, term by term, and the draws against a list of all orders."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpruner.prune.ppo import PPOSettings, clipped_loss, generalized_advantages, normalized, update

SHARES = st.floats(0, 1)


def advantages_by_definition(rewards, values, discount, trace):
    """GAE as the sum over l of (discount * trace)^l * delta[t + l], each delta by itself (equation 16)."""
    episodes, steps = rewards.shape
    result = np.zeros((episodes, steps))
    for episode, step in itertools.product(range(episodes), range(steps)):
        for later in range(step, steps):
            following = values[episode, later + 1] if later + 1 < steps else 0.0
            delta = rewards[episode, later] + discount * following - values[episode, later]
            result[episode, step] += (discount * trace) ** (later - step) * delta
    return result


def clipped_by_definition(log_probs, old, advantages, clip):
    terms = []
    for new, before, advantage in zip(log_probs.flat, old.flat, advantages.flat, strict=True):
        ratio = np.exp(new - before)
        terms.append(min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage))
    return -np.mean(terms)


@settings(max_examples=40, deadline=None)
@given(
    episodes=st.integers(1, 5),
    steps=st.integers(1, 7),
    discount=SHARES,
    trace=SHARES,
    seed=st.integers(0, 99),
)
def test_advantages_equal_their_definition(episodes, steps, discount, trace, seed):
    random = np.random.default_rng(seed)
    rewards, values = random.normal(size=(2, episodes, steps))
    advantages, returns = generalized_advantages(torch.tensor(rewards), torch.tensor(values), discount, trace)
    expected = advantages_by_definition(rewards, values, discount, trace)
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(returns.numpy(), expected + values, atol=1e-12)


def test_advantages_of_a_small_case_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 8.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    advantages, returns = generalized_advantages(rewards, values, discount=0.5, trace=0.5)
    # delta: 0 + 0.5*2 - 1 = 0; 0 + 0.5*4 - 2 = 0; 8 - 4 = 4; each step back is worth a quarter.
    assert advantages.tolist() == [[0.25, 1.0, 4.0]] and returns.tolist() == [[1.25, 3.0, 8.0]]
    # Without discount and with the whole trace, only the end counts: what was paid minus what was expected.
    advantages, returns = generalized_advantages(rewards, values, discount=1.0, trace=1.0)
    assert advantages.tolist() == [[7.0, 6.0, 4.0]] and returns.tolist() == [[8.0, 8.0, 8.0]]
    # Without a trace, each step looks one step ahead.
    assert generalized_advantages(rewards, values, 1.0, 0.0)[0].tolist() == [[1.0, 2.0, 4.0]]


@settings(max_examples=40, deadline=None)
@given(episodes=st.integers(1, 5), steps=st.integers(1, 7), clip=st.floats(0.01, 0.9), seed=st.integers(0, 99))
def test_loss_equals_its_definition(episodes, steps, clip, seed):
    random = np.random.default_rng(seed)
    old, advantages = random.normal(size=(2, episodes, steps))
    log_probs = old + 0.5 * random.normal(size=old.shape)
    loss = clipped_loss(torch.tensor(log_probs), torch.tensor(old), torch.tensor(advantages), clip)
    assert float(loss) == pytest.approx(clipped_by_definition(log_probs, old, advantages, clip))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "pushes"),
    [
        (1.0, 2.0, -2.0, True),
        (1.1, 2.0, -2.2, True),
        (1.5, 2.0, -2.4, False),  # Likelier by enough: no more credit.
        (0.5, 2.0, -1.0, True),  # Made unlikely by mistake: the way back stays open.
        (0.5, -2.0, 1.6, False),
        (1.5, -2.0, 3.0, True),
    ],
)
def test_the_clip_cuts_the_gradient_on_the_right_side(ratio, advantage, loss, pushes):
    log_prob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    value = clipped_loss(log_prob, torch.zeros(1).double(), torch.tensor([advantage]).double(), 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert float(log_prob.grad) == pytest.approx(-ratio * advantage if pushes else 0.0)


def test_normalized():
    values = normalized(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert float(values.mean()) == pytest.approx(0, abs=1e-6) and float(values.square().mean()) == pytest.approx(1)
    assert torch.allclose(values, normalized(1000 * torch.tensor([[1.0, 2.0], [3.0, 4.0]]) - 7), atol=1e-5)
    # Rewards that are all alike teach nothing.
    assert normalized(torch.full((3, 2), 5.0)).abs().max() == 0 and normalized(torch.ones(1, 1)).tolist() == [[0.0]]


class Bandit:
    """Two steps of three arms; the best pair is known, each arm is worth something by itself."""

    WORTH = torch.tensor([[0.0, 1.0, 0.3], [0.5, 0.2, 0.9]])

    def __init__(self):
        self.logits = torch.zeros(2, 3, requires_grad=True)
        self.values = torch.zeros(2, requires_grad=True)
        self.settings = PPOSettings(learning_rate=0.05)
        self.optimizer = torch.optim.Adam([self.logits, self.values], lr=self.settings.learning_rate)
        self.generator = torch.Generator().manual_seed(0)

    def batch(self, episodes: int = 32) -> dict[str, float]:
        probabilities = self.logits.detach().softmax(-1).expand(episodes, 2, 3)
        arms = torch.multinomial(probabilities.reshape(-1, 3), 1, generator=self.generator).view(episodes, 2, 1)
        rewards = torch.zeros(episodes, 2)
        rewards[:, 1] = self.WORTH.expand(episodes, 2, 3).gather(-1, arms)[..., 0].sum(1)

        def score():
            log_probs = self.logits.log_softmax(-1).expand(episodes, 2, 3)
            entropies = -(log_probs.exp() * log_probs).sum(-1)
            return log_probs.gather(-1, arms)[..., 0], entropies, self.values.expand(episodes, 2)

        with torch.no_grad():
            old = score()[0]
        return update(score, self.optimizer, old, rewards, self.settings)


def test_update_learns_a_bandit():
    bandit = Bandit()
    reports = [bandit.batch() for _ in range(40)]
    probabilities = bandit.logits.detach().softmax(-1)
    assert probabilities.argmax(-1).tolist() == [1, 2] and probabilities.max(-1).values.min() > 0.8
    # The baseline predicts what the policy earns by now, from both steps on.
    assert (bandit.values - (probabilities * bandit.WORTH).sum()).abs().max() < 0.15
    assert set(reports[0]) == {"policy_loss", "value_loss", "entropy", "ratio_clipped"}
    assert reports[-1]["entropy"] < reports[0]["entropy"] < np.log(3) + 1e-6
    assert reports[-1]["value_loss"] < 0.2 * reports[0]["value_loss"]
    assert all(0 <= report["ratio_clipped"] <= 1 for report in reports)


def test_update_moves_no_further_than_the_gradient_norm_allows():
    bandit = Bandit()
    bandit.settings = PPOSettings(epochs=1, gradient_norm=1e-3)
    bandit.optimizer = torch.optim.SGD([bandit.logits, bandit.values], lr=1.0)
    bandit.batch()
    moved = torch.cat([bandit.logits.detach().flatten(), bandit.values.detach()])
    assert 0.9e-3 < float(moved.norm()) < 1.001e-3
