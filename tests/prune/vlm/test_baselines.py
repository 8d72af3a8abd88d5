"""Baselines choose what slow formulas choose: whole attention matrices, and loops over pairs, of the unpruned model."""

import numpy as np
import pytest
import torch
from click import BadParameter
from tiny_vlms import PATCHES, dropping_plan, prompts, shared_vlm, tiny_vlm

from vpruner.cli.types import Layers
from vpruner.core.cost import cost_ratio
from vpruner.core.errors import UserError

pytest.importorskip("transformers", reason="transformers is not installed")

from vpruner.prune.vlm import baselines
from vpruner.prune.vlm.baselines import Pruning, candidates_of, prunings_from
from vpruner.prune.vlm.modes import prefill
from vpruner.prune.vlm.views import EncoderView

#: Three rows of different lengths, two images in the last.
TEXTS, IMAGES = (5, 9, 12), (1, 1, 2)


@pytest.fixture(scope="module")
def model():
    return shared_vlm()


@pytest.fixture
def inputs():
    return prompts(TEXTS, IMAGES)


def kept_places(model, inputs, pruning):
    """int64 [crop, kept] of the tower, and bool [batch, token] behind the last layer."""
    with pruning.prepare(model)() as run:
        prefill(model, inputs)
        return run.last.encoder_positions, run.last.kept(len(run.parts.layers))


def test_fastv_ranks_by_the_last_row_of_the_attention_matrix(model, inputs):
    layers = 2
    _, kept = kept_places(model, inputs, Pruning("fastv", 0.25))
    eager = tiny_vlm(attention="eager")
    image = inputs["input_ids"] == 60
    for line in range(3):
        # One by one and without padding, whose rows of the matrix are not finite in float64.
        start = int((inputs["attention_mask"][line] == 0).sum())
        crops = slice(sum(IMAGES[:line]), sum(IMAGES[: line + 1]))
        alone = {
            "input_ids": inputs["input_ids"][line : line + 1, start:],
            "pixel_values": inputs["pixel_values"][crops],
        }
        with torch.inference_mode():
            matrix = eager(**alone, output_attentions=True).attentions[layers - 1]
        row = torch.nn.functional.pad(matrix[0, :, -1].mean(0), (start, 0))
        places = image[line].nonzero()[:, 0].tolist()
        ranked = sorted(places, key=lambda place, row=row: -float(row[place]))
        expected = set(ranked[: round(0.25 * len(places))])
        assert {place for place in places if kept[line, place]} == expected
        text = ~image[line] & inputs["attention_mask"][line].bool()
        assert kept[line][text].all(), "text was dropped"


def test_fastv_leaves_its_first_layers_whole(model, inputs):
    with Pruning("fastv", 0.5, layers=(3,)).prepare(model)() as run:
        prefill(model, inputs)
    assert run.visual_tokens.tolist() == [[36, 36, 36, 18, 18, 18], [36, 36, 36, 18, 18, 18], [72, 72, 72, 36, 36, 36]]


def slow_vispruner(attention, features, kept, important):
    """Of one crop: attention [patch] and features [patch, channel], one pair at a time."""
    order = sorted(range(len(attention)), key=lambda patch: -attention[patch])
    first = round(kept * important)
    chosen, rest = order[:first], order[first:]

    def cosine(one, other):
        a, b = features[one], features[other]
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    while len(rest) > kept - first:
        even, odd = rest[::2], rest[1::2]
        alike = {patch: max(cosine(patch, other) for other in odd) for patch in even}
        drop = min(8, len(rest) - (kept - first), len(even))
        leaving = sorted(even, key=lambda patch: -alike[patch])[:drop]
        rest = [patch for patch in even if patch not in leaving] + odd
    return sorted(chosen + rest)


@pytest.mark.parametrize("keep", [0.75, 0.25, 0.06])
def test_vispruner_takes_what_is_attended_to_and_what_differs(model, inputs, keep):
    found, _ = kept_places(model, inputs, Pruning("vispruner", keep))
    eager = tiny_vlm(attention="eager")
    with torch.inference_mode():
        tower = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    # The features are the hidden states before the last of four blocks.
    attention = tower.attentions[2][:, :, 0, 1:].mean(1).numpy()
    features = tower.hidden_states[-2][:, 1:].numpy()
    for crop in range(sum(IMAGES)):
        expected = slow_vispruner(attention[crop], features[crop], round(keep * PATCHES), 0.5)
        assert found[crop].tolist() == expected


def test_vispruner_needs_a_class_token():
    siglip = shared_vlm("onevision")
    view = EncoderView("output", torch.zeros(1, 4, 2), torch.arange(4)[None], 4, prefix=0)
    with pytest.raises(UserError, match="class token"):
        Pruning("vispruner", 0.5).prepare(siglip).keywords["encoder"]["output"](view)


def test_random_draws_other_patches_for_every_image_and_the_same_for_a_seed(model, inputs):
    found, kept = kept_places(model, inputs, Pruning("random", 0.5, seed=3))
    again, _ = kept_places(model, inputs, Pruning("random", 0.5, seed=3))
    other, _ = kept_places(model, inputs, Pruning("random", 0.5, seed=4))
    assert found.shape == (4, 18) and torch.equal(found, again) and not torch.equal(found, other)
    assert len({tuple(row) for row in found.tolist()}) == 4
    assert (kept & (inputs["input_ids"] == 60)).sum(1).tolist() == [18, 18, 36]


def test_random_choices_go_on_and_no_place_is_preferred():
    selector = baselines.RandomPatches(0.25)
    view = EncoderView("output", torch.zeros(500, 16, 1), torch.arange(16).expand(500, -1), 16, prefix=1)
    first, second = selector(view), selector(view)
    assert not torch.equal(first, second)
    counts = torch.bincount(torch.cat([first, second]).flatten(), minlength=16)
    # 1,000 draws with a chance of 1/4: 250 with a standard deviation of 13.7.
    assert counts.sum() == 4000 and (counts - 250).abs().max() < 5 * 13.7


@pytest.mark.parametrize("mode", ["random", "vispruner", "fastv", "vit", "llm"])
def test_keeping_all_changes_nothing(model, inputs, mode):
    expected = prefill(model, inputs)
    with Pruning(mode, 1.0).prepare(model)():
        assert torch.equal(prefill(model, inputs), expected)


# -- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (dict(mode="best"), "expected one of vit"),
        (dict(mode="vit", keep=0.0), "'keep' is 0,"),
        (dict(mode="vit", keep=1.5), "'keep' is 1.5"),
        (dict(mode="vit", keep=float("nan")), "'keep' is nan"),
        (dict(mode="vit"), "neither a share to keep nor a threshold"),
        (dict(mode="llm", keep=0.5, threshold=0.8), "both a share to keep and a threshold"),
        (dict(mode="random", threshold=0.8), "not with random"),
        (dict(mode="vit", keep=0.5, layers=(1,)), "not with vit"),
        (dict(mode="llm", keep=0.5, encoder_keep=0.7), "not with llm"),
        (dict(mode="fastv", keep=0.5, layers=(1, 2)), "one number of layers"),
        (dict(mode="static"), "give it with plan=PLAN"),
        (dict(mode="static", keep=0.5, plan=dropping_plan()), "leave out 'keep'"),
        (dict(mode="vit", keep=0.5, plan=dropping_plan()), "leave out 'plan'"),
    ],
)
def test_what_does_not_go_together_is_refused(asked, says):
    with pytest.raises(UserError) as error:
        Pruning(**asked)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "asked",
    [
        dict(mode="fastv", keep=0.5, layers=(5,)),
        dict(mode="llm", keep=0.5, layers=(9,)),
        dict(mode="hybrid", keep=0.5, encoder_keep=0.3),
    ],
)
def test_what_the_model_has_no_place_for_is_refused_before_it_runs(model, asked):
    with pytest.raises(UserError), Pruning(**asked).prepare(model)():
        pass
    assert "_vpruner" not in vars(model)


def test_every_mode_is_combined_with_every_share():
    plan = dropping_plan()
    found = prunings_from(["hybrid", "fastv", "static"], [0.5, 0.25], encoder_keep=0.7, layers=(2,), plan=plan)
    static = f"static {cost_ratio(plan):.2f} of MACs"
    expected = ["hybrid 0.5 tower 0.7", "hybrid 0.25 tower 0.7", "fastv 0.5", "fastv 0.25", static]
    assert [one.label for one in found] == expected
    assert [one.label for one in prunings_from(["vit"], [])] == ["vit 0.25"]
    assert [one.label for one in prunings_from(["llm"], [], threshold=0.8)] == ["llm threshold 0.8"]
    with pytest.raises(UserError, match="'plan' goes with 'mode' static"):
        prunings_from(["vit"], [0.5], plan=plan)


def test_candidates_are_told_apart(model):
    twice = [Pruning("vit", 0.5), Pruning("vit", 0.5)]
    with pytest.raises(UserError, match="'vit 0.5' is asked for twice"):
        candidates_of(model, twice)
    found = candidates_of(model, twice[:1])
    assert list(found) == ["dense", "vit 0.5"]
    with found["dense"]() as run:
        assert run is None


@pytest.mark.parametrize(
    ("text", "layers"), [("7-16", tuple(range(7, 17))), ("2", (2,)), ("2,5-6", (2, 5, 6)), ("x", None), ("9-7", None)]
)
def test_layers_are_numbers_and_ranges(text, layers):
    if layers is None:
        with pytest.raises(BadParameter, match="is not layers, as in 7-16"):
            Layers().convert(text, None, None)
    else:
        assert Layers().convert(text, None, None) == layers
