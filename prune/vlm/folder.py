"""The settings in a folder of transformers, which are data: how images are prepared, and what they may not ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.json_file import read_json
from ...core.preprocess import Preprocessing
from ...core.text import option

#: Pillow's numbers of its filters, as preprocessor_config.json has them.
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
#: Indices of weights in several files.
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_settings(path: Path) -> dict[str, Any]:
    return read_json(path, "the settings", "expected a file that save_pretrained wrote", expected=dict)


def check_settings(described: Any, where: str) -> None:
    """Refuse a config.json that names code to fetch: transformers takes an implementation of attention from the hub.

    Raises:
        UserError: It names the entry.
    """
    if isinstance(described, Mapping):
        for key, value in described.items():
            if str(key).endswith("_implementation") and any(letter in str(value) for letter in "/:@"):
                raise UserError(
                    f"{where}: {str(key)[:60]} of config.json is {str(value)[:60]!r}, code of a repository",
                    "take the entry out: settings may not name code",
                )
            check_settings(value, where)
    elif isinstance(described, (list, tuple)):
        for value in described:
            check_settings(value, where)


def check_files(folder: Path) -> None:
    """Refuse a folder whose weights are elsewhere.

    Raises:
        UserError: It holds an adapter, whose model would be fetched by name, or an index of files outside.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds an adapter (adapter_config.json), expected the whole model",
            "merge the two with PEFT's merge_and_unload() and save the result with save_pretrained",
        )
    for name in _INDICES:
        if (folder / name).is_file():
            files = read_settings(folder / name).get("weight_map")
            for file in files.values() if isinstance(files, dict) else [files]:
                if not isinstance(file, str) or Path(file).name != file or file in ("", "..") or "\\" in file:
                    raise UserError(
                        f"{folder / name}: weight_map names {file!r:.80}, expected files of the folder",
                        "save the model again with save_pretrained",
                    )


def read_preprocessing(folder: str | Path, size: tuple[int, int]) -> Preprocessing:
    """How images are prepared, from preprocessor_config.json (or processor_config.json, where that holds it).

    Args:
        size: (height, width) in pixels that the tower takes.

    Raises:
        UserError: No such file, or it asks for something that :class:`Preprocessing` cannot do; the message names it.
    """
    folder = Path(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            path, found = folder / name, read_settings(folder / name)
            found = found.get("image_processor", found)
            if isinstance(found, Mapping) and {"do_resize", "image_mean", "size"} & set(found):
                break
    else:
        raise UserError(
            f"{folder} has no preprocessor_config.json, so how its images are prepared is not known",
            "save it there with AutoImageProcessor.from_pretrained(...).save_pretrained(...)",
        )

    def refuse(what: str) -> UserError:
        return UserError(
            f"{path}: {what}", f"correct the file, or export the tower to ONNX and give {option('mean')} and others"
        )

    for key in ("do_rescale", "do_normalize", "do_center_crop", "do_resize"):
        if not isinstance(found.get(key), (bool, type(None))):
            raise refuse(f"{key} is {found[key]!r:.60}, expected true or false")
    if found.get("do_rescale") is False:
        raise refuse("do_rescale is false, so pixels are not divided by 255; only pixel / 255 is supported")
    factor = found.get("rescale_factor", 1 / 255)
    if not isinstance(factor, (int, float)) or not abs(factor * 255 - 1) <= 1e-6:
        raise refuse(f"rescale_factor is {factor!r:.60}, only pixel / 255 is supported")
    normalises = found.get("do_normalize", True)
    mean, std = ((found.get(key) if normalises else None) for key in ("image_mean", "image_std"))
    resample = found.get("resample", 3)
    if not isinstance(resample, int) or resample not in _RESAMPLING:
        raise refuse(f"resample is {resample!r:.60}, expected one of {sorted(_RESAMPLING)}")
    crops = found.get("do_center_crop", False)
    resized = _size(found.get("size"), size) if found.get("do_resize", True) else (min(size), True)
    shorter, keeps_shape = resized
    cropped = _size(found.get("crop_size"), size)[0] if crops else min(size)
    if cropped != min(size) or shorter < cropped:
        raise refuse(f"it prepares images of {cropped} pixels from {shorter}, the tower takes {size[0]} x {size[1]}")
    if not keeps_shape and shorter != min(size):
        raise refuse(f"it squashes images to {shorter} pixels, the tower takes {size[0]} x {size[1]}")
    if keeps_shape:
        # timm resizes the shorter side to floor(size / crop_pct); without a crop only square images fit the tower.
        crop_pct, crop_mode = min(size) / shorter, "center"
    else:
        crop_pct, crop_mode = 1.0, "squash"
    return Preprocessing(
        mean=mean or (0.0,) * 3,
        std=std or (1.0,) * 3,
        size=size,
        interpolation=_RESAMPLING[resample],
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )


def _size(value: Any, expected: tuple[int, int]) -> tuple[int, bool]:
    """(pixels of the shorter side, whether the aspect ratio stays) of a ``size`` or ``crop_size``, in any spelling."""
    if isinstance(value, int):
        return value, True
    if isinstance(value, Mapping):
        if isinstance(value.get("shortest_edge"), int):
            return value["shortest_edge"], True
        if isinstance(value.get("height"), int) and isinstance(value.get("width"), int):
            return min(value["height"], value["width"]), False
    return min(expected), True
