"""The command line as a user meets it: exit codes, messages, files, and nothing half-written."""

import json
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from vpruner import bundled
from vpruner.cli import main
from vpruner.errors import ParityError
from vpruner.prune.cost import cost_ratio
from vpruner.prune.plan import TokenPlan

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 4}
CLASSES = ["cat", "cow", "dog", "fox"]


def call(*arguments, code=0, **options):
    """Run a command in this process; a traceback of ours fails the test, whatever the exit code."""
    result = CliRunner().invoke(main, [str(a) for a in arguments], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(*arguments, says, code=2):
    """A user's mistake: the exit code, exactly one line of error, and no traceback."""
    result = call(*arguments, code=code)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert len(errors) == 1, result.stderr
    assert says in errors[0], errors[0]
    assert "Traceback" not in result.stderr and result.stdout == ""


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """A model card of a tiny random ViT with weights beside it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(**TINY)
    save_file({k: v + 0.05 * torch.randn_like(v) for k, v in model.state_dict().items()}, folder / "tiny.safetensors")
    (folder / "tiny.json").write_text(
        json.dumps(
            {
                "class": "timm.models.vision_transformer.VisionTransformer",
                "args": TINY,
                "weights": "tiny.safetensors",
                "classes": CLASSES,
                "preprocessing": {"mean": [0.5] * 3, "std": [0.25] * 3, "size": [32, 32], "interpolation": "bicubic"},
            }
        )
    )
    return folder / "tiny.json"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for index in range(6):
            Image.fromarray(random.integers(0, 255, (40, 36, 3), np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def finished(card, images, tmp_path_factory):
    """One whole run, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "out"
    result = call("run", card, "--data", images, "--target", 0.6, "-o", output, "--seconds", 0.2)
    return output, result


def test_run_writes_everything_and_ends_with_the_table(finished):
    output, result = finished
    names = {path.name for path in output.iterdir()}
    assert names >= {"plan.json", "dense.onnx", "pruned.onnx", "results.jsonl", "report.html"}
    for text in ("dense", "pruned", "ratio", "top-1, 6 images", "MACs", "parameters", "p50, batch 1"):
        assert text in result.stdout
    assert str(output / "pruned.onnx") in result.stdout
    assert "put aside for evaluation" in result.stderr
    plan = TokenPlan.load(output / "plan.json")
    assert 0.55 < cost_ratio(plan) <= 0.6
    assert plan.provenance["loss"] == "labels" and plan.provenance["calibration"]["images"] == 18
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"run", "cost", "accuracy", "latency", "parity"}
    rungs = [row for row in rows if row["kind"] == "parity"]
    assert len(rungs) == 5 and all(row["passed"] and row["difference"] <= row["tolerance"] for row in rungs)
    assert (output / "report.html").read_text().startswith("<!")
    assert not list(output.parent.glob(".*"))


def test_the_files_know_where_they_come_from(finished):
    output, _ = finished
    properties = {p.key: p.value for p in onnx.load(output / "pruned.onnx").metadata_props}
    plan = TokenPlan.load(output / "plan.json")
    assert properties["vpruner.plan"] == plan.digest
    assert properties["vpruner.weights_sha256"] == plan.provenance["weights_sha256"]
    assert json.loads(properties["vpruner.classes"]) == CLASSES
    assert json.loads(properties["vpruner.kept"]) == [list(k) for k in plan.kept]


def test_an_existing_folder_is_kept_unless_forced(finished, card, images):
    output, _ = finished
    before = (output / "plan.json").read_bytes()
    fails(
        "run",
        card,
        "--data",
        images,
        "-o",
        output,
        "-q",
        says=f"{output} exists already; choose another folder with -o",
    )
    assert (output / "plan.json").read_bytes() == before
    call("run", card, "--data", images, "--target", 0.7, "-o", output, "--seconds", 0.2, "--force", "-q")
    assert (output / "plan.json").read_bytes() != before


@pytest.mark.parametrize("beside", [(), ("plan.json",)])
def test_force_never_replaces_a_folder_of_something_else(card, images, tmp_path, beside):
    for name in ("thesis.tex", *beside):
        (tmp_path / name).write_text("years of work")
    fails("run", card, "--data", images, "-o", tmp_path, "--force", says="holds thesis.tex, which is not of a run")
    assert (tmp_path / "thesis.tex").exists()


def test_the_current_folder_is_no_output(card, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails("run", card, "--data", images, "-o", ".", says="is the folder you are in")


def test_a_link_stays_a_link_and_its_target_gets_the_run(card, images, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    call("run", card, "--data", images, "--target", 0.7, "-o", tmp_path / "link", "--seconds", 0.1, "-q")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "plan.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_a_run_that_finished_first_is_not_replaced(card, images, tmp_path, monkeypatch):
    """Two runs into one folder: the later one to finish loses, not the earlier one's results."""

    def meanwhile(*arguments, **options):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "plan.json").write_text("the other run")

    monkeypatch.setattr("vpruner.report.write_report", meanwhile)
    fails(
        "run",
        card,
        "--data",
        images,
        "--target",
        0.7,
        "-o",
        tmp_path / "out",
        "--seconds",
        0.1,
        "-q",
        says="exists already",
    )
    assert (tmp_path / "out" / "plan.json").read_text() == "the other run"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_termination_leaves_nothing(card, images, tmp_path):
    """SIGTERM in the middle of a run: the scratch folder goes, as with Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vpruner.cli", "run", card, "--data", images, "--seconds", "60", "-o", tmp_path / "out"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*/dense.onnx")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_inputs_are_never_overwritten(finished, card, tmp_path):
    output, _ = finished
    copies = {name: tmp_path / name for name in ("plan.json", "dense.onnx")}
    for name, path in copies.items():
        path.write_bytes((output / name).read_bytes())
    before = {name: path.read_bytes() for name, path in copies.items()}
    dense, plan = copies["dense.onnx"], copies["plan.json"]
    fails("fold", dense, "--plan", plan, "-o", dense, says="dense.onnx is read by this command")
    fails("fold", dense, "--plan", plan, "-o", plan, says="plan.json does not end in .onnx")
    fails("export", card, "--plan", plan, "-o", plan, says="does not end in .onnx")
    fails("prune", card, "-o", card, says="tiny.json is read by this command")
    fails("show", plan, "-o", plan, says="does not end in .png")
    (tmp_path / "folder.onnx").mkdir()
    fails("export", card, "-o", tmp_path / "folder.onnx", says="is a folder")
    assert before == {name: path.read_bytes() for name, path in copies.items()}


def test_a_baseline_must_be_one(finished, images):
    output, _ = finished
    pruned, dense = output / "pruned.onnx", output / "dense.onnx"
    for command, more in (("profile", ("--seconds", 0.1)), ("evaluate", ("--eval-data", images))):
        fails(command, dense, "--against", pruned, *more, says="pruned.onnx is a pruned file")
        fails(command, pruned, "--against", pruned, *more, says="against itself")


def test_nothing_to_measure_is_said_before_measuring(finished, tmp_path):
    output, _ = finished
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    fails("evaluate", output / "dense.onnx", "--eval-data", tmp_path, says="no labels, and nothing to compare with")


def test_json_is_json_even_for_one_image(finished, images):
    output, _ = finished

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    both = (output / "pruned.onnx", "--against", output / "dense.onnx")
    result = call("evaluate", *both, "--eval-data", images, "--eval-images", 1, "--json", "-q")
    rows = json.loads(result.stdout, parse_constant=refuse)
    assert {row["count"] for row in rows} == {1}


@pytest.mark.parametrize(
    "option", [("--seed", -1), ("--seed", 10**20), ("--seconds", "nan"), ("--images", 0), ("--target", "nan")]
)
def test_numbers_out_of_range(card, images, tmp_path, option):
    result = CliRunner().invoke(
        main, ["run", str(card), "--data", str(images), "-o", str(tmp_path / "o"), *map(str, option)]
    )
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert list(tmp_path.iterdir()) == []


def test_run_as_json(card, images, tmp_path):
    result = call(
        "run", card, "--data", images, "--target", 0.7, "-o", tmp_path / "o", "--seconds", 0.2, "--json", "-q"
    )
    value = json.loads(result.stdout)
    assert value["files"]["pruned.onnx"] == str(tmp_path / "o" / "pruned.onnx")
    assert result.stderr == ""


def test_stage_by_stage_equals_the_run(finished, card, images, tmp_path):
    call("prune", card, "--data", images, "--target", 0.6, "-o", tmp_path / "plan.json", "-q")
    plan = TokenPlan.load(tmp_path / "plan.json")
    call("export", card, "-o", tmp_path / "dense.onnx", "-q")
    result = call(
        "fold", tmp_path / "dense.onnx", "--plan", tmp_path / "plan.json", "-o", tmp_path / "a.onnx", "--json"
    )
    value = json.loads(result.stdout)
    assert value["modified"] and all(row["passed"] for row in value["parity"])
    call("export", card, "--plan", tmp_path / "plan.json", "-o", tmp_path / "b.onnx", "-q")
    one, other = (onnx.load(tmp_path / name) for name in ("a.onnx", "b.onnx"))
    assert one.SerializeToString() == other.SerializeToString()
    assert {p.key: p.value for p in one.metadata_props}["vpruner.plan"] == plan.digest
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"plan.json", "dense.onnx", "a.onnx", "b.onnx"}


def test_fold_identity_removes_dead_tokens_only(card, tmp_path):
    call("export", card, "-o", tmp_path / "dense.onnx", "-q")
    call("fold", tmp_path / "dense.onnx", "--identity", "-o", tmp_path / "lean.onnx", "-q")
    properties = {p.key: p.value for p in onnx.load(tmp_path / "lean.onnx").metadata_props}
    assert json.loads(properties["vpruner.kept"]) == [list(range(16))] * 3


def test_evaluate_profile_predict_show(finished, images, card, tmp_path):
    output, _ = finished
    pruned, dense = output / "pruned.onnx", output / "dense.onnx"
    rows = json.loads(call("evaluate", pruned, "--against", dense, "--eval-data", images, "--json", "-q").stdout)
    by_metric = {(row["label"], row["metric"]): row for row in rows}
    assert by_metric["pruned", "agreement"]["count"] == 24
    torch_rows = json.loads(
        call("evaluate", card, "--plan", output / "plan.json", "--eval-data", images, "--json", "-q").stdout
    )
    for row in torch_rows:
        assert row["value"] == pytest.approx(by_metric[row["label"], row["metric"]]["value"], abs=1e-3)
    assert "same class as dense" in call("evaluate", pruned, "--against", dense, "--eval-data", images).stdout

    rows = json.loads(
        call("profile", pruned, "--against", dense, "--seconds", 0.2, "--threads", 1, "--json",
             "--results", tmp_path / "r.jsonl").stdout
    )  # fmt: skip
    assert [row["label"] for row in rows] == ["dense", "pruned"] and rows[1]["ratio"] > 0
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2
    assert "p50 ms" in call("profile", pruned, "--seconds", 0.2, "--threads", 1).stdout

    image = images / "cat" / "0.png"
    (prediction,) = json.loads(call("predict", pruned, image, "--top", 2, "--json").stdout)
    assert len(prediction["scores"]) == 2 and prediction["scores"][0]["label"] in CLASSES
    assert prediction["scores"][0]["label"] in call("predict", pruned, image).stdout

    for source in (output / "plan.json", pruned):
        call("show", source, "--image", image, "-o", tmp_path / "tokens.png")
        assert Image.open(tmp_path / "tokens.png").width > 300
    call("show", output / "plan.json", "-o", tmp_path / "default.png")


def test_bad_input_is_one_line_and_exit_code_2(card, images, finished, tmp_path):
    output, _ = finished
    here = tmp_path / "untouched"
    here.mkdir()
    out, onnx_out, json_out = here / "out", here / "out.onnx", here / "out.json"
    run = ("run", card, "-o", out, "-q")
    fails(*run, "--data", tmp_path / "nowhere", says="there is no folder or tar file")
    (tmp_path / "empty").mkdir()
    fails(*run, "--data", tmp_path / "empty", says="no images found")
    fails(*run, "--data", images, "--target", 0.01, says="cannot be reached: the cheapest plan costs 0.")
    fails(*run, "--data", images, "--target", 1.5, says="expected a fraction of the dense MACs")
    fails(*run, "--data", images, "--loss", "features", says="loss 'features' for a model of logits")
    other = bundled.reference_card().with_name("reference.safetensors")
    fails("run", "deit_tiny_patch16_224", "-o", out, "--weights", other,
          says="does not fit deit_tiny_patch16_224: 0 of ")  # fmt: skip
    fails("run", "resnet18", "--weights", card, "-o", out, says="resnet18 cannot be pruned: it is a ResNet")
    fails("run", "deit_tiny_patch16_224", "-o", out, says="no weights given")
    fails("run", card, "--model-arg", "img_size", "-o", out, says="is not key=value")
    fails("export", "--plan", output / "plan.json", "-o", onnx_out, says="the plan is for tiny, this is reference")
    fails("prune", tmp_path / "no.json", "-o", json_out, says="cannot read the model card")
    fails("fold", output / "dense.onnx", "-o", onnx_out, says="one of --plan FILE and --identity")
    again = ("fold", output / "pruned.onnx", "--plan", output / "plan.json", "-o", onnx_out)
    fails(*again, says="already, expected a dense graph")
    fails("fold", tmp_path / "no.onnx", "--identity", "-o", onnx_out, says="no.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes((output / "dense.onnx").read_bytes()[:-2000])
    for arguments in (("fold", broken, "--identity", "-o", onnx_out), ("predict", broken, images / "cat" / "0.png"),
                      ("profile", broken), ("evaluate", broken)):  # fmt: skip
        fails(*arguments, says="broken.onnx")
    fails("predict", output / "pruned.onnx", tmp_path / "no.jpg", says="no.jpg")
    fails("predict", output / "pruned.onnx", card, says="tiny.json")
    fails("predict", output / "pruned.onnx", images / "cat" / "0.png", "--provider", "tpu", says="tpu")
    fails("evaluate", output / "pruned.onnx", "--plan", output / "plan.json", says="use --against")
    fails("evaluate", card, "--against", output / "dense.onnx", says="goes with an ONNX file")
    fails("show", output / "dense.onnx", "-o", here / "x.png", says="holds no token plan")
    fails("show", output / "plan.json", "-o", here / "x.jpg", says="does not end in .png")
    fails("show", output / "plan.json", "-o", "/proc/x/y.png", says="cannot write")
    fails("run", card, "--data", images, "-o", broken / "out", says="broken.onnx is a file")
    fails("run", card, "--data", images, "-o", "/proc/nothing/out", says="cannot write to /proc/nothing")
    assert list(here.iterdir()) == []


def test_a_plan_of_other_weights_is_refused(finished, tmp_path):
    output, _ = finished
    content = json.loads((output / "plan.json").read_text())
    content["provenance"]["weights_sha256"] = "f" * 64
    (tmp_path / "plan.json").write_text(json.dumps(content))
    fails("fold", output / "dense.onnx", "--plan", tmp_path / "plan.json", "-o", tmp_path / "p.onnx",
          says="the plan was learned on weights ffffffffffff")  # fmt: skip
    assert not (tmp_path / "p.onnx").exists()


def test_corrupt_images_are_counted_or_refused(card, tmp_path):
    random = np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_bytes(b"oops")
    result = call("prune", card, "--data", tmp_path, "--target", 0.7, "-o", tmp_path / "plan.json")
    assert "1 calibration image could not be read and was skipped: 3.png" in result.stderr
    plan = TokenPlan.load(tmp_path / "plan.json")
    assert plan.provenance["loss"] == "self" and plan.provenance["calibration"]["skipped"] == 1
    fails("prune", card, "--data", tmp_path, "--strict", "-q", "-o", tmp_path / "other.json", says="3.png")
    assert not (tmp_path / "other.json").exists()


def test_a_failed_parity_check_leaves_no_file(card, images, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ParityError("pruned.onnx equals the gathered model: relative difference 0.5, tolerance 0.0001")

    monkeypatch.setattr("vpruner.export.parity.check_ladder", fail)
    fails("run", card, "--data", images, "-o", tmp_path / "out", "-q", says="relative difference 0.5", code=1)
    assert list(tmp_path.iterdir()) == []


def test_features_model_reports_cosine(images, tmp_path):
    torch.manual_seed(0)
    arguments = {**TINY, "num_classes": 0, "reg_tokens": 4, "no_embed_class": True}
    model = timm.models.vision_transformer.VisionTransformer(**arguments)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    card = {"class": "timm.models.vision_transformer.VisionTransformer", "args": arguments, "weights": "w.safetensors"}
    (tmp_path / "features.json").write_text(json.dumps(card))
    result = call(
        "run", tmp_path / "features.json", "--data", images, "--target", 0.6, "-o", tmp_path / "o", "--seconds", 0.2
    )
    assert "cosine to dense features" in result.stdout and "top-1" not in result.stdout
    assert TokenPlan.load(tmp_path / "o" / "plan.json").provenance["loss"] == "features"
    (prediction,) = json.loads(
        call("predict", tmp_path / "o" / "pruned.onnx", images / "cat" / "0.png", "--json").stdout
    )
    assert len(prediction["features"]) == 48


def commands():
    return sorted(main.commands)


@pytest.mark.parametrize("name", commands())
def test_help_ends_in_a_runnable_example(name):
    """Every example in the help parses: the options exist and the values have the right type."""
    command = main.commands[name]
    assert "--json" in [option for p in command.params for option in p.opts]
    lines = [line.strip() for line in command.help.splitlines() if line.strip()]
    examples = [line for line in lines if line.startswith(f"vpruner {name}")]
    assert examples and lines[-1] in examples
    for example in examples:
        command.make_context(name, shlex.split(example)[2:], resilient_parsing=False)
    text = call(name, "--help").stdout
    assert "Example:" in text


def test_version():
    from vpruner import __version__

    assert __version__ in call("--version").stdout
