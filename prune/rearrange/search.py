"""Stage 2, token mask rearrangement: move tokens within the budget so that the pruned model agrees better.

The Fisher search adds up what each token costs alone; which of two similar tokens stays, and how a budget is best
spread over the blocks, only shows when the pruned model is run. So pruning is played as a game, one episode per plan:

* *state* at block l: which tokens are left, where each stands against the best plan so far (the *incumbent*), what its
  gate's gradients promise, the Fisher prior, its neighbours, and how much of the budget is spoken for;
* *action*: how many tokens enter the block (an offset from the incumbent's number; numbers that the budget cannot bear
  are masked out), and which ones leave, drawn without replacement (Plackett-Luce);
* *reward*, at the end: the relative drop in distance from the dense model against the incumbent on the same images,
  minus the weighted cost over budget.

What ships is tuned afterwards (:mod:`vpruner.prune.tune`), and tuning makes some gains worthless: where the errors of
several dropped tokens were played off against each other, a refit would have undone them anyway. Where weights will be
tuned, plans are therefore judged with stand-in weights, refitted to many plans around the start at once
(:meth:`World.foresee_tuning`). Where they will not, such gains are real, and the quadratic estimate finds the first of
them in seconds: the game then begins at the best of a few greedily swapped plans (:func:`greedy_swaps`).

The policy is trained by clipped PPO (:mod:`vpruner.prune.ppo`). Its first logits say "as the incumbent does", with just
enough noise for a few tokens to move, and those rather that the gradients point at. When an episode beats the incumbent
on images that did not choose it, it becomes the incumbent. What all episodes so far say of single tokens is kept
(:class:`Evidence`), and the plans that it speaks for challenge the incumbent too. What is returned is the best
incumbent on images that no reward was ever computed on, or the Fisher plan.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.choices import EPISODES, EPISODES_UNTUNED, TIME_LIMIT
from ...core.cost import Cost, MacsCost
from ...core.errors import UserError
from ...core.files import atomic_path
from ...core.json_file import json_sha256
from ...core.plan import Geometry, TokenPlan
from ...core.text import counted, first_line, option
from ..backbones.vit import ViTAdapter, weights_sha256
from ..calibration import Calibration, Judgement, distance, divergence
from ..fisher import batch_size_for, gate_gradients
from ..ppo import PPOSettings, update
from ..rollouts import evaluate_plans
from ..tune.weights import refit_weights, with_weights

#: Version of the checkpoint file.
CHECKPOINT_SCHEMA = 2
#: Images that rewards come from, mirror images included: with fewer, plans fit them; more cost time in each challenge.
REWARD_IMAGES = 3072
#: Images that finalists are judged on first; a winner goes on to twice as many, and again, until it is on all.
FIRST_LOOK = 384
#: Tokens that enter a block, relative to the incumbent's number; times one per 64 patches. Further goes in more steps.
OFFSETS = (-2, -1, 0, 1, 2)
#: A stage fed with noise keeps a plan one time in so many, at most: 2.6 standard errors for a single plan.
LUCK = 200
#: Logit of offset 0 at the start: three blocks of four keep the incumbent's number.
STAY = 2.5
#: Tokens that leave at another block than in the incumbent, in an average first episode. Fewer are lost in the noise of
#: a small batch of images, more cancel each other.
MOVES = 6.0
#: Episodes are played at temperatures log-uniform in this range, so that small and large changes are tried throughout.
TEMPERATURES = (0.6, 1.3)
#: What temperatures are multiplied by, at most, when the policy has settled down.
MOST_HEAT = 8.0
#: How many blocks a token may move at once in a plan that the evidence proposes, and how many tokens in each of its
#: plans: a step along what single moves have shown holds for a few moves, and not far.
REACH, PROPOSED_MOVES = 2, (4, 12)
#: Prior standard deviations, as relative gains, that the evidence chooses from for the effect of one gate.
EFFECTS = (0.001, 0.002, 0.004, 0.008)
#: How far the budget may be overspoken at block 0, as a fraction of it; falls to 0 at the last block. Without it no
#: early block could gain a token that a later one gives up for it.
SLACK = 0.04
#: Reward lost per unit of cost over budget. Divergence falls by less than 1 in relative terms for each 10 % of cost, so
#: at 20 no plan is worth being over budget; action masks leave little to punish anyway.
OVER_BUDGET_WEIGHT = 20.0
#: First weights of what the gradients promise (first-order, Fisher term), against an attachment of 4 to 8.
GUIDANCE = (3.0, 0.5)
#: Hidden units of policy and value networks.
HIDDEN = 32
#: Stand-in weights are refitted to so many plans together, on so many images at most. Weights of the start alone would
#: favour it: over plans around it, the distance with them falls where the distance after a refit of their own rises.
STAND_IN_PLANS, STAND_IN_IMAGES = 16, 1024
#: Rows of a stand-in's normal equations at most, an image or its mirror image giving one per token: with more tokens to
#: an image fewer images do, and no mirror images, and a model of DeiT's size is refitted in minutes.
STAND_IN_ROWS = 150_000
#: How many of those plans say, on the held-out images, whether the refit helped.
STAND_IN_JUDGES = 4
#: Temperatures of the episodes that those plans come from: further from the start than the episodes to be judged.
STAND_IN_TEMPERATURES = (1.0, 2.5)
TOKEN_FEATURES, BLOCK_FEATURES = 9, 6


@dataclass(frozen=True)
class RearrangeSettings:
    """How much is played.

    Attributes:
        episodes: Plans that are run on images, at most.
        time_limit: Seconds: no batch of episodes begins that would not end within them if it took as long as the last
            one. The first is always played.
        batch: Episodes per update of the policy: all are judged on the same images. The last update may have fewer.
        screened: Episodes sampled for each that is run; the quadratic estimate picks.
        images: Images that a batch of episodes is judged on, drawn anew each time.
        effect_images: Images of a gradient pass at an incumbent.
        finalists: Episodes of a batch that are judged on all images, so that one may become the incumbent.
    """

    episodes: int = EPISODES
    time_limit: float = TIME_LIMIT
    batch: int = 16
    screened: int = 4
    images: int = 96
    effect_images: int = 192
    finalists: int = 2

    @classmethod
    def for_tuning(cls, tuning: str, **given: float | None) -> RearrangeSettings:
        """The defaults for one of :data:`~vpruner.prune.tune.stage.TUNINGS`, but for what is ``given`` and not None."""
        defaults = {"episodes": EPISODES if tuning == "weights" else EPISODES_UNTUNED}
        return cls(**{**defaults, **{name: value for name, value in given.items() if value is not None}})


@dataclass(frozen=True)
class Rearranged:
    """What the stage found.

    Attributes:
        plan: The best plan on held-out images; the one it started from when none was better.
        judgement: Divergence of start and result on the held-out images.
        kept: Whether ``plan`` is another than the start.
        note: One sentence when it is not, or when the stage was cut short; else empty.
        details: JSON values: episodes played, incumbents, seconds, settings.
        history: One entry for each batch of episodes.
    """

    plan: TokenPlan
    judgement: Judgement
    kept: bool
    note: str
    details: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list, repr=False)


# -- the world that episodes are played in -------------------------------------------------------------------------


class World:
    """The model as episodes see it: what a plan does on some images, and what each gate would change.

    Tests replace it by worlds whose best plan is known.

    Attributes:
        images: int64 [image]: those that may give rewards.
        held_out: int64 [image]: those that may not.
        stand_in: Weights that plans are judged with, as a foretaste of tuning; None: the model's own.
    """

    stand_in: Mapping[str, Tensor] | None = None

    def __init__(self, adapter: ViTAdapter, calibration: Calibration):
        self.adapter, self.calibration = adapter, calibration
        self.geometry, self.name = adapter.geometry, adapter.name
        # Other images say more than mirror images, which say more than nothing.
        self.images = calibration.mirrored(calibration.fit)[:REWARD_IMAGES]
        self.held_out = calibration.held_out
        # One chain of activations per level of the tree is alive at a time.
        self._chunk = max(1, batch_size_for(self.geometry, backward=True))

    def foresee_tuning(self, plans: Sequence[TokenPlan], on_step: Callable[[int], None] = lambda count: None) -> bool:
        """Judge plans with weights refitted to ``plans`` together from now on.

        Args:
            on_step: Called with 1 after each block.

        Returns:
            False when no refit helped them on the held-out images: the model's own weights stay then.
        """
        # One image of a fit has hardly a say in its normal equations: the images of rewards may be among them.
        tokens = self.geometry.tokens
        fit = self.calibration.fit[: min(STAND_IN_IMAGES, STAND_IN_ROWS // tokens)]
        flip = 2 * len(fit) * tokens <= STAND_IN_ROWS
        judges = plans[:: -(-len(plans) // STAND_IN_JUDGES)]
        self.stand_in = None
        before = self.judge(judges, self.held_out)[1].mean(0)
        weights, _ = refit_weights(self.adapter, plans, self.calibration, fit, flip=flip, on_step=on_step)
        with with_weights(self.adapter.model, weights):
            after = self.judge(judges, self.held_out)[1].mean(0)
        self.stand_in = weights if weights and Judgement.of(before, after).better else None
        return self.stand_in is not None

    def judge(
        self, plans: Sequence[TokenPlan], indices: np.ndarray, *, foresee: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """How far plans are from the dense model: (distances, divergences), each float64 [plan, image].

        :func:`~vpruner.prune.calibration.distance` is what rewards are made of, for its small variance;
        :func:`~vpruner.prune.calibration.divergence` is what is reported.

        Args:
            foresee: False: with the model's own weights, whatever :attr:`stand_in` is.
        """
        distances = np.empty((len(plans), len(indices)))
        divergences = np.empty_like(distances)
        # Before any weights are exchanged: the target is what the model as trained says.
        self.calibration.dense_outputs(self.adapter, indices)
        with with_weights(self.adapter.model, self.stand_in if foresee else None):
            for start in range(0, len(indices), self._chunk):
                places = slice(start, start + self._chunk)
                outputs = evaluate_plans(self.adapter, plans, self.calibration.images(indices[places]))
                dense = self.calibration.dense_outputs(self.adapter, indices[places]).expand_as(outputs)
                distances[:, places] = distance(dense, outputs, self.geometry.output).numpy()
                divergences[:, places] = divergence(dense, outputs, self.geometry.output).numpy()
        return distances, divergences

    @property
    def digest(self) -> str:
        """Identity of the images and the weights: a checkpoint goes with both."""
        pixels = hashlib.sha256(memoryview(np.ascontiguousarray(self.calibration.pixels))).hexdigest()
        weights = weights_sha256(self.adapter.model)[:16]
        return f"{pixels[:16]}-{len(self.held_out)}-{weights}{'-tuned' if self.stand_in else ''}"

    def curvature(self, indices: np.ndarray, seed: int) -> np.ndarray:
        """float32 [image, block L, patch N]: gate gradients at the dense model whose squares are its Fisher scores."""
        loss = "features" if self.geometry.output == "features" else "self"
        size = batch_size_for(self.geometry, backward=True)
        values = gate_gradients(self.adapter, self.calibration.batches(indices, size), loss, seed=seed).values
        return values[:, : self.geometry.depth]

    def effects(self, plan: TokenPlan, indices: np.ndarray) -> np.ndarray:
        """float32 [image, block L, patch N]: gradient of the distance with respect to each gate, at ``plan``.

        For a kept token it is taken at m = 1, for a dropped one at m = 0. Where the head pools the patches, what a
        token changes there is counted with the last block.
        """
        model = self.adapter.model
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        rows = []
        # Before any weights are exchanged, as in judge().
        self.calibration.dense_outputs(self.adapter, indices)
        try:
            for start in range(0, len(indices), self._chunk):
                chunk = indices[start : start + self._chunk]
                dense = self.calibration.dense_outputs(self.adapter, chunk)
                with (
                    with_weights(model, self.stand_in),
                    self.adapter.gated(len(chunk), plan, reopen=True) as gates,
                    torch.enable_grad(),
                ):
                    output = model(self.calibration.images(chunk).to(gates.device, gates.dtype)).float()
                    value = distance(dense.to(output.device), output, self.geometry.output).sum()
                    (gradient,) = torch.autograd.grad(value, gates)
                rows.append(gradient.float().cpu().numpy())
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
        values = np.concatenate(rows)
        if values.shape[1] > self.geometry.depth:
            values[:, -2] += values[:, -1]
        return values[:, : self.geometry.depth]


@dataclass(frozen=True, eq=False)
class Prospect:
    """What gradients at an incumbent promise for other plans.

    Attributes:
        exits: int64 [patch N] of the incumbent.
        moves: float32 [image, exit 0..L, patch N]: first-order change of the divergence when a token leaves there.
        first: float64 [exit 0..L, patch N]: its mean.
        second: float64 [exit 0..L, patch N]: half its mean square, the Fisher term.
        unit: Typical size of a one-block move; features are in this unit.
    """

    exits: np.ndarray
    moves: np.ndarray
    first: np.ndarray
    second: np.ndarray
    unit: float

    @classmethod
    def at(cls, exits: np.ndarray, effects: np.ndarray) -> Prospect:
        if not np.isfinite(effects).all():
            effects = np.nan_to_num(effects, nan=0.0, posinf=0.0, neginf=0.0)
        images, _, patches = effects.shape
        reach = np.concatenate([np.zeros((images, 1, patches), effects.dtype), np.cumsum(effects, axis=1)], axis=1)
        moves = reach - np.take_along_axis(reach, np.broadcast_to(exits, (images, 1, patches)), axis=1)
        return cls.of(exits, moves, float(np.abs(effects.mean(0)).mean()) + 1e-12)

    @classmethod
    def of(cls, exits: np.ndarray, moves: np.ndarray, unit: float) -> Prospect:
        first = moves.mean(0, dtype=np.float64)
        second = 0.5 * np.square(moves, dtype=np.float32).mean(0, dtype=np.float64)
        return cls(exits, moves, first, second, unit)

    def estimate(self, exits: np.ndarray) -> float:
        """Second-order estimate of the change of divergence from the incumbent to ``exits``, interactions included."""
        tokens = np.flatnonzero(exits != self.exits)
        change = self.moves[:, exits[tokens], tokens].sum(1, dtype=np.float64)
        return float(change.mean() + 0.5 * np.square(change).mean())


class Evidence:
    """What the plans that were run say of single gates: Bayesian linear regression of their gains.

    One batch of images tells a good plan from a bad one hardly better than chance, but a gate is opened or closed in
    many plans. So all gains seen so far, relative to the incumbents of their time, are explained by

        gain = sum over gates of (m - m of the incumbent) * effect + slope * promised gain + toll * gates that differ

    with independent normal priors; their width is what makes the gains seen most likely, among :data:`EFFECTS`.

    Attributes:
        effects: float64 [block L, patch N]: posterior mean of what opening each gate gains.
        slope: How much of what gradients promise comes true.
        toll: What each gate that differs from the incumbent costs in the mean; not above 0.
    """

    #: Prior deviations of slope and toll.
    SLOPE, TOLL = 0.5, 0.005

    def __init__(self, depth: int, patches: int):
        self.effects = np.zeros((depth, patches))
        self.slope = self.toll = 0.0
        self._shape = (depth, patches)
        self.rows: list[np.ndarray] = []
        self.promised: list[float] = []
        self.gains: list[float] = []
        self.errors: list[float] = []

    def add(self, incumbent: np.ndarray, exits: np.ndarray, promised: float, gains: np.ndarray) -> None:
        """Args:
        incumbent, exits: int64 [patch N] of both plans.
        promised: Relative gain that gradients promised.
        gains: float64 [image], of mean ``gain``: relative to the incumbent's mean.
        """
        blocks = np.arange(self._shape[0])[:, None]
        self.rows.append(((exits > blocks).astype(np.int8) - (incumbent > blocks)).ravel())
        # Garbage gradients promise anything; no plan gains more than all there is.
        self.promised.append(float(np.clip(np.nan_to_num(promised), -1, 1)))
        self.gains.append(float(gains.mean()))
        self.errors.append(float(gains.std(ddof=1) / len(gains) ** 0.5) + 1e-6)

    def fit(self) -> None:
        """Update the attributes from all that was added."""
        rows = np.array(self.rows, np.float64)
        differ = np.abs(rows).sum(1)
        gains, promised = np.array(self.gains), np.array(self.promised)
        sound = np.isfinite(gains) & np.isfinite(self.errors) & (differ > 0)
        if not sound.any():
            return
        rows, differ, gains, promised = rows[sound], differ[sound], gains[sound], promised[sound]
        common = rows @ rows.T
        fixed = np.outer(promised, promised) * self.SLOPE**2 + np.outer(differ, differ) * self.TOLL**2
        fixed += np.diag(np.array(self.errors)[sound] ** 2)
        best = -np.inf
        for effect in EFFECTS:
            try:
                factor = np.linalg.cholesky(fixed + effect**2 * common)
            except np.linalg.LinAlgError:
                continue
            white = np.linalg.solve(factor, gains)
            likelihood = -0.5 * white @ white - np.log(np.diag(factor)).sum()
            if likelihood > best:
                best = likelihood
                weights = np.linalg.solve(factor.T, white)
                self.effects = (effect**2 * weights @ rows).reshape(self._shape)
                self.slope = float(self.SLOPE**2 * weights @ promised)
                self.toll = min(0.0, float(self.TOLL**2 * weights @ differ))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; see :meth:`restore`."""
        rows = np.array(self.rows, np.int8).reshape(len(self.rows), -1)
        return {"rows": torch.from_numpy(rows), "seen": list(zip(self.promised, self.gains, self.errors, strict=True))}

    def restore(self, state: dict[str, Any]) -> None:
        """What had been added when :meth:`state` was called."""
        self.rows = list(state["rows"].numpy())
        self.promised, self.gains, self.errors = ([seen[part] for seen in state["seen"]] for part in range(3))

    def expected(self, prospect: Prospect, scale: float) -> np.ndarray:
        """float64 [exit 0..L, patch N]: relative gain to expect when one token leaves there, not as in the incumbent.

        Args:
            scale: The incumbent's mean distance, which gains are relative to.
        """
        depth, patches = self._shape
        reach = np.concatenate([np.zeros((1, patches)), np.cumsum(self.effects, axis=0)])
        gain = reach - reach[prospect.exits, np.arange(patches)]
        steps = np.abs(np.arange(depth + 1)[:, None] - prospect.exits)
        return gain - self.slope * prospect.first / scale + self.toll * steps


# -- the policy ----------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """Scores tokens for leaving, numbers of tokens, and states.

    A linear part that starts at "as the incumbent does", and small networks beside it that start at zero.

    Args:
        attachment: First weight of the incumbent's own choice; see :func:`_attachment`.
    """

    def __init__(self, attachment: float):
        super().__init__()

        def network(inputs: int, outputs: int) -> nn.Sequential:
            last = nn.Linear(HIDDEN, outputs)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Tanh(), last)

        self.leave = nn.Linear(TOKEN_FEATURES, 1, bias=False)
        self.leave_network = network(TOKEN_FEATURES + BLOCK_FEATURES, 1)
        self.count = network(BLOCK_FEATURES, len(OFFSETS))
        self.value = network(BLOCK_FEATURES, 1)
        with torch.no_grad():
            self.leave.weight.zero_()
            self.leave.weight[0, :3] = torch.tensor([attachment, *GUIDANCE])
            self.count[-1].bias[OFFSETS.index(0)] = STAY

    def leave_scores(self, tokens: Tensor, blocks: Tensor) -> Tensor:
        """[..., patch] from tokens [..., patch, feature] and blocks [..., feature]."""
        wide = blocks.unsqueeze(-2).expand(*tokens.shape[:-1], -1)
        return self.leave(tokens)[..., 0] + self.leave_network(torch.cat([tokens, wide], -1))[..., 0]


@dataclass(eq=False)
class Episodes:
    """Recorded episodes; axes are [episode, block, ...].

    Attributes:
        tokens: float32 [.., patch, feature].
        blocks: float32 [.., feature].
        order: int64 [.., patch]: tokens in the order drawn: those that leave first, then the rest, then those gone.
        leaving: int64 [..]: how many of ``order`` leave here.
        alive: int64 [..]: how many of ``order`` were left.
        offsets: int64 [..]: index of the number chosen.
        allowed: bool [.., offset].
        temperature: float32 [episode].
        exits: int64 [episode, patch].
    """

    tokens: Tensor
    blocks: Tensor
    order: Tensor
    leaving: Tensor
    alive: Tensor
    offsets: Tensor
    allowed: Tensor
    temperature: Tensor
    exits: np.ndarray

    def select(self, rows: Sequence[int]) -> Episodes:
        index = torch.as_tensor(list(rows))
        parts = {name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Episodes(**parts, exits=self.exits[list(rows)])

    def score(self, policy: Policy) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probabilities, entropies, values), each [episode, block], under ``policy``."""
        temperature = self.temperature[:, None]
        counts = (policy.count(self.blocks) / temperature[..., None]).masked_fill(~self.allowed, -torch.inf)
        counts = counts.log_softmax(-1)
        log_probs = counts.gather(-1, self.offsets[..., None])[..., 0]
        scores = policy.leave_scores(self.tokens, self.blocks) / temperature[..., None]
        drawn, first = plackett_luce(scores.gather(-1, self.order), self.leaving, self.alive)
        entropies = -(counts.exp() * counts.clamp(min=-1e4)).sum(-1) + first
        return log_probs + drawn, entropies, policy.value(self.blocks)[..., 0]


def plackett_luce(scores: Tensor, drawn: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of drawing without replacement, each draw by softmax over what is left.

    Args:
        scores: float [..., item], items in the order drawn, then those left over, then those that could not be drawn.
        drawn: int [...]: how many were drawn.
        alive: int [...]: how many could be.

    Returns:
        log-probability [...], and the entropy [...] of the first draw (0 where nothing is drawn).
    """
    place = torch.arange(scores.shape[-1], device=scores.device)
    # Finite, not -inf: logcumsumexp of nothing but -inf has no gradient.
    scores = torch.where(place < alive[..., None], scores, scores.new_tensor(-1e4))
    remaining = scores.flip(-1).logcumsumexp(-1).flip(-1)
    log_prob = torch.where(place < drawn[..., None], scores - remaining, 0.0).sum(-1)
    first = scores - remaining[..., :1]
    entropy = -(first.exp() * first).sum(-1)
    return log_prob, torch.where(drawn > 0, entropy, 0.0)


# -- playing -------------------------------------------------------------------------------------------------------


class Game:
    """Plays episodes around an incumbent within a budget."""

    def __init__(self, geometry: Geometry, cost: Cost, budget: float, importance: np.ndarray | None):
        self.geometry, self.cost, self.budget = geometry, cost, budget
        depth, patches = geometry.depth, geometry.patches
        prior = np.zeros((depth, patches)) if importance is None else importance[:depth]
        prior = np.log(prior + 1e-30)
        self.prior = ((prior - prior.mean()) / (prior.std() + 1e-9)).astype(np.float32)
        self.step = max(1, round(patches / 64))
        rows, columns = np.divmod(np.arange(patches), geometry.grid[1])
        self.centre = np.stack(
            [2 * rows / max(1, geometry.grid[0] - 1) - 1, 2 * columns / max(1, geometry.grid[1] - 1) - 1]
        ).astype(np.float32)
        #: The image must get in, and where the head pools or there is no prefix, it must stay.
        stays = geometry.head_patches or geometry.prefix_tokens == 0
        self.fewest = np.array([1 if stays or block == 0 else 0 for block in range(depth)])

    def play(
        self,
        policy: Policy,
        prospect: Prospect,
        temperature: np.ndarray,
        random: np.random.Generator,
        opening: int = 0,
    ) -> Episodes:
        """Play one episode per entry of ``temperature`` [episode]; the blocks before ``opening`` as the incumbent."""
        depth, patches = self.geometry.depth, self.geometry.patches
        episodes = len(temperature)
        numbers = self._counts(prospect.exits)
        alive = np.ones((episodes, patches), bool)
        kept = np.zeros((episodes, depth), np.int64)
        exits = np.full((episodes, patches), depth)
        moved = np.zeros(episodes, np.float32)
        records: dict[str, list[np.ndarray]] = {
            name: [] for name in ("tokens", "blocks", "order", "leaving", "alive", "offsets", "allowed")
        }
        heat = temperature[:, None].astype(np.float32)
        if opening:
            exits[:, prospect.exits < opening] = prospect.exits[prospect.exits < opening]
            alive &= prospect.exits >= opening
            kept[:, :opening] = numbers[:opening]
        for block in range(opening, depth):
            tokens = self._token_features(block, alive, prospect)
            left = alive.sum(1)
            projected = np.array([self._projected(kept[e], block, left[e], numbers) for e in range(episodes)])
            blocks = np.stack(
                [
                    np.full(episodes, block / depth),
                    (projected / self.budget - 1) * 20,
                    (left - (numbers[block - 1] if block else patches)) / self.step,
                    moved / (10 * prospect.unit),
                    np.where(alive, tokens[..., 1], 0).max(1, initial=0) * 0.2,
                    np.full(episodes, (numbers[block] + 1) / patches),
                ],
                axis=1,
            ).astype(np.float32)
            wanted = np.clip(numbers[block] + self.step * np.asarray(OFFSETS)[None], self.fewest[block], left[:, None])
            allowed = self._allowed(kept, block, wanted, numbers)
            with torch.no_grad():
                logits = policy.count(torch.from_numpy(blocks)).numpy() / heat
                scores = policy.leave_scores(torch.from_numpy(tokens), torch.from_numpy(blocks)).numpy() / heat
            # Gumbel noise turns argmax and sort into draws from the softmax, without replacement.
            logits = np.where(allowed, logits + random.gumbel(size=logits.shape), -np.inf)
            offsets = logits.argmax(1)
            keep = wanted[np.arange(episodes), offsets]
            noisy = np.where(alive, scores + random.gumbel(size=scores.shape), -np.inf)
            order = np.argsort(-noisy, axis=1, kind="stable")
            leaving = left - keep
            leaves = np.zeros_like(alive)
            np.put_along_axis(leaves, order, np.arange(patches) < leaving[:, None], axis=1)
            exits[leaves] = block
            moved += np.where(leaves & (prospect.exits > block), prospect.first[block], 0).sum(1).astype(np.float32)
            alive &= ~leaves
            kept[:, block] = keep
            values = (tokens, blocks, order, leaving, left, offsets, allowed)
            for name, value in zip(records, values, strict=True):
                records[name].append(value)
        stacked = {name: torch.from_numpy(np.stack(values, axis=1)) for name, values in records.items()}
        return Episodes(**stacked, temperature=torch.from_numpy(temperature.astype(np.float32)), exits=exits)

    def spend(self, exits: np.ndarray, prospect: Prospect) -> np.ndarray:
        """Let tokens stay a block longer while the budget allows, those first whose gradients promise most for it.

        What an episode leaves of the budget is spent for it: the policy need not learn to count.
        """
        exits, depth = exits.copy(), self.geometry.depth
        tokens = np.arange(len(exits))
        counts = self._counts(exits)
        for _ in range(len(exits)):
            base, room = self._cost_of(counts), np.zeros(depth, bool)
            for block in range(depth):
                room[block] = self._cost_of(counts + (np.arange(depth) == block)) <= max(self.budget, base)
            leaving = exits < depth
            able = leaving & room[np.minimum(exits, depth - 1)]
            if not able.any():
                break
            promise = np.where(
                able,
                prospect.first[np.minimum(exits + 1, depth), tokens] - prospect.first[np.minimum(exits, depth), tokens],
                np.inf,
            )
            token = int(promise.argmin())
            counts[exits[token]] += 1
            exits[token] += 1
        return exits

    def save(self, exits: np.ndarray, prospect: Prospect) -> np.ndarray:
        """Let tokens leave a block earlier until the budget is met, those first whose gradients promise most for it."""
        exits, tokens = exits.copy(), np.arange(len(exits))
        while self.total(exits) > self.budget:
            counts = self._counts(exits)
            able = (exits > 0) & (counts > self.fewest)[exits - 1]
            if not able.any():
                break
            promise = prospect.first[np.maximum(exits - 1, 0), tokens] - prospect.first[exits, tokens]
            exits[int(np.where(able, promise, np.inf).argmin())] -= 1
        return exits

    def propose(self, expected: np.ndarray, prospect: Prospect, most: int) -> np.ndarray:
        """int64 [patch N]: the plan within budget around the incumbent that gains most, if gains added up.

        Args:
            expected: float64 [exit 0..L, patch N]: gain of each exit over the incumbent's.
            most: How many tokens may move, before the budget is evened out.
        """
        depth, tokens = self.geometry.depth, np.arange(len(prospect.exits))
        counts = self._counts(prospect.exits)
        here = self._cost_of(counts)
        price = np.array([self._cost_of(counts + (np.arange(depth) == b)) - here for b in range(depth)]) / here
        paid = np.concatenate([[0.0], np.cumsum(price)])
        paid = paid[:, None] - paid[prospect.exits]
        far = np.abs(np.arange(depth + 1)[:, None] - prospect.exits) > REACH
        # Where nothing is to be gained, tokens stay where they are, however little they would save.
        expected = expected + 1e-6 * (paid == 0)
        low, high = 0.0, 100.0
        for _ in range(30):
            worth = 0.5 * (low + high)
            values = np.where(far, -np.inf, expected - worth * paid)
            chosen = values.argmax(0)
            moving = np.argsort(-values[chosen, tokens], kind="stable")[:most]
            exits = prospect.exits.copy()
            exits[moving] = chosen[moving]
            if paid[exits, tokens].sum() > 0:
                low = worth
            else:
                high = worth
        if (self._counts(exits) < self.fewest).any():
            return prospect.exits.copy()
        return self.spend(self.save(exits, prospect), prospect)

    def _counts(self, exits: np.ndarray) -> np.ndarray:
        """int64 [block L]: patches that enter each block."""
        return (exits > np.arange(self.geometry.depth)[:, None]).sum(1)

    def _cost_of(self, patches: np.ndarray) -> float:
        return self.cost.total((self.geometry.prefix_tokens + patches).tolist())

    def total(self, exits: np.ndarray) -> float:
        return self._cost_of(self._counts(exits))

    def _token_features(self, block: int, alive: np.ndarray, prospect: Prospect) -> np.ndarray:
        """float32 [episode, patch, feature]; see the comments for each feature."""
        episodes, depth = len(alive), self.geometry.depth
        due = prospect.exits <= block
        # Gain of leaving now: for a token that would stay, what leaving promises; for one that is due, what staying
        # one block longer would cost.
        first = np.where(due, prospect.first[block + 1] - prospect.first[block], -prospect.first[block])
        second = np.where(due, prospect.second[block + 1], -prospect.second[block])
        grid = np.pad(alive.reshape(episodes, *self.geometry.grid), ((0, 0), (1, 1), (1, 1))).astype(np.float32)
        height, width = self.geometry.grid
        around = sum(
            grid[:, 1 + y : 1 + y + height, 1 + x : 1 + x + width] for y in (-1, 0, 1) for x in (-1, 0, 1) if x or y
        )
        shared = np.stack(
            [
                np.where(due, 1.0, -1.0),  # What the incumbent does.
                np.clip(first / prospect.unit, -8, 8) / 4,  # What the gradients promise, to first order ...
                np.clip(second / prospect.unit, -8, 8) / 4,  # ... and the Fisher term.
                (block - prospect.exits) / depth,  # How overdue, or how early.
                -self.prior[block],  # Fisher importance at the dense model.
                *self.centre,  # Where it is.
                self.centre.max(0) - self.centre.min(0),  # And how far from the diagonal, a cheap nonlinearity.
            ],
            axis=-1,
        ).astype(np.float32)
        wide = np.broadcast_to(shared, (episodes, *shared.shape))
        # The share of neighbours that are left: tokens say much the same as those beside them.
        return np.concatenate([wide, around.reshape(episodes, -1, 1) / 8], axis=-1)

    def _projected(self, kept: np.ndarray, block: int, left: int, numbers: np.ndarray) -> float:
        """Cost when the rest is played as the incumbent does."""
        rest = np.minimum(numbers[block:], left)
        return self._cost_of(np.concatenate([kept[:block], rest]))

    def _allowed(self, kept: np.ndarray, block: int, wanted: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """bool [episode, offset]: numbers that the budget can bear; the smallest where none can."""
        depth = self.geometry.depth
        limit = self.budget * (1 + SLACK * (1 - (block + 1) / depth))
        allowed = np.zeros(wanted.shape, bool)
        cache: dict[bytes, float] = {}
        for episode in range(len(wanted)):
            for choice, number in enumerate(wanted[episode]):
                rest = np.minimum(numbers[block + 1 :], number)
                counts = np.concatenate([kept[episode, :block], [number], rest])
                key = counts.tobytes()
                if key not in cache:
                    cache[key] = self._cost_of(counts)
                allowed[episode, choice] = cache[key] <= limit
        allowed[~allowed.any(1), 0] = True
        return allowed


def _attachment(game: Game, prospect: Prospect, random: np.random.Generator) -> float:
    """The weight of the incumbent's choice at which about :data:`MOVES` tokens move in an episode, by bisection."""
    low, high = 0.0, 12.0
    for _ in range(8):
        middle = 0.5 * (low + high)
        played = game.play(Policy(middle), prospect, np.ones(8), random)
        if (played.exits != prospect.exits).sum(1).mean() > MOVES:
            low = middle
        else:
            high = middle
    return high


def _first_policy(game: Game, prospect: Prospect, seed: int) -> Policy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy(_attachment(game, prospect, np.random.default_rng([seed, 3])))


def _look_around(world: World, plan: TokenPlan, count: int, random: np.random.Generator) -> Prospect:
    """What the gradients at ``plan`` promise, on ``count`` images drawn from those of rewards."""
    images = np.sort(random.permutation(world.images)[:count])
    return Prospect.at(plan.exits, world.effects(plan, images))


def _game_around(
    world: World, plan: TokenPlan, target: float, cost: Cost | None, importance: np.ndarray | None
) -> Game:
    cost = cost or MacsCost(world.geometry)
    # A plan may be a little over its target (a table re-measured); rearranging must not make that an excuse.
    return Game(world.geometry, cost, max(target * cost.dense, cost.total(plan.key_counts)), importance)


def plans_around(
    world: World,
    plan: TokenPlan,
    *,
    target: float,
    cost: Cost | None = None,
    importance: np.ndarray | None = None,
    count: int = STAND_IN_PLANS,
    images: int = RearrangeSettings.effect_images,
    seed: int = 0,
) -> list[TokenPlan]:
    """Plans within the budget such as a rearrangement of ``plan`` meets: episodes of its first policy, heated.

    Args:
        world, plan, target, cost, importance, seed: As for :func:`rearrange`.
        count: How many.
        images: How many give the gradients that guide the policy.
    """
    random = np.random.default_rng([seed, 5])
    game = _game_around(world, plan, target, cost, importance)
    prospect = _look_around(world, plan, images, random)
    temperatures = np.exp(random.uniform(*np.log(STAND_IN_TEMPERATURES), count))
    played = game.play(_first_policy(game, prospect, seed), prospect, temperatures, random)
    finished = (game.spend(exits, prospect) for exits in played.exits)
    return [TokenPlan.from_exits(world.name, world.geometry, exits) for exits in finished]


# -- the stage -----------------------------------------------------------------------------------------------------


def rearrange(
    world: World,
    plan: TokenPlan,
    *,
    target: float,
    cost: Cost | None = None,
    importance: np.ndarray | None = None,
    firsts: Sequence[TokenPlan] = (),
    settings: RearrangeSettings | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    on_batch: Callable[[int, float], None] = lambda episodes, best: None,
) -> Rearranged:
    """Improve ``plan`` by PPO at no more than ``target`` of the dense model's cost.

    Args:
        world: The model and the images.
        plan: Where to start: the Fisher plan.
        cost: What the budget is of; None: MACs.
        importance: float [exit 0..L, patch N]: Fisher importance, a feature of the policy; None: no prior.
        firsts: Plans within the budget to begin at, such as what :func:`greedy_swaps` made of ``plan``. The best on the
            images of rewards is the first incumbent, if it is better than ``plan`` there.
        checkpoint: A file to resume from, where it exists, and to write after every few batches of episodes.
        on_batch: Called with the number of episodes just played and the relative gain of the incumbent so far.

    Returns:
        Never a plan that is worse than ``plan`` on held-out images. Ctrl-C ends the stage early, not the program.

    Raises:
        UserError: The checkpoint is of another run, or cannot be read.
    """
    settings = settings or RearrangeSettings()
    cost = cost or MacsCost(world.geometry)
    started = time.monotonic()
    run = _Run(world, plan, target, cost, importance, settings, seed, firsts)
    if checkpoint is not None:
        run.resume(Path(checkpoint))
    interrupted, took = False, 0.0
    try:
        while run.played < settings.episodes:
            begun, before = time.monotonic(), run.played
            if took and begun - started + took > settings.time_limit:
                break
            run.batch()
            on_batch(run.played - before, run.improvement)
            if checkpoint is not None and run.batches % 5 == 0:
                run.save(Path(checkpoint))
            took = time.monotonic() - begun
    except KeyboardInterrupt:
        interrupted = True
    if checkpoint is not None:
        run.save(Path(checkpoint))
    judgement = Judgement.of(run.held_out_start[1], run.held_out_best[1])
    if world.stand_in is not None:  # What is reported is of the model with its own weights.
        judgement = Judgement.of(*world.judge([plan, run.best], world.held_out, foresee=False)[1])
    kept = run.best is not plan and _clearly_better(run.held_out_start, run.held_out_best, run.looks)
    refitted = world.stand_in is not None
    note = _told(judgement, kept, run.best is plan, run.played, settings.episodes, interrupted, refitted=refitted)
    details = {
        "episodes": run.played,
        "incumbents": run.incumbents,
        "foresees_tuning": world.stand_in is not None,
        "seconds": round(time.monotonic() - started, 3),
        "settings": asdict(settings),
        "seed": seed,
    }
    return Rearranged(run.best if kept else plan, judgement, kept, note, details, run.history)


def _told(
    judgement: Judgement, kept: bool, nothing: bool, played: int, most: int, interrupted: bool, *, refitted: bool
) -> str:
    """The note of a rearrangement: what became of its best plan, and what ended it early; empty where all is as asked.

    Args:
        nothing: Whether no plan was better on the held-out images at all. One that was, and by too little, is another
            matter: its numbers stand beside the note, and they look better.
        played, most: Episodes, and how many were asked for.
        refitted: Whether plans were judged with stand-in weights; ``judgement`` is with the model's own.
    """
    played_of = counted(played, "episode")
    cut = interrupted or played < most
    if kept:
        if interrupted:
            return f"rearrangement was interrupted after {played_of}; the best plan so far was kept"
        return f"rearrangement stopped at its time limit after {played} of {most} episodes" if cut else ""
    if cut:
        played_of = f"{played} of {most} episodes, {'interrupted' if interrupted else 'stopped at its time limit'}"
    where = f"on {counted(judgement.images, 'held-out image')}"
    if nothing:
        return (
            f"rearrangement found nothing better than the Fisher plan {where} ({played_of}); the Fisher plan was kept"
        )
    # The numbers are with the model's own weights, and with those that tuning would give the gain may be another.
    return (
        f"rearrangement was undone: {judgement.before:.4f} to {judgement.after:.4f} {where} is no gain beyond what "
        f"chance explains{' once weights are refitted' if refitted else ''} ({played_of}); the Fisher plan was kept"
    )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a rearrangement wrote there.

    Raises:
        UserError: It is not the checkpoint of a rearrangement, or one of another version.
    """
    try:
        state = torch.load(path, weights_only=True)
        if state["schema"] != CHECKPOINT_SCHEMA:
            raise ValueError(f"schema {state['schema']}")
        return {**state, "identity": dict(state["identity"])}
    except Exception as error:
        raise UserError(
            f"{path} is not a checkpoint of a rearrangement: {first_line(error, 120)}",
            f"name another file with {option('checkpoint')}, or delete this one",
        ) from None


def _clearly_better(before: Sequence[np.ndarray], after: Sequence[np.ndarray], looks: int = 1) -> bool:
    """Whether (distances, divergences) on held-out images say so: a lower mean divergence, and a distance that is lower
    by more than the best of ``looks`` plans would be by luck, one time in :data:`LUCK`.

    With two standard errors, whatever the looks, 1 of 5 stages that were fed noise kept a plan.
    """
    distance = Judgement.of(before[0], after[0])
    errors = NormalDist().inv_cdf(1 - 1 / (LUCK * max(1, looks)))
    return distance.after < distance.before - errors * distance.error and float(after[1].mean()) < float(
        before[1].mean()
    )


class _Run:
    """The state of one rearrangement between batches of episodes: all that a checkpoint holds."""

    def __init__(self, world, plan, target, cost, importance, settings, seed, firsts=()):
        self.world, self.plan, self.settings = world, plan, settings
        self._facts = {"target": target, "cost": json_sha256(cost.to_json(plan)), "seed": seed}
        self.random = np.random.default_rng([seed, 2])
        self.game = _game_around(world, plan, target, cost, importance)
        self.played = self.batches = self.incumbents = self.looks = 0
        self.history: list[dict[str, float]] = []
        self.heat, self.run_before = 1.0, set()
        self.incumbent = self.best = plan
        #: (distances, divergences) on the held-out images, each float64 [image].
        self.held_out_start = self.held_out_best = self._on_held_out(plan)
        #: float64 [image]: the incumbent's distance on ``world.images``, and the start's mean there.
        self.reference = world.judge([plan], world.images)[0][0]
        self.start = float(self.reference.mean())
        self._begin_at_the_best_of([first for first in firsts if first.digest != plan.digest])
        self.evidence = Evidence(world.geometry.depth, world.geometry.patches)
        self.prospect = self._look_around()
        self.policy = _first_policy(self.game, self.prospect, seed)
        self.ppo = PPOSettings()
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=self.ppo.learning_rate)

    def _begin_at_the_best_of(self, firsts: Sequence[TokenPlan]) -> None:
        if not firsts:
            return
        distances = self.world.judge(firsts, self.world.images)[0]
        best = int(distances.mean(1).argmin())
        if Judgement.of(self.reference, distances[best]).better:
            self.incumbent, self.reference = firsts[best], distances[best]
            self._remember_if_best()

    def batch(self) -> None:
        """One batch of episodes: sample, screen, run, learn, and let the best challenge the incumbent."""
        settings, world = self.settings, self.world
        most = min(settings.batch, settings.episodes - self.played)
        low, high = np.log(TEMPERATURES)
        temperature = self.heat * np.exp(self.random.uniform(low, high, most * settings.screened))
        # Episodes of a batch open alike, as the incumbent does: what they share is run once.
        opening = int(self.random.integers(0, world.geometry.depth))
        sampled = self.game.play(self.policy, self.prospect, temperature, self.random, opening)
        rows = self._screen(sampled, most)
        self.batches += 1
        self.played += max(1, len(rows))
        if not rows:
            return
        episodes = sampled.select(rows)
        finished = [self.game.spend(exits, self.prospect) for exits in episodes.exits]
        plans = [TokenPlan.from_exits(world.name, world.geometry, exits) for exits in finished]
        chosen = np.sort(self.random.permutation(len(world.images))[: settings.images])
        distances, _ = world.judge(plans, world.images[chosen])
        rewards = self._rewards(self.reference[chosen], distances, plans)
        with torch.no_grad():
            old_log_probs = episodes.score(self.policy)[0]
        ends = torch.zeros_like(old_log_probs)
        ends[:, -1] = torch.from_numpy(rewards).float()
        report = update(lambda: episodes.score(self.policy), self.optimizer, old_log_probs, ends, self.ppo)
        self._observe(plans, self.reference[chosen], distances)
        accepted = self._challenge(plans, rewards)
        moved = (episodes.exits != self.prospect.exits).sum(1).mean()
        if accepted or self.batches % 4 == 0:
            self.prospect = self._look_around()
        self.history.append(
            {
                "episodes": self.played,
                "mean_reward": float(rewards.mean()),
                "best_reward": float(rewards.max()),
                "moved": float(moved),
                "improvement": self.improvement,
                "incumbents": self.incumbents,
                **report,
            }
        )

    def _look_around(self) -> Prospect:
        return _look_around(self.world, self.incumbent, self.settings.effect_images, self.random)

    def _screen(self, sampled: Episodes, most: int) -> list[int]:
        """At most ``most`` rows worth running: not run before around this incumbent, distinct, best by the quadratic
        estimate.

        A policy that has settled down samples what it knows. When few samples are new, it is heated until more are.
        """
        seen = {self.incumbent.exits.tobytes()} | self.run_before
        estimates = []
        for row, exits in enumerate(sampled.exits):
            if exits.tobytes() not in seen:
                seen.add(exits.tobytes())
                estimates.append((self.prospect.estimate(exits), row))
        scarce = len(estimates) < len(sampled.exits) // 2
        self.heat = min(MOST_HEAT, self.heat * 1.25) if scarce else max(1.0, self.heat / 1.25)
        rows = [row for _, row in sorted(estimates)[:most]]
        self.run_before |= {sampled.exits[row].tobytes() for row in rows}
        return rows

    def _rewards(self, reference: np.ndarray, distances: np.ndarray, plans: Sequence[TokenPlan]) -> np.ndarray:
        """float64 [plan], from the incumbent's distances [image] and those of ``plans`` [plan, image]."""
        before = float(reference.mean())
        over = np.array([self.game.total(plan.exits) / self.game.budget - 1 for plan in plans])
        rewards = (before - distances.mean(1)) / max(abs(before), 1e-9) - OVER_BUDGET_WEIGHT * np.maximum(over, 0)
        return np.nan_to_num(rewards, nan=-1.0, posinf=-1.0, neginf=-1.0)

    def _challenge(self, plans: Sequence[TokenPlan], rewards: np.ndarray) -> bool:
        """Judge the best episodes, and what all episodes together suggest, on all images that may give rewards; a
        winner replaces the incumbent.

        The images of one batch tell good episodes from bad ones, not a gain of 2 % from luck: picking the best of 16 on
        64 images, again and again, followed the noise (69 % better there, 18 % on held-out images).
        """
        affordable = [row for row in np.argsort(-rewards) if self.game.total(plans[row].exits) <= self.game.budget]
        finalists = [plans[row] for row in affordable[: self.settings.finalists] if rewards[row] > 0]
        finalists += self._proposals({plan.digest for plan in finalists})
        if not finalists:
            return False
        # Each part of the images that a challenge ends on saves the rest.
        order, start, size = self.random.permutation(len(self.world.images)), 0, FIRST_LOOK
        after = np.empty_like(self.reference)
        while start < len(order):
            look = np.sort(order[start : start + size])
            distances, _ = self.world.judge(finalists, self.world.images[look])
            if start == 0:
                self._observe(finalists, self.reference[look], distances)
                winner = int(distances.mean(1).argmin())
                finalists, distances = [finalists[winner]], distances[winner : winner + 1]
            after[look] = distances[0]
            start, size = start + size, 2 * size
            seen = order[:start]
            if not after[seen].mean() < self.reference[seen].mean():
                return False
        if not Judgement.of(self.reference, after).better:
            return False
        self.incumbent, self.reference = finalists[0], after
        self.run_before.clear()
        self.incumbents += 1
        self._remember_if_best()
        return True

    def _observe(self, plans: Sequence[TokenPlan], reference: np.ndarray, distances: np.ndarray) -> None:
        """Add to the evidence, from the incumbent's distances [image] and those of ``plans`` [plan, image]."""
        scale = max(float(reference.mean()), 1e-9)
        for plan, row in zip(plans, distances, strict=True):
            promised = -self._promised(plan.exits) / scale
            self.evidence.add(self.prospect.exits, plan.exits, promised, (reference - row) / scale)

    def _promised(self, exits: np.ndarray) -> float:
        return float(self.prospect.first[exits, np.arange(len(exits))].sum())

    def _proposals(self, known: set[str]) -> list[TokenPlan]:
        """Plans that the evidence speaks for; none that is the incumbent or in ``known`` (digests)."""
        self.evidence.fit()
        expected = self.evidence.expected(self.prospect, max(float(self.reference.mean()), 1e-9))
        proposals = []
        for most in PROPOSED_MOVES:
            exits = self.game.propose(expected, self.prospect, most)
            plan = TokenPlan.from_exits(self.world.name, self.world.geometry, exits)
            if plan.digest not in known | {self.incumbent.digest} and self.game.total(exits) <= self.game.budget:
                known.add(plan.digest)
                proposals.append(plan)
        return proposals

    def _remember_if_best(self) -> None:
        held_out = self._on_held_out(self.incumbent)
        self.looks += 1
        if held_out[0].mean() < self.held_out_best[0].mean():
            self.best, self.held_out_best = self.incumbent, held_out

    def _on_held_out(self, plan: TokenPlan) -> np.ndarray:
        """float64 [distance and divergence, image]."""
        return np.concatenate(self.world.judge([plan], self.world.held_out))

    @property
    def improvement(self) -> float:
        """How much lower the incumbent's distance is than the start's, on the images of rewards."""
        return 1 - float(self.reference.mean()) / max(self.start, 1e-12)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint goes with."""
        return {"plan": self.plan.digest, **self._facts, "images": self.world.digest}

    def save(self, path: Path) -> None:
        state = {
            "schema": CHECKPOINT_SCHEMA,
            "identity": self.identity,
            "played": self.played,
            "batches": self.batches,
            "incumbents": self.incumbents,
            "looks": self.looks,
            "reference": torch.from_numpy(self.reference),
            "history": self.history,
            "heat": self.heat,
            "run_before": sorted(np.frombuffer(exits, np.int64).tolist() for exits in self.run_before),
            "incumbent": self.incumbent.exits.tolist(),
            "best": self.best.exits.tolist(),
            "held_out_best": torch.from_numpy(self.held_out_best),
            "random": self.random.bit_generator.state,
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "moves": torch.from_numpy(self.prospect.moves),
            "moves_from": self.prospect.exits.tolist(),
            "unit": self.prospect.unit,
            "evidence": self.evidence.state(),
        }
        # PyTorch says nothing of a full disk where it writes the file itself.
        torch.save(state, buffer := io.BytesIO())
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def resume(self, path: Path) -> None:
        if not path.exists():
            return
        state = read_checkpoint(path)
        different = [name for name, value in self.identity.items() if state["identity"].get(name) != value]
        if different:
            raise UserError(
                f"{path} is the checkpoint of another run: its {different[0]} is "
                f"{state['identity'].get(different[0])}, here it is {self.identity[different[0]]}",
                f"name another file with {option('checkpoint')}, or delete this one",
            )
        geometry, name = self.world.geometry, self.world.name
        self.played, self.batches = state["played"], state["batches"]
        self.incumbents, self.looks = state["incumbents"], state["looks"]
        self.reference = state["reference"].numpy()
        self.history, self.heat = state["history"], state["heat"]
        self.run_before = {np.array(exits, np.int64).tobytes() for exits in state["run_before"]}
        self.incumbent = self.best = self.plan
        if state["incumbent"] != self.plan.exits.tolist():
            self.incumbent = TokenPlan.from_exits(name, geometry, np.array(state["incumbent"]))
            if state["best"] != self.plan.exits.tolist():
                self.best = TokenPlan.from_exits(name, geometry, np.array(state["best"]))
        self.held_out_best = state["held_out_best"].numpy()
        self.random.bit_generator.state = state["random"]
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.evidence.restore(state["evidence"])
        if state["moves_from"] != self.incumbent.exits.tolist():  # Interrupted between the two.
            self.prospect = self._look_around()
            return
        self.prospect = Prospect.of(self.incumbent.exits, state["moves"].numpy(), state["unit"])


# -- the baseline --------------------------------------------------------------------------------------------------


def greedy_swaps(
    world: World,
    plan: TokenPlan,
    *,
    target: float,
    cost: Cost | None = None,
    seed: int = 0,
    images: int = 512,
    most_swaps: int = 1000,
) -> tuple[TokenPlan, int]:
    """Greedy swapping on the quadratic Fisher estimate, as Kwon et al. 2022 (arXiv 2204.09656, section 5.2) rearrange.

    The dense model's gate gradients are kept per image; again and again the swap of two tokens' exits that lowers
    0.5 * mean over images of (sum over closed gates of g)^2 most is made. The model as pruned is never run.

    Args:
        world, plan, target, cost: As for :func:`rearrange`.
        seed: Draws the images, and the directions of their gradients.
        images: How many give gradients.

    Returns:
        (plan, swaps): within the budget, and not judged by anything but the estimate; and how many swaps made it.
    """
    game = _game_around(world, plan, target, cost, None)
    gates = world.curvature(np.sort(np.random.default_rng([seed, 4]).permutation(world.images)[:images]), seed)
    patches = world.geometry.patches
    # sums[x, e, i]: gradient of all the gates that token i closes when it leaves at block e.
    sums = np.concatenate([np.flip(np.cumsum(np.flip(gates, 1), 1), 1), np.zeros_like(gates[:, :1])], axis=1)
    exits = plan.exits.copy()
    tokens = np.arange(patches)
    total = sums[:, exits, tokens].sum(1, dtype=np.float64)
    swaps = 0
    for _ in range(most_swaps):
        # Change of the sum when token i leaves where token j does now: [image, token i, token j].
        own = sums[:, exits, tokens]
        best, pair = np.square(total).mean() * (1 - 1e-6), None
        for token in range(patches):
            after = total[:, None] + (sums[:, exits, token] - own[:, token, None]) + (sums[:, exits[token], :] - own)
            value = np.square(after).mean(0)
            other = int(value.argmin())
            if exits[other] != exits[token] and value[other] < best:
                best, pair = value[other], (token, other)
        if pair is None:
            break
        one, other = pair
        trial = exits.copy()
        trial[one], trial[other] = exits[other], exits[one]
        if game.total(trial) > game.budget:  # A swap leaves the counts as they are; only a rounding error gets here.
            break
        exits, swaps = trial, swaps + 1
        total = sums[:, exits, tokens].sum(1, dtype=np.float64)
    return TokenPlan.from_exits(world.name, world.geometry, exits), swaps


def swap_greedily(world: World, plan: TokenPlan, **options: Any) -> Rearranged:
    """:func:`greedy_swaps`, judged on the held-out images: the baseline for :func:`rearrange`.

    Args, Returns: as :func:`rearrange`; ``options`` as :func:`greedy_swaps`.
    """
    started = time.monotonic()
    found, swaps = greedy_swaps(world, plan, **options)
    distances, divergences = world.judge([plan, found], world.held_out)
    judgement = Judgement.of(*divergences)
    kept = _clearly_better((distances[0], divergences[0]), (distances[1], divergences[1]))
    note = "" if kept else "greedy swapping did not help on held-out images; the Fisher plan was kept"
    details = {"swaps": swaps, "seconds": round(time.monotonic() - started, 3), "depth": world.geometry.depth}
    return Rearranged(found if kept else plan, judgement, kept, note, details)
