"""The command line as a user meets it: exit codes, messages, files, and nothing half-written."""

import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import click
import numpy as np
import onnx
import pytest
import timm
import torch
from click.testing import CliRunner
from commands import call, fails
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_cards import CLASSES, TINY

from vpruner.cli import main
from vpruner.cli.types import read_value
from vpruner.core import bundled
from vpruner.core.choices import PROVIDERS
from vpruner.core.cost import cost_ratio
from vpruner.core.errors import ParityError
from vpruner.core.plan import TokenPlan
from vpruner.core.text import counted
from vpruner.prune import stages
from vpruner.prune.calibration import Judgement
from vpruner.prune.models import open_model
from vpruner.prune.rearrange import settings as rearrange_settings
from vpruner.prune.rearrange import stage as rearrange

#: For tests of anything but the stages after the search.
SEARCH_ALONE = ("--rearrange", "none", "--tune", "none")


@pytest.fixture(scope="module")
def finished(card, images, tmp_path_factory):
    """One whole run, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "out"
    result = call("run", card, "--data", images, "--target", 0.6, "-o", output, "--seconds", 0.2, *SEARCH_ALONE)
    return output, result


def exchanged(plan: TokenPlan) -> TokenPlan:
    """The plan in which the patch with least work and the one with most take each other's place."""
    work, masks = plan.masks.sum((0, 1)), plan.masks.copy()
    both = [work.argmin(), work.argmax()]
    masks[:, :, both] = masks[:, :, both[::-1]]
    return TokenPlan.from_masks(plan.model, plan.geometry, masks)


def everything_helps(patch):
    """Let every stage run and then find something: two dozen images of noise give it nothing to find."""
    real_rearrange, real_tune, real_greedy = stages.rearrange, stages.tune, stages.exchange_greedily

    def moved(real):
        def rearrange(world, plan, *game, **options):
            found = real(world, plan, *game, **options)
            return replace(found, plan=exchanged(plan), kept=True, note="")

        return rearrange

    def tune(adapter, plan, calibration, kind, **options):
        done = replace(real_tune(adapter, plan, calibration, kind, **options), kept=True, note="")
        if kind != "weights":
            gates = [[1 + index / 10 for index in range(len(indices))] for indices in plan.keys]
            return replace(done, plan=replace(plan, gates=gates))
        own = adapter.model.state_dict()
        names = ("blocks.1.attn.proj.weight", "blocks.2.mlp.fc2.bias")
        return replace(done, weights={name: 1.5 * own[name] for name in names}, judgement=Judgement(0.2, 0.1, 0.01, 4))

    patch.setattr(stages, "rearrange", moved(real_rearrange))
    patch.setattr(stages, "exchange_greedily", moved(real_greedy))
    patch.setattr(stages, "tune", tune)


@pytest.fixture(scope="module")
def tuned(card, images, tmp_path_factory):
    """A whole run of which every stage was kept, and what it printed."""
    output = tmp_path_factory.mktemp("tuned") / "out"
    with pytest.MonkeyPatch.context() as patch:
        everything_helps(patch)
        result = call("run", card, "--data", images, "--target", 0.6, "-o", output, "--seconds", 0.2, "--episodes", 4)
    return output, result


def test_run_writes_everything_and_ends_with_the_table(finished):
    output, result = finished
    names = {path.name for path in output.iterdir()}
    assert names >= {"plan.json", "dense.onnx", "pruned.onnx", "results.jsonl", "report.html"}
    for text in (
        "dense",
        "pruned",
        "accuracy on 6 images",
        "top-1 accuracy",
        "MACs",
        "parameters",
        "batch 1, 1 thread",
    ):
        assert text in result.stdout
    assert str(output / "pruned.onnx") in result.stdout
    assert "put aside for evaluation" in result.stderr
    plan = TokenPlan.load(output / "plan.json")
    assert 0.55 < cost_ratio(plan) <= 0.6
    assert plan.provenance["loss"] == "labels" and plan.provenance["calibration"]["images"] == 18
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"run", "cost", "stage", "accuracy", "latency", "parity"}
    checks = [row for row in rows if row["kind"] == "parity"]
    assert len(checks) == 5 and all(row["passed"] and row["difference"] <= row["tolerance"] for row in checks)
    assert (output / "report.html").read_text().startswith("<!")
    assert not list(output.parent.glob(".*"))


def test_the_files_know_where_they_come_from(finished):
    output, _ = finished
    properties = {p.key: p.value for p in onnx.load(output / "pruned.onnx").metadata_props}
    plan = TokenPlan.load(output / "plan.json")
    assert properties["vpruner.plan"] == plan.digest
    assert properties["vpruner.weights_sha256"] == plan.provenance["weights_sha256"]
    assert json.loads(properties["vpruner.classes"]) == CLASSES
    written = plan.to_json()
    sets = {"reads": list(plan.reads), **{kind: written[kind] for kind in ("keys", "queries", "mlps")}}
    assert json.loads(properties["vpruner.sets"]) == sets


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
    more = ("--seconds", 0.2, "--force", "-q", *SEARCH_ALONE)
    call("run", card, "--data", images, "--target", 0.7, "-o", output, *more)
    assert (output / "plan.json").read_bytes() != before


@pytest.mark.parametrize("name", ["thesis.tex", "plan.json", "report.md", "results.jsonl", "dense.onnx"])
def test_force_never_replaces_a_folder_of_something_else(card, images, finished, tmp_path, name):
    """Nor a file that has the name of one of ours, but not its mark."""
    output = shutil.copytree(finished[0], tmp_path / "run")
    (output / name).write_text("years of work")
    fails("run", card, "--data", images, "-o", output, "--force", says=f"holds {name}, which no run wrote")
    assert (output / name).read_text() == "years of work"


def test_the_current_folder_is_no_output(card, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails("run", card, "--data", images, "-o", ".", says="is the folder you are in")


def test_a_link_stays_a_link_and_its_target_gets_the_run(card, images, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    more = ("--seconds", 0.1, "-q", *SEARCH_ALONE)
    call("run", card, "--data", images, "--target", 0.7, "-o", tmp_path / "link", *more)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "plan.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_a_run_that_finished_first_is_not_replaced(card, images, tmp_path, monkeypatch):
    """Two runs into one folder: the later one to finish loses, not the earlier one's results."""

    def meanwhile(*arguments, **options):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "plan.json").write_text("the other run")

    monkeypatch.setattr("vpruner.report.run.write_report", meanwhile)
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
        *SEARCH_ALONE,
        says="exists already",
    )
    assert (tmp_path / "out" / "plan.json").read_text() == "the other run"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.state"}


def test_termination_leaves_what_was_learned_alone(repository, images, tmp_path):
    """SIGTERM in the middle of a run: the scratch folder goes, as with Ctrl-C. An ONNX file need not be exported."""
    model = repository / "tests" / "golden" / "inputs" / "theirs.onnx"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "vpruner", "run", model, "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5"),
            *("--data", images, "--seconds", "60", "-o", tmp_path / "out", *SEARCH_ALONE),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*/dense.onnx")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["out.state"]


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
        fails(command, pruned, "--against", pruned, *more, says="is compared with itself")


def test_no_accuracy_is_made_of_outputs_that_are_no_numbers(finished, images, tmp_path):
    output, _ = finished
    pruned, dense, broken = output / "pruned.onnx", output / "dense.onnx", tmp_path / "broken.onnx"
    model = onnx.load(dense)
    weight = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    weight.raw_data = np.full(len(weight.raw_data) // 4, np.nan, np.float32).tobytes()
    onnx.save(model, broken)
    # Of 20 images the first 16 are one batch: the others are not run.
    says = f"outputs are not finite (NaN or infinity) for 16 of 16 images: its initializer {weight.name!r} holds NaN"
    for files in ((broken,), (pruned, "--against", broken), (broken, "--against", dense)):
        fails("evaluate", *files, "--eval-data", images, "--eval-images", 20, says=f"broken.onnx: the {says}")
    fails("predict", broken, images / "cat" / "0.png", says="broken.onnx: the outputs are not finite")


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
        "run", card, "--data", images, "--target", 0.7, "-o", tmp_path / "o", "--seconds", 0.2, "--json", "-q",
        *SEARCH_ALONE,
    )  # fmt: skip
    value = json.loads(result.stdout)
    assert value["files"]["pruned.onnx"] == str(tmp_path / "o" / "pruned.onnx")
    assert result.stderr == ""


def test_stage_by_stage_equals_the_run(finished, card, images, tmp_path):
    call("prune", card, "--data", images, "--target", 0.6, "-o", tmp_path / "plan.json", "-q", *SEARCH_ALONE)
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
    every = list(range(16))
    sets = {"keys": [every] * 3, "queries": [every, every, []], "mlps": [every, every, []], "reads": []}
    assert json.loads(properties["vpruner.sets"]) == sets


# -- the stages ------------------------------------------------------------------------------------------------------


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def properties_of(path):
    return {p.key: p.value for p in onnx.load(path).metadata_props}


def test_every_stage_is_shown_on_the_evaluation_images(tuned):
    output, result = tuned
    rows = rows_of(output)
    stages = {row["stage"]: row for row in rows if row["kind"] == "stage"}
    assert [(row["method"], row["label"]) for row in stages.values()] == [
        ("fisher", "search"), ("ppo", "rearrange"), ("weights", "pruned"),
    ]  # fmt: skip
    assert all(row["kept"] and row["held_out"]["images"] == 4 and row["seconds"] > 0 for row in stages.values())
    assert len(stages["rearrange"]["history"]) == 1 and stages["rearrange"]["episodes"] <= 4
    labels = {row["label"] for row in rows if row["kind"] == "accuracy"}
    assert labels == {"dense", "search", "rearrange", "pruned"}
    assert {row["label"] for row in rows if row["kind"] == "latency"} == {"dense", "pruned"}
    plan = TokenPlan.load(output / "plan.json")
    assert [stage["stage"] for stage in plan.provenance["stages"]] == ["search", "rearrange", "tune"]
    assert "history" not in json.dumps(plan.provenance["stages"])
    for text in ("what each stage contributed", "search (fisher)", "rearrange (ppo)", "tune (weights)"):
        assert text in result.stdout
    assert "## Stages" in (output / "report.md").read_text()
    # The graphs of the stages in between are measured and thrown away.
    assert {path.name for path in output.iterdir()} == {
        "plan.json", "model.safetensors", "dense.onnx", "pruned.onnx", "results.jsonl", "report.html", "report.md",
    }  # fmt: skip


def test_a_stage_left_out_has_no_graph_of_its_own(finished):
    output, _ = finished
    rows = rows_of(output)
    assert [row["label"] for row in rows if row["kind"] == "stage"] == ["pruned"]
    assert {row["label"] for row in rows if row["kind"] == "accuracy"} == {"dense", "pruned"}
    assert not (output / "model.safetensors").exists()
    assert "tuned_weights_sha256" not in TokenPlan.load(output / "plan.json").provenance


def test_tuned_weights_are_the_whole_model_and_say_what_they_are_for(tuned, card):
    output, _ = tuned
    plan = TokenPlan.load(output / "plan.json")
    with safe_open(output / "model.safetensors", "pt") as file:
        facts = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert facts["vpruner.tuned_for_plan"] == plan.digest
    assert facts["vpruner.weights_sha256"] == plan.provenance["weights_sha256"] == open_model(str(card)).sha256
    own = load_file(card.parent / "tiny.safetensors")
    changed = {name for name, value in own.items() if not torch.equal(value, state[name])}
    assert state.keys() == own.keys() and changed
    assert all(name.split(".", 2)[2].startswith(("attn.proj", "mlp.fc2")) for name in changed)
    loaded = open_model(str(card), weights=output / "model.safetensors")
    assert loaded.sha256 == plan.provenance["tuned_weights_sha256"]


def test_tuned_weights_make_the_same_graph_again(tuned, card, tmp_path):
    output, _ = tuned
    plan = ("--plan", output / "plan.json")
    call("export", card, "--weights", output / "model.safetensors", *plan, "-o", tmp_path / "again.onnx", "-q")
    assert (tmp_path / "again.onnx").read_bytes() == (output / "pruned.onnx").read_bytes()
    # By hand, in two steps.
    call("export", card, "--weights", output / "model.safetensors", "-o", tmp_path / "tuned.onnx", "-q")
    result = call("fold", tmp_path / "tuned.onnx", *plan, "-o", tmp_path / "folded.onnx")
    assert "before tuning" not in result.stderr
    assert (tmp_path / "folded.onnx").read_bytes() == (output / "pruned.onnx").read_bytes()
    # And it is another graph than the weights before tuning give.
    call("export", card, *plan, "-o", tmp_path / "untuned.onnx", "-q")
    tuned_model, untuned_model = (onnx.load(path) for path in (output / "pruned.onnx", tmp_path / "untuned.onnx"))
    del tuned_model.metadata_props[:], untuned_model.metadata_props[:]
    assert tuned_model.SerializeToString() != untuned_model.SerializeToString()
    facts, dense = properties_of(output / "pruned.onnx"), properties_of(output / "dense.onnx")
    provenance = TokenPlan.load(output / "plan.json").provenance
    assert facts["vpruner.weights_sha256"] == dense["vpruner.weights_sha256"] == provenance["weights_sha256"]
    assert facts["vpruner.tuned_sha256"] == provenance["tuned_weights_sha256"]
    assert "vpruner.tuned_sha256" not in dense


def test_a_tuned_graph_is_compared_with_its_dense_one(tuned, images):
    output, _ = tuned
    both = (output / "pruned.onnx", "--against", output / "dense.onnx")
    rows = json.loads(call("evaluate", *both, "--eval-data", images, "--json", "-q").stdout)
    assert {row["label"] for row in rows} == {"dense", "pruned"}
    call("profile", *both, "--seconds", 0.1, "--threads", 1, "-q")


def test_evaluate_with_tuned_weights_has_no_dense_model(tuned, card, images, tmp_path):
    output, _ = tuned
    model = (card, "--weights", output / "model.safetensors", "--plan", output / "plan.json")
    result = call("evaluate", *model, "--eval-data", images, "--json")
    (row,) = json.loads(result.stdout)
    assert (row["label"], row["metric"]) == ("pruned", "top1")
    assert "vpruner evaluate pruned.onnx --against dense.onnx" in result.stderr
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    fails("evaluate", *model, "--eval-data", tmp_path, "-q", says="no labels, and nothing to compare with")


def test_weights_before_tuning_go_on_with_a_remark(tuned, card, images, tmp_path):
    output, _ = tuned
    plan = ("--plan", output / "plan.json")
    for again, command in (
        ("export", ("export", card, *plan, "-o", tmp_path / "a.onnx")),
        ("export", ("fold", output / "dense.onnx", *plan, "-o", tmp_path / "b.onnx")),
        ("evaluate", ("evaluate", card, *plan, "--eval-data", images)),
    ):
        said = " ".join(call(*command).stderr.split())
        assert "model.safetensors next to the plan holds the tuned ones" in said
        weights = f"--weights {output / 'model.safetensors'} --plan {output / 'plan.json'}"
        assert f"vpruner {again} MODEL {weights}" in said
    assert "vpruner.tuned_sha256" not in properties_of(tmp_path / "a.onnx")


def test_prune_writes_tuned_weights_beside_the_plan(card, images, tmp_path, monkeypatch):
    everything_helps(monkeypatch)
    start = ("prune", card, "--data", images, "--target", 0.6, "--rearrange", "greedy", "-o", tmp_path / "p.json")
    result = call(*start, "-q")
    assert "tune (weights)" in result.stdout and str(tmp_path / "p.safetensors") in result.stdout
    plan = TokenPlan.load(tmp_path / "p.json")
    assert plan.provenance["tuned_weights_file"] == "p.safetensors"
    loaded = open_model(str(card), weights=tmp_path / "p.safetensors")
    assert loaded.sha256 == plan.provenance["tuned_weights_sha256"]
    value = json.loads(call(*start, "-q", "--json").stdout)
    assert (
        value["weights"] == str(tmp_path / "p.safetensors") and value["provenance"]["stages"][1]["method"] == "greedy"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"p.json", "p.safetensors"}


def test_tuned_weights_of_an_earlier_plan_do_not_stay_beside_a_new_one(card, images, tmp_path):
    output, tuned = tmp_path / "p.json", tmp_path / "p.safetensors"
    prune = ("prune", card, "--data", images, *SEARCH_ALONE, "-o", output, "--target")

    def tuned_for(digest):
        state = load_file(card.parent / "tiny.safetensors")
        save_file(state, tuned, {"format": "pt", "vpruner.tuned_for_plan": digest})

    call(*prune, 0.6, "-q")
    tuned_for(TokenPlan.load(output).digest)
    said = " ".join(call(*prune, 0.7).stderr.split())
    assert f"removed {tuned}: its weights were tuned for the plan that p.json held before" in said
    assert {path.name for path in tmp_path.iterdir()} == {"p.json"}
    # Weights of any other plan, or of the user's own, are not ours to remove.
    for digest in ("0" * 64, None):
        tuned_for(digest) if digest else tuned.write_bytes(b"mine")
        before = tuned.read_bytes()
        said = " ".join(call(*prune, 0.6).stderr.split())
        assert f"{tuned} was left as it is; its weights do not belong to the new p.json" in said
        assert tuned.read_bytes() == before
    # Nor are those that were pruned just now.
    tuned_for(TokenPlan.load(output).digest)
    said = call(*prune, 0.7, "--weights", tuned).stderr
    assert tuned.exists() and "was left as it is" not in said and "removed" not in said


def test_weights_of_the_users_are_never_overwritten(card, tmp_path):
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes((card.parent / "tiny.safetensors").read_bytes())
    before = weights.read_bytes()
    fails("prune", card, "-o", tmp_path / "mine.json", says="mine.safetensors, which holds something else")
    fails("prune", card, "--weights", weights, "-o", tmp_path / "mine.json", says="is read by this command")
    assert weights.read_bytes() == before and list(tmp_path.iterdir()) == [weights]


def test_gates_are_timed_against_the_graph_without_them(card, images, tmp_path, monkeypatch):
    everything_helps(monkeypatch)
    output = tmp_path / "o"
    result = call("run", card, "--data", images, "--target", 0.6, "--rearrange", "none", "--tune", "gates",
                  "--seconds", 0.2, "-o", output)  # fmt: skip
    assert TokenPlan.load(output / "plan.json").gates is not None
    rows = rows_of(output)
    assert [row["label"] for row in rows if row["kind"] == "latency"] == ["dense", "pruned", "ungated"]
    (gates,) = (row for row in rows if row["kind"] == "gates")
    assert gates["ratio"] > 0 and gates["ungated_p50_ms"] > 0
    assert (
        "what the gate constants cost" in result.stdout and "Gates are constants" in (output / "report.md").read_text()
    )
    assert not (output / "model.safetensors").exists() and "ungated.onnx" not in {p.name for p in output.iterdir()}


def test_ctrl_c_keeps_the_best_plan_and_goes_on(card, images, tmp_path, monkeypatch):
    real, found = rearrange._Run.batch, []

    def interrupted(run):
        if not found:
            real(run)
            run.best = run.incumbent = exchanged(run.plan)
            run.held_out_best, run.incumbents = 0.1 * run.held_out_start, 1
            found.append(run.best)
        else:
            raise KeyboardInterrupt  # As from the terminal: in the middle of a batch.

    monkeypatch.setattr(rearrange._Run, "batch", interrupted)
    command = ("prune", card, "--data", images, "--target", 0.6, "--tune", "none", "-o", tmp_path / "plan.json")
    result = call(*command)
    said = " ".join(result.stderr.split())
    assert "Rearrangement ended after" in said and "it was interrupted." in said
    assert TokenPlan.load(tmp_path / "plan.json").digest == found[0].digest
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json"}


def test_ctrl_c_elsewhere_ends_the_program(card, images, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("vpruner.prune.stages.tune", interrupted)
    result = CliRunner().invoke(
        main, ["run", str(card), "--data", str(images), "--rearrange", "none", "-o", str(tmp_path / "out")]
    )
    assert result.exit_code == 1 and "Aborted" in result.stderr
    said = " ".join(result.stderr.split())
    assert "out.state; to go on, run the same with --resume" in said.replace(f"{tmp_path}/", "")
    assert [path.name for path in tmp_path.iterdir()] == ["out.state"]
    monkeypatch.undo()
    call("run", card, "--data", images, "--rearrange", "none", "-o", tmp_path / "out", "--seconds", 0.1, "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unreadable_evaluation_images_are_refused_before_anything_is_learned(card, images, tmp_path, monkeypatch):
    folder = tmp_path / "eval"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(b"no image")

    def learned(*args, **options):
        raise AssertionError

    monkeypatch.setattr("vpruner.prune.learn.learn", learned)
    start = ("run", card, "--data", images, "--eval-data", folder, "-q", "-o", tmp_path / "out")
    fails(*start, says=f"none of the 3 images of {folder} can be read: ")
    fails(*start, says=".jpg (not an image that Pillow can read")
    # One that can be read is enough, wherever it is.
    Image.new("RGB", (16, 16)).save(folder / "9.png")
    with pytest.raises(AssertionError):
        call(*start)


def test_one_image_is_not_called_images():
    assert [counted(count, "image") for count in (0, 1, 2)] == ["0 images", "1 image", "2 images"]


def test_help_names_every_provider_that_is_known():
    assert ", ".join(PROVIDERS) in " ".join(call("predict", "--help").stdout.split())


def test_an_output_of_another_ending_is_told_all_that_fit(card, images, tmp_path):
    start = ("analyze", card, "--data", images, "-o", tmp_path / "curves.foo")
    fails(*start, says="curves.foo does not end in .svg or .png; name a .svg or .png file with -o")


def test_a_state_that_cannot_be_used(card, images, tmp_path):
    for command, output in (("run", tmp_path / "out"), ("prune", tmp_path / "plan.json")):
        state = output.with_name(f"{output.name}.state")
        state.mkdir()
        start = (command, card, "--data", images, "-q", "-o", output, "--resume")
        (state / "stages.safetensors").write_bytes(b"oops")
        fails(*start, says="stages.safetensors is not the state of a run")
        (state / "mine.txt").write_text("mine")
        fails(*start, says="holds mine.txt; move that away")
        assert sorted(path.name for path in state.iterdir()) == ["mine.txt", "stages.safetensors"]
        assert not output.exists()


def test_what_help_says_of_the_stages_is_what_they_take():
    settings = rearrange_settings.RearrangeSettings.for_tuning("weights")
    untuned = rearrange_settings.RearrangeSettings.for_tuning("gates", time_limit=None)
    for command in ("run", "prune"):
        text = " ".join(call(command, "--help").stdout.split())
        assert f"[default: ({settings.episodes} with --tune weights, else {untuned.episodes}); x>=1]" in text
        assert settings.time_limit is None and "[default: (none); x>=0.1]" in text


# -- the other commands ------------------------------------------------------------------------------------------------


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
    assert "agreement with dense" in call("evaluate", pruned, "--against", dense, "--eval-data", images).stdout

    rows = json.loads(
        call("profile", pruned, "--against", dense, "--seconds", 0.2, "--threads", 1, "--json",
             "--results", tmp_path / "r.jsonl").stdout
    )  # fmt: skip
    assert [row["label"] for row in rows] == ["dense", "pruned"] and rows[1]["ratio"] > 0
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2
    assert "p50" in call("profile", pruned, "--seconds", 0.2, "--threads", 1).stdout

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
    result = call("prune", card, "--data", tmp_path, "--target", 0.7, "-o", tmp_path / "plan.json", *SEARCH_ALONE)
    assert "1 calibration image could not be read and was skipped: 3.png" in result.stderr
    plan = TokenPlan.load(tmp_path / "plan.json")
    assert plan.provenance["loss"] == "self" and plan.provenance["calibration"]["skipped"] == 1
    fails("prune", card, "--data", tmp_path, "--strict", "-q", "-o", tmp_path / "other.json", says="3.png")
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize("proven", [True, False])
def test_a_failed_parity_check_leaves_no_file(proven, card, images, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ParityError("relative difference 0.5, tolerance 0.0001", proven=proven)

    monkeypatch.setattr("vpruner.export.parity.check_pruned", fail)
    start = ("run", card, "--data", images, "-o", tmp_path / "out", "-q", *SEARCH_ALONE)
    blame = "This is a defect of vpruner, not of your input" if proven else "If PyTorch computes this model well"
    fails(*start, says=f"relative difference 0.5, tolerance 0.0001. Nothing was written. {blame}", code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out.state"]


def test_features_model_reports_cosine(images, tmp_path):
    torch.manual_seed(0)
    arguments = {**TINY, "num_classes": 0, "reg_tokens": 4, "no_embed_class": True, "depth": 2}
    model = timm.models.vision_transformer.VisionTransformer(**arguments)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    card = {"class": "timm.models.vision_transformer.VisionTransformer", "args": arguments, "weights": "w.safetensors"}
    (tmp_path / "features.json").write_text(json.dumps(card))
    result = call(
        "run", tmp_path / "features.json", "--data", images, "--target", 0.6, "-o", tmp_path / "o", "--seconds", 0.2,
        "--episodes", 4,
    )  # fmt: skip
    assert "cosine to dense" in result.stdout and "top-1" not in result.stdout
    assert TokenPlan.load(tmp_path / "o" / "plan.json").provenance["loss"] == "features"
    (prediction,) = json.loads(
        call("predict", tmp_path / "o" / "pruned.onnx", images / "cat" / "0.png", "--json").stdout
    )
    assert len(prediction["features"]) == 48


def commands(group=main, prefix=""):
    """Name such as "run" or "vlm profile" -> command; groups are gone through."""
    found, context = {}, click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = commands(command, f"{name} ") if isinstance(command, click.Group) else {name: command}
        found |= {f"{prefix}{key}": value for key, value in inner.items()}
    return found


@pytest.mark.parametrize("name", commands())
def test_help_ends_in_a_runnable_example(name):
    """Every example in the help parses: the options exist and the values have the right type."""
    command = commands()[name]
    assert "--json" in [option for p in command.params for option in p.opts]
    lines = [line.strip() for line in command.help.splitlines() if line.strip()]
    examples = [line for line in lines if line.startswith(f"vpruner {name}")]
    assert examples and lines[-1] in examples
    for example in examples:
        command.make_context(name, shlex.split(example)[1 + len(name.split()) :], resilient_parsing=False)
    text = call(*name.split(), "--help").stdout
    assert "Example:" in text


def test_version():
    from vpruner import __version__

    assert __version__ in call("--version").stdout


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("False", False), ("false", False), ("FALSE ", False), ("True", True), ("None", None), ("null", None),
        ("(16, 16)", (16, 16)), ("[16, 16]", [16, 16]), ("16", 16), ("0.5", 0.5), ("'avg'", "avg"), ("avg", "avg"),
        ("none", "none"), ("Flase", "Flase"), ("", ""), ("(" * 500, "(" * 500), ("NaN", "NaN"), ("1e999", math.inf),
    ],
)  # fmt: skip
def test_a_value_of_a_model_argument_is_read_as_json_or_as_python(typed, value):
    found = read_value(typed)
    assert found == value and type(found) is type(value)


def test_a_mistyped_truth_value_is_refused_and_never_true(tmp_path):
    says = "--model-arg: pool_include_prefix is 'Flase', expected true or false"
    fails("export", "-o", tmp_path / "m.onnx", "--model-arg", "pool_include_prefix=Flase", says=says)
