"""Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) for short episodes of equal length.

Nothing here knows of tokens: a policy is a module that scores recorded steps anew, and :func:`update` improves it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PPOSettings:
    """Constants of the update, with their reasons.

    Attributes:
        clip: How far a probability ratio may move before its gradient is cut; the paper's 0.2.
        discount: 1: an episode is one pass through the blocks, and only its end is rewarded.
        trace: Lambda of GAE; the paper's 0.95 keeps most of the long view and averages some noise away.
        epochs: Passes over each batch of episodes. Running the ViT is what costs, so each episode is used several
            times; the clip keeps that safe.
        learning_rate: Of Adam. High, because the policy is tiny and there are dozens of updates, not thousands.
        entropy: Weight of the entropy bonus: enough to keep the exploration alive for some dozen updates.
        value: Weight of the value loss; its network is separate, so this only scales its learning rate.
        gradient_norm: Longest gradient, as usual.
    """

    clip: float = 0.2
    discount: float = 1.0
    trace: float = 0.95
    epochs: int = 4
    learning_rate: float = 5e-3
    entropy: float = 1e-3
    value: float = 0.5
    gradient_norm: float = 0.5


def generalized_advantages(rewards: Tensor, values: Tensor, discount: float, trace: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2015, arXiv 1506.02438, equation 16) of whole episodes.

    Args:
        rewards: [episode, step]: received after each step; the episode ends with the last one.
        values: [episode, step]: expected return before each step.

    Returns:
        advantages [episode, step], and the returns [episode, step] that the value baseline should have predicted.
    """
    advantages = torch.zeros_like(rewards)
    following_advantage = following_value = torch.zeros_like(rewards[:, 0])
    for step in reversed(range(rewards.shape[1])):
        surprise = rewards[:, step] + discount * following_value - values[:, step]
        following_advantage = surprise + discount * trace * following_advantage
        advantages[:, step], following_value = following_advantage, values[:, step]
    return advantages, advantages + values


def clipped_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """The clipped surrogate objective (equation 7 of the paper) as a loss, averaged over all elements.

    Args:
        log_probs, old_log_probs: Of the actions taken, under the policy now and when they were taken.
        advantages: Of the same shape.
    """
    ratio = (log_probs - old_log_probs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def normalized(advantages: Tensor) -> Tensor:
    """Zero mean, unit deviation: the size of a reward then does not set the size of the step."""
    return (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)


def update(
    score: Callable[[], tuple[Tensor, Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    old_log_probs: Tensor,
    rewards: Tensor,
    settings: PPOSettings,
) -> dict[str, float]:
    """Improve the policy behind ``optimizer`` on one batch of episodes.

    Args:
        score: Gives (log-probabilities of the actions taken, entropies, values), each [episode, step], under the
            policy as it is when called.
        old_log_probs: [episode, step], when the actions were taken.
        rewards: [episode, step].

    Returns:
        ``policy_loss``, ``value_loss``, ``entropy`` and ``ratio_clipped`` (share of ratios beyond the clip), of the
        last epoch.
    """
    with torch.no_grad():
        _, _, values = score()
        advantages, returns = generalized_advantages(rewards, values, settings.discount, settings.trace)
        advantages = normalized(advantages)
    report = {}
    for _ in range(settings.epochs):
        log_probs, entropies, values = score()
        policy_loss = clipped_loss(log_probs, old_log_probs, advantages, settings.clip)
        value_loss = F.mse_loss(values, returns)
        loss = policy_loss + settings.value * value_loss - settings.entropy * entropies.mean()
        optimizer.zero_grad()
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_norm)
        optimizer.step()
        clipped = ((log_probs - old_log_probs).exp() - 1).abs() > settings.clip
        report = {
            "policy_loss": float(policy_loss.detach()),
            "value_loss": float(value_loss.detach()),
            "entropy": float(entropies.detach().mean()),
            "ratio_clipped": float(clipped.float().mean()),
        }
    return report
