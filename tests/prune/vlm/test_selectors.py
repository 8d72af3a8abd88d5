"""SAINT's selectors and the views they see, against slow formulas written anew."""

import math

import pytest
import torch

pytest.importorskip("transformers", reason="the vlm extra brings transformers")

from tiny_vlms import IMAGE, PATCHES, prompts, shared_vlm

from vpruner.prune.vlm import OUTPUT, BipartiteVotes, EncoderView, FullGraphDrop, SpanView, pruned, selectors
from vpruner.prune.vlm.parts import cache_in


def encoder_view(key, prefix=1):
    patches = key.shape[2] - prefix
    places = torch.arange(patches).expand(len(key), -1)
    return EncoderView(0, torch.zeros(len(key), patches, 1), places, patches, prefix, None, None, key)


def span_view(key, valid=None, total=None):
    """Keys [batch, image token, head, head_dim] of prompts that hold nothing else, not rotated."""
    batch, count, _, width = key.shape
    rows = torch.arange(count).expand(batch, -1)
    still = (torch.ones(1, count, width), torch.zeros(1, count, width))
    total = torch.full((batch,), count) if total is None else torch.tensor(total)
    return SpanView(0, rows, valid, total, None, None, key, still, valid, rows)


def full_graph(keys, kept, rounds):
    """Of one crop: keys [patch, head_dim], what is left."""
    left = list(range(len(keys)))
    similarity = torch.cosine_similarity(keys[:, None], keys[None], dim=-1).tolist()
    while len(left) > kept:
        alike = {i: sum(similarity[i][j] for j in left) for i in left}
        drop = min(len(left) - kept, max(1, len(left) // rounds))
        for i in sorted(left, key=lambda i: -alike[i])[:drop]:
            left.remove(i)
    return left


@pytest.mark.parametrize("kept, rounds", [(2, 4), (7, 16), (20, 16), (33, 5)])
def test_full_graph_drop(kept, rounds):
    torch.manual_seed(kept)
    key = torch.randn(3, 2, 41, 6, dtype=torch.float64) + 0.5
    rows = FullGraphDrop(kept / 40, rounds)(encoder_view(key))
    for crop in range(3):
        expected = full_graph(key[crop, :, 1:].mean(0), kept, rounds)
        assert rows[crop].sort().values.tolist() == expected


def test_crops_are_worked_off_in_groups(monkeypatch):
    torch.manual_seed(1)
    view = encoder_view(torch.randn(7, 2, 31, 6))
    together = FullGraphDrop(0.3)(view)
    monkeypatch.setattr(selectors, "SIMILARITY_BYTES", 2 * 30 * 30 * 4)
    assert torch.equal(FullGraphDrop(0.3)(view), together) and together.shape == (7, 9)


def votes_of(keys, threshold, neighbours, gamma):
    """Of one prompt: votes, and visual tokens of the even side from most to least redundant."""
    even, odd = list(range(0, len(keys), 2)), list(range(1, len(keys), 2))
    votes, scores = 0, {}
    for i in even:
        all_of_them = [float(torch.cosine_similarity(keys[i], keys[j], dim=0)) for j in odd]
        alike = [value for value in all_of_them if value >= threshold]
        votes += len(alike) >= neighbours
        mean = sum(alike) / len(alike) if alike else 0
        scores[i] = len(alike) * math.exp(gamma * (mean - threshold)) if alike else sum(all_of_them) / max(1, len(odd))
    return votes, sorted(even, key=lambda i: -scores[i])


@pytest.mark.parametrize("share", [None, 0.8, 0.7, 0.1])
def test_bipartite_votes(share):
    torch.manual_seed(5)
    key = torch.randn(3, 21, 2, 6, dtype=torch.float64) + 0.6
    lengths = [21, 14, 5]
    valid = torch.arange(21) < torch.tensor(lengths)[:, None]
    totals = [30, 15, 5]
    keep = BipartiteVotes(0.6, 3, 4.0, share)(span_view(key, valid, totals))
    dropped = 0
    for row, length in enumerate(lengths):
        votes, order = votes_of(key[row, :length].mean(1), 0.6, 3, 4.0)
        if share is not None:
            votes = min(max(0, length - round(share * totals[row])), len(order))
        gone = (~keep[row, :length]).nonzero().flatten().tolist()
        assert gone == sorted(order[:votes])
        dropped += votes
    assert dropped


def test_padding_does_not_matter():
    torch.manual_seed(6)
    key = torch.randn(1, 12, 2, 6, dtype=torch.float64) + 0.6
    alone = BipartiteVotes(0.5, 2)(span_view(key))
    longer = torch.cat([key, torch.full((1, 5, 2, 6), 9.0, dtype=torch.float64)], 1)
    valid = torch.arange(17)[None] < 12
    assert torch.equal(BipartiteVotes(0.5, 2)(span_view(longer, valid, [12]))[:, :12], alone) and not alone.all()


@pytest.fixture(scope="module")
def seen():
    """Views of one pass over prompts of different lengths, and the attention that eager attention returns."""
    model = shared_vlm("llava", attention="eager", dtype=torch.float32)
    batch = prompts([9, 5, 12], [1, 1, 2])
    batch["pixel_values"] = batch["pixel_values"].float()
    views = {}

    def look(name):
        def select(view):
            views[name] = view
            if isinstance(view, EncoderView):
                return torch.arange(view.positions.shape[1]).expand(len(view.positions), -1)
            return torch.ones_like(view.rows, dtype=torch.bool)

        return select

    stages = {1: look("block"), OUTPUT: look("output")}
    with torch.inference_mode():
        with pruned(model, stages, {2: look("layer")}):
            model(**batch)
        tower = model.model.vision_tower(batch["pixel_values"], output_attentions=True).attentions
        language = model(**batch, output_attentions=True).attentions
    return batch, views, tower, language


@torch.inference_mode()
def test_class_attention_is_a_row_of_the_matrix(seen):
    _, views, tower, _ = seen
    for name, block in (("block", 1), ("output", 2)):
        torch.testing.assert_close(views[name].class_attention(), tower[block].mean(1)[:, 0, 1:])


@torch.inference_mode()
def test_last_query_attention_is_a_row_of_the_matrix(seen):
    batch, views, _, language = seen
    view, image = views["layer"], batch["input_ids"] == IMAGE
    expected = language[2].mean(1)[:, -1]
    found = view.last_query_attention()
    for row in range(3):
        real = slice(None) if view.valid is None else view.valid[row]
        torch.testing.assert_close(found[row][real], expected[row][image[row]])
        assert view.positions[row][real].tolist() == image[row].nonzero().flatten().tolist()
    assert view.count.tolist() == view.total.tolist() == [PATCHES, PATCHES, 2 * PATCHES]


def test_keys_are_compared_as_they_are_cached(seen):
    batch, views, _, _ = seen
    model = shared_vlm("llava", attention="eager", dtype=torch.float32)
    with torch.inference_mode():
        cached = cache_in(model(**batch, use_cache=True)).layers[2].keys.mean(1)
    view, image = views["layer"], batch["input_ids"] == IMAGE
    expected = torch.nn.functional.normalize(cached[2][image[2]], dim=-1)
    torch.testing.assert_close(view.mean_key()[2], expected)
    assert (view.mean_key(rotated=False)[2] - expected).abs().max() > 0.1
