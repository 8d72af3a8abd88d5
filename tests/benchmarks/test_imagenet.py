"""benchmarks/imagenet.py: its table, and what it asks of a comparison, without one."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from vpruner.core.errors import UserError
from vpruner.core.rows import read_rows

RECORDED = Path(__file__).parents[1] / "recorded" / "compare" / "results.jsonl"


@pytest.fixture
def imagenet(script):
    return script("imagenet")


@pytest.fixture
def data(tmp_path):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_one_table_of_all_models(imagenet):
    rows = read_rows(RECORDED)
    table = imagenet.one_table({"one": rows, "two": rows})
    shown = imagenet.comparison_table(imagenet.entries_of(rows))
    assert table.rows == tuple((name, *row) for name in ("one", "two") for row in shown.rows) and len(shown.rows) > 1
    lines = imagenet.markdown(table).splitlines()
    assert len(lines) == 2 + len(table.rows) and len({line.count("|") for line in lines}) == 1


def test_a_model_that_fails_leaves_the_others(imagenet, data, tmp_path, monkeypatch):
    asked = {}

    def compare(options, folder):
        asked[options.model.what] = options
        if options.model.what == "absent":
            raise UserError("there is no such model", "choose another")
        folder.mkdir(parents=True)
        (folder / "results.jsonl").write_bytes(RECORDED.read_bytes())

    monkeypatch.setattr(imagenet, "compare", compare)
    models = ("--models", "absent", "--models", "vit_small_patch14_dinov2")
    result = CliRunner().invoke(imagenet.main, [str(data), *models, "--targets", "0.5", "-o", str(tmp_path / "out")])
    assert result.exit_code == 1 and "1 of 2 models were left out: absent" in result.output
    assert "absent: left out: there is no such model; choose another" in result.output
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| vit_small_patch14_dinov2 |" in table and "| absent |" not in table
    options = asked["vit_small_patch14_dinov2"]
    assert options.model.pretrained and options.model.model_args == {"img_size": 224}
    assert options.targets == (0.5,) and options.data.eval_images == imagenet.VALIDATION
    assert options.data.data == str(data / "train") and options.data.eval_data[0].data == str(data / "val")


def test_what_is_no_imagenet_is_refused(imagenet, tmp_path):
    result = CliRunner().invoke(imagenet.main, [str(tmp_path)])
    assert result.exit_code == 2 and "has no folder train" in result.output
