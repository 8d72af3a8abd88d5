"""What processes that learn together find: ``python ranks_worker.py FOLDER GRAPH`` starts two, and then three."""

import json
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tiny_vits import calibration_for, frozen_plan, half_plan, tiny

from vpruner.core.errors import UserError
from vpruner.core.preprocess import Preprocessing
from vpruner.core.specs import LearnSpec
from vpruner.export.graph_model import open_graph_model
from vpruner.prune import ranks
from vpruner.prune.backbones.vit import ViTAdapter, weights_sha256
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.fisher import gate_gradients
from vpruner.prune.learn import learn
from vpruner.prune.learned import Learned
from vpruner.prune.loaded import LoadedModel
from vpruner.prune.rearrange.settings import RearrangeSettings
from vpruner.prune.saved import SavedState
from vpruner.prune.tune.ridge import NormalEquations
from vpruner.prune.tune.weights import refit_weights

#: Exit code of the process that ends too early.
DIES = 7
#: 11 to fit to: neither two nor three processes have equal shares of them.
IMAGES = 14
#: How each model is learned; the first goes on from a state that one process began.
WAYS = {
    "ppo, weights": dict(rearrange="ppo", tune="weights"),
    "greedy, gates": dict(rearrange="greedy", tune="gates"),
    "distilled gates": dict(rearrange="none", tune="gates-distill"),
    "by content": dict(rearrange="none", tune="weights", select="content"),
    "graph": dict(rearrange="ppo", tune="weights"),
}
EPISODES = RearrangeSettings(episodes=10, batch=5, images=8, worth=0.0)
#: A graph is folded anew for each.
FEW_EPISODES = replace(EPISODES, episodes=5)
#: How many processes there are, and in which ways they learn.
SIZES = {2: tuple(WAYS), 3: ("ppo, weights",)}
PREPROCESSING = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, size=(32, 48))


def found(folder: Path, graph: Path, ways: Sequence[str]) -> dict[str, np.ndarray]:
    """Name -> what was found, by the process alone or by those that it has joined."""
    with ranks.joined():
        results = {**_sums(), **_exchanged()}
    for way in ways:
        learned = learned_by(way, folder, graph)
        results[f"{way}: masks"] = learned.plan.masks
        results[f"{way}: divergences"] = np.array(
            [(s.judgement.before, s.judgement.after) for s in learned.stages if s.judgement is not None]
        )
        weights = learned.weights or {}
        results[f"{way}: weights"] = np.concatenate([v.double().numpy().ravel() for v in weights.values()] or [[]])
        if learned.plan.gates is not None:
            results[f"{way}: gates"] = np.concatenate(learned.plan.gates)
        if learned.content is not None:
            results[f"{way}: channels"] = np.array(learned.content.channels)
        played = next((stage.details.get("episodes") for stage in learned.stages if stage.method == "ppo"), 0)
        results[f"{way}: episodes"] = np.array(played)
    return results


def learned_by(way: str, folder: Path, graph: Path, *, resume: bool = True) -> Learned:
    torch.manual_seed(0)
    if way == "graph":
        loaded = open_graph_model(graph, preprocessing={"mean": (0.5,) * 3, "std": (0.25,) * 3})
    else:
        model = tiny("class token", depth=2)
        loaded = LoadedModel(ViTAdapter(model, "tiny"), PREPROCESSING, None, weights_sha256(model))
    saved = SavedState(folder / "state", resume=resume) if way == "ppo, weights" else None
    spec = LearnSpec(target=0.6, rounds=2, **WAYS[way])
    source = ImageSource(str(folder / f"images{loaded.preprocessing.size[0]}"))
    return learn(
        loaded,
        ImageSet(source, range(IMAGES)),
        spec,
        settings=FEW_EPISODES if way == "graph" else EPISODES,
        saved=saved,
    )


def _sums() -> dict[str, np.ndarray]:
    """In float64, of a model of that."""
    adapter = ViTAdapter(tiny("class token", depth=3).double(), "tiny")
    calibration = calibration_for(adapter, IMAGES, 3)
    fit = calibration.fit
    batches = calibration.batches(ranks.share(fit), 4)
    gradients = gate_gradients(adapter, batches, "self", before=ranks.bounds(len(fit))[0])
    plans = [half_plan(adapter), frozen_plan(adapter)]
    weights, details = refit_weights(adapter, plans, calibration, fit, flip=True)
    single = ViTAdapter(tiny("class token", depth=3), "tiny")
    random = np.random.default_rng(0)
    rows, targets = (torch.from_numpy(random.standard_normal((11, 3, count))) for count in (6, 2))
    equations = NormalEquations(6, 2, 4)
    for number in ranks.share(range(11)):
        equations.add(number % 4, rows[number], targets[number])
    solution = equations.sum_up().solve()
    return {
        "sum: moments": gradients.moments,
        "sum: images": np.array(gradients.images),
        "float64: weights": torch.cat([value.flatten() for value in weights.values()]).numpy(),
        "sum: refit images": np.array([details["images"], details["folds"]]),
        "sum: equations": torch.cat(
            [equations.grams.flatten(), equations.crosses.flatten(), equations.squares]
        ).numpy(),
        "sum: solution": np.array([solution.ridge or 0, solution.explained]),
        "two: divergences": calibration.divergence(single, half_plan(single), calibration.held_out[:2]),
    }


def _exchanged() -> dict[str, np.ndarray]:
    """What is shared out comes back whole; of one row most processes have none."""
    rows = torch.arange(10).reshape(5, 2)
    size = ranks.world().size
    return {
        "exchanged: rows": ranks.gathered(ranks.share(rows)).numpy(),
        "exchanged: row": ranks.gathered(ranks.share(rows[:1])).numpy(),
        "exchanged: objects": np.array(ranks.collected(ranks.share([str(number) for number in range(5)]))),
        "exchanged: first": np.array(ranks.from_first(ranks.world().rank)),
        "exchanged: total": ranks.summed(torch.tensor(1 / size))[0].numpy(),
        "exchanged: all": np.array([ranks.everywhere(True), ranks.everywhere(size > 1 and ranks.world().first)]),
    }


def main(folder: Path, graph: Path) -> None:
    """Of one of the processes; leaves ``found`` and ``facts`` in the folder."""
    place = ranks.launched()
    if place.first:
        shutil.copytree(folder / "begun", folder / "state", dirs_exist_ok=True)
    name = f"{place.rank} of {place.size}"
    np.savez(folder / f"found {name}.npz", **found(folder, graph, SIZES[place.size]))
    facts = {"speaks": ranks.speaks(), "different": "", "lost": ""}
    try:
        with ranks.joined():
            ranks.require_same({"weights": 1, "images": place.rank})
    except UserError as error:
        facts["different"] = str(error)
    try:
        with ranks.joined() as world:
            (folder / f"facts {name}.json").write_text(json.dumps(facts))
            if world.rank == world.size - 1:
                os._exit(DIES)
            ranks.summed(torch.ones(3))
    except ranks.LostProcess as error:
        facts["lost"] = str(error)
    (folder / f"facts {name}.json").write_text(json.dumps(facts))


def start(size: int, *arguments: Path) -> list[int]:
    """Exit codes of so many processes, which need not import everything again: they are forks of this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(size):
        if not (child := os.fork()):
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            try:
                main(*arguments)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    for size in SIZES:
        codes = start(size, *map(Path, sys.argv[1:]))
        assert codes == [0] * (size - 1) + [DIES], codes
