"""benchmarks/families.py: its rows hold every family, and are what is found today; the table of them."""

import pytest

from vpruner.core.rows import read_rows

#: Quick families in which all, some and nothing is masked.
QUICK = [("ViT", "torchvision"), ("BEiT", "timm"), ("SAM", "timm"), ("Swin", "timm")]


@pytest.fixture
def families(script):
    for package in ("timm", "torchvision", "onnxruntime"):
        pytest.importorskip(package)
    return script("families")


@pytest.fixture
def recorded(repository):
    rows = read_rows(repository / "benchmarks" / "results" / "families.jsonl")
    return {(row["family"], row["library"]): row for row in rows}


def test_there_is_a_row_for_every_family(families, recorded):
    tried = [(family.name, family.library) for family in families.FAMILIES]
    assert list(recorded) == tried and len(set(tried)) == len(tried)
    for family in families.FAMILIES:
        row = recorded[family.name, family.library]
        assert (row["models"], row["blocks"]) == (family.models, family.blocks)
        made = [(file["exporter"], file["opset"], file["open_batch"]) for file in row["files"]]
        possible = [(one.exporter, one.opset, one.open_batch) for one in families.exports_of(family)]
        assert made and made == [one for one in possible if one in made]


@pytest.mark.parametrize("key", QUICK, ids=lambda key: " of ".join(key))
def test_a_quick_family_gives_the_row_that_is_recorded(families, recorded, key):
    (family,) = (one for one in families.FAMILIES if (one.name, one.library) == key)
    export = families.Export("torchscript", 17, False)
    (found,) = families.row_of(family, [export])["files"]
    (wanted,) = (
        file for file in recorded[key]["files"] if file["exporter"] == "torchscript" and not file["open_batch"]
    )
    assert found.pop("folded") < families.TOLERANCE and wanted.pop("folded") < families.TOLERANCE
    assert found == wanted


def test_a_family_that_cannot_be_made_is_a_row(families):
    def build():
        raise RuntimeError("no such model\nand more")

    family = families.Family("none", "timm", "", build)
    row = families.row_of(family, families.EXPORTS)
    assert [file["problems"] for file in row["files"]] == [{"build": "RuntimeError: no such model"}]
    assert "no such model" in families.said(row)


def test_what_differs_is_a_problem(families):
    import numpy as np

    ones = [np.ones((1, 2))]
    assert families.check("it", ones, ones) == 0
    with pytest.raises(ValueError, match="it is off by 1.0e-03"):
        families.check("it", [np.array([[1, 1.001]])], ones)
    with pytest.raises(ValueError, match="off by nan"):
        families.check("it", [np.full((1, 2), np.nan)], ones)
    with pytest.raises(ValueError, match=r"shapes \[\(1, 2\)\], expected \[\(2, 2\)\]"):
        families.check("it", ones, [np.ones((2, 2))])


# -- the table --------------------------------------------------------------------------------------------------------


def file(exporter="dynamo", open_batch=False, problems=None, **more):
    return {"exporter": exporter, "opset": 20, "open_batch": open_batch, "problems": problems or {}, **more}


def good(found=2, keys=2, queries=2, mlps=2, **more):
    counts = {"found": found, "keys": keys, "queries": queries, "mlps": mlps}
    return file(**{**counts, "reasons": [], "folded": 2e-7, "learns": True, **more})


def row(family, files, library="timm", blocks=2):
    packages = dict.fromkeys(("torch", "timm", "transformers", "onnx", "onnxruntime"), "1.0")
    return {"family": family, "library": library, "models": f"`{family}` of {library}", "blocks": blocks,
            "files": files, "environment": {"packages": packages}}  # fmt: skip


def cells(script, rows) -> list[list[str]]:
    lines = script("family_tables").families(rows).splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2 : lines.index("")]]


def test_libraries_of_which_all_is_equal_share_a_line(script):
    both = [good(), good(exporter="torchscript")]
    rows = [row("A", both), row("B", both), row("A", both, "transformers"), row("A", both[:1], "torchvision")]
    rows += [row("C", [good(), file(open_batch=True, problems={"export": "TypeError: no"})])]
    assert cells(script, rows) == [
        ["A", "`A` of timm; `A` of transformers", "timm, transformers", "dynamo; TorchScript", *["all"] * 3, "yes",
         ""],
        ["B", "`B` of timm", "timm", "dynamo; TorchScript", *["all"] * 3, "yes", ""],
        ["A", "`A` of torchvision", "torchvision", "dynamo; TorchScript not tried", *["all"] * 3, "yes", ""],
        ["C", "`C` of timm", "timm", "dynamo, fixed batch; TorchScript not tried", *["all"] * 3, "yes", ""],
    ]  # fmt: skip


def test_what_is_left_whole_says_why(script):
    windows = good(keys=0, queries=0, reasons=["windows: the axis is split at node 'a' (Pad)",
                                               "windows: the axis is split at node 'b' (Pad)"])  # fmt: skip
    lost = {**windows, "exporter": "torchscript", "mlps": 1}
    rows = [
        row("parts", [windows, lost], blocks=4),
        row("whole", [good(keys=0, queries=0, mlps=0, reasons=["summed without a softmax at node 'c' (MatMul)"])]),
        row("refused", [file(problems={"follow": "GraphError: no tokens | found"})]),
        row("no file", [file(problems={"export": "TypeError: no"})]),
        row("wrong", [good(problems={"fold": "ValueError: the folded graph is off by 1"})]),
        row("blind", [good(learns=False, problems={"learn": "GraphError: no function"})]),
    ]
    assert [line[3:] for line in cells(script, rows)] == [
        ["dynamo; TorchScript", "none", "none", "2 of 4", "yes",
         "2 of 4 blocks are in other stages; windows: the axis is split; less from TorchScript"],
        ["dynamo; TorchScript not tried", *["none"] * 3, "no", "summed without a softmax"],
        ["dynamo; TorchScript not tried", *["none"] * 3, "no", r"no tokens \| found"],
        ["TorchScript not tried", *["none"] * 3, "no", "no exporter writes a file that onnxruntime runs"],
        ["dynamo; TorchScript not tried", *["none"] * 3, "no", "the folded graph is off by 1"],
        ["dynamo; TorchScript not tried", *["all"] * 3, "no", "no function"],
    ]  # fmt: skip
