"""``vpruner export --method``: the file, what the other commands make of it, and mistakes."""

import json

import pytest
from commands import call, fails
from tiny_cards import write_card

DEPTH = 2


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    return write_card(tmp_path_factory.mktemp("model"), depth=DEPTH)


@pytest.fixture(scope="module")
def exported(card, images, tmp_path_factory):
    """The dense file, one by SAINT with frozen counts, and what writing that printed."""
    folder = tmp_path_factory.mktemp("files")
    call("export", card, "-o", folder / "dense.onnx")
    result = call(
        "export", card, "--method", "saint-frozen", "--data", images, "--target", 0.5, "--for", "trt10",
        "--precision", "fp16,int8-dynamic", "-o", folder / "saint.onnx", "--json",
    )  # fmt: skip
    written = ["dense.onnx", "saint.fp16.onnx", "saint.int8-dynamic.onnx", "saint.onnx"]
    assert sorted(path.name for path in folder.iterdir()) == written
    return folder / "dense.onnx", folder / "saint.onnx", result


def test_the_parity_checks_and_the_cost_are_told(exported):
    _, path, result = exported
    told = json.loads(result.stdout)
    assert [check["rung"] for check in told["parity"]] == [
        "a rule that does nothing changes nothing",
        "masked equals gathered",
        "saint.onnx equals saint-frozen in PyTorch",
        "saint.onnx for trt10 equals saint-frozen in PyTorch",
        "saint.fp16.onnx stays near saint.onnx",
        "saint.int8-dynamic.onnx stays near saint.onnx",
    ]
    exact, low = told["parity"][:4], told["parity"][4:]
    assert all(check["passed"] for check in exact) and all(check["difference"] > 0 for check in low)
    assert [check["near_ties"] for check in exact] == [None, None, 0, 0]
    # 24 images are there, and all of them are compared.
    assert [check["compared"] for check in exact] == [2, 2, 24, 24]
    assert told["deployment"]["target"] == "trt10" and told["file"] == str(path)
    assert "saint-frozen: 0." in result.stderr and "tokens that enter each block: 17, " in result.stderr


def test_other_commands_take_the_file(exported, images):
    dense, path, _ = exported
    one = next(images.glob("*/*.png"))
    assert "%" in call("predict", path, one).stdout
    rows = json.loads(call("evaluate", path, "--against", dense, "--eval-data", images, "--json").stdout)
    assert {row["label"] for row in rows} == {"dense", "pruned"}
    assert call("evaluate", path, "--eval-data", images, "--json").exit_code == 0
    profiled = call("profile", path, "--against", dense, "--seconds", 0.2, "--layers", "--json").stdout
    blocks = [row for row in json.loads(profiled) if row["kind"] == "blocks" and row["plan"]]
    (lines,) = [row["blocks"] for row in blocks]
    assert lines[0]["keys"] == 17 and lines[0]["queries"] == lines[1]["keys"] < 17 and lines[1]["queries"] == 1
    assert "0 errors" in call("check", path, "--for", "trt10").stdout
    seen = call("inspect", path).stdout
    assert "saint-frozen chooses the tokens of each image" in seen
    described = json.loads(call("inspect", path, "--json").stdout)
    assert [block["keys"] for block in described["blocks"]] == described["rule"]["counts"][:-1]


def test_commands_that_want_a_dense_file_refuse_it(exported, images, tmp_path):
    dense, path, _ = exported
    fails("evaluate", dense, "--against", path, "--eval-data", images, says="is a pruned file")
    fails("fold", path, "--identity", "-o", tmp_path / "a.onnx", says="already, expected a dense graph")
    fails("show", path, "-o", tmp_path / "a.png", says="saint-frozen chooses the tokens of each image")
    assert not list(tmp_path.iterdir())


def test_a_method_that_gives_a_plan_is_folded(card, images, tmp_path):
    result = call("export", card, "--method", "centre", "--data", images, "--target", 0.8, "-o", tmp_path / "a.onnx")
    assert "a.onnx equals the gathered model" in result.stdout


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--method", "saint-frozen", "--plan", "plan.json"], "--plan and --method both say which tokens leave"),
        (["--target", "0.5"], "--target goes with --method"),
        (["--seed", "1"], "--seed goes with --method"),
        (["--method", "none-such"], "there is no method called 'none-such'; choose one of"),
        (["--method", "saint"], "saint leaves the number of tokens to each image"),
        (["--method", "evit", "--target", "1.5"], "1.5"),
        (["--method", "saint-frozen", "--target", "0.3"], "saint cannot reach 0.3 of the dense MACs"),
        (["--method", "saint-frozen", "--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(card, images, arguments, says, tmp_path):
    if "--data" not in arguments and "--method" in arguments:
        arguments = [*arguments, "--data", images]
    fails("export", card, *arguments, "-q", "-o", tmp_path / "a.onnx", says=says)
    assert not list(tmp_path.iterdir())
