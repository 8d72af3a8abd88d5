"""Tiny exported models, made once per session: an export takes seconds."""

import pytest
import torch
from export_tools import PREPROCESSING, Exported
from foreign_graphs import Foreign, write_foreign
from tiny_vits import tiny

from vpruner.export.dense import export_dense
from vpruner.prune.backbones.vit import read_geometry, weights_sha256


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """``exported(kind, opset=, dynamic_batch=, batch_size=, **changes)``: a dense ONNX file of a tiny model."""
    cache: dict[str, Exported] = {}

    def export(kind: str = "class token", *, opset=20, dynamic_batch=False, batch_size=1, **changes) -> Exported:
        key = repr((kind, opset, dynamic_batch, batch_size, sorted(changes.items(), key=str)))
        if key not in cache:
            model = tiny(kind, **changes)
            geometry = read_geometry(model, "tiny")
            path = export_dense(
                model,
                tmp_path_factory.mktemp("dense") / "dense.onnx",
                name="tiny",
                geometry=geometry,
                preprocessing=PREPROCESSING,
                classes=[f"class {index}" for index in range(geometry.outputs)]
                if geometry.output == "logits"
                else None,
                weights_sha256=weights_sha256(model),
                opset=opset,
                dynamic_batch=dynamic_batch,
                batch_size=batch_size,
            )
            cache[key] = Exported(model, geometry, path)
        return cache[key]

    return export


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """``written(Foreign(...))``: the file, exported once per session."""
    folder, paths = tmp_path_factory.mktemp("foreign"), {}

    def write(foreign: Foreign):
        if foreign not in paths:
            paths[foreign] = write_foreign(foreign, folder / f"{len(paths)}.onnx")
        return paths[foreign]

    return write
