"""The Python API as a reader of docs/python.md calls it."""

import importlib
import json
import logging
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from covered import KINDS
from PIL import Image

import vpruner as vp

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

QUICK = {"rounds": 1, "episodes": 4}


@pytest.fixture(scope="module", autouse=True)
def exports_once(tmp_path_factory):
    """The exporter's answers come from the store; what it does is tested in tests/export."""
    from exports import remembering

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", remembering(torch.onnx.export))
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def noise(count: int, size: int = 36) -> list[Image.Image]:
    random = np.random.default_rng(1)
    return [Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def model(card):
    return vp.open_model(card)


@pytest.fixture(scope="module")
def pruned(model, images):
    """With weights that tuning changed: made so here, as tuning undoes what does not help on noise."""
    from dataclasses import replace

    found = model.prune(vp.open_images(images), target=0.65, **QUICK)
    name = "blocks.1.attn.proj.weight"
    weights = {name: model.module.get_parameter(name).detach() * 1.01}
    return vp.Pruned(found.loaded, found.files, replace(found._learned, weights=weights))


def six_lines(model, images, validation, path):
    pruned = vp.open_model(model).prune(vp.open_images(images), target=0.65, **QUICK)
    files = pruned.export("pruned.onnx")
    text = str(vp.evaluate(files, images=validation, against=vp.open_model(model)))
    with vp.open("pruned.onnx") as session:
        prediction = session.predict([path])[0]
    return pruned, text, prediction


# -- the face ---------------------------------------------------------------------------------------------------------


def test_the_six_lines_also_after_every_submodule_was_imported(card, images, here):
    path = next(images.glob("cat/*.png"))
    pruned, text, prediction = six_lines(card, images, images, path)
    assert "top-1 accuracy" in text and "change in top-1" in text and prediction.label in ("cat", "cow", "dog", "fox")
    for module in pkgutil.walk_packages(vp.__path__, "vpruner."):
        if module.name.split(".")[1] in ("core", "prune", "export", "runtime", "report", "pipeline", "api"):
            try:
                importlib.import_module(module.name)
            except ImportError:
                pass  # An extra that is not installed.
    again, text_again, prediction_again = six_lines(card, images, images, path)
    assert again.plan.digest == pruned.plan.digest and text_again == text
    assert prediction_again.label == prediction.label


def test_every_name_is_there_and_is_no_package():
    for name in vp.__all__:
        assert callable(getattr(vp, name)), name
    assert set(vp.__all__) <= set(dir(vp)) and set(vp.__all__) == set(vp._HOME)
    root = Path(vp.__file__).parent
    assert not [name for name in vp.__all__ if (root / name).exists() or (root / f"{name}.py").exists()]
    with pytest.raises(AttributeError, match="no attribute 'prune_model'"):
        _ = vp.prune_model


# -- models and images in memory --------------------------------------------------------------------------------------


def test_a_timm_model_made_in_memory_and_a_list_of_pictures(here):
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, num_classes=5)
    pictures = noise(16)
    pruned, text, prediction = six_lines(module, pictures, noise(8), pictures[0])
    assert "agreement with dense" in text and 0 <= prediction.scores[0].index < 5
    assert pruned.plan.provenance["calibration"]["source"] == "the list of 16 images"
    assert not module.training


def test_a_model_proto(exported, here):
    import onnx

    proto = onnx.load(exported("class token").path)
    model = vp.open_model(proto)
    files = model.prune(noise(8), rounds=1, rearrange="none", tune="none").export("pruned.onnx")
    assert model.name and all(check.passed for check in files.checks)
    assert vp.evaluate(files, noise(4), against=model)[0]["count"] == 4


class Pictures(torch.utils.data.Dataset):
    """As torchvision has them: pixels as a tensor from 0 to 1, channels first."""

    classes = ("fox", "dog", "cow", "cat")

    def __init__(self, images, broken=()):
        self.images, self.broken = images, broken

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.broken:
            raise RuntimeError("the disk is gone")
        pixels = torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1)
        return pixels.float() / 255, index % 4


def read_all(source):
    from vpruner.prune.data import ImageSet

    images = ImageSet(source, range(len(source)), {0: 0, 1: 1, 2: 2, 3: 3} if source.numbered else None)
    return [(np.array(image), label) for image, label in images.images()], images


def test_the_same_images_in_every_form(tmp_path):
    pictures = noise(4)
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    arrays = np.stack([np.array(picture) for picture in pictures])
    numbered = [(picture, index) for index, picture in enumerate(pictures)]
    forms = {
        "list": pictures, "paths": paths, "text": list(map(str, paths)), "generator": (picture for picture in pictures),
        "arrays": list(arrays), "array": arrays, "floats": list(arrays / 255),
        "first": list(arrays.transpose(0, 3, 1, 2)),
        "tensor": torch.from_numpy(arrays).permute(0, 3, 1, 2),
    }  # fmt: skip
    for name, form in forms.items():
        read, images = read_all(vp.open_images(form).source)
        assert [label for _, label in read] == [None] * 4, name
        assert all(np.array_equal(found, expected) for (found, _), expected in zip(read, arrays, strict=True)), name
        assert images.sha256 == read_all(vp.open_images(pictures).source)[1].sha256, name
    for form in (numbered, [{"image": image, "label": label} for image, label in numbered], Pictures(pictures)):
        read, _ = read_all(vp.open_images(form).source)
        assert [label for _, label in read] == [0, 1, 2, 3]
        assert all(np.array_equal(found, expected) for (found, _), expected in zip(read, arrays, strict=True))
    assert len(vp.open_images(iter(pictures), limit=2)) == 2


def test_classes_of_a_data_set_are_matched_by_name(model, pruned, images):
    """Its number 0 is fox, which is the model's output 3."""
    from vpruner.core.specs import DataSpec
    from vpruner.pipeline.inputs import calibration_set

    source = vp.open_images(Pictures(noise(4))).source
    found = calibration_set(model.classes, model.geometry, DataSpec(data=source))
    assert found.label_map == {0: 3, 1: 2, 2: 1, 3: 0}
    mapped = vp.evaluate(pruned, Pictures(noise(8)))
    assert {row["metric"] for row in mapped} >= {"top1", "kl"}


def test_items_that_cannot_be_read_are_skipped_and_counted(model, reported):
    data = Pictures(noise(8), broken={1, 5})
    pruned = model.prune(data, rounds=1, rearrange="none", tune="none")
    assert pruned.plan.provenance["calibration"]["skipped"] == 2
    with pytest.raises(vp.UserError, match="the disk is gone"):
        model.prune(vp.open_images(data, strict=True), rounds=1, rearrange="none", tune="none")


# -- plans ------------------------------------------------------------------------------------------------------------


def test_a_saved_plan_is_the_command_lines(card, images, here):
    from commands import call

    options = ("--rounds", "1", "--episodes", "4", "--target", "0.65")
    call("prune", card, "--data", images, *options, "-o", "typed.json", "--quiet")
    vp.open_model(card).prune(images, target=0.65, **QUICK).save("called.json")
    typed, called = (json.loads(Path(name).read_text()) for name in ("typed.json", "called.json"))
    for plan in (typed, called):
        assert plan["provenance"].pop("created")
        plan["provenance"].pop("tuned_weights_file", None)
        for stage in plan["provenance"]["stages"]:
            stage.pop("seconds")
    assert typed == called


def test_a_saved_plan_exports_the_same_graph_with_its_tuned_weights(model, pruned, here):
    paths = pruned.save("plan.json")
    assert [path.name for path in paths] == ["plan.json", "plan.safetensors"]
    again = model.with_plan("plan.json")
    assert again.plan.digest == pruned.plan.digest and set(again.weights) == set(pruned.weights)
    assert model.with_plan("plan.json", weights="plan.safetensors").weights.keys() == pruned.weights.keys()
    written = pruned.export("one.onnx")
    model.with_plan("plan.json").export("two.onnx")
    model.export("three.onnx", plan="plan.json")
    one, two, three = (Path(name).read_bytes() for name in ("one.onnx", "two.onnx", "three.onnx"))
    assert one == two == three and all(check.passed for check in written.checks)
    rows = vp.evaluate(written, noise(6), against=model)
    assert {row["label"] for row in rows} == {"pruned"}
    in_pytorch = vp.evaluate(pruned, noise(6))
    for row, other in zip(rows, in_pytorch, strict=True):
        assert row["metric"] == other["metric"] and row["value"] == pytest.approx(other["value"], abs=1e-5)


def test_weights_of_another_plan_are_refused(card, model, pruned, here):
    pruned.save("plan.json")
    with pytest.raises(vp.UserError, match="has weights .* the plan goes with"):
        model.with_plan("plan.json", weights=card.with_suffix(".safetensors"))


def test_a_plan_of_an_onnx_file_is_saved_with_the_tuned_graph(exported, here):
    from dataclasses import replace

    model = vp.open_model(exported("class token").path)
    pruned = model.prune(noise(8), rounds=1, rearrange="none", tune="none")
    square = [
        (name, own) for name, own in model.module.named_parameters() if own.ndim == 2 and len(set(own.shape)) == 1
    ]
    name, own = square[-1]  # An attention projection.
    changed = {name: own.detach() * 1.01}
    pruned = vp.Pruned(pruned.loaded, pruned.files, replace(pruned._learned, weights=changed))
    paths = pruned.save("plan.json")
    assert [path.name for path in paths] == ["plan.json", "plan.tuned.onnx"]
    with pytest.raises(vp.UserError, match='is an ONNX file, and select="content" writes a graph'):
        model.prune(noise(8), select="content")
    again = model.with_plan("plan.json")
    assert set(again.weights) == {name} and torch.allclose(again.weights[name], changed[name])
    assert all(check.passed for check in again.export("pruned.onnx").checks)
    assert all(check.passed for check in vp.fold_plan("plan.tuned.onnx", "plan.json", "folded.onnx").checks)


def test_a_plan_is_folded_into_a_model_in_memory(exported, here):
    import onnx
    import onnx_ir

    path = exported("class token").path
    vp.fold_plan(path, identity=True, output="file.onnx")
    for model in (onnx.load(path), onnx_ir.load(path)):
        folded = vp.fold_plan(model, identity=True, output="memory.onnx")
        assert folded.checks[0].passed and Path("memory.onnx").read_bytes() == Path("file.onnx").read_bytes()
    with pytest.raises(vp.UserError, match="the graph is a list; expected a path, an onnx.ModelProto"):
        vp.fold_plan([1], identity=True)


def test_a_graph_that_ends_in_a_softmax(exported, here):
    import onnx

    proto = onnx.load(exported("class token").path)
    (output,) = proto.graph.output
    proto.graph.node.append(onnx.helper.make_node("Softmax", [output.name], ["probabilities"], axis=-1))
    output.name = "probabilities"
    onnx.save(proto, "soft.onnx")
    model = vp.open_model("soft.onnx")
    pruned = model.prune(noise(8), rounds=1, rearrange="none", tune="none")
    with pytest.raises(vp.UserError, match="ends in a Softmax.* vpruner.fold_plan"):
        pruned.export("pruned.onnx")
    pruned.save("plan.json")
    folded = vp.fold_plan("soft.onnx", "plan.json", "folded.onnx")
    rows, files = (vp.evaluate(folded, noise(6), against=against) for against in (model, "soft.onnx"))
    assert [row["value"] for row in rows] == [row["value"] for row in files]


def test_a_plan_by_content(card, here):
    model = vp.open_model(card)
    pruned = model.prune(noise(8), rounds=1, rearrange="none", tune="none")
    geometry = pruned.plan.geometry
    kept = [range(geometry.patches - 2 * block) for block in range(geometry.depth)]
    channels = [[0.01 * number for number in range(geometry.embed_dim)]] * (geometry.depth - 1)
    content = vp.ContentPlan(vp.TokenPlan.dropping(pruned.plan.model, geometry, kept), channels, 0.5)
    chosen = model.with_plan(content)
    assert "chooses its own patches" in str(content) and "chooses its own" in chosen._repr_html_()
    with pytest.raises(vp.UserError, match="each image chooses its own patches by this plan; export it"):
        chosen.module()
    assert all(check.passed for check in chosen.export("content.onnx").checks)


def test_plans_and_results_show_themselves(pruned, images):
    from dataclasses import replace
    from html.parser import HTMLParser

    text, markup = str(pruned.plan), pruned._repr_html_()
    assert "16" in text and "patches that attend" in text and "what each stage contributed" in str(pruned)
    assert markup.count("<svg") == 1 and "stops at block 2" in markup
    hostile = replace(pruned.plan, model="<script>alert(1)</script>")
    assert "<script" not in hostile._repr_html_()
    opened = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    for shown in (pruned, pruned.plan, vp.evaluate(pruned, images)):
        Checker().feed(shown._repr_html_())
        assert not opened and repr(shown)


# -- the pruned module ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_equals_the_gathered_form(kind):
    from tiny_vits import frozen_plan, half_plan, tiny

    from vpruner.prune.backbones.vit import ViTAdapter
    from vpruner.prune.gathered import gathered_module

    adapter = ViTAdapter(tiny(kind).double(), kind)
    plan = half_plan(adapter, first=0)
    gates = tuple(tuple(0.5 + index % 3 for index in row) for row in plan.keys)
    images = torch.randn(3, 3, *adapter.geometry.image_size, dtype=torch.float64)
    for made in (plan, vp.TokenPlan.dropping(plan.model, plan.geometry, plan.kept, gates), frozen_plan(adapter)):
        module = gathered_module(adapter, made)
        with torch.inference_mode(), adapter.applied(made, "gathered") as gathered:
            expected = gathered(images)
        found = module(images)
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
        assert module.state_dict().keys() == adapter.model.state_dict().keys()
        hooks = [part for part in module.modules() if part._forward_hooks or part._forward_pre_hooks]
        assert not hooks and "forward" not in vars(module.blocks[0])


def test_the_module_has_the_tuned_weights_and_leaves_the_model_alone(model, pruned):
    from vpruner.prune.tune.weights import with_weights

    module, images = pruned.module(), torch.randn(5, 3, 32, 32)
    adapter = pruned.loaded.adapter
    before = model.module(images)
    with torch.inference_mode(), with_weights(adapter.model, pruned.weights), adapter.applied(pruned.plan) as applied:
        expected = applied(images)
    assert torch.allclose(module(images), expected, atol=1e-6)
    other = pruned.module()
    other.load_state_dict({name: torch.zeros_like(value) for name, value in module.state_dict().items()})
    assert not other(images).any() and torch.equal(model.module(images), before)
    module.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in module.blocks.parameters())


def test_torch_export_and_compile_take_the_module(pruned):
    module, images = pruned.module(), torch.randn(3, 3, 32, 32)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (1, 3, 7):
            images = torch.randn(batch, 3, 32, 32)
            expected = module(images)
            assert torch.allclose(program.module()(images), expected, atol=1e-6)
            assert torch.allclose(compiled(images), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.nightly
def test_inductor_compiles_the_module(pruned):
    module, images = pruned.module(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(torch.compile(module)(images), module(images), atol=1e-5)


# -- words ------------------------------------------------------------------------------------------------------------


def test_nothing_prints_and_progress_is_heard(model, here, capsys, caplog):
    class Heard(vp.Sink):
        def __init__(self):
            self.titles, self.remarks = [], []

        def finished(self, title, seconds, done, unit):
            self.titles.append(title)

        def remarked(self, text):
            self.remarks.append(text)

    given, around = Heard(), Heard()
    with caplog.at_level(logging.INFO, "vpruner"):
        pruned = model.prune(noise(8), progress=given, **QUICK)
        assert "Reading calibration images" in given.titles and not caplog.messages
        with vp.progress(around):
            pruned.export("pruned.onnx")
        assert "Checking parity" in around.titles and not caplog.messages
        vp.evaluate("pruned.onnx", noise(4), against=model)
        assert any(message.startswith("Evaluating") for message in caplog.messages)
    assert capsys.readouterr() == ("", "")


def test_remarks_go_nowhere_where_the_program_has_no_logging():
    code = "from vpruner.core import progress; progress.remark('no labels')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_what_messages_call_exists():
    """The calls and the arguments that messages name, see core/text.py."""
    from inspect import signature

    from vpruner.core.text import IN_PYTHON

    model, session = vp.Model, importlib.import_module("vpruner.runtime").Session
    for called in IN_PYTHON.values():
        name = called.removeprefix("vpruner.")
        if called.startswith("model."):
            assert callable(getattr(model, name.removeprefix("model.")))
        elif name == "open(...).predict":
            assert callable(session.predict)
        elif "." in name:
            module, _, function = name.rpartition(".")
            assert callable(getattr(importlib.import_module(f"vpruner.{module}"), function))
        else:
            assert callable(getattr(vp, name))
    named = {
        vp.run: "data eval_data output weights pretrained model_args images eval_images force",
        vp.compare: "data eval_data output weights results force",
        vp.evaluate: "against plan weights", vp.fold_plan: "plan output identity deploy_for",
        vp.build_engine: "output", vp.profile: "layers cuda_graph provider against",
        vp.Model.prune: "target cost loss rounds rearrange tune select episodes time_limit state resume seed",
        vp.Model.export: "output plan method opset dynamic_batch batch_size deploy_for precisions io data images "
        "tokens",
        vp.open_model: "weights pretrained model_args loss", vp.open_images: "strict limit workers",
    }  # fmt: skip
    for function, names in named.items():
        assert set(names.split()) <= set(signature(function).parameters), function


PICTURE = Image.new("RGB", (8, 8))
WRONG = {
    "model": (lambda m: vp.open_model(42), "the model is of type int; expected a timm name"),
    "module": (lambda m: vp.open_model(torch.nn.Linear(2, 2)), "cannot be pruned: it is a Linear"),
    "weights": (lambda m: vp.open_model("vit_tiny_patch16_224", weights=3), "'weights' is 3; expected a path"),
    "twice": (lambda m: vp.open_model(m, weights="x"), "is open already"),
    "name": (lambda m: vp.open_model("a.json", name="x"), "go with a torch module"),
    "preprocessing": (lambda m: vp.open_model(m.module, preprocessing={"men": 1}), "'mean'|no men|does not say how"),
    "no images": (lambda m: vp.open_images([]), "there are no images: the list is empty"),
    "empty iterable": (lambda m: vp.open_images(x for x in ()), "the generator is empty"),
    "a number": (lambda m: vp.open_images(3), "the images are of type int; expected a folder"),
    "one image": (lambda m: vp.open_images(PICTURE), "found one image"),
    "shape": (lambda m: vp.open_images([np.zeros((5, 9, 2), np.uint8)]), r"shape \[5, 9, 2\]; expected \[height"),
    "one array": (lambda m: vp.open_images(np.zeros((8, 8, 3), np.uint8)), "expected .image, height, width, channel"),
    "normalised": (lambda m: vp.open_images([torch.full((3, 8, 8), -1.0)]), "before any normalisation"),
    "an item": (lambda m: vp.open_images([None]), "item 0 is of type NoneType, no image"),
    "no file": (lambda m: vp.open_images(["nowhere.png"]), "not a readable image .*nowhere.png"),
    "raises": (lambda m: vp.open_images(Pictures([PICTURE], {0})), "raises RuntimeError: the disk is gone"),
    "loader": (lambda m: vp.open_images(torch.utils.data.DataLoader(Pictures([PICTURE]))), "loader.dataset"),
    "label": (lambda m: m.prune([(PICTURE, 9)] * 4), "label 9, the model's classes are 0..3"),
    "text label": (lambda m: vp.open_images([(PICTURE, "cat")]), "a label is 'cat', expected a class number"),
    "some labels": (
        lambda m: vp.open_images([(PICTURE, 1), PICTURE]),
        "some have a label and item 1 differs; label all or none",
    ),
    "limit": (lambda m: vp.open_images([PICTURE], limit=0), "'limit' is 0"),
    "target": (lambda m: m.prune([PICTURE], target="0.65"), "'target' is '0.65'; expected a fraction"),
    "too low": (lambda m: m.prune([PICTURE] * 4, target=0.001), "use a target of 0.1"),
    "choice": (lambda m: m.prune([PICTURE], tune="x"), "'tune' is 'x'; expected one of weights"),
    "sink": (lambda m: m.prune([PICTURE], progress=print), "expected a vpruner.Sink"),
    "plan": (lambda m: m.with_plan("nowhere.json"), r"cannot read the plan nowhere.json: .* model.prune\(...\)"),
    "precision": (lambda m: m.export("a.onnx", precisions=5), "'precisions' is 5; expected a name"),
    "int8": (lambda m: m.export("a.onnx", precisions="int8"), "give them with data=DIR"),
    "opset": (lambda m: m.export("a.onnx", opset="x"), "'opset' is 'x'"),
    "suffix": (lambda m: m.export("a.txt"), "does not end in .onnx; name a .onnx file with 'output'"),
    "against": (lambda m: vp.evaluate(m, [PICTURE], against="a.onnx"), "'against' goes with an ONNX file"),
    "nothing": (lambda m: vp.evaluate(m, [PICTURE]), "nothing to measure: no labels"),
    "batches": (lambda m: vp.profile("a.onnx", batches="x"), "'batches' is 'x'; expected a whole number above zero"),
    "fold": (lambda m: vp.fold_plan("a.onnx"), "give one of 'plan' and identity=True"),
    "build": (lambda m: vp.build_engine("a.onnx", "a.engine", bla=1), "build_engine has no bla; expected some of"),
    "open": (lambda m: vp.open(3), "the model is of type int; expected the path"),
    "spec": (lambda m: vp.run(m, [PICTURE], learn=3), "'learn' is of type int; expected a vpruner.LearnSpec"),
    "methods": (lambda m: vp.compare(m, [PICTURE], methods=5), "'methods' is 5; expected a name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_clear_error(case, model, here):
    call, message = WRONG[case]
    with pytest.raises(vp.UserError, match=message) as caught:
        call(model)
    assert "--" not in str(caught.value) and not list(here.iterdir())


def test_the_public_face_is_typed(repository):
    pytest.importorskip("pyright")
    files = ["api.py", "__init__.py", *(f"pipeline/{name}.py" for name in ("pruned", "images", "models", "calls"))]
    names = [str(repository / name) for name in files]
    done = subprocess.run([sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *names],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout
