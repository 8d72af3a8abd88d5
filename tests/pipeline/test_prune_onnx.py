"""A plan is learned from an ONNX file alone: the same one as from the PyTorch model, and it folds into that file."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from commands import call, fails
from foreign_graphs import write_module
from PIL import Image
from tiny_vits import tiny

from vpruner.core import bundled, progress
from vpruner.core.plan import TokenPlan
from vpruner.core.specs import ExportSpec, LearnSpec, ModelSpec
from vpruner.export.files import load_model, save_model
from vpruner.export.graph_model import open_graph_model, probe_images
from vpruner.export.parity import run_onnx
from vpruner.pipeline.fold import fold_checked
from vpruner.pipeline.folders import check_free
from vpruner.pipeline.graphs import write_dense
from vpruner.pipeline.inputs import open_prunable
from vpruner.prune import stages
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.calibration import Calibration, Judgement
from vpruner.prune.choose_images import choose_indices
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.fisher import gate_gradients
from vpruner.prune.learn import learn_plan
from vpruner.prune.models import open_model

GIVEN = ("--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")
SEARCH_ALONE = ("--rearrange", "none", "--tune", "none")
#: Initialisers that tuning replaces, in the three blocks of the tiny model.
TUNED = ("blocks.1.attn.proj.weight", "blocks.2.mlp.fc2.bias")


@pytest.fixture(scope="module")
def model():
    return tiny("class token", depth=3)


@pytest.fixture(scope="module")
def graph(model, tmp_path_factory):
    """A file of another exporter, with a dynamic batch and no metadata."""
    path = tmp_path_factory.mktemp("graph") / "mine.onnx"
    write_module(model, torch.zeros(2, 3, 32, 48), path, "torchscript", 17, True)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two dozen images of random colours, in a folder without classes."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for index in range(24):
        colours = Image.fromarray(random.integers(0, 255, (4, 6, 3), np.uint8))
        colours.resize((48, 32), Image.Resampling.NEAREST).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def tuning_helps(model, monkeypatch):
    """Let tuning find something: two dozen images of noise give it next to nothing."""
    real, wanted = (
        stages.tune,
        [weight.mT if weight.ndim > 1 else weight for weight in map(model.state_dict().get, TUNED)],
    )

    def tune(adapter, plan, calibration, kind, **options):
        own = dict(adapter.model.named_parameters())
        # The exporter turns matrices around.
        weights = {name: 1.5 * value.detach() for name, value in own.items()
                   if any(value.shape == one.shape and torch.equal(value, one) for one in wanted)}  # fmt: skip
        assert len(weights) == len(TUNED)
        done = real(adapter, plan, calibration, kind, **options)
        return replace(done, kept=True, note="", weights=weights, judgement=Judgement(0.2, 0.1, 0.01, 4))

    monkeypatch.setattr(stages, "tune", tune)


# -- the same plan ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny", pytest.param("bundled", marks=pytest.mark.nightly)])
def reference(request, card):
    return open_model(card if request.param == "tiny" else None)


@pytest.fixture(scope="module", params=["ours", "torchscript"])
def reference_graph(request, reference, tmp_path_factory):
    path, geometry = tmp_path_factory.mktemp("reference") / "reference.onnx", reference.adapter.geometry
    if request.param == "ours":
        write_dense(reference, path, ExportSpec())
    else:
        zeros = torch.zeros(1, geometry.in_chans, *geometry.image_size)
        write_module(reference.adapter.model, zeros, path, request.param, 18, False)
    return path


def test_the_plan_from_the_graph_is_the_one_from_pytorch(reference, reference_graph, images, tmp_path):
    given = {name: value for name, value in reference.preprocessing.to_json().items() if name != "size"}
    opened = open_graph_model(reference_graph, preprocessing=given)
    source = ImageSource(images if reference.name == "tiny" else bundled.calibration_data())
    chosen = ImageSet(source, choose_indices(source, 24, 0), None)
    scores, plans = [], []
    for loaded in (reference, opened):
        batches = Calibration.load(chosen, loaded.preprocessing, held_out=0).batches(np.arange(24), 24)
        scores.append(gate_gradients(loaded.adapter, batches, "self").losses())
        plans.append(learn_plan(loaded, chosen, LearnSpec(target=0.6, loss="self", rounds=2, seed=1)))
    assert np.abs(scores[1] - scores[0]).max() <= 1e-4 * scores[0].max()
    assert scores[0].max() > 0
    # Near-ties may fall either way.
    assert (plans[1].masks == plans[0].masks).mean() >= 0.99 and not plans[0].is_identity
    assert plans[1].geometry.differences(plans[0].geometry) == []
    if opened.classes is not None:  # A file of ours: what is learned from it is a plan for the model itself.
        plans[1].check_fits(reference.name, reference.adapter.geometry, reference.sha256)
        with progress.reporting() as record:
            fold_checked(reference_graph, plans[1], tmp_path / "pruned.onnx")
        assert not record.remarks


# -- prune, fold, run -------------------------------------------------------------------------------------------------


def test_prune_and_fold_need_no_pytorch_model(model, graph, images, tmp_path, tuning_helps):
    result = call("prune", graph, "--data", images, "--target", 0.6, "--rearrange", "none", *GIVEN,
                  "-o", tmp_path / "plan.json")  # fmt: skip
    tuned = tmp_path / "plan.tuned.onnx"
    assert str(tuned) in result.stdout
    assert f"next: vpruner fold {tuned} --plan {tmp_path / 'plan.json'} -o pruned.onnx" in " ".join(
        result.stderr.split()
    )
    assert "5 outputs are taken for logits" in result.stderr
    plan = TokenPlan.load(tmp_path / "plan.json")
    assert plan.model == "mine" and plan.provenance["loss"] == "self" and not plan.is_identity
    assert plan.provenance["preprocessing"]["std"] == [0.25] * 3
    assert plan.provenance["tuned_weights_file"] == tuned.name

    call("fold", tuned, "--plan", tmp_path / "plan.json", "-o", tmp_path / "pruned.onnx")
    own = tiny("class token", depth=3)
    own.load_state_dict({k: 1.5 * v if k in TUNED else v for k, v in model.state_dict().items()})
    adapter, pixels = ViTAdapter(own, "mine"), probe_images(plan.geometry)
    with torch.no_grad(), adapter.applied(plan, "gathered"):
        expected = own(torch.from_numpy(pixels)).numpy()
    found = run_onnx(tmp_path / "pruned.onnx", pixels)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    with torch.no_grad():
        assert np.abs(model(torch.from_numpy(pixels)).numpy() - expected).max() > 1e-3
    # What the user said of the images goes with the file, and the file says what was done to its weights.
    shown = call("predict", tmp_path / "pruned.onnx", next(images.iterdir()), "--json")
    assert len(json.loads(shown.stdout)[0]["scores"]) == 5
    facts = load_model(tmp_path / "pruned.onnx").metadata_props
    assert facts["vpruner.tuned_sha256"] == plan.provenance["tuned_weights_sha256"]
    assert facts["vpruner.weights_sha256"] == plan.provenance["weights_sha256"]
    # The same plan with the file as it was holds too, and is known for the file it was learned from.
    result = call("fold", graph, "--plan", tmp_path / "plan.json", "-o", tmp_path / "untuned.onnx")
    assert "plan.tuned.onnx" in result.stderr and "could not be checked" not in result.stderr
    # A second time its own files may be replaced, another's not.
    tuned.write_bytes(b"something else")
    fails("prune", graph, "--data", images, *GIVEN, "-o", tmp_path / "plan.json", says="which holds something else")


def test_a_plan_alone_leaves_no_second_file(graph, images, tmp_path):
    plan = tmp_path / "plan.json"
    result = call("prune", graph, "--data", images, "--target", 0.6, *SEARCH_ALONE, *GIVEN, "-o", plan)
    assert f"next: vpruner fold {graph}" in " ".join(result.stderr.split())
    result = call("fold", graph, "--plan", plan, "-o", tmp_path / "pruned.onnx")
    assert "could not be checked" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "pruned.onnx"]


def test_a_graph_that_ends_in_a_softmax_is_pruned_by_its_logits(graph, images, tmp_path):
    proto = onnx.load(graph)
    output = proto.graph.output[0]
    last = next(node for node in proto.graph.node if output.name in node.output)
    last.output[0] = "logits"
    proto.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], [output.name], axis=-1, name="softmax"))
    onnx.save(proto, tmp_path / "probabilities.onnx")
    plans = []
    for path in (graph, tmp_path / "probabilities.onnx"):
        call("prune", path, "--data", images, "--target", 0.6, *SEARCH_ALONE, *GIVEN, "-o", tmp_path / "plan.json")
        plans.append(TokenPlan.load(tmp_path / "plan.json"))
    assert plans[0].kept == plans[1].kept
    fails("run", tmp_path / "probabilities.onnx", "--data", images, *GIVEN, "-o", tmp_path / "run",
          says="ends in a Softmax")  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_run_takes_the_file_as_its_dense_graph(graph, images, tmp_path, tuning_helps):
    result = call("run", graph, "--data", images, "--target", 0.6, "--rearrange", "none", *GIVEN, "--seconds", 0.1,
                  "-o", tmp_path / "out")  # fmt: skip
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"plan.json", "dense.onnx", "tuned.onnx", "pruned.onnx", "report.html"}
    assert "mine at 0.6 of its MACs" in result.stdout
    before, after = onnx.load(graph), onnx.load(tmp_path / "out" / "dense.onnx")
    assert [node.op_type for node in after.graph.node] == [node.op_type for node in before.graph.node]
    call(
        "evaluate",
        tmp_path / "out" / "pruned.onnx",
        "--against",
        tmp_path / "out" / "dense.onnx",
        "--eval-data",
        images,
    )
    # --force knows its own files again, tuned.onnx among them.
    check_free(tmp_path / "out", force=True)


def test_a_folded_file_is_compared_with_the_graph_it_came_from(graph, images, tmp_path):
    call("fold", graph, "--identity", "-o", tmp_path / "lean.onnx")
    result = call("evaluate", tmp_path / "lean.onnx", "--against", graph, "--eval-data", images, *GIVEN)
    assert "100.00 %" in result.stdout and "cannot be checked" in result.stderr
    fails("evaluate", tmp_path / "lean.onnx", "--against", graph, "--eval-data", images, says="--mean is not given")
    fails("evaluate", graph, "--eval-data", images, *GIVEN, says="does not say what model it is")
    fails("evaluate", "--eval-data", images, *GIVEN, says="goes with an ONNX file")


def test_methods_without_blocks_are_compared_on_a_file(exported, images, tmp_path):
    """What looks at each image inside of blocks is left out, and refused where it was asked for."""
    file, data = exported("class token").path, ("--data", images, "--eval-data", images, "--targets", 0.6)
    fails("compare", file, *data, "--methods", "centre,tome", "-o", tmp_path / "none",
          says="runs as an ONNX graph, and tome needs the blocks of a timm VisionTransformer")  # fmt: skip
    result = call("compare", file, *data, "--methods", "fisher,centre", "--seconds", 0.1, "-o", tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    judged = {row["method"]: row["failure"] for row in rows if row["kind"] == "compared"}
    assert judged.keys() >= {"fisher", "centre"} and not any(judged.values()), result.stderr
    timed = {row["method"] for row in rows if row["kind"] == "latency"}
    assert timed == {"dense", "fisher", "centre"}


def test_what_the_output_is_follows_the_loss(graph, images):
    def opened(loss):
        with progress.reporting() as record:
            given = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
            loaded = open_prunable(ModelSpec(str(graph), preprocessing=given), loss=loss)
        return loaded.adapter.geometry.output, bool(record.remarks)

    assert [opened(loss) for loss in ("auto", "self", "features")] == [
        ("logits", True), ("logits", False), ("features", False),
    ]  # fmt: skip


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_end_in_one_line_and_leave_nothing(graph, images, tmp_path):
    there = set(tmp_path.iterdir())
    data = ("--data", images)
    plan = ("-o", tmp_path / "plan.json")
    fails("prune", graph, *data, *plan, says="--mean is not given; give them as the model was trained")
    fails("prune", graph, *data, "--mean", "0.5,0.5,0.5", *plan, says="--std is not given")
    fails("prune", tmp_path / "absent.onnx", *data, *plan, says="absent.onnx")
    fails("prune", graph, *data, *GIVEN, "--weights", "w.pth", *plan, says="--weights, --pretrained and --model-arg go")
    fails("prune", *data, *GIVEN, *plan, says="goes with an ONNX file")
    fails("prune", graph, *data, *GIVEN, "--target", 0.01, *plan, says="0.01")
    fails("prune", graph, *data, *GIVEN, "--loss", "labels", *plan, says="no usable labels")
    fails("prune", graph, *data, *GIVEN, "--tune", "gates", *plan, says="--tune gates needs a PyTorch model")
    fails("run", graph, *data, *GIVEN, "--opset", 18, "-o", tmp_path / "out", says="keeps its opset and its batch")
    fails("export", graph, says="learn a plan from it: vpruner prune")
    assert set(tmp_path.iterdir()) == there


def test_a_graph_that_is_not_understood_is_named_with_its_node(graph, images, tmp_path):
    odd = load_model(graph)
    next(node for node in odd.graph if node.op_type == "Erf").op_type = "Acosh"
    save_model(odd, tmp_path / "odd.onnx")
    fails("prune", tmp_path / "odd.onnx", "--data", images, *GIVEN, "-o", tmp_path / "p.json", says="(Acosh)")
    (tmp_path / "cut.onnx").write_bytes(graph.read_bytes()[:5000])
    fails("prune", tmp_path / "cut.onnx", "--data", images, *GIVEN, "-o", tmp_path / "p.json", says="cut.onnx")
    assert not (tmp_path / "p.json").exists()
