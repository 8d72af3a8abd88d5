"""Stage 2, token mask rearrangement: spread the budget so that the pruned model agrees better, by PPO.

The game is that of :mod:`vpruner.prune.rearrange.play`, the policy is trained by clipped PPO
(:mod:`vpruner.prune.ppo`). Reward of an episode: the relative drop in distance from the dense model against the best
plan so far (the *incumbent*) on the same images. The best episode of a batch challenges the incumbent on images that
did not choose it; tilts count from the winner then. What is returned is the best incumbent on images that no reward
was ever computed on, or the plan of the search.

What ships is tuned afterwards (:mod:`vpruner.prune.tune`), and tuning makes some gains worthless. Where weights will be
tuned, plans are therefore judged with stand-in weights, refitted to many plans around the start at once
(:meth:`~vpruner.prune.rearrange.world.World.foresee_tuning`).

The stage ends by itself once its evidence says that more episodes are not worth it
(:class:`~vpruner.prune.rearrange.play.Potential`); that counts episodes and images, not seconds, so the same seed gives
the same plan.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from ...core.cost import Cost, MacsCost
from ...core.errors import UserError
from ...core.files import atomic_path
from ...core.json_file import json_sha256
from ...core.plan import TokenPlan
from ...core.text import counted, first_line, option
from .. import ranks
from ..calibration import Judgement
from ..ppo import PPOSettings, update
from .play import ACTIONS, Game, Policy, Potential
from .settings import Rearranged, RearrangeSettings
from .world import World

#: Version of the checkpoint file.
CHECKPOINT_SCHEMA = 4
#: A stage fed with noise keeps a plan one time in so many, at most: 2.6 standard errors for a single plan.
LUCK = 200
#: Plans around the start that stand-in weights are refitted to.
STAND_IN_PLANS = 8
#: Reward lost per unit of cost over budget. The search keeps it; what is left is the rounding of a latency table.
OVER_BUDGET_WEIGHT = 20.0


def game_around(
    world: World, plan: TokenPlan, moments: np.ndarray, target: float, cost: Cost | None = None, form: str = "exits"
) -> Game:
    """The game of plans that cost no more than ``target`` of the dense model, or than ``plan`` does.

    A plan may be a little over its target (a table re-measured); rearranging must not make that an excuse.
    """
    cost = cost or MacsCost(world.geometry)
    return Game(world.name, world.geometry, moments, cost, max(target * cost.dense, cost.of(plan)), form)


def plans_around(game: Game, plan: TokenPlan, seed: int, count: int = STAND_IN_PLANS) -> list[TokenPlan]:
    """``count`` plans: the start, and first episodes around it."""
    tilts = _first_policy(plan, seed).play(count - 1, np.random.default_rng([seed, 5])).numpy()
    return [plan, *ranks.collected([game.plan(chosen) for chosen in ranks.share(tilts)])]


def rearrange(
    world: World,
    plan: TokenPlan,
    game: Game,
    *,
    settings: RearrangeSettings | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    on_batch: Callable[[int, float], None] = lambda episodes, best: None,
) -> Rearranged:
    """Improve ``plan`` by PPO within the budget of ``game``.

    Args:
        world: The model and the images.
        plan: Where to start: the plan of the search.
        checkpoint: A file to resume from, where it exists, and to write after every batch of episodes.
        on_batch: Called with the number of episodes just played and the relative gain of the incumbent so far.

    Returns:
        Never a plan that is worse than ``plan`` on held-out images. Ctrl-C ends the stage early, not the program.

    Raises:
        UserError: The checkpoint is of another run, or cannot be read.
    """
    settings = settings or RearrangeSettings()
    started = time.monotonic()
    run = _Run(world, plan, game, settings, seed)
    if checkpoint is not None:
        run.resume(Path(checkpoint))
    ended, took = run.ended, 0.0
    try:
        while run.played < settings.episodes and not ended:
            begun, before = time.monotonic(), run.played
            late = bool(settings.time_limit and took and begun - started + took > settings.time_limit)
            if ranks.from_first(late):
                ended = "its time limit ended it"
                break
            run.batch()
            on_batch(run.played - before, run.improvement)
            if checkpoint is not None:
                run.save(Path(checkpoint))
            took = time.monotonic() - begun
            ended = run.ended
    except KeyboardInterrupt:
        if ranks.world().size > 1:  # One process cannot end the stage early for all.
            raise
        ended = "it was interrupted"
    judgement = Judgement.of(run.held_out_start[1], run.held_out_best[1])
    if world.stand_in is not None:  # What is reported is of the model with its own weights.
        judgement = Judgement.of(*world.judge([plan, run.best], world.held_out, foresee=False)[1])
    kept = run.best is not plan and clearly_better(run.held_out_start, run.held_out_best, run.incumbents)
    details = {
        "episodes": run.played,
        "incumbents": run.incumbents,
        "foresees_tuning": world.stand_in is not None,
        "ended": ended,
        "settings": asdict(settings),
        "seed": seed,
    }
    return Rearranged(run.best if kept else plan, judgement, kept, _note(run, kept, ended), details, run.history)


def _note(run: _Run, kept: bool, ended: str) -> str:
    """One sentence: what ended the stage early and what became of its plan; empty where all is as asked."""
    played = f"{run.played} of {counted(run.settings.episodes, 'episode')}"
    found = "" if kept else "; no plan was better than that of the search by more than chance explains"
    if not ended and kept:
        return ""
    return f"Rearrangement ended after {played}{': ' if ended else ''}{ended}{found}."


def clearly_better(before: Sequence[np.ndarray], after: Sequence[np.ndarray], looks: int = 1) -> bool:
    """Whether (distances, divergences) on held-out images say so: a lower mean divergence, and a distance that is lower
    by more than the best of ``looks`` plans would be by luck, one time in :data:`LUCK`.
    """
    distance = Judgement.of(before[0], after[0])
    errors = NormalDist().inv_cdf(1 - 1 / (LUCK * max(1, looks)))
    lower = float(after[1].mean()) < float(before[1].mean())
    return lower and distance.after < distance.before - errors * distance.error


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """What a rearrangement wrote there.

    Raises:
        UserError: It is not the checkpoint of a rearrangement, or one of another version.
    """
    try:
        state = torch.load(path, weights_only=True)
        if state["schema"] != CHECKPOINT_SCHEMA:
            raise ValueError(f"schema {state['schema']}, expected {CHECKPOINT_SCHEMA}")
        return {**state, "identity": dict(state["identity"])}
    except Exception as error:
        raise UserError(
            f"{path} is not a checkpoint of a rearrangement: {first_line(error, 120).partition('. ')[0]}",
            f"delete it, or leave out {option('resume')} to begin anew",
        ) from None


def _first_policy(plan: TokenPlan, seed: int) -> Policy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy(plan)


class _Run:
    """The state of one rearrangement between batches of episodes: all that a checkpoint holds."""

    def __init__(self, world: World, plan: TokenPlan, game: Game, settings: RearrangeSettings, seed: int):
        self.world, self.plan, self.game, self.settings, self.seed = world, plan, game, settings, seed
        self.random = np.random.default_rng([seed, 2])
        self.played = self.batches = self.incumbents = 0
        self.history: list[dict[str, float]] = []
        self.potential = Potential([])
        self.incumbent = self.best = plan
        #: float32 [block L, action]: what tilts count from.
        self.base = np.zeros((plan.geometry.depth, ACTIONS), np.float32)
        #: (distances, divergences) on the held-out images, each float64 [image].
        self.held_out_start = self.held_out_best = self._on_held_out(plan)
        #: float64 [image]: the incumbent's distance on ``world.images``, NaN where nobody has asked for it yet: most
        #: stages end before they have looked at every image. The start's mean there, once there is an incumbent.
        self.reference = np.full(len(world.images), np.nan)
        self.start = math.nan
        self.policy = _first_policy(plan, seed)
        self.ppo = PPOSettings()
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=self.ppo.learning_rate)

    def batch(self) -> None:
        """One batch of episodes: play, run, learn, and let the best challenge the incumbent."""
        count = min(self.settings.batch, self.settings.episodes - self.played)
        tilts = ranks.from_first(self.policy.play(count, self.random))
        plans = ranks.collected([self.game.plan(self.base + chosen) for chosen in ranks.share(tilts.numpy())])
        order = self.random.permutation(len(self.world.images))
        # Of few images half choose, and half judge what was chosen.
        size = min(self.settings.images, len(order) // 2)
        chosen, others = np.sort(order[:size]), order[size:]
        distances, _ = self.world.judge(plans, self.world.images[chosen])
        rewards = self._rewards(self._distances_before(chosen), distances, plans)
        with torch.no_grad():
            old_log_probs = self.policy.score(tilts)[0]
        ends = torch.zeros_like(old_log_probs)
        ends[:, -1] = torch.from_numpy(rewards).float()
        report = update(lambda: self.policy.score(tilts), self.optimizer, old_log_probs, ends, self.ppo)
        self.batches += 1
        self.played += count
        best = int(rewards.argmax())
        found = np.full(len(order), np.nan)
        found[chosen] = distances[best]
        self._challenge(plans[best], tilts[best].numpy(), found, others)
        self.history.append(
            {
                "episodes": self.played,
                "mean_reward": float(rewards.mean()),
                "best_reward": float(rewards.max()),
                "improvement": self.improvement,
                "incumbents": self.incumbents,
                **report,
            }
        )

    def _distances_before(self, places: np.ndarray) -> np.ndarray:
        """float64 [place]: the incumbent's, on those of ``world.images``."""
        new = places[np.isnan(self.reference[places])]
        if len(new):
            self.reference[new] = self.world.judge([self.incumbent], self.world.images[new])[0][0]
        return self.reference[places]

    def _rewards(self, reference: np.ndarray, distances: np.ndarray, plans: Sequence[TokenPlan]) -> np.ndarray:
        """float64 [plan], from the incumbent's distances [image] and those of ``plans`` [plan, image]."""
        before, budget = float(reference.mean()), self.game.target * self.game.cost.dense
        over = np.array([self.game.cost.of(plan) / budget - 1 for plan in plans])
        rewards = (before - distances.mean(1)) / max(abs(before), 1e-9) - OVER_BUDGET_WEIGHT * np.maximum(over, 0)
        return np.nan_to_num(rewards, nan=-1.0, posinf=-1.0, neginf=-1.0)

    def _challenge(self, plan: TokenPlan, tilts: np.ndarray, found: np.ndarray, others: np.ndarray) -> None:
        """Judge the best episode on the images that did not choose it, until they show that it gains too little.

        The images of one batch tell good episodes from bad ones, not a gain of 3 % from luck. Most best episodes are
        worse than the incumbent, which a few hundred images show; only one that may be better is judged on all.

        Args:
            plan, tilts: Of the episode; tilts [block, action].
            found: float64 [image]: its distances on ``world.images`` where they are known, to which these are added.
            others: int64 [image]: places of those that did not choose it.
        """
        count = 0
        while count < len(others):
            more = others[count : max(2 * count, self.settings.images)]
            found[more] = self.world.judge([plan], self.world.images[more])[0][0]
            count += len(more)
            judged = Judgement.of(self._distances_before(others[:count]), found[others[:count]])
            scale = max(judged.before, 1e-9)
            gain, error = (judged.before - judged.after) / scale, judged.error / scale
            if gain + 2 * error < self.settings.worth:
                break
        self.potential.add(gain, error)
        if not judged.better or count < len(others):
            return
        if not self.incumbents:  # The batch has looked at every image.
            self.start = float(self.reference.mean())
        # In one line: Ctrl-C leaves the last one whole.
        self.incumbent, self.base, self.reference = plan, self.base + tilts, found
        self.incumbents += 1
        held_out = self._on_held_out(self.incumbent)
        if held_out[0].mean() < self.held_out_best[0].mean():
            self.best, self.held_out_best = self.incumbent, held_out

    def _on_held_out(self, plan: TokenPlan) -> np.ndarray:
        """float64 [distance and divergence, image]."""
        return np.concatenate(self.world.judge([plan], self.world.held_out))

    @property
    def ended(self) -> str:
        """Why no more episodes are worth it, for the note; empty while they may be."""
        worth, patience = self.settings.worth, self.settings.patience
        if not self.potential.exhausted(worth, patience):
            return ""
        before = self.history[-patience - 1]["episodes"] if len(self.history) > patience else 0
        return f"the last {self.played - before} can have gained less than {worth:.0%}"

    @property
    def improvement(self) -> float:
        """How much lower the incumbent's distance is than the start's, on the images of rewards."""
        return 1 - float(self.reference.mean()) / max(self.start, 1e-12) if self.incumbents else 0.0

    # -- checkpoints ------------------------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint goes with."""
        return {
            "plan": self.plan.digest,
            "target": self.game.target,
            "form": self.game.form,
            "cost": json_sha256(self.game.cost.to_json(self.plan)),
            "seed": self.seed,
            "images": self.world.digest,
        }

    def save(self, path: Path) -> None:
        if not ranks.world().first:
            return
        state = {
            "schema": CHECKPOINT_SCHEMA,
            "identity": self.identity,
            **{name: getattr(self, name) for name in ("played", "batches", "incumbents", "start", "history")},
            "bounds": self.potential.bounds,
            "reference": torch.from_numpy(self.reference),
            "base": torch.from_numpy(self.base),
            "incumbent": torch.from_numpy(self.incumbent.masks),
            "best": torch.from_numpy(self.best.masks),
            "held_out_best": torch.from_numpy(self.held_out_best),
            "random": self.random.bit_generator.state,
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        # PyTorch says nothing of a full disk where it writes the file itself.
        torch.save(state, buffer := io.BytesIO())
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def resume(self, path: Path) -> None:
        read = ranks.world().first and path.exists()
        state = ranks.from_first(read_checkpoint(path) if read else None)
        if state is None:
            return
        different = [name for name, value in self.identity.items() if state["identity"].get(name) != value]
        if different:
            raise UserError(
                f"{path} is the checkpoint of another run: its {different[0]} is "
                f"{state['identity'].get(different[0])}, here it is {self.identity[different[0]]}",
                f"delete it, or leave out {option('resume')} to begin anew",
            )
        for name in ("played", "batches", "incumbents", "start", "history"):
            setattr(self, name, state[name])
        self.potential = Potential(list(state["bounds"]))
        self.reference, self.base = state["reference"].numpy(), state["base"].numpy()
        self.incumbent, self.best = (self._plan(state[name].numpy()) for name in ("incumbent", "best"))
        self.held_out_best = state["held_out_best"].numpy()
        self.random.bit_generator.state = state["random"]
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _plan(self, masks: np.ndarray) -> TokenPlan:
        """Of a checkpoint; the start is the start itself, not one like it."""
        if (masks == self.plan.masks).all():
            return self.plan
        plan = TokenPlan.from_masks(self.world.name, self.world.geometry, masks)
        return TokenPlan.dropping(plan.model, plan.geometry, plan.keys) if self.game.form == "drop" else plan
