"""Dropping visual tokens equals masking them, and nothing else about the model changes."""

import pytest
import torch

pytest.importorskip("transformers", reason="the vlm extra brings transformers")

from covered import VISION_LANGUAGE_MODELS
from masked_vlms import masked, positions_of
from tiny_vlms import IMAGE, PATCHES, prompts, shared_vlm, tiny_vlm

from vpruner.core.errors import UserError
from vpruner.prune.vlm import OUTPUT, pruned, saint
from vpruner.prune.vlm.parts import cache_in, cache_name

NEW = 8
#: Logits are of the order of 1.
EXACT = dict(rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def llava():
    return shared_vlm("llava")


@pytest.fixture(scope="module")
def batch():
    """Three prompts of different lengths, two images in the last."""
    return prompts([9, 5, 12], [1, 1, 2])


@torch.inference_mode()
def generated(model, inputs, new=3, **options):
    """Sequences [batch, token] and the logits that chose each new token, [batch, new token, vocabulary]."""
    # Those that generate() returns are float32.
    logits = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output[:, -1]))
    try:
        sequences = model.generate(**inputs, **{"max_new_tokens": new, "do_sample": False, **options})
    finally:
        hook.remove()
    return sequences, torch.stack(logits, 1)


def drop_places(*places):
    """A selector of the language model that drops given places among the visual tokens, in whichever rows have them."""

    def select(view):
        keep = torch.ones_like(view.rows, dtype=torch.bool)
        for row, place in places:
            keep[row, place] = False
        return keep

    return select


#: Another number of tokens in each row, and one row that loses none.
LANGUAGE = {
    1: drop_places((0, [0, 3, 4, 35]), (2, list(range(20, 60)))),
    3: drop_places((0, [1, 2]), (2, [5])),
}


def reference(model, inputs, run, sequences, new, shift=None, tower=None):
    """Logits of the last ``new`` steps of ``sequences``, from one pass of the masked model without a cache."""
    kept = torch.stack([run.last.kept(layer) for layer in range(len(run.parts.layers))])
    # The tokens that were generated are nowhere dropped.
    keys = torch.cat([kept, kept.new_ones(*kept.shape[:2], sequences.shape[1] - kept.shape[2])], 2)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, sequences.shape[1] - kept.shape[2]), value=1)
    positions = positions_of(mask)
    if shift is not None:
        lost = torch.nn.functional.pad(shift, (0, sequences.shape[1] - shift.shape[1]))
        positions = (positions - lost.cumsum(1)).clamp(min=0)
    with torch.inference_mode(), masked(model, keys, tower):
        out = model(
            input_ids=sequences,
            attention_mask=mask,
            pixel_values=inputs["pixel_values"],
            position_ids=positions,
            use_cache=False,
        )
    return out.logits[:, -new - 1 : -1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropping_in_the_language_model_equals_masking(attention, batch):
    # The eager softmax of transformers is float32, where a padded row of a float64 mask is no number.
    dtype, tolerance = (torch.float64, 1e-10) if attention == "sdpa" else (torch.float32, 1e-4)
    model = shared_vlm("llava", attention=attention, dtype=dtype)
    batch = {**batch, "pixel_values": batch["pixel_values"].to(dtype)}
    with pruned(model, language=LANGUAGE) as run:
        sequences, logits = generated(model, batch, NEW)
    torch.testing.assert_close(logits, reference(model, batch, run, sequences, NEW), rtol=0, atol=tolerance)
    counts = run.visual_tokens
    assert counts.tolist() == [
        [36, 36, 32, 32, 30, 30],
        [36, 36, 36, 36, 36, 36],
        [72, 72, 32, 32, 31, 31],
    ]
    # The unpruned model says something else, so the comparison means something.
    assert (logits - generated(model, batch, NEW)[1]).abs().max() > 1e-3


def test_prompts_alone_and_in_a_batch_agree(llava, batch):
    """Padding, the prompts' own and that of rows which keep fewer tokens, is invisible."""
    with saint(llava, "hybrid", keep=0.3, layers=[1, 2, 3]) as run:
        together = generated(llava, batch)[1]
        counts = run.visual_tokens
        run.clear()
        start = 0
        for row, images in enumerate([1, 1, 2]):
            real = batch["attention_mask"][row].bool()
            alone = {
                "input_ids": batch["input_ids"][row, real][None],
                "attention_mask": batch["attention_mask"][row, real][None],
                "pixel_values": batch["pixel_values"][start : start + images],
            }
            start += images
            torch.testing.assert_close(generated(llava, alone)[1][0], together[row], **EXACT)
        assert (run.visual_tokens == counts).all()


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_dropping_in_the_tower_equals_masking(llava, batch, positions):
    generator = torch.Generator().manual_seed(4)
    rows = torch.stack([torch.randperm(PATCHES, generator=generator) for _ in range(4)])
    encoder = {
        0: lambda view: rows[:, :20],
        # Rows are counted among what is left.
        2: lambda view: torch.tensor([[1, 17, 3, 9, 4]]).expand(4, -1),
    }
    with pruned(llava, encoder, positions=positions) as run:
        sequences, logits = generated(llava, batch, NEW)
        kept = run.last.encoder_positions
    first = rows[:, :20].sort(dim=1).values
    assert torch.equal(kept, first[:, [1, 3, 4, 9, 17]])

    def with_class(places):
        grid = torch.zeros(4, PATCHES, dtype=torch.bool).scatter(1, places, True)
        return torch.nn.functional.pad(grid, (1, 0), value=True)

    everything = torch.ones(4, PATCHES + 1, dtype=torch.bool)
    tower = torch.stack([everything, with_class(first), with_class(first), with_class(kept)])
    lost = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    lost[batch["input_ids"] == IMAGE] = ~with_class(kept)[:, 1:].flatten()
    shift = lost if positions == "compact" else None
    expected = reference(llava, batch, run, sequences, NEW, shift=shift, tower=tower)
    torch.testing.assert_close(logits, expected, **EXACT)
    assert torch.equal(run.last.kept(0), batch["attention_mask"].bool() & ~lost)
    assert (run.visual_tokens == [[5] * 6, [5] * 6, [10] * 6]).all()


def test_tower_and_language_model_together_equal_masking(llava, batch):
    encoder = {1: lambda view: torch.arange(0, PATCHES, 2).expand(len(view.positions), -1)}
    language = {0: drop_places((1, [2, 3])), 2: drop_places((0, [17]), (2, [0, 30]))}
    with pruned(llava, encoder, language) as run:
        sequences, logits = generated(llava, batch, NEW)
    tower = torch.ones(4, 4, PATCHES + 1, dtype=torch.bool)
    tower[2:, :, 2::2] = False
    lost = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    lost[batch["input_ids"] == IMAGE] = ~tower[2, :, 1:].flatten()
    expected = reference(llava, batch, run, sequences, NEW, tower=tower)
    torch.testing.assert_close(logits, expected, **EXACT)
    assert run.visual_tokens[:, -1].tolist() == [17, 16, 34]


def test_dropping_before_the_first_block_and_after_the_last(llava, batch):
    """Equal to one another where the tower's blocks do nothing; both ends of the tower are reached."""
    keep = torch.tensor([[3, 30, 7]])

    def select(view):
        return keep.expand(len(view.positions), -1)

    seen = {}

    def look(view):
        seen["view"] = view
        return select(view)

    with torch.inference_mode(), pruned(llava, {-1: select}) as run:
        llava(**batch)
        assert run.last.encoder_positions.tolist() == [[3, 7, 30]] * 4
    with torch.inference_mode(), pruned(llava, {OUTPUT: look}) as run:
        pruned_features = llava.model.get_image_features(batch["pixel_values"]).pooler_output
        llava(**batch)
        assert run.last.encoder_positions.tolist() == [[3, 7, 30]] * 4
    with torch.inference_mode():
        features = llava.model.get_image_features(batch["pixel_values"]).pooler_output
        states = llava.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    for before, after in zip(features, pruned_features, strict=True):
        torch.testing.assert_close(after[[3, 7, 30]], before[[3, 7, 30]], **EXACT)
        assert not after[[0, 1, 2, 35]].any()
    torch.testing.assert_close(seen["view"].hidden, states[-2][:, 1:], **EXACT)


@pytest.mark.parametrize("kind", VISION_LANGUAGE_MODELS)
@pytest.mark.parametrize(
    "settings",
    [dict(mode="vit", keep=1.0), dict(mode="llm", threshold=1.5), dict(mode="llm", keep=1.0), dict(keep=1.0)],
    ids=["tower", "threshold above 1", "language model", "hybrid"],
)
def test_keeping_everything_changes_nothing(kind, settings):
    model, inputs = shared_vlm(kind), inputs_for(kind)
    with torch.inference_mode():
        dense = model(**inputs).logits
        with saint(model, **settings) as run:
            out = model(**inputs).logits
    assert torch.equal(out, dense) or (out - dense).abs().max() < 1e-12
    assert (run.visual_tokens == run.visual_tokens[:, :1]).all()
    assert run.kv_bytes[0] == run.kv_bytes[1]


def inputs_for(kind):
    """One prompt of the kind's own shape: several crops and ends of rows for those that have them."""
    if kind == "llava":
        return prompts([6, 8], [1, 1])
    model = shared_vlm(kind)
    size = torch.tensor([[40, 44]])
    pixels = prompts([4], [1], crops=5)["pixel_values"][None]
    with torch.inference_mode():
        features = model.model.get_image_features(pixels, size).pooler_output
    inputs = prompts([7], [1], tokens=len(features[0]))
    return {**inputs, "pixel_values": pixels, "image_sizes": size}


@pytest.mark.parametrize("kind", ["next", "onevision"])
@pytest.mark.parametrize("mode", ["vit", "llm", "hybrid"])
def test_models_with_several_crops(kind, mode):
    model, inputs = shared_vlm(kind), inputs_for(kind)
    extra = {} if mode == "vit" else dict(layers=[1, 2])
    with saint(model, mode, keep=0.5, **extra) as run:
        sequences, logits = generated(model, inputs)
        without_cache = generated(model, inputs, use_cache=False)
        left = run.visual_tokens[0]
    assert torch.equal(sequences, without_cache[0])
    torch.testing.assert_close(logits, without_cache[1], **EXACT)
    total = int((inputs["input_ids"] == IMAGE).sum())
    if mode == "vit":
        crops, newlines = 5, total - int(run.last.encoder_positions.numel())
        assert run.last.encoder_positions.shape == (crops, 18) and newlines > 0
        assert 0.35 < left[0] / total < 0.7 and len(set(left)) == 1
    else:
        assert left[-1] == round(0.5 * total)
    assert (logits - generated(model, inputs)[1]).abs().max() > 1e-4


def test_ends_of_rows_stay_and_features_are_those_of_their_place():
    """LLaVA-NeXT: what the language model is given equals the unpruned features at the places that are kept."""
    model, inputs = shared_vlm("next"), inputs_for("next")
    # Only the features are thinned, so what is left is what it was.
    encoder = {OUTPUT: lambda view: torch.arange(1, PATCHES, 3).expand(len(view.positions), -1)}
    sizes = dict(image_sizes=inputs["image_sizes"])
    with torch.inference_mode():
        dense = model.model.get_image_features(inputs["pixel_values"], **sizes).pooler_output[0]
        with pruned(model, encoder) as run:
            thin = model.model.get_image_features(inputs["pixel_values"], **sizes).pooler_output[0]
            model(**inputs)
    newline = (dense == model.model.image_newline).all(1)
    assert newline.sum() > 3
    kept = thin.any(1)
    assert kept[newline].all() and kept[:PATCHES].nonzero().flatten().tolist() == list(range(1, PATCHES, 3))
    torch.testing.assert_close(thin[kept], dense[kept], **EXACT)
    image = (inputs["input_ids"] == IMAGE)[0]
    assert torch.equal(run.last.kept(0)[0, image], kept)


def test_interpolated_features_are_means_of_those_that_are_left():
    """LLaVA-OneVision shrinks large grids: what is gone counts nothing in the mean."""
    model = tiny_vlm("onevision", vision_aspect_ratio="anyres_max_1")
    size = torch.tensor([[44, 44]])
    pixels = prompts([4], [1], crops=5)["pixel_values"][None]
    encoder = {OUTPUT: lambda view: torch.arange(0, PATCHES, 2).expand(len(view.positions), -1)}
    with torch.no_grad():
        # All features alike: a mean of any of them is the same.
        model.model.multi_modal_projector.linear_2.weight.zero_()
        features = model.model.get_image_features(pixels, size).pooler_output[0]
        with pruned(model, encoder):
            thin = model.model.get_image_features(pixels, size).pooler_output[0]
    assert len(features) < PATCHES * 3
    kept = thin.any(1)
    assert 0.3 < kept.float().mean() < 0.95
    torch.testing.assert_close(thin[kept], features[kept], **EXACT)


def test_generation_without_cache_and_sampled(llava, batch):
    with saint(llava, "hybrid", keep=0.4, layers=[1, 3]):
        greedy = generated(llava, batch)
        for other in (generated(llava, batch, use_cache=False), generated(llava, batch)):
            assert torch.equal(other[0], greedy[0])
            torch.testing.assert_close(other[1], greedy[1], **EXACT)
        torch.manual_seed(3)
        first = generated(llava, batch, do_sample=True, temperature=3.0)[0]
        torch.manual_seed(3)
        again = generated(llava, batch, do_sample=True, temperature=3.0, use_cache=False)[0]
    assert torch.equal(first, again) and not torch.equal(first, greedy[0])


def test_beams_and_several_sequences(llava, batch):
    with saint(llava, "hybrid", keep=0.4, layers=[1, 3]):
        cached = llava.generate(**batch, max_new_tokens=3, num_beams=3, num_return_sequences=2, do_sample=False)
        without = llava.generate(
            **batch, max_new_tokens=3, num_beams=3, num_return_sequences=2, do_sample=False, use_cache=False
        )
    assert torch.equal(cached, without) and len(cached) == 6


def test_a_given_cache_is_filled_and_its_layers_differ_in_length(llava, batch):
    from transformers import DynamicCache

    cache = DynamicCache(config=llava.config.text_config)
    with pruned(llava, language=LANGUAGE) as run:
        generated(llava, batch, NEW, **{cache_name(llava.forward): cache})
        lengths = [layer.keys.shape[2] for layer in cache.layers]
    prompt = batch["input_ids"].shape[1]
    assert lengths[:2] == [prompt + NEW - 1] * 2
    # The longest row sets the length; then it is the second prompt's, which keeps all its tokens.
    longest = run.last.kept(2).sum(1).max() + NEW - 1
    assert lengths[2] == lengths[3] == longest < lengths[0]
    element = 8 * 2 * 16 * 3
    assert run.kv_bytes == (
        element * sum(length - NEW + 1 for length in lengths),
        element * prompt * len(cache.layers),
    )


def test_several_tokens_are_decoded_at_once(llava, batch):
    """As assisted generation does; the first rows are padded, and layers see different numbers of them."""
    more = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    ones = torch.ones_like(more)
    mask = torch.cat([batch["attention_mask"], ones], 1)
    length, name = batch["input_ids"].shape[1], cache_name(llava.forward)
    with torch.inference_mode(), saint(llava, "hybrid", keep=0.3, layers=[1, 3]):
        cache = cache_in(llava(**batch, use_cache=True))
        together = llava(input_ids=more, attention_mask=mask, **{name: cache}).logits
        cache = cache_in(llava(**batch, use_cache=True))
        for step in range(3):
            end = length + step + 1
            alone = llava(input_ids=more[:, step : step + 1], attention_mask=mask[:, :end], **{name: cache})
            torch.testing.assert_close(alone.logits[:, 0], together[:, step], **EXACT)


def test_logits_have_a_row_for_each_token_of_the_prompt(llava, batch):
    ids = batch["input_ids"]
    positions = positions_of(batch["attention_mask"])
    with torch.inference_mode(), pruned(llava, language=LANGUAGE) as run:
        logits = llava(**batch, position_ids=positions, use_cache=False).logits
        kept = run.last.kept(len(run.parts.layers))
    assert logits.shape[:2] == ids.shape and not logits[~kept].any()
    expected = reference(llava, batch, run, ids, ids.shape[1] - 1)
    kept = kept[:, :-1]
    torch.testing.assert_close(logits[:, :-1][kept], expected[kept], **EXACT)


def test_no_mask_is_made_where_nothing_is_padded(llava):
    """A mask would keep SDPA from its flash kernel."""
    inputs = prompts([6], [1])
    masks = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for layer in llava.model.language_model.layers
    ]
    try:
        with saint(llava, "hybrid", keep=0.3, layers=[1, 2]):
            # The context's own hooks came later, so they have not changed what these see; look behind them.
            inner = [
                layer.self_attn.register_forward_pre_hook(
                    lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
                )
                for layer in llava.model.language_model.layers
            ]
            masks.clear()
            generated(llava, inputs)
            for hook in inner:
                hook.remove()
    finally:
        for hook in hooks:
            hook.remove()
    assert masks and all(mask is None for mask in masks)


def unpadding(module, query, key, value, attention_mask, scaling, is_causal=None, **options):
    """Attention as flash kernels do it: no mask, or which keys of each prompt are no padding; causal from the end."""
    assert attention_mask is None or attention_mask.shape == (len(key), key.shape[2])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(2, 3) * scaling
    if module.is_causal if is_causal is None else is_causal:
        ahead = torch.ones(logits.shape[2:], dtype=torch.bool).triu(logits.shape[3] - logits.shape[2] + 1)
        logits = logits.masked_fill(ahead, -torch.inf)
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask[:, None, None].bool(), -torch.inf)
    return (logits.softmax(-1).nan_to_num() @ value).transpose(1, 2), None


def test_attention_without_square_masks(batch):
    """FlashAttention is told which keys are padding, for each layer's own rows, and nothing else."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register("unpadding", unpadding)
    AttentionMaskInterface.register("unpadding", flash_attention_mask)
    model = tiny_vlm("llava", attention="unpadding")
    settings = dict(mode="hybrid", keep=0.3, layers=[1, 3])
    with saint(model, **settings):
        sequences, logits = generated(model, batch)
    other = shared_vlm("llava")
    with saint(other, **settings):
        expected = generated(other, batch)
    assert torch.equal(sequences, expected[0])
    torch.testing.assert_close(logits, expected[1], **EXACT)


def test_prompts_given_as_embeddings(llava, batch):
    with torch.inference_mode(), saint(llava, "hybrid", keep=0.3, layers=[1, 3]) as run:
        expected = llava(**batch).logits
        embeds = llava.get_input_embeddings()(batch["input_ids"])
        rest = {key: value for key, value in batch.items() if key != "input_ids"}
        torch.testing.assert_close(llava(inputs_embeds=embeds, **rest).logits, expected, **EXACT)
        assert (run.visual_tokens[:3] == run.visual_tokens[3:]).all()


def test_features_of_several_blocks():
    model = tiny_vlm("llava", vision_feature_layer=[-3, -2])
    inputs = prompts([6], [1])
    with saint(model, "vit", keep=0.5) as run:
        assert tuple(run.encoder) == (1,)
        cached = generated(model, inputs)
        torch.testing.assert_close(cached[1], generated(model, inputs, use_cache=False)[1], **EXACT)
    with pytest.raises(UserError, match="block 2 comes after"), saint(model, "vit", keep=0.5, blocks=[2]):
        pass


def test_a_model_spread_by_accelerate_keeps_its_hooks(batch):
    """accelerate puts forwards aside and runs them between moving inputs and outputs; ours goes where it put them."""
    model = tiny_vlm("llava")
    moved = []
    with torch.inference_mode(), saint(model, "hybrid", keep=0.3, layers=[1, 3]):
        expected = model(**batch).logits

    def spread(module):
        module._hf_hook, module._old_forward = object(), module.forward

        def forward(*args, **kwargs):
            moved.append(module)
            return module._old_forward(*args, **kwargs)

        module.forward = forward

    for module in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
        spread(module)
    before = {module: dict(vars(module)) for module in model.modules()}
    with torch.inference_mode(), saint(model, "hybrid", keep=0.3, layers=[1, 3]):
        torch.testing.assert_close(model(**batch).logits, expected, **EXACT)
    assert len(moved) == 4 + 5
    for module, attributes in before.items():
        assert all(vars(module)[name] is value for name, value in attributes.items() if "forward" in name)


def state_of(model):
    return [
        (name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


def test_nothing_is_left_behind(llava, batch):
    with torch.inference_mode():
        dense = llava(**batch).logits
    before = state_of(llava)
    with saint(llava, "hybrid", keep=0.3, layers=[1, 2]):
        generated(llava, batch)
        assert state_of(llava) != before
    assert state_of(llava) == before

    def broken(view):
        raise RuntimeError("a selector failed")

    with pytest.raises(RuntimeError, match="a selector failed"), pruned(llava, {1: broken}, {2: broken}):
        llava(**batch)
    with pytest.raises(ZeroDivisionError), saint(llava, "llm", keep=0.5, layers=[1, 2]):
        raise ZeroDivisionError
    assert state_of(llava) == before
    with torch.inference_mode():
        assert torch.equal(llava(**batch).logits, dense)


def test_a_failed_pass_does_not_spoil_the_next(llava, batch):
    fail = True

    def sometimes(view):
        if fail:
            raise RuntimeError
        return torch.ones_like(view.rows, dtype=torch.bool)

    with torch.inference_mode(), pruned(llava, language={1: sometimes}):
        with pytest.raises(RuntimeError):
            llava(**batch)
        fail = False
        out = llava(**batch).logits
    with torch.inference_mode():
        torch.testing.assert_close(out, llava(**batch).logits, **EXACT)


def test_user_mistakes_end_in_one_line(llava, batch):
    text = {key: batch[key].clone() for key in ("input_ids", "attention_mask")}
    text["input_ids"][text["input_ids"] == IMAGE] = 5
    with saint(llava, "llm", keep=0.5, layers=[1]), pytest.raises(UserError, match=r"holds no image token \(60\)"):
        llava(**text)
    with torch.inference_mode():
        cache = cache_in(llava(**batch, use_cache=True))
    name = cache_name(llava.forward)
    more = {"input_ids": torch.tensor([[5]] * 3), name: cache}
    with saint(llava, "llm", keep=0.5, layers=[1]):
        with pytest.raises(UserError, match="cache was filled"):
            llava(**more)
        with pytest.raises(UserError, match="StaticCache"):
            llava.generate(**batch, cache_implementation="static", max_new_tokens=2)
        with pytest.raises(UserError, match=r"not a tensor \[batch, token\]"):
            llava(**{**batch, "attention_mask": torch.ones(3, 1, 84, 84)})
        with pytest.raises(UserError, match="pruned already"), saint(llava, "llm", keep=0.5, layers=[1]):
            pass
        out = llava(**batch, use_cache=True)
        longer = torch.ones(3, batch["input_ids"].shape[1] + 5, dtype=torch.long)
        with pytest.raises(UserError, match="cannot be continued"):
            llava(**{**more, name: cache_in(out)}, attention_mask=longer)
    with saint(llava, "vit", keep=0.5), pytest.raises(UserError, match="vision tower was not run"):
        llava(**{**batch, "pixel_values": None})


def test_a_second_turn_on_a_pruned_cache_is_told_why_it_cannot_be(llava, batch):
    """Of text alone: generate() cuts the dialogue at the length of the cache, which tokens were dropped from."""
    with saint(llava, "vit", keep=0.5), torch.inference_mode():
        first = llava.generate(**batch, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        cache, text = first.past_key_values, torch.full((len(first.sequences), 4), 5)
        dialogue = torch.cat([first.sequences, text], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(len(text), 6, dtype=torch.long)], 1)
        held, before = cache.get_seq_length(0), dialogue.shape[1] - text.shape[1] - 1
        with pytest.raises(UserError, match=f"it holds {held} of the {before} tokens .* the whole dialogue and its im"):
            llava.generate(input_ids=dialogue, attention_mask=mask, past_key_values=cache, max_new_tokens=2)
        assert held < before
        ids = {"input_ids": batch["input_ids"], cache_name(llava.forward): cache}
        with pytest.raises(UserError, match="a later turn brings images"):
            llava(**ids)


@pytest.mark.parametrize(
    "encoder, language, message",
    [
        ({3: len}, {}, "block 3 comes after the features"),
        ({9: len}, {}, "no block 9"),
        ({}, {5: len}, "no layer 5; expected 0 to 4"),
        ({OUTPUT: len, 2: len}, {}, "choose one of the two"),
    ],
)
def test_stages_that_cannot_be(llava, encoder, language, message):
    with pytest.raises(UserError, match=message), pruned(llava, encoder, language):
        pass


def test_models_that_are_not_supported_are_named():
    import transformers as hf

    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    unsupported = hf.LlamaForCausalLM(hf.LlamaConfig(**small))
    with pytest.raises(UserError, match="LlamaForCausalLM is not a supported"), pruned(unsupported):
        pass
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8)
    for towers, texts, message in (
        (hf.ViTConfig, hf.LlamaConfig, "vision tower of this LlavaForConditionalGeneration is a ViTModel"),
        (hf.CLIPVisionConfig, hf.Qwen3Config, "language model of this .* is a Qwen3Model"),
    ):
        config = hf.LlavaConfig(vision_config=towers(**vision, patch_size=4), text_config=texts(**small))
        with pytest.raises(UserError, match=message), pruned(hf.LlavaForConditionalGeneration(config)):
            pass
    with (
        pytest.raises(UserError, match="sliding window of 4 tokens"),
        pruned(tiny_vlm("onevision", text=dict(use_sliding_window=True, sliding_window=4, max_window_layers=0))),
    ):
        pass
