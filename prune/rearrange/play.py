"""The game of a rearrangement: from block to block, how much each kind of work is worth.

What a search gets from gradients is the loss of closing single gates. How a budget is best spread over blocks and kinds
of work only shows when the pruned model is run: errors of early blocks are amplified or made up for, closed gates stand
in for one another. So an episode walks through the blocks, and at each of them *tilts* the losses: one factor for each
kind of gate, one exponent for the contrast between patches, and one slope from the centre of the image to its border.
The plan of the episode is the search's answer to the tilted losses, so it meets the budget exactly, whatever it is of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...core.cost import Cost
from ...core.geometry import Geometry
from ...core.plan import KINDS, TokenPlan
from ..fisher import losses_of
from ..search import search_mask

#: What is chosen in each block: a logarithm of a factor per kind, of the contrast, and a slope over the image.
ACTIONS = len(KINDS) + 2
#: Standard deviations that the policy begins with.
FIRST_SPREADS = (0.4,) * len(KINDS) + (0.15, 0.3)
#: No action goes further: an exponential of it must stay a number.
FURTHEST = 4.0
#: Hidden units of policy and value networks.
HIDDEN = 16
#: Marginal costs are taken anew so often in the search of an episode: its losses are near those of the last one.
REPEATS = 3


class Game:
    """Turns what episodes choose into plans.

    Args:
        moments: float [kind 3, kind 3, block L, patch N]: of :class:`~vpruner.prune.rounds.FisherSearch`.
        budget: In the unit of ``cost``.
        form: One of :data:`~vpruner.prune.search.FORMS`.
    """

    def __init__(self, name: str, geometry: Geometry, moments: np.ndarray, cost: Cost, budget: float, form: str):
        self.name, self.geometry, self.cost, self.form = name, geometry, cost, form
        self.moments, self.target = moments, min(1.0, budget / cost.dense)
        rows, columns = np.divmod(np.arange(geometry.patches), geometry.grid[1])
        away = [2 * where / max(1, most - 1) - 1 for where, most in zip((rows, columns), geometry.grid, strict=True)]
        distance = np.hypot(*away)
        #: float64 [patch N]: how far from the centre, mean 0.
        self.away = distance - distance.mean()

    def plan(self, tilts: np.ndarray) -> TokenPlan:
        """The plan of one episode: float [block L, action] -> within the budget."""
        tilts = np.clip(tilts, -FURTHEST, FURTHEST)
        factors = np.exp(tilts[:, : len(KINDS)] / 2).T
        losses = losses_of(self.moments * (factors[:, None] * factors[None])[..., None])
        losses = losses * np.exp(tilts[:, len(KINDS) + 1, None] * self.away)[:, None]
        unit = float(np.median(losses[losses > 0])) if (losses > 0).any() else 1.0
        losses = unit * (losses / unit) ** np.exp(tilts[:, len(KINDS), None, None])
        found = search_mask(losses, self.geometry, self.target, cost=self.cost, form=self.form, repeats=REPEATS)
        return found.plan(self.name, self.geometry)


class Policy(nn.Module):
    """Chooses the tilts of a block: a normal distribution around a mean that depends on the state.

    State: which block, how much of each kind the incumbent leaves open there, and the mean tilt so far.
    """

    def __init__(self, incumbent: TokenPlan):
        super().__init__()
        depth = incumbent.geometry.depth
        shares = torch.from_numpy(incumbent.masks.mean(2).T).float()
        self.register_buffer("blocks", torch.cat([torch.linspace(-1, 1, depth)[:, None], shares], 1))

        def network(outputs: int) -> nn.Sequential:
            last = nn.Linear(HIDDEN, outputs)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            return nn.Sequential(nn.Linear(1 + len(KINDS) + ACTIONS, HIDDEN), nn.Tanh(), last)

        self.mean, self.value = network(ACTIONS), network(1)
        self.log_spread = nn.Parameter(torch.tensor(FIRST_SPREADS).log())

    def states(self, tilts: Tensor) -> Tensor:
        """[episode, block, feature] for tilts [episode, block, action]; a state knows only the blocks before it."""
        before = torch.cat([torch.zeros_like(tilts[:, :1]), tilts[:, :-1]], 1).cumsum(1)
        mean = before / torch.arange(1, tilts.shape[1] + 1)[:, None]
        return torch.cat([self.blocks[: tilts.shape[1]].expand(len(tilts), -1, -1), mean], 2)

    @torch.no_grad()
    def play(self, episodes: int, random: np.random.Generator) -> Tensor:
        """float32 [episode, block, action], chosen from the first block to the last."""
        noise = torch.from_numpy(random.standard_normal((episodes, len(self.blocks), ACTIONS), dtype=np.float32))
        tilts = torch.zeros_like(noise)
        for block in range(len(self.blocks)):
            mean = self.mean(self.states(tilts[:, : block + 1])[:, -1])
            tilts[:, block] = mean + self.log_spread.exp() * noise[:, block]
        return tilts

    def score(self, tilts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probabilities, entropies, values), each [episode, block]."""
        states = self.states(tilts)
        normal = torch.distributions.Normal(self.mean(states), self.log_spread.exp().expand(ACTIONS))
        return normal.log_prob(tilts).sum(2), normal.entropy().sum(2), self.value(states)[..., 0]


@dataclass
class Potential:
    """What is known of what more episodes can gain: the sequential test that ends a rearrangement.

    Each batch's best episode is judged on images that did not choose it. Its gain and two standard errors are what the
    batch can have found at most.

    Attributes:
        bounds: Of each batch so far, relative to the incumbent's distance at its time.
    """

    bounds: list[float]

    def add(self, gain: float, error: float) -> None:
        self.bounds.append(gain + 2 * error if math.isfinite(gain) and math.isfinite(error) else math.inf)

    def exhausted(self, worth: float, patience: int) -> bool:
        """Whether each of the last ``patience`` batches can have found less than ``worth``."""
        return len(self.bounds) >= patience and max(self.bounds[-patience:]) < worth
