"""SAINT's modes: how many visual tokens are left where, thresholds from calibration prompts, and the cost of it all."""

import pytest
import torch

pytest.importorskip("transformers", reason="the vlm extra brings transformers")

from flops import flop_counter
from tiny_vlms import PATCHES, prompts, shared_vlm

from vpruner.core.errors import UserError
from vpruner.prune.vlm import (
    choose_encoder_keep,
    default_blocks,
    default_layers,
    find_parts,
    find_threshold,
    prefill,
    saint,
)
from vpruner.prune.vlm.cost import language_macs, tower_row


@pytest.fixture(scope="module")
def llava():
    return shared_vlm("llava")


@pytest.fixture(scope="module")
def batch():
    return prompts([6, 4], [1, 2])


def counts(model, inputs, *arguments, **settings):
    with saint(model, *arguments, **settings) as run:
        prefill(model, inputs)
        return run.visual_tokens.tolist()


def test_counts_follow_keep(llava, batch):
    # 36 and 72 visual tokens; layers 1 and 2 of 5 by default.
    assert counts(llava, batch, "vit", 0.25) == [[9] * 6, [18] * 6]
    assert counts(llava, batch, "llm", 0.25) == [[36, 36, 18, 9, 9, 9], [72, 72, 36, 18, 18, 18]]
    # 0.25 ** 0.31 of 36 patches are 23.
    assert counts(llava, batch, "hybrid", 0.25) == [[23, 23, 15, 9, 9, 9], [46, 46, 29, 18, 18, 18]]
    assert counts(llava, batch, "hybrid", 0.25, encoder_keep=0.25) == [[9] * 6, [18] * 6]
    assert counts(llava, batch, "vit", 0.25, blocks=[0, 1, 2]) == [[9] * 6, [18] * 6]
    assert counts(llava, batch, "llm", 0.5, layers=[4]) == [[36] * 5 + [18], [72] * 5 + [36]]


def test_a_threshold_lets_each_prompt_drop_its_own_number(llava, batch):
    found = counts(llava, batch, "llm", threshold=0.5)
    shares = [row[-1] / row[0] for row in found]
    assert max(shares) < 1 and shares[0] != shares[1]
    hybrid = counts(llava, batch, "hybrid", threshold=0.5)
    assert [row[0] for row in hybrid] == [round(0.65 * PATCHES), 2 * round(0.65 * PATCHES)]


def test_published_places():
    class Depth:
        def __init__(self, blocks, states, layers):
            self.blocks, self.feature_states, self.layers = range(blocks), states, range(layers)

    assert default_blocks(Depth(24, (23,), 32)) == (19,)
    assert default_layers(Depth(24, (23,), 32)) == tuple(range(7, 17))
    assert default_blocks(Depth(4, (2,), 1)) == (1,) and default_layers(Depth(4, (2,), 1)) == (0,)
    assert default_layers(Depth(24, (23,), 12)) == (3, 4, 5)


def test_a_threshold_is_found_for_a_share(llava):
    batches = [prompts([6], [1], seed=seed) for seed in range(3)]
    threshold = find_threshold(llava, batches, 0.6, tolerance=0.05, neighbours=2)
    with saint(llava, "llm", threshold=threshold, neighbours=2) as run:
        for inputs in batches:
            prefill(llava, inputs)
        left = run.visual_tokens
    assert abs(left[:, -1].sum() / left[:, 0].sum() - 0.6) <= 0.05
    with pytest.raises(UserError, match=r"even the lowest threshold leaves 0\.250"):
        find_threshold(llava, batches, 0.1)
    with pytest.raises(UserError, match="no calibration prompts"):
        find_threshold(llava, [], 0.5)


def test_the_split_is_the_latest_that_is_fast_enough(llava, batch):
    seen = []

    def measured(dense, candidate):
        dense()
        with torch.inference_mode():
            candidate()
        # As a model would be whose time is that of the language model's tokens.
        seen.append(run_counts.pop())
        return seen[-1]

    run_counts = [0.5, 0.6, 0.7, 0.8, 0.9]
    assert choose_encoder_keep(llava, batch, 0.25, 0.75, candidates=[0.25, 0.5, 1.0], measure=measured) == 0.25
    assert seen == [0.9, 0.8, 0.7]
    run_counts = [0.5, 0.6]
    with pytest.raises(UserError, match=r"no split is as fast as 0\.1 .* the best is 0\.500, with encoder_keep=0\.250"):
        choose_encoder_keep(llava, batch, 0.25, 0.1, candidates=[0.25, 0.5], measure=measured)
    assert choose_encoder_keep(llava, prompts([4], [1]), 0.5, 100.0) == 1.0


@pytest.mark.parametrize("mode", ["dense", "vit", "llm", "hybrid"])
def test_cost_in_closed_form_equals_what_is_counted(mode):
    model = shared_vlm("llava", attention="eager", dtype=torch.float32)
    parts = find_parts(model)
    inputs = prompts([6], [2])
    inputs["pixel_values"] = inputs["pixel_values"].float()
    length = inputs["input_ids"].shape[1]
    if mode == "dense":
        with flop_counter() as counter:
            prefill(model, inputs)
        tower = tower_row(parts, None)["macs"]
        language = language_macs(parts, [length] * 6)
    else:
        with saint(model, mode, 0.3) as run:
            with flop_counter() as counter:
                prefill(model, inputs)
            rows = [int(run.last.kept(layer).sum()) for layer in range(6)]
            tower = tower_row(parts, run)["macs"]
            language = language_macs(parts, rows, run.visual_tokens[0].tolist(), tuple(run.language))
    assert counter.get_total_flops() == 2 * (2 * tower + language)


@pytest.mark.parametrize(
    "mode, settings, message",
    [
        ("both", dict(keep=0.5), "mode is 'both'; expected one of vit, llm, hybrid"),
        ("vit", dict(keep=0), "keep is 0; expected a share above 0"),
        ("llm", dict(keep=1.5), r"keep is 1\.5"),
        ("llm", dict(), "neither keep nor threshold"),
        ("llm", dict(keep=0.5, threshold=0.8), "both keep and threshold"),
        ("vit", dict(threshold=0.8), "the tower drops to a number"),
        ("vit", dict(keep=0.5, encoder_keep=0.5), "encoder_keep is for the hybrid"),
        ("vit", dict(keep=0.5, layers=[1]), "layers are of the language model"),
        ("llm", dict(keep=0.5, blocks=[1]), "blocks are of the tower"),
        ("llm", dict(keep=0.5, layers=[1, 1]), r"layers are \[1, 1\]"),
        ("llm", dict(keep=0.5, neighbours=0), "neighbours is 0"),
        ("llm", dict(keep=0.2, layers=[1, 2]), "a layer drops half of the visual tokens at most"),
        ("hybrid", dict(keep=0.5, encoder_keep=0.4), r"keep is 0\.5, more than the 0\.4"),
        ("vit", dict(keep=0.5, blocks=[3]), "block 3 comes after the features"),
        ("llm", dict(keep=0.5, layers=[7]), "no layer 7"),
        ("vit", dict(keep=0.5, positions="kept"), "positions is 'kept'; expected one of original, compact"),
    ],
)
def test_settings_that_contradict_each_other(llava, mode, settings, message):
    with pytest.raises(UserError, match=message), saint(llava, mode, **settings):
        pass
