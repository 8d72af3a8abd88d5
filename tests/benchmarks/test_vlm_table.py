"""Tables and plot of benchmarks/vlm."""

import pytest


@pytest.fixture
def tables(script, tmp_path, monkeypatch):
    module = script("tables")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def rows(method, keep, seed, lost=-0.02, model="one"):
    common = dict(method=method, keep=keep, seed=seed, model_sha256=model, count=1000, positions="original")
    common["visual_tokens"] = None if method == "dense" else [256.0, 256.0 * keep, 256.0 * keep]
    found = []
    for number, kind in enumerate(("all", "position", "count", "presence")):
        right = dict(question_kind=kind, metric="accuracy", value=0.9 - 0.1 * number, low=0.0, high=1.0)
        found.append({**common, **right})
        if method != "dense":
            some = lost * number
            change = dict(metric="accuracy_difference", value=some, low=some - 0.03, high=some + 0.03)
            found.append({**common, **right, **change})
    return found


def test_points_lost_by_share_and_kind(tables):
    found = [
        *rows("random", 0.25, 0, model="an older model"),
        *(row for seed in (0, 1) for row in rows("dense", 1.0, seed)),
        *({**row, "positions": "compact"} for row in rows("vispruner", 0.25, 0)),
        *rows("hybrid", 0.25, 0, lost=-0.5),  # Made again below: the newest counts.
        *(row for seed in (0, 1) for row in rows("hybrid", 0.25, seed, lost=-0.01 - 0.02 * seed)),
        *rows("fastv", 0.5, 0),
        *rows("fastv", 0.25, 0),
    ]
    lines = tables.vlm_accuracy(found).splitlines()
    start = lines.index("| | 50 % | 25 % | position, 25 % | count, 25 % | presence, 25 % | tokens per layer |")
    assert lines[start + 1 :] == [
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| FastV | ±0.00 pp ± 3.00 (1) | ±0.00 pp ± 3.00 (1) | −2.00 pp ± 3.00 (1) | −4.00 pp ± 3.00 (1) "
        "| −6.00 pp ± 3.00 (1) | 160 |",
        # Two seeds: 3 / sqrt(2).
        "| SAINT, hybrid | – | ±0.00 pp ± 2.12 | −2.00 pp ± 2.12 | −4.00 pp ± 2.12 | −6.00 pp ± 2.12 | 160 |",
        "",
        "Right answers of the dense model: position 80.00 %, count 70.00 %, presence 60.00 %; 2 seeds of 1,000 "
        "questions of each kind, brackets hold the number where it is smaller; ± half of the 95 % interval, paired "
        "question by question; tokens per layer: visual tokens that enter a language layer at 25 %, on average.",
    ]
    assert tables.vlm_accuracy([]) == tables.vlm_accuracy(rows("dense", 1.0, 0)) == ""


def test_plot(tables, script, tmp_path):
    pytest.importorskip("matplotlib")
    plots = script("plots")
    found = [*rows("dense", 1.0, 0), *(row for method in tables.VLM_METHODS for row in rows(method, 0.5, 0))]
    path = tmp_path / tables.VLM_ACCURACY_PLOT
    plots.plot_vlm_accuracy(found, path)
    first = path.read_bytes()
    assert first.startswith(b"<?xml") and b"FastV" in first and b"<dc:date>" not in first
    plots.plot_vlm_accuracy(found, path)
    assert path.read_bytes() == first
    assert f"]({tables.VLM_ACCURACY_PLOT})" in tables.vlm_accuracy(found)


def prefill(mode, p50_ms, ratio, macs_saved, **more):
    limits = dict(ratio=ratio, ratio_low=ratio - 0.02, ratio_high=ratio + 0.02, ratio_to="dense")
    about = dict(model="LLaVA", layers=4, dtype="float32", count=9, protocol=dict(prompt_tokens=616, threads=2))
    saved = dict(macs_saved=macs_saved, saved_of_macs_saved=(1 - ratio) / macs_saved if macs_saved else None)
    sizes = dict(peak_tensor_bytes=200 << 20, kv_bytes=30 << 20 if macs_saved else None)
    environment = dict(environment=dict(cpu="a CPU"))
    return dict(mode=mode, keep=0.25, p50_ms=p50_ms, **limits, **about, **saved, **sizes, **environment) | more


def test_time_to_the_first_token(tables):
    older = [prefill("dense", 1.0, 1.0, 0.0), prefill("llm", 0.5, 0.5, 0.5)]
    newest = [prefill("dense", 8195.6, 1.0, 0.0), prefill("vit", 3900, 0.48, 0.5, peak_tensor_bytes=92 << 20)]
    assert tables.vlm_prefill([*older, *newest]).splitlines()[2:] == [
        "| dense | 1 | 8.2 s | | 200 MiB | |",
        "| SAINT, vit | 0.500× | 0.480× (0.460 to 0.500) | 1.040× | 92 MiB | 30 MiB |",
        "",
        "LLaVA, 4 language layers in float32, random weights, one image and 616 tokens in all; 25 % of the visual "
        "tokens kept; 9 rounds in turns, 2 threads of a CPU. The peak memory is that of the prefill, "
        "without the weights.",
    ]
    assert tables.vlm_prefill([]) == ""
