from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import vpruner.runtime
from vpruner.core.errors import UserError
from vpruner.runtime import Preprocessing
from vpruner.runtime.ort import OrtSession, provider_name, short_provider

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def photos(count: int, seed: int = 0) -> list[np.ndarray]:
    """Smooth uint8 [height, width, 3] images of odd sizes."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        images.append(np.asarray(small.resize(tuple(rng.integers(5, 40, 2).tolist()), Image.Resampling.BICUBIC)))
    return images


def expected_logits(images, weight, preprocessing_json) -> np.ndarray:
    preprocessing = Preprocessing.from_json(preprocessing_json)
    return preprocessing.batch(images).reshape(len(images), weight.shape[0]) @ weight


# -- images in, labels out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 4, "batch"])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 9])
def test_any_number_of_images_through_any_batch(make_onnx, weight, preprocessing_json, batch, count):
    images = photos(count)
    with OrtSession(make_onnx(batch=batch), batch_size=3) as session:
        assert session.batch_size == (3 if batch == "batch" else batch)
        logits = session.logits(images)
    assert logits.shape == (count, 7) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected_logits(images, weight, preprocessing_json), rtol=1e-5, atol=1e-5)


def test_static_batch_is_filled_and_dynamic_batch_is_not(make_onnx, monkeypatch):
    for batch, shapes in ((4, [4, 4]), ("batch", [4, 2])):
        session = OrtSession(make_onnx(batch=batch), batch_size=4)
        seen, run = [], session._run
        monkeypatch.setattr(
            session, "_run", lambda feeds, seen=seen, run=run: seen.append(len(feeds["image"])) or run(feeds)
        )
        session.logits(iter(photos(6)))
        assert seen == shapes


def test_predict_names_classes_best_first(make_onnx, weight, preprocessing_json):
    images = photos(3)
    with OrtSession(make_onnx(classes=CLASSES)) as session:
        predictions = session.predict(images, top=3)
    for prediction, logits in zip(predictions, expected_logits(images, weight, preprocessing_json), strict=True):
        probability = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
        best = np.argsort(-logits)[:3]
        assert [score.index for score in prediction.scores] == best.tolist()
        assert [score.label for score in prediction.scores] == [CLASSES[i] for i in best]
        assert prediction.label == CLASSES[best[0]]
        np.testing.assert_allclose([score.score for score in prediction.scores], probability[best], rtol=1e-4)
        label, score, index = prediction.scores[0]
        assert prediction.to_json()["scores"][0] == {"label": label, "score": score, "index": index}


def test_predict_takes_paths_pil_and_arrays_alike(make_onnx, tmp_path):
    array = photos(1)[0]
    Image.fromarray(array).save(tmp_path / "a.png")
    with OrtSession(make_onnx(classes=CLASSES)) as session:
        results = session.predict([tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array])
        assert len({result.scores for result in results}) == 1
        # One image alone is a list of one.
        for single in (str(tmp_path / "a.png"), Image.fromarray(array), array):
            assert [result.scores for result in session.predict(single)] == [results[0].scores]
        with pytest.raises(UserError, match=r"gone\.png"):
            session.predict([tmp_path / "gone.png"])
        with pytest.raises(UserError, match="int"):
            session.predict(5)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((32, 32, 4), np.uint8),  # RGBA, not 32 grey images
        np.zeros((3, 32, 32), np.uint8),  # channels first, not 3 grey images
        np.zeros((2, 3, 32, 32), np.uint8),
        np.zeros((2, 32, 32, 1), np.uint8),
        np.zeros((1, 2, 32, 32, 3), np.uint8),
        np.zeros(3, np.uint8),
        np.zeros((32, 32, 3), np.float32),
        np.zeros((2, 32, 32, 3), np.float32),
    ],
)
def test_arrays_of_other_shapes_are_not_guessed_at(make_onnx, array):
    with OrtSession(make_onnx()) as session, pytest.raises(UserError) as caught:
        session.predict(array)
    assert f"{array.dtype} {list(array.shape)}" in str(caught.value)
    assert "[height, width], [height, width, 3] or [image, height, width, 3]" in str(caught.value)


def test_arrays_of_one_or_many_images(make_onnx, tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    Image.fromarray(colour[0]).save(tmp_path / "a.png")
    with OrtSession(make_onnx()) as session:
        assert session.logits(colour[:0]).shape == (0, 7)
        many = session.logits(colour)
        np.testing.assert_array_equal(many[:1], session.logits(colour[0]))
        np.testing.assert_array_equal(many, session.logits(list(colour)))
        assert session.logits(colour[0, :, :, 0]).shape == (1, 7)
        np.testing.assert_array_equal(session.logits(np.array([str(tmp_path / "a.png")])), many[:1])


def test_top_is_capped_and_checked(make_onnx):
    with OrtSession(make_onnx()) as session:
        scores = session.predict(photos(1), top=99)[0].scores
        assert len(scores) == 7 and sum(score.score for score in scores) == pytest.approx(1)
        assert scores[0].label == f"class {scores[0].index}"
        for top in (0, -1, 1.5, True):
            with pytest.raises(UserError, match="top"):
                session.predict(photos(1), top=top)


def test_equal_scores_keep_the_order_of_the_outputs(make_onnx):
    with OrtSession(make_onnx(scale=0.0)) as session:
        assert [score.index for score in session.predict(photos(1))[0].scores] == [0, 1, 2, 3, 4]


def test_features(make_onnx):
    with OrtSession(make_onnx(props={"vpruner.output": "features"})) as session:
        (prediction,) = session.predict(photos(1))
        np.testing.assert_array_equal(prediction.features, session.logits(photos(1))[0])
    assert prediction.scores == () and len(prediction.to_json()["features"]) == 7
    with pytest.raises(UserError, match="features"):
        _ = prediction.label


def test_outputs_that_are_not_finite_are_refused(make_onnx):
    path = make_onnx(scale=np.inf)
    with OrtSession(path, batch_size=2) as session:
        for use in (session.predict, session.logits):
            with pytest.raises(
                UserError, match=rf"{path}: the outputs are not finite .* for 3 of 3 images; look for NaN"
            ):
                use(photos(3))
        found = session.logits(photos(3), finite=False)
        found[1:] = 0
        with pytest.raises(UserError, match="for 1 of 3 images"):
            session.check_finite(found)
    nan = make_onnx(scale=np.nan, props={"vpruner.output": "features"})
    with OrtSession(nan) as session, pytest.raises(UserError, match="its initializer 'weight' holds NaN"):
        session.predict(photos(1))
    half = make_onnx(scale=np.inf, props={"vpruner.precision": "fp16"})
    with OrtSession(half) as session, pytest.raises(UserError, match="in fp16: a value inside is likely beyond 65504"):
        session.logits(photos(1))


# -- tensors ----------------------------------------------------------------------------------------------------------


def test_run_gives_named_tensors(make_onnx, weight):
    image = np.random.default_rng(0).normal(size=(2, 3, 8, 6)).astype(np.float32)
    with OrtSession(make_onnx(batch="batch")) as session:
        outputs = session.run({"image": image})
        assert list(outputs) == ["logits"]
        np.testing.assert_allclose(outputs["logits"], image.reshape(2, -1) @ weight, rtol=1e-5, atol=1e-5)
        strided = np.asfortranarray(image)
        np.testing.assert_array_equal(session.run({"image": strided})["logits"], outputs["logits"])


@pytest.mark.parametrize(
    ("feeds", "reasons"),
    [
        ({"pixels": np.zeros((1, 3, 8, 6), np.float32)}, ["pixels", "image"]),
        ({}, ["image"]),
        ({"image": np.zeros((1, 3, 8, 6), np.float32), "mask": np.zeros(1)}, ["mask"]),
        ({"image": np.zeros((1, 3, 8, 6))}, ["float64", "float32"]),
        ({"image": np.zeros((2, 3, 8, 6), np.float32)}, ["[2, 3, 8, 6]", "[1, 3, 8, 6]"]),
        ({"image": np.zeros((1, 3, 6, 8), np.float32)}, ["[1, 3, 6, 8]"]),
        ({"image": np.zeros((3, 8, 6), np.float32)}, ["[3, 8, 6]"]),
        ({"image": [[0.0]]}, ["list", "numpy"]),
        (np.zeros((1, 3, 8, 6), np.float32), ["ndarray", "image"]),
    ],
)
def test_run_says_what_it_found_and_expected(make_onnx, feeds, reasons):
    with OrtSession(make_onnx(batch=1)) as session, pytest.raises(UserError) as caught:
        session.run(feeds)
    assert all(reason in str(caught.value) for reason in reasons)
    assert "\n" not in str(caught.value)


def test_empty_batch_is_refused(make_onnx):
    with OrtSession(make_onnx(batch="batch")) as session, pytest.raises(UserError, match=r"\[0, 3, 8, 6\]"):
        session.run({"image": np.zeros((0, 3, 8, 6), np.float32)})


def test_a_closed_session_says_so(make_onnx):
    session = OrtSession(make_onnx())
    with session:
        pass
    session.close()
    assert session.closed
    for call in (lambda: session.run({}), lambda: session.logits([]), lambda: session.predict([])):
        with pytest.raises(UserError, match="closed"):
            call()


# -- what the file says -----------------------------------------------------------------------------------------------


def test_metadata_is_read(make_onnx):
    props = {"vpruner.plan": "cd" * 32}
    with OrtSession(make_onnx(classes=CLASSES, props=props)) as session:
        metadata = session.metadata
    assert (metadata.model, metadata.version, metadata.plan) == ("tiny", "0.0.1", "cd" * 32)
    assert metadata.token_plan is None and metadata.classes == tuple(CLASSES) and metadata.geometry is None


def test_a_file_without_preprocessing_runs_but_does_not_predict(make_onnx, preprocessing_json):
    path = make_onnx(props=dict.fromkeys(["vpruner.preprocessing", "vpruner.version", "vpruner.model"]))
    with OrtSession(path) as session:
        assert session.run({"image": np.zeros((1, 3, 8, 6), np.float32)})["logits"].shape == (1, 7)
        with pytest.raises(UserError, match=r"vpruner\.preprocessing.*model.export.*, or in Python.*preprocessing="):
            session.predict(photos(1))
    for given in (preprocessing_json, Preprocessing.from_json(preprocessing_json)):
        with OrtSession(path, preprocessing=given, classes=CLASSES) as session:
            assert session.predict(photos(1))[0].label in CLASSES


def test_preprocessing_of_another_size_is_refused(make_onnx, preprocessing_json):
    with (
        OrtSession(make_onnx(), preprocessing={**preprocessing_json, "size": [8, 8]}) as session,
        pytest.raises(UserError, match=r"\[3, 8, 8\].*\[1, 3, 8, 6\]"),
    ):
        session.predict(photos(1))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("vpruner.preprocessing", "{"),
        ("vpruner.preprocessing", '{"mean": 1}'),
        ("vpruner.classes", '"cat"'),
        ("vpruner.kept", "3"),
        ("vpruner.sets", "3"),
        ("vpruner.output", "boxes"),
        ("vpruner.geometry", "{}"),
    ],
)
def test_malformed_metadata_names_the_file(make_onnx, key, text):
    path = make_onnx(props={key: text})
    with pytest.raises(UserError, match=r"model\.onnx") as caught:
        OrtSession(path)
    assert "\n" not in str(caught.value)


def test_threads_far_beyond_the_cores_are_refused(make_onnx, monkeypatch):
    monkeypatch.setattr("vpruner.runtime.session.usable_cores", lambda: 2)
    with pytest.raises(UserError, match="threads is 9, this machine has 2 usable cores; expected 1 to 8"):
        OrtSession(make_onnx(), threads=9)
    OrtSession(make_onnx(), threads=8).close()


def test_wrong_number_of_class_names(make_onnx):
    with pytest.raises(UserError, match="2 class names for 7 outputs"):
        OrtSession(make_onnx(classes=["a", "b"]))


# -- opening ----------------------------------------------------------------------------------------------------------


def test_open_picks_by_suffix(make_onnx, tmp_path):
    with vpruner.runtime.open(make_onnx(), threads=1) as session:
        assert isinstance(session, OrtSession) and session.threads == 1
    for suffix in (".engine", ".plan", ".TRT"):
        with pytest.raises(UserError, match="no such file"):
            vpruner.runtime.open(tmp_path / f"model{suffix}")
    with pytest.raises(UserError, match=r"expected \.onnx or \.engine"):
        vpruner.runtime.open(tmp_path / "model.pt")


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "truncated"])
def test_unusable_files_give_one_line_and_no_noise(make_onnx, tmp_path, capfd, kind):
    path = tmp_path / "bad.onnx"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        whole = make_onnx().read_bytes()
        path.write_bytes({"empty": b"", "text": b"hello, world", "truncated": whole[: len(whole) // 2]}[kind])
    with pytest.raises(UserError) as caught:
        OrtSession(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).count(str(path)) == 1
    assert capfd.readouterr() == ("", "")


def test_missing_external_weights_are_one_line(make_onnx, tmp_path):
    import onnx

    model = onnx.load(make_onnx())
    onnx.save(model, tmp_path / "big.onnx", save_as_external_data=True, location="big.bin", size_threshold=0)
    assert OrtSession(tmp_path / "big.onnx").inputs[0].name == "image"
    (tmp_path / "big.bin").unlink()
    with pytest.raises(UserError, match=r"big\.onnx needs its weights file big\.bin, which is not") as caught:
        OrtSession(tmp_path / "big.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("providers", [None, "cpu", ["cpu"], "CPUExecutionProvider", [("cpu", {})]])
def test_cpu_by_any_name(make_onnx, providers):
    assert OrtSession(make_onnx(), providers=providers).providers == ("CPUExecutionProvider",)


def test_unknown_and_missing_providers(make_onnx):
    import onnxruntime

    with pytest.raises(UserError, match="no provider 'gpu'.*cuda"):
        OrtSession(make_onnx(), providers="gpu")
    with pytest.raises(UserError, match="expected a name"):
        OrtSession(make_onnx(), providers=[3])
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(UserError, match=r"'cuda', only .*cpu.*vpruner\[gpu\]"):
            OrtSession(make_onnx(), providers=["cuda", "cpu"])


def test_a_provider_that_was_asked_for_and_not_obtained(make_onnx, monkeypatch):
    # onnxruntime-gpu on a machine without a GPU: CUDA is listed as available, and the session silently lacks it.
    import onnxruntime

    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, settings, **_: real(path, settings, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(UserError, match=r"cuda was asked for, onnxruntime runs on cpu.*driver"):
        OrtSession(make_onnx(), providers="cuda")


# -- tensors that stay on the device ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, "batch"])
def test_the_steps_of_a_run_are_the_run(make_onnx, weight, batch):
    with OrtSession(make_onnx(batch=batch)) as session:
        with pytest.raises(UserError, match=r"call upload\(\) first"):
            session.enqueue()
        with pytest.raises(UserError, match="nothing has run"):
            session.download()
        mine = np.ones((2, 3, 8, 6), np.float32)
        session.upload({"image": mine})
        session.enqueue()
        first = session.download()["logits"]
        session.upload({"image": 2 * mine})
        session.enqueue()
        np.testing.assert_allclose(session.download()["logits"], 2 * first, rtol=1e-6)
        assert (mine == 1).all(), "an upload wrote into the array of the one before"
        np.testing.assert_allclose(first, np.ones((2, 144), np.float32) @ weight, rtol=1e-5, atol=1e-5)
        with pytest.raises(UserError, match="shape"):
            session.upload({"image": mine[0]})
    with pytest.raises(UserError, match="closed"):
        session.enqueue()


def test_on_a_gpu_tensors_are_bound_once_per_shape(make_onnx, weight, preprocessing_json, pretended_gpu):
    images = photos(5)
    with OrtSession(make_onnx(batch="batch"), providers=[("cuda", {"device_id": 1})], batch_size=2) as session:
        assert session.placement == ("cuda", 1)
        logits = session.logits(images)
    np.testing.assert_allclose(logits, expected_logits(images, weight, preprocessing_json), rtol=1e-5, atol=1e-5)
    # Batches of 2, 2 and 1: one input and one output for each of the two shapes.
    assert pretended_gpu["values"] == [("cuda", 1)] * 4 and pretended_gpu["runs"] == 3
    assert pretended_gpu["options"]["CUDAExecutionProvider"] == {"device_id": 1}


@pytest.mark.parametrize("provider, option", [("cuda", "enable_cuda_graph"), ("tensorrt", "trt_cuda_graph_enable")])
def test_cuda_graphs(make_onnx, pretended_gpu, provider, option):
    with OrtSession(make_onnx(), providers=provider, cuda_graph=True) as session:
        assert session.run({"image": np.zeros((1, 3, 8, 6), np.float32)})["logits"].shape == (1, 7)
    options = pretended_gpu["options"]
    assert next(iter(options.values())) == {option: "1"} and options["CPUExecutionProvider"] == {}
    with pytest.raises(UserError, match=r"open dimensions, and a CUDA graph needs fixed ones; export it with"):
        OrtSession(make_onnx(batch="batch"), providers=provider, cuda_graph=True)


def test_cuda_graphs_are_for_gpus(make_onnx):
    with pytest.raises(UserError, match="cuda_graph on cpu; expected providers='cuda'"):
        OrtSession(make_onnx(), cuda_graph=True)


def test_provider_names():
    assert provider_name("cuda") == provider_name("CUDA") == provider_name("CUDAExecutionProvider")
    assert short_provider("TensorrtExecutionProvider") == "tensorrt"
    assert short_provider("XyzExecutionProvider") == "XyzExecutionProvider"


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 1.5}, {"batch_size": 0}, {"spinning": "never"}])
def test_options_are_checked(make_onnx, options):
    with pytest.raises(UserError, match=next(iter(options))):
        OrtSession(make_onnx(), **options)


def test_thread_and_spinning_options_reach_onnxruntime(make_onnx):
    options = OrtSession(make_onnx(), threads=1)._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    options = OrtSession(make_onnx(), spinning=False)._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    options = OrtSession(make_onnx(), spinning="run")._session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_runtime_imports_without_heavy_packages():
    code = """
import sys
blocked = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "tensorrt")
sys.modules.update(dict.fromkeys(blocked))
import pkgutil, importlib, vpruner.runtime
for module in pkgutil.iter_modules(vpruner.runtime.__path__):
    importlib.import_module("vpruner.runtime." + module.name)
import pathlib, tempfile
from vpruner.core.errors import UserError
with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
    try:
        vpruner.runtime.open(file.name)
    except UserError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "vpruner[cpu]" in result.stdout
