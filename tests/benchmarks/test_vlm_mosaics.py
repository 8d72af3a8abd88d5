"""Mosaics and what is asked of them, and how answers are learned and counted."""

import importlib.util
import json
import sys
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from vpruner.core import bundled
from vpruner.prune.data import ImageSource
from vpruner.prune.models import open_model
from vpruner.prune.vlm.evaluate import read_questions
from vpruner.prune.vlm.loading import open_vlm


@pytest.fixture
def vlm_script(repository, monkeypatch):
    """Import a script of benchmarks/vlm under a name of its own: accuracy.py is there twice."""
    folder = repository / "benchmarks" / "vlm"
    monkeypatch.syspath_prepend(folder)

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"vlm_{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def mosaic(vlm_script):
    return vlm_script("mosaic")


@pytest.fixture
def colours(mosaic):
    """Two images of each class; a pixel says which: red is the class, green the image."""
    images = torch.zeros(len(mosaic.CLASSES), 2, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 0] = (torch.arange(len(mosaic.CLASSES)) + 100)[:, None, None, None]
    images[:, :, 1] = torch.arange(2)[None, :, None, None]
    return list(images)


def test_cells_hold_what_is_drawn(mosaic, colours):
    cells = mosaic.draw_cells(400, torch.Generator().manual_seed(3))
    filled = (cells != mosaic.EMPTY).sum(1)
    assert set(filled.tolist()) == {2, 3, 4} and set(cells.flatten().tolist()) == set(range(7))
    painted = mosaic.paint(cells, colours, torch.Generator().manual_seed(4))
    assert painted.shape == (400, 3, 64, 64) and painted.dtype == torch.uint8
    for place, (top, left) in enumerate([(0, 0), (0, 32), (32, 0), (32, 32)]):
        cell = painted[:, :, top : top + 32, left : left + 32]
        flat = cell.flatten(2).float().std(2).amax(1) == 0
        assert (flat == (cells[:, place] != mosaic.EMPTY)).all()  # Backgrounds are noisy.
        assert (cell[flat, 0, 5, 7] == cells[flat, place] + 100).all()
    # Classes are repeated more often than chance: of two filled cells 1 in 6 would be alike.
    pairs = cells[(filled == 2)]
    alike = [len(set(row) - {mosaic.EMPTY}) == 1 for row in pairs.tolist()]
    assert 0.3 < np.mean(alike) < 0.6


def test_change_is_applied_to_images_alone(mosaic, colours):
    cells = torch.tensor([[2, mosaic.EMPTY, mosaic.EMPTY, 4]])
    painted = mosaic.paint(cells, colours, torch.Generator().manual_seed(0), change=lambda images: images + 50)
    assert painted[0, 0, 0, 0] == 152 and painted[0, 0, 63, 63] == 154


def test_answers_are_true(mosaic):
    empty = mosaic.EMPTY
    cells = [2, empty, 2, 0]
    places = [mosaic.ask_position(cells, place) for place in range(4)]
    assert [question.answer for question in places] == ["cat", "nothing", "cat", "airplane"]
    assert places[2].question == "what is at the bottom left?"
    assert mosaic.ask_count(cells, 2) == ("count", "how many cats?", "2")
    assert mosaic.ask_count(cells, 3).answer == "0"
    assert mosaic.ask_presence(cells, 0) == ("presence", "is there an airplane?", "yes")
    assert mosaic.ask_presence(cells, 5) == ("presence", "is there a ship?", "no")


def test_presence_is_asked_evenly_and_position_of_what_is_there(mosaic):
    generator = torch.Generator().manual_seed(5)
    asked = [mosaic.ask_each_kind(row, generator) for row in mosaic.draw_cells(600, generator).tolist()]
    assert all(tuple(question.kind for question in row) == mosaic.KINDS for row in asked)
    position, count, presence = zip(*asked, strict=True)
    assert "nothing" not in {question.answer for question in position}
    assert 0.42 < np.mean([question.answer == "yes" for question in presence]) < 0.58
    assert 0.25 < np.mean([question.answer == "0" for question in count]) < 0.42


def test_a_set_goes_by_its_seed_and_is_what_the_command_reads(mosaic, colours, tmp_path):
    path = mosaic.write_set(colours, 5, 7, tmp_path / "one")
    again = mosaic.write_set(colours, 5, 7, tmp_path / "two")
    other = mosaic.write_set(colours, 5, 8, tmp_path / "three")
    assert path.read_bytes() == again.read_bytes() != other.read_bytes()
    first = "images/00000.png"
    assert (path.parent / first).read_bytes() == (again.parent / first).read_bytes()
    questions = read_questions(path)
    assert len(questions) == 15 and [question.kind for question in questions[:3]] == list(mosaic.KINDS)
    # What the files say about the pictures in them.
    for row, question in zip(map(json.loads, path.read_text().splitlines()), questions, strict=True):
        pixels = np.asarray(Image.open(question.images[0]))
        corners = pixels[[0, 0, 32, 32], [0, 32, 0, 32], 0]
        sure = pixels[[9, 9, 41, 41], [9, 41, 9, 41], 0] == corners
        if row["kind"] == "position":
            place = mosaic.PLACES.index(question.text.removeprefix("what is at the ").rstrip("?"))
            assert sure[place] and mosaic.CLASSES[corners[place] - 100] == row["answer"]
        assert 2 <= row["filled"] <= 4


def test_other_data_is_refused(mosaic, tmp_path):
    for name in ("cat", "lion"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name / "one.png")
    with pytest.raises(SystemExit, match="no images of airplane, automobile, frog, horse, ship"):
        mosaic.load_cells(str(tmp_path))


@pytest.fixture
def train_llava(vlm_script):
    return vlm_script("train_llava")


@pytest.fixture
def small(train_llava, tmp_path):
    """A folder with an untrained model of two layers."""
    processor = train_llava.make_processor([0.5] * 3, [0.25] * 3)
    config = train_llava.make_config(processor.tokenizer)
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 2
    torch.manual_seed(0)
    model = train_llava.LlavaForConditionalGeneration(config).eval()
    # Larger weights than at the start of training, so that answers differ from question to question.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    train_llava.write_model(tmp_path / "small", model, processor, {})
    return tmp_path / "small"


def test_every_word_has_a_token(train_llava, mosaic):
    tokenizer = train_llava.make_tokenizer()
    for cells in ([0, 1, 2, 3], [4, 5, 6, 0]):
        for question in (
            *(mosaic.ask_position(cells, place) for place in range(4)),
            *(mosaic.ask_count(cells, label) for label in range(6)),
            *(mosaic.ask_presence(cells, label) for label in range(6)),
        ):
            text = f"{question.question} ASSISTANT: {question.answer}"
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids and len(ids) <= train_llava.SLOT
            assert tokenizer.decode(ids[-1]) == question.answer


def test_questions_on_one_sheet_are_answered_as_alone(train_llava, mosaic, small, monkeypatch):
    """What the training computes for many questions at once is what the processor and the model make of each alone."""
    vlm = open_vlm(str(small), device="cpu")
    model = vlm.model.double()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    questions = train_llava.lesson([2, 6, 2, 0], torch.Generator().manual_seed(0))
    expected = []
    for question in questions:
        inputs = vlm.inputs([[picture]], [question.question])
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        expected.append(logits)
    seen = []
    head = model.lm_head
    head.register_forward_hook(lambda module, args, output: seen.append(output))
    pixels = vlm.inputs([[picture]], ["how many cats?"])["pixel_values"]
    with torch.no_grad():
        features, _ = train_llava.look(model.model.vision_tower, pixels)
        sheet = train_llava.Sheet(vlm.processor.tokenizer, len(questions), pooled=False)
        sheet.mask = sheet.mask.double()
        _, shares = sheet.loss(model, features, [questions])
    found = seen[0][0].unflatten(0, (len(questions), 2))[:, 0]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-9)
    right = [
        vlm.processor.decode(logits.argmax()) == question.answer
        for logits, question in zip(expected, questions, strict=True)
    ]
    assert shares["position"] == np.mean(right[:2])


def test_positions_as_if_patches_were_gone(train_llava):
    sheet = train_llava.Sheet(train_llava.make_tokenizer(), 2, pooled=False)
    positions = sheet.positions(200, torch.Generator().manual_seed(0))
    usual = sheet.positions(1, None)[0]
    assert usual[:259].tolist() == list(range(259)) and usual[259:].tolist() == [*range(259, 269)] * 2
    visual, after = positions[:, 3:259], positions[:, 259:]
    assert (positions[:, :3] == torch.arange(3)).all()
    assert set(visual.diff(dim=1).unique().tolist()) == {0, 1}
    # Questions begin right behind the image, wherever that ends; a third of the images keep all positions.
    assert (after[:, 0] == visual[:, -1] + 1).all() and (after[:, :10] == after[:, 10:]).all()
    assert 0.25 < (after[:, 0] == 259).float().mean() < 0.5 and after[:, 0].min() < 80


@pytest.fixture(scope="module")
def reference():
    return open_model().adapter.model


@pytest.fixture
def tower(train_llava):
    processor = train_llava.make_processor([0.5] * 3, [0.25] * 3)
    return train_llava.CLIPVisionModel(train_llava.make_config(processor.tokenizer).vision_config).eval()


def test_reference_in_the_tower(train_llava, reference, tower):
    """What enters the first layer, and what a layer makes of it, is the reference's own, in all four cells."""
    cells = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mosaics = cells.tile(1, 1, 2, 2)
    code = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)) / 100
    train_llava.load_reference(tower, reference.state_dict(), code, mosaics)
    with torch.no_grad():
        entering = reference._pos_embed(reference.patch_embed(cells))
        found = tower.pre_layrnorm(tower.embeddings(mosaics))
        grid = found[:, 1:].view(8, 2, 8, 2, 8, -1).permute(0, 1, 3, 2, 4, 5).reshape(8, 4, 64, -1)
        wanted = entering[:, None, 1:] + code[:, None]
        assert (grid - wanted).std() < 0.2 * wanted.std()
        code_found = grid.mean((0, 2)) - grid.mean((0, 1, 2))
        torch.testing.assert_close(code_found, code - code.mean(0), atol=4e-3, rtol=0.1)
        torch.testing.assert_close(
            tower.encoder.layers[3](entering, None), reference.blocks[3](entering), atol=1e-4, rtol=1e-4
        )


def test_cells_look_like_single_images(train_llava, mosaic, reference, tower):
    """Patches of a mosaic are nearer to those of its images alone than without the code, and see their own cell."""
    images = ImageSource(bundled.calibration_data())
    pixels = np.stack([np.asarray(images.read(index)[0].convert("RGB")) for index in range(0, 640, 10)])
    cells = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.47) / 0.25
    mosaics = cells.view(16, 2, 2, 3, 32, 32).permute(0, 3, 1, 4, 2, 5).reshape(16, 3, 64, 64)
    seen = []
    with torch.no_grad():
        alone = reference._pos_embed(reference.patch_embed(cells))
        for block in reference.blocks[:7]:
            alone = block(alone)
        plain = reference.state_dict(), torch.zeros(4, 128)
        for weights, code in (plain, train_llava.separate_cells(reference, cells)):
            train_llava.load_reference(tower, weights, code, mosaics)
            features, _ = train_llava.look(tower, mosaics)
            grid = features.view(16, 2, 8, 2, 8, -1).permute(0, 1, 3, 2, 4, 5).reshape(64, 64, -1)
            seen.append(torch.cosine_similarity(grid.mean(1), alone[:, 1:].mean(1)).mean().item())
    assert seen[1] > 0.75 and 1 - seen[1] < 0.7 * (1 - seen[0]), seen


@pytest.fixture
def accuracy(vlm_script):
    return vlm_script("accuracy")


def test_shared_features_change_no_answer(accuracy, small, colours):
    vlm = open_vlm(str(small), device="cpu")
    asked = accuracy.Asked.draw(colours, 5, 1)
    for pruning in (None, accuracy.Pruning("hybrid", 0.5), accuracy.Pruning("vispruner", 0.25)):
        opened = pruning.prepare(vlm.model) if pruning else nullcontext
        with torch.inference_mode():
            found, layers = accuracy.answer(vlm, asked, opened, batch=2)
        assert layers is None if pruning is None else layers[-1] == 256 * pruning.keep
        for picture, questions, row in zip(asked.pictures, asked.questions, found, strict=True):
            for question, word in zip(questions, row, strict=True):
                inputs = vlm.inputs([[picture]], [question.question])
                with opened(), torch.inference_mode():
                    sequence = vlm.model.generate(**inputs, max_new_tokens=1)
                (expected,) = vlm.texts(sequence, inputs["input_ids"].shape[1])
                assert accuracy.normalise_answer(expected) == word


def test_the_stored_model_answers(accuracy, mosaic, repository, monkeypatch):
    """On mosaics of images that it was not trained on; and without most of its visual tokens still."""
    folder = repository / "benchmarks" / "vlm" / "model"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
    vlm = open_vlm(str(folder), device="cpu")
    assert vlm.dtype == "float32"
    asked = accuracy.Asked.draw(mosaic.load_cells(str(bundled.evaluation_data())), 24, 0)
    half = partial(accuracy.Pruning("llm", 0.5).prepare(vlm.model), positions="original")
    with torch.inference_mode():
        for opened in (nullcontext, half):
            found, _ = accuracy.answer(vlm, asked, opened, batch=8)
            position, count, presence = (found == asked.answers).mean(0)
            # Chance is 1/6, about 1/2 and 1/2.
            assert position > 0.7 and count > 0.6 and presence > 0.7


def test_rows_of_the_benchmark(accuracy, mosaic, small, colours, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "load_cells", lambda source: colours)
    monkeypatch.setattr(accuracy, "CALIBRATION_MOSAICS", 4)
    output = tmp_path / "rows.jsonl"
    options = ["--model", str(small), "--eval-data", "mosaics", "--data", "mosaics", "--mosaics", "6", "--seeds", "2"]
    options += ["--keeps", "0.5", "-o", str(output)]
    accuracy.main([*options, "--methods", "vit", "random"])
    before = accuracy.read_rows(output)
    accuracy.main([*options, "--methods", "vit", "random", "static"])
    rows = accuracy.read_rows(output)
    assert rows[: len(before)] == before and {row["method"] for row in rows[len(before) :]} == {"static"}
    accuracy.main([*options, "--methods", "vit", "--positions", "compact"])
    moved = accuracy.read_rows(output)[len(rows) :]
    assert [row["method"] for row in moved[:5]] == ["dense"] * 4 + ["vit"] and {row["positions"] for row in moved} == {
        "compact"
    }
    kinds = [*mosaic.KINDS, "all"]
    assert [row["question_kind"] for row in rows if row["method"] == "dense"] == kinds
    for method in ("vit", "random", "static"):
        some = [row for row in rows if row["method"] == method]
        metrics = ["accuracy", "accuracy_difference", "agreement"]
        assert [(row["question_kind"], row["metric"]) for row in some] == [(k, m) for k in kinds for m in metrics]
        assert some[0]["count"] == 6 and some[-1]["count"] == 18
        assert abs(some[0]["visual_tokens"][-1] - 128) <= (3 if method == "static" else 0)
    assert "/" not in str([{k: v for k, v in row.items() if k != "environment"} for row in rows])


def test_estimates_count_by_kind(accuracy):
    truth = np.array([["cat", "1", "yes"], ["ship", "0", "no"]])
    dense = np.array([["cat", "1", "no"], ["frog", "0", "no"]])
    found = np.array([["cat", "2", "yes"], ["frog", "0", "no"]])
    values = {(kind, e.metric): (e.value, e.count) for kind, e in accuracy.estimates(found, dense, truth)}
    assert values["position", "accuracy"] == (0.5, 2) and values["position", "agreement"] == (1.0, 2)
    assert values["count", "accuracy_difference"] == (-0.5, 2)
    assert values["presence", "accuracy_difference"] == (0.5, 2)
    assert values["all", "accuracy"] == (4 / 6, 6) and values["all", "accuracy_difference"] == (0.0, 6)
