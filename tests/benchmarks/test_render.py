"""Tables and pictures from rows, and where pages show them."""

import random

import pytest

from vpruner.core.rows import append_rows


@pytest.fixture
def tables(script, tmp_path, monkeypatch):
    module = script("tables")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


@pytest.fixture
def render(script, tables, tmp_path, monkeypatch):
    module = script("render")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def rows(method, target, seed, *, model="toy", lost=-0.01, kl=0.1, **changes):
    common = dict(
        model=model, method=method, target=target, seed=seed, images=1024, count=2000, macs_ratio=target - 0.001
    )
    common["seconds"] = 10.0 + 20 * seed
    common |= dict(episodes=640 if "ppo" in method else None, **changes)
    return [
        dict(metric="top1", value=0.8 + lost, low=0.7, high=0.9, **common),
        dict(metric="top1_difference", value=lost, low=lost - 0.004, high=lost + 0.006, **common),
        dict(metric="agreement", value=0.9, low=0.8, high=1.0, **common),
        dict(metric="kl", value=kl, low=0.0, high=1.0, **common),
    ]


def test_accuracy_table(tables):
    found = [
        *rows("fisher + ppo", 0.5, 0, lost=-0.005, kl=0.05),
        *rows("random", 0.5, 0, lost=-0.04, kl=0.9),
        *rows("random", 0.65, 0, lost=-0.5),  # Made again below: the newest counts.
        *rows("random", 0.65, 0, lost=-0.01, kl=0.1),
        *rows("random", 0.65, 1, lost=-0.03, kl=0.3),
    ]
    lines = tables.accuracy(found).splitlines()
    start = lines.index("| toy: change in top-1 / KL to dense (nats) | 0.65 | 0.5 | time |")
    assert lines[start + 1 :] == [
        "| --- | ---: | ---: | ---: |",
        "| random exits | −2.00 pp ± 1.41 / 0.2000 ± 0.1414 | −4.00 pp / 0.9000 (1) | 10 s |",
        "| Fisher + PPO | – | −0.50 pp / 0.0500 (1) | 10 s |",
        "",
        "Mean ± standard deviation of 2 seeds; brackets hold the number of seeds where it is smaller; "
        "1,024 calibration and 2,000 evaluation images; PPO played at most 640 episodes; "
        "time is the median to make a plan, on one thread of a machine that did other work too; "
        "the 95 % interval over images of one top-1 difference is ± 0.5 to 0.5 pp.",
    ]


def test_accuracy_table_does_not_depend_on_the_order_of_rows(tables):
    found = [
        row
        for method in tables.METHODS
        for target in (0.8, 0.5)
        for seed in (0, 1)
        for model in ("toy", "other")
        for row in rows(method, target, seed, model=model)
    ]
    shuffled = random.Random(0).sample(found, len(found))
    table = tables.accuracy(found)
    assert tables.accuracy(shuffled) == table
    assert table.index("| other: change") < table.index("| toy: change") and table.count("PPO + weights") == 2


def form_rows(form, target, seed, kl):
    common = dict(model="toy", form=form, target=target, seed=seed, images=1024, count=2000, macs_ratio=target - 0.001)
    return [
        dict(metric=metric, value=value, low=value - 0.004, high=value + 0.006, refit=refit, seconds=10.0, **common)
        for refit in (False, True)
        for metric, value in (("top1_difference", -kl / 10), ("kl", kl / 2 if refit else kl))
    ]


def test_forms_of_the_search(tables, script, tmp_path):
    found = [row for seed in (0, 1) for row in form_rows("exits", 0.5, seed, 0.1 + 0.2 * seed)]
    found += [*form_rows("drop", 0.5, 0, 0.9), *form_rows("drop", 0.65, 0, 0.4)]
    lines = tables.search_forms(found).splitlines()
    assert lines == [
        "| toy: change in top-1 / KL to dense (nats) | 0.65 | 0.5 | time |",
        "| --- | ---: | ---: | ---: |",
        "| one exit: dropped whole | −4.00 pp / 0.4000 (1) | −9.00 pp / 0.9000 (1) | 10 s |",
        "| three exits: MLP, query, key (default) | – | −2.00 pp ± 1.41 / 0.2000 ± 0.1414 | 10 s |",
        "| one exit: dropped whole; refitted | −4.00 pp / 0.2000 (1) | −9.00 pp / 0.4500 (1) | 10 s |",
        "| three exits: MLP, query, key (default); refitted | – | −2.00 pp ± 1.41 / 0.1000 ± 0.0707 | 10 s |",
        "",
        "Mean ± standard deviation of 2 seeds; brackets hold the number of seeds where it is smaller; "
        "1,024 calibration and 2,000 evaluation images; "
        "time is the median to make a plan, on one thread of a machine that did other work too; "
        "the 95 % interval over images of one top-1 difference is ± 0.5 to 0.5 pp.",
    ]
    pytest.importorskip("matplotlib")
    path = tmp_path / tables.SEARCH_FORMS_PLOT
    plot = script("plots").plot_search_forms
    plot(found, path)
    first = path.read_bytes()
    assert first.startswith(b"<?xml") and b"</svg>" in first and b"<dc:date>" not in first
    plot(found, path)
    assert path.read_bytes() == first
    assert tables.search_forms(found).startswith(
        f"![KL divergence over multiply-adds, by form of the masks]({tables.SEARCH_FORMS_PLOT})"
    )


def test_unlabelled_images_and_features(tables):
    unlabelled = [row for row in rows("fisher", 0.5, 0) if row["metric"] in ("agreement", "kl")]
    assert (
        "| toy: agreement with dense / KL to dense (nats) | 0.5 | time |\n| --- | ---: | ---: |\n"
        "| Fisher | 90.00 % / 0.1000 | 10 s |" in tables.accuracy(unlabelled)
    )
    features = [{**unlabelled[0], "metric": "cosine", "value": 0.98}]
    assert (
        "| toy: cosine to dense | 0.5 | time |\n| --- | ---: | ---: |\n| Fisher | 0.9800 | 10 s |"
        in tables.accuracy(features)
    )
    assert "pp" not in tables.accuracy(features).splitlines()[-1]


def test_a_page_before_and_after_there_are_rows(render, tables, tmp_path, monkeypatch):
    page, texts = tmp_path / "docs" / "results" / "accuracy.md", {"accuracy": lambda: render.table("accuracy")}
    text = "# x\n\n<!-- accuracy:begin -->\n<!-- accuracy:end -->\n"
    assert render.render(page, text, texts) == text
    append_rows(tmp_path / "accuracy.jsonl", rows("fisher", 0.5, 0))
    after = render.render(page, text, texts)
    assert (
        "| Fisher | −1.00 pp / 0.1000 |" in after and render.render(page, after, texts) == after and "![" not in after
    )
    with pytest.raises(
        SystemExit, match=r"docs/results/accuracy\.md: nothing generates accuracy, expected one of demo"
    ):
        render.render(page, text, {"demo": str})


def test_links_start_at_the_page(render, tmp_path):
    texts = {"x": lambda: "[a](benchmarks/a.svg) [b](https://b.org/c) [c](#d)"}
    text = "<!-- x:begin -->\nold\n<!-- x:end -->"
    shown = render.render(tmp_path / "docs" / "results" / "a.md", text, texts).splitlines()[1]
    assert shown == "[a](../../benchmarks/a.svg) [b](https://b.org/c) [c](#d)"
    assert render.render(tmp_path / "README.md", text, texts).splitlines()[1].startswith("[a](benchmarks/a.svg)")


def test_every_table_has_one_place(render, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["render.py", "--check"])
    monkeypatch.setattr(render, "generated", lambda: {"x": lambda: "made", "y": lambda: "made"})
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- x:begin -->\n<!-- x:end -->\n")
    with pytest.raises(SystemExit, match="y has 0 places in the pages; expected one"):
        render.main()
    (tmp_path / "docs" / "y.md").write_text("<!-- y:begin -->\n<!-- y:end -->\n")
    with pytest.raises(SystemExit, match=r"out of date: README\.md, docs/y\.md; run"):
        render.main()
    monkeypatch.setattr("sys.argv", ["render.py"])
    render.main()
    assert (tmp_path / "docs" / "y.md").read_text() == "<!-- y:begin -->\nmade\n<!-- y:end -->\n"
    monkeypatch.setattr("sys.argv", ["render.py", "--check"])
    render.main()


def test_plot(tables, script, tmp_path):
    pytest.importorskip("matplotlib")
    plots = script("plots")
    found = [
        row
        for method in ("random", "fisher", "fisher + ppo + weights", "a new one")
        for target in (0.8, 0.5)
        for seed in (0, 1)
        for model in ("toy", "other")
        for row in rows(method, target, seed, model=model, lost=-0.01 * (seed + 1))
    ]
    path = tmp_path / tables.ACCURACY_PLOT
    plots.plot_accuracy(found, path)
    first = path.read_bytes()
    assert first.startswith(b"<?xml") and b"</svg>" in first and b"<dc:date>" not in first
    plots.plot_accuracy(found, path)
    assert path.read_bytes() == first
    assert f"]({tables.ACCURACY_PLOT})" in tables.accuracy(found)


def test_stage_costs_show_the_newest_row_of_each_step(tables):
    here = {"cpu": "A processor", "packages": {"torch": "2.1"}}

    def row(model, step, seconds, **changes):
        common = dict(model=model, images=1024, step=step, seconds=seconds, peak_bytes=3 << 30, threads=2)
        return {**common, "episodes": None, "time_limit": None, "environment": here, **changes}

    found = [
        row("small", "Search", 99.0),
        row("small", "Search", 10.2),
        row("small", "PPO", 60.3, episodes=48, time_limit=60.0),
        row("large", "Search", 20.0),
    ]
    assert tables.stage_costs(found).splitlines() == [
        "| step | small, 1,024 images | large, 1,024 images |",
        "| --- | ---: | ---: |",
        "| Search | 10 s, 3.0 GiB | 20 s, 3.0 GiB |",
        "| PPO | 48 episodes in 60 s, 3.0 GiB | – |",
        "",
        "A processor, 2 threads, PyTorch 2.1; the rearrangement had a time limit of 60 s.",
    ]


def test_precision_table(tables):
    def row(graph, precision, calibration=None, lost=None, **changes):
        top1 = dict(metric="top1", value=0.78 + (lost or 0), low=0.7, high=0.8, count=2000)
        found = dict(model="toy", graph=graph, precision=precision, calibration=calibration, top1=top1, target=None)
        found |= dict(file_bytes=6_460_000, calibrated_on=128)
        if lost is not None:
            found["top1_difference"] = dict(value=lost, low=lost - 0.004, high=lost + 0.006)
        return {**found, **changes}

    found = [
        row("dense", "fp32"),
        row("dense", "int8", "minmax", lost=-0.5),  # Made again below: the newest counts.
        row("dense", "int8", "minmax", lost=-0.0015, file_bytes=1_790_000),
        row("pruned", "fp32", target=0.65),
        row("dense", "fp16", lost=0.0),
    ]
    assert tables.precision(found).splitlines() == [
        "| toy, top-1 accuracy | dense | change in top-1 | size | pruned, 0.65 of the MACs | change in top-1 | size |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| fp32 | 78.00 % |  | 6.46 MB | 78.00 % |  | 6.46 MB |",
        "| int8, minmax | 77.85 % | −0.15 pp (−0.55 to +0.45) | 1.79 MB | – | – | – |",
        "| fp16 | 78.00 % | ±0.00 pp (−0.40 to +0.60) | 6.46 MB | – | – | – |",
        "",
        "2,000 evaluation images; INT8 was calibrated on 128; BF16 is emulated in float32.",
    ]


def gpu_row(label, ratio, **changes):
    environment = {
        "gpu": "H200",
        "driver": "570.1",
        "cuda": "12.8",
        "tensorrt": "10.13.0",
        "packages": {"torch": "2.9"},
    }
    row = {"kind": "latency", "model": "deit_base_patch16_224", "batch": 128, "runtime": "tensorrt", "label": label}
    row |= {"p50_ms": 10.0, "ratio": ratio, "environment": environment, "skipped": ["torch: absent"]}
    return {**row, **changes}


def test_rows_of_a_gpu_and_that_there_are_none(tables):
    assert "Not measured yet" in tables.gpu([])
    found = [gpu_row("dense", 1.0), gpu_row("0.5", 0.7)]
    parity = dict(kind="parity", rung="tensorrt fp32 equals onnxruntime", precision="fp32")
    found += [gpu_row("0.5", None, passed=True, **parity), gpu_row("dense", None, passed=False, **parity)]
    text = tables.gpu(found)
    assert "| deit_base_patch16_224 | 128 | tensorrt | 10.000 ms | – | – | 0.700 |" in text
    assert "H200, driver 570.1, CUDA 12.8; TensorRT 10.13.0, torch 2.9. 2 results compared, 1 wrong." in text
    assert "Wrong: deit_base_patch16_224 dense, tensorrt fp32 equals onnxruntime, batch 128." in text
    assert "Not reached: deit_base_patch16_224, TensorRT FP16, batch 128" in text and "(0.700)." in text
    assert "Skipped: torch: absent." in text
    # Another machine has a table of its own.
    other = gpu_row("dense", 1.0, environment={"gpu": "Orin", "cuda": "12.6"})
    assert tables.gpu([*found, other]).count("| model | batch |") == 2


def test_content_scores_table(tables):
    def row(score, target, refit, metric, value):
        facts = dict(score=score, target=target, refit=refit, images=1024, eval_images=2000)
        return dict(metric=metric, value=value, **facts)

    found = []
    for score, target, refit, top1, kl in (
        ("static", 0.5, False, 0.74, 0.09),
        ("linear", 0.5, False, 0.1, 0.9),  # Made again below: the newest counts.
        ("linear", 0.5, True, 0.77, 0.04),
        ("linear", 0.5, False, 0.76, 0.06),
        ("static", 0.65, False, 0.765, 0.04),
    ):
        found += [row(score, target, refit, "top1", top1), row(score, target, refit, "top1_difference", top1 - 0.78)]
        found += [row(score, target, refit, "kl", kl)]
    assert tables.content_scores(found).splitlines() == [
        "| top-1 accuracy / KL | 0.65 | 0.5 | 0.5, refitted |",
        "| --- | ---: | ---: | ---: |",
        "| none: the static plan | 76.50 % / 0.0400 | 74.00 % / 0.0900 | – |",
        "| linear probe of Fisher importance (`--select content`) | – | 76.00 % / 0.0600 | 77.00 % / 0.0400 |",
        "",
        "1,024 calibration and 2,000 evaluation images, on which the dense model has 78.00 %.",
    ]


def test_the_summary_shows_what_every_seed_measured(tables):
    def compared(method, target, seed, lost):
        some = dict(kind="compared", method=method, target=target, seed=seed, failure=None, macs_ratio=target)
        return dict(some, top1_difference=dict(value=lost, low=lost - 0.01, high=lost + 0.01))

    def timed(method, target, batch, ratio):
        return dict(
            kind="latency", method=method, target=target, batch=batch, runtime="onnxruntime", ratio=ratio, p50_ms=1.0
        )

    found = [
        compared("v-pruner", 0.65, 0, -0.01),
        compared("v-pruner", 0.65, 1, -0.02),
        timed("v-pruner", 0.65, 1, 0.7),
    ]
    found += [compared("v-pruner", 0.85, 0, -0.01), compared("tome", 0.65, 0, -0.5), timed("tome", 0.65, 1, 0.9)]
    common = dict(label="ordered", runtime="onnxruntime", target=0.65, protocol={"batch": 1}, macs_ratio=0.6497)
    larger = [
        dict(common, model="base", ratio=0.9, p50_ms=300.0),  # Measured again below: the newest counts.
        dict(common, model="base", ratio=0.68, p50_ms=300.0),
        dict(common, model="tiny", ratio=0.667, p50_ms=20.0, macs_ratio=0.64),
        dict(common, model="tiny", ratio=0.5, p50_ms=20.0, protocol={"batch": 8}),
        dict(common, model="tiny", ratio=0.5, p50_ms=20.0, label="grid"),
        dict(common, model="half", ratio=0.5, p50_ms=20.0, target=0.5),
    ]
    assert tables.summary(found, larger).splitlines() == [
        "| multiply-adds | change in top-1 | time, batch 1 |",
        "| ---: | ---: | ---: |",
        "| 0.650× | −1.50 pp ± 0.71 | 0.700× |",
        "",
        "Time of larger models, batch 1: tiny 0.667× at 0.640× of the multiply-adds, base 0.680× at 0.650× of the "
        "multiply-adds.",
    ]


def test_time_and_memory_of_folding(tables):
    common = dict(model="toy", file_bytes=3 << 29, reads=1, recognitions=1, system_seconds=1.0)
    common["environment"] = {"cpu": "A processor", "packages": {"onnxruntime": "1.2"}}
    rows = [dict(common, way="read by each step", reads=3, recognitions=5, user_seconds=60.0, peak_bytes=6 << 30)]
    rows += [
        dict(common, way="opened once", user_seconds=s, peak_bytes=b << 30)
        for s, b in ((30.0, 9), (32.0, 2), (90.0, 1))
    ]
    assert tables.fold_memory(rows).splitlines()[2:] == [
        "| read by each step | 3 × | 5 × | 61 s | 6.0 GiB |",
        "| opened once | 1 × | 1 × | 33 s | 2.0 GiB |",
        "",
        "toy, a file of 1.50 GiB; A processor, onnxruntime 1.2.",
    ]


def test_gradients_and_budgets_of_time(tables):
    rows = [dict(way=way, p50_ms=64.0 * at, batch=32, ratio=at, ratio_low=at, ratio_high=at, model="toy", gates=1512,
                 threads=1, largest_relative_difference=1e-6) for at, way in ((1, "timm"), (2, "dynamo 20, open batch"))
            ]  # fmt: skip
    rows[-1]["environment"] = {"cpu": "A processor", "packages": {"torch": "1.2"}}
    assert tables.graph_gradients(rows).splitlines()[2:] == [
        "| the timm model | 2.00 ms | 1 |  |",
        "| its ONNX file, dynamo 20, open batch | 4.00 ms | 2.000× (2.000 to 2.000) | 1.0e-06 |",
        "",
        "toy, 1,512 gates, batch 32, 1 thread; A processor, PyTorch 1.2.",
    ]
    common = dict(target=0.5, searched="by latency", macs_ratio=0.42, predicted_ratio=0.5, model="toy", count=2000)
    common |= dict(ratio=0.52, ratio_low=0.51, ratio_high=0.53, batch=1, threads=2)
    common["environment"] = {"cpu": "A processor", "packages": {"onnxruntime": "1.2"}}
    rows = [
        dict(common, metric="top1_difference", value=-0.05, low=-0.07, high=-0.04),
        dict(common, metric="kl", value=0.149),
    ]
    assert tables.latency_budget(rows).splitlines()[2:] == [
        "| onnxruntime | 0.5 | by latency | 0.420× | 0.500× | 0.520× (0.510 to 0.530) | −5.00 pp (−7.00 to −4.00) | "
        "0.1490 |",
        "",
        "toy, 2,000 evaluation images, batch 1, 2 thread(s); A processor, onnxruntime 1.2.",
    ]


def dense_rows():
    common = dict(eval_mosaics=1000, batch=1, threads=1, kind="x", p50_ms=10.0)
    common["environment"] = {"cpu": "A processor", "packages": {"onnxruntime": "1.2"}}

    def row(label, way, target, macs, time, accuracy, **changes):
        lost = accuracy - 0.8
        found = dict(common, label=label, way=way, target=target, macs_ratio=macs, accuracy=accuracy, difference=lost)
        found |= dict(difference_low=lost - 0.01, difference_high=lost + 0.01, agreement=0.9, relative_error=0.05)
        return {**found, "ratio": time, "ratio_low": time - 0.01, "ratio_high": time + 0.01, **changes}

    learned = dict(search_mosaics=1024, fit_mosaics=512)
    return [
        row("dense", "dense", None, 1.0, 1.0, 0.8),
        row("shallow", "shallow", None, 0.63, 0.64, 0.75, depth=5),
        row("pruned 0.5", "pruned", 0.5, 0.499, 0.55, 0.77, **learned),
        row("pruned 0.65", "pruned", 0.65, 0.649, 0.9, 0.1, **learned),  # Made again below: the newest counts.
        row("pruned 0.65", "pruned", 0.65, 0.649, 0.7, 0.79, **learned),
        row("pooled 0.65", "pooled", 0.65, 0.62, 0.63, 0.72, entry=4, added=True),
    ]


def test_answers_for_every_patch(script, tables, tmp_path):
    assert script("dense_tables").dense([]) == "Not measured yet."
    text = script("dense_tables").dense(dense_rows())
    assert text.splitlines()[2:] == [
        "| dense | 1.000× | 10.0 ms | 80.00 % |  |  |  |",
        "| pruned, 0.65 | 0.649× | 0.700× (0.690 to 0.710) | 79.00 % | −1.00 pp (−2.00 to ±0.00) | 90.00 % | 0.0500 |",
        "| pruned, 0.5 | 0.499× | 0.550× (0.540 to 0.560) | 77.00 % | −3.00 pp (−4.00 to −2.00) | 90.00 % | 0.0500 |",
        "| 2 x 2 pooled, 0.65 from block 4 on, updates added | 0.620× | 0.630× (0.620 to 0.640) | 72.00 % "
        "| −8.00 pp (−9.00 to −7.00) | 90.00 % | 0.0500 |",
        "| smaller model, 5 blocks | 0.630× | 0.640× (0.630 to 0.650) | 75.00 % | −5.00 pp (−6.00 to −4.00) "
        "| 90.00 % | 0.0500 |",
        "",
        "1,024 mosaics for the search and 512 for the refit; 1,000 evaluation mosaics; batch 1, 1 thread(s); "
        "A processor, onnxruntime 1.2.",
    ]
    path = tmp_path / tables.DENSE_PLOT
    plot = script("plots").plot_dense
    plot(dense_rows(), path)
    first = path.read_bytes()
    assert first.startswith(b"<?xml") and b"</svg>" in first and b"<dc:date>" not in first
    plot(dense_rows(), path)
    assert path.read_bytes() == first
    assert (
        script("dense_tables")
        .dense(dense_rows())
        .startswith(f"![Accuracy per patch over measured time]({tables.DENSE_PLOT})")
    )


def test_errors_of_patch_tokens(script, tables):
    def row(way, target, error, images=1024, seed=0, **changes):
        common = dict(model="toy", search_images=images, fit_images=images, eval_images=2000, seed=seed)
        return dict(common, way=way, target=target, relative_error=error, **changes)

    found = [row("copies", 0.8, 0.3), row("pruned", 0.8, 0.05, before_refit=0.1), row("copies", 0.5, 0.6)]
    found += [row("pruned", 0.8, 0.03, before_refit=0.12, seed=1), row("pruned", 0.5, 0.2, 2048, before_refit=0.4)]
    assert script("dense_tables").dense_tokens(found).splitlines() == [
        "| relative squared error at | 0.8 of the MACs | 0.5 of the MACs |",
        "| --- | ---: | ---: |",
        "| pruned, 1,024 images for the search, 1,024 for the refit | 0.0400 | – |",
        "| before the refit, 1,024 images for the search, 1,024 for the refit | 0.1100 | – |",
        "| pruned, 2,048 images for the search, 2,048 for the refit | – | 0.2000 |",
        "| before the refit, 2,048 images for the search, 2,048 for the refit | – | 0.4000 |",
        "| copies of the nearest | 0.3000 | 0.6000 |",
        "",
        "toy, 2,000 evaluation images; mean of 2 seeds.",
    ]
