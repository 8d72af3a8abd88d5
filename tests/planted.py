"""A world for the rearrangement whose best plan is known: no model, closed gates add to the distance."""

import numpy as np

from vpruner.core.geometry import Geometry
from vpruner.core.plan import TokenPlan
from vpruner.prune.fisher import losses_of
from vpruner.prune.rearrange.stage import game_around
from vpruner.prune.search import search_mask


class PlantedWorld:
    """Each closed gate has a true loss; gradients misjudge it by a factor for each kind and block.

    Args:
        wrong: Standard deviation of the logarithm of that factor; 0: the search knows the best plan.
        noise: Of the distance of one image, relative.
    """

    stand_in, name = None, "planted"
    depth, grid = 6, (6, 6)

    def __init__(self, seed: int = 0, wrong: float = 1.2, noise: float = 0.1, pooled: bool = False):
        random = np.random.default_rng(seed)
        self.geometry = Geometry(
            depth=self.depth, embed_dim=32, num_heads=2, head_dim=16, grid=self.grid, prefix_tokens=1,
            image_size=(48, 48), mlp_macs=8 * 32 * 32, head_prefix=1, head_patches=pooled, outputs=10,
        )  # fmt: skip
        shape = (3, self.geometry.depth, self.geometry.patches)
        true = random.exponential(size=shape) * np.array([2.0, 1.0, 1.5])[:, None, None]
        if not pooled:
            true[1:, -1] = 0
        factors = np.exp(wrong * random.standard_normal(shape[:2]))[..., None]
        self.true = true / true.sum()
        self.moments = np.zeros((3, *shape))
        for kind in range(3):
            self.moments[kind, kind] = self.true[kind] * factors[kind]
        self.images, self.held_out = np.arange(768), np.arange(768, 1024)
        self.scale = random.lognormal(sigma=0.3, size=1024)
        self.noise = noise
        self.judged = 0

    def loss(self, plan: TokenPlan) -> float:
        return float(self.true[~plan.masks].sum())

    def judge(self, plans, indices, *, foresee=True):
        self.judged += len(plans) * len(indices)
        rows = []
        for plan in plans:
            own = np.random.default_rng(np.frombuffer(bytes.fromhex(plan.digest[:32]), np.uint32))
            noise = own.standard_normal(len(self.scale))[indices]
            rows.append(self.loss(plan) * self.scale[indices] * (1 + self.noise * noise))
        return np.array(rows), np.square(rows)

    @property
    def digest(self) -> str:
        return "planted"

    def plan(self, moments, target=0.5, form="exits") -> TokenPlan:
        return search_mask(losses_of(moments), self.geometry, target, form=form).plan(self.name, self.geometry)

    def start(self, target=0.5, form="exits"):
        """(plan of the search, game around it)."""
        plan = self.plan(self.moments, target, form)
        return plan, game_around(self, plan, self.moments, target, form=form)

    def best(self, target=0.5) -> TokenPlan:
        """What the search makes of the true losses."""
        moments = np.zeros_like(self.moments)
        for kind in range(3):
            moments[kind, kind] = self.true[kind]
        return self.plan(moments, target)


class SmallWorld(PlantedWorld):
    """For what holds whatever there is to find: a search takes a third of the time."""

    depth, grid = 3, (4, 4)
