"""From an image file to the tensor the model was trained on, with Pillow and numpy only.

The arithmetic is that of timm's evaluation transform (``timm.data.create_transform(..., is_training=False)``, which
sits on torchvision), down to the rounding of sizes and offsets, so that an accuracy measured with timm is the accuracy
the application gets. As in timm and torchvision, the EXIF orientation is *not* applied: a photo stored sideways is
classified sideways, as it was in training, and a remark says how many there were. transformers' own loader and browsers
do turn; call ``PIL.ImageOps.exif_transpose`` first where a model was trained that way.

One thing is not as in timm: images of 16 bits per pixel are scaled to 8 (:func:`to_rgb`), where Pillow's own conversion
clips them to white.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from . import progress
from .choices import CROP_MODES, INTERPOLATIONS
from .errors import UserError
from .files import open_regular
from .text import counted, option

if TYPE_CHECKING:
    from PIL import Image

#: What is read, by Pillow's names; HEIF where its plugin is registered.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
#: The EXIF tag.
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input.

    Attributes:
        mean: Per channel (R, G, B), subtracted after the pixels were divided by 255.
        std: Per channel, divided by after that.
        size: (height, width) in pixels of the model's input.
        interpolation: One of :data:`INTERPOLATIONS`.
        crop_pct: Share of the resized image that the crop keeps: the resize goes to floor(size / crop_pct).
        crop_mode: ``"center"`` scales the shorter side and crops the middle; ``"squash"`` scales both sides, giving up
            the aspect ratio; ``"border"`` scales the longer side and fills the rest with the mean colour.

    Raises:
        UserError: A value is out of range; the message names it.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: tuple[int, int]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self):
        object.__setattr__(self, "mean", _three_numbers("mean", self.mean))
        object.__setattr__(self, "std", _three_numbers("std", self.std))
        if min(self.std) <= 0:
            raise UserError(f"preprocessing: std is {list(self.std)}, expected positive numbers")
        size = self.size
        if (
            not isinstance(size, (list, tuple))
            or len(size) != 2
            or not all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) and v >= 1 for v in size)
        ):
            raise UserError(f"preprocessing: size is {size!r}, expected two positive whole numbers [height, width]")
        object.__setattr__(self, "size", (int(size[0]), int(size[1])))
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"preprocessing: interpolation is {self.interpolation!r}",
                f"expected one of {', '.join(INTERPOLATIONS)}",
            )
        if not _is_number(self.crop_pct) or not 0.1 <= self.crop_pct <= 2:
            raise UserError(f"preprocessing: crop_pct is {self.crop_pct!r}, expected a share between 0.1 and 2")
        object.__setattr__(self, "crop_pct", float(self.crop_pct))
        if self.crop_mode not in CROP_MODES:
            raise UserError(
                f"preprocessing: crop_mode is {self.crop_mode!r}", f"expected one of {', '.join(CROP_MODES)}"
            )

    # -- JSON -----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "size": list(self.size),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }

    @classmethod
    def from_json(cls, value: Any) -> Preprocessing:
        """Inverse of :meth:`to_json`; reads the ``preprocessing`` of a model card too.

        What a card may leave out or say in words:

        * no ``crop_pct`` -> 1.0, no ``crop_mode`` -> ``"center"``;
        * ``interpolation`` that begins with "none" (images come at the native size) -> bicubic and ``crop_pct`` 1.0:
          images of that size pass unchanged, others are still brought to it;
        * ``scale``, free text that must speak of 255, the only scaling there is.

        Raises:
            UserError: A key is missing, unknown (ignoring one could change the pixels) or has an unusable value.
        """
        if not isinstance(value, Mapping):
            raise UserError(f"preprocessing is a JSON object, found {type(value).__name__}")
        required, optional = {"mean", "std", "size", "interpolation"}, {"crop_pct", "crop_mode", "scale"}
        missing, unknown = required - set(value), set(value) - required - optional
        if missing:
            raise UserError(f"preprocessing lacks {min(missing)!r}", f"expected {', '.join(sorted(required))}")
        if unknown:
            raise UserError(
                f"preprocessing has the unknown key {min(map(str, unknown))!r}",
                f"known are {', '.join(sorted(required | optional))}",
            )
        if "255" not in str(value.get("scale", "255")):
            raise UserError(f"preprocessing: scale is {value['scale']!r}, only pixel / 255 is supported")
        interpolation, crop_pct = value["interpolation"], value.get("crop_pct")
        if isinstance(interpolation, str) and interpolation.lower().startswith("none"):
            interpolation, crop_pct = "bicubic", 1.0
        return cls(
            mean=value["mean"],
            std=value["std"],
            size=value["size"],
            interpolation=interpolation,
            crop_pct=1.0 if crop_pct is None else crop_pct,
            crop_mode=value.get("crop_mode") or "center",
        )

    # -- images ---------------------------------------------------------------------------------------------------

    def __call__(self, image: Image.Image) -> np.ndarray:
        """The model's input for one image of any mode and size.

        Returns:
            float32 [channel 3, height, width], C-contiguous.
        """
        pixels = np.asarray(self.crop(image), dtype=np.uint8)
        # Divide, then subtract, then divide, all in float32: folding the three into one multiply-add is faster but
        # differs from torchvision in the last bit.
        values = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        values -= np.asarray(self.mean, np.float32)[:, None, None]
        values /= np.asarray(self.std, np.float32)[:, None, None]
        return np.ascontiguousarray(values)

    def crop(self, image: Image.Image) -> Image.Image:
        """What the model sees, as an RGB image of :attr:`size`, before normalisation."""
        image = to_rgb(image)
        scale = tuple(max(1, math.floor(side / self.crop_pct)) for side in self.size)
        fill = (0, 0, 0)
        if self.crop_mode == "squash":
            target = scale
        elif self.crop_mode == "border":
            target = _keep_ratio(image, scale, longest=True)
            fill = tuple(round(255 * v) for v in self.mean)
        elif scale[0] == scale[1]:
            target = _shorter_side(image, scale[0])
        else:
            target = _keep_ratio(image, scale, longest=False)
        if (image.height, image.width) != target:
            from PIL import Image as pillow

            image = image.resize((target[1], target[0]), pillow.Resampling[self.interpolation.upper()])
        return _crop_or_pad(image, self.size, fill)

    def batch(self, images: Iterable[Any]) -> np.ndarray:
        """float32 [batch B, channel 3, height, width] of anything :func:`load_image` takes."""
        loaded = [load_image(image) for image in images]
        if turned := sum(map(is_turned, loaded)):
            progress.remark(turned_remark(turned))
        arrays = [self(image) for image in loaded]
        return np.stack(arrays) if arrays else np.empty((0, 3, *self.size), np.float32)


def resolve_preprocessing(
    stated: Preprocessing | None,
    given: Mapping[str, Any],
    *,
    size: tuple[int, int] | None,
    source: str,
) -> Preprocessing:
    """How images become the input of a model file: what the file states, with what the user gave over it.

    Args:
        stated: What the file says; None for a graph of another tool.
        given: Fields of :class:`Preprocessing` that the user set; never ``size``, which is the graph's.
        size: (height, width) of the graph's input; None where the graph leaves it open.
        source: What to call the file in messages.

    Raises:
        UserError: Neither says what mean and std are; the size is open; a value is out of range.
    """
    known = [one.name for one in fields(Preprocessing) if one.name != "size"]
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"preprocessing has no {', '.join(map(str, unknown))}", f"expected some of {', '.join(known)}")
    if stated is not None:
        return replace(stated, **given)
    missing = [name for name in ("mean", "std") if name not in given]
    if missing:
        raise UserError(
            f"{source} does not say how images are prepared (no vpruner.preprocessing in its metadata), and "
            f"{option(missing[0])} is not given",
            "give them as the model was trained, such as "
            f"{option('mean', (0.485, 0.456, 0.406))} {option('std', (0.229, 0.224, 0.225))}",
        )
    if size is None:
        raise UserError(f"{source}: the input has no fixed image size", "expected [batch, 3, height, width]")
    return Preprocessing(size=size, **given)


def load_image(source: str | PathLike | Image.Image | np.ndarray) -> Image.Image:
    """A decoded RGB image from a file, a Pillow image, or an array of pixels.

    Args:
        source: A path, a PIL image, or uint8 [height, width, 3] (RGB) or uint8 [height, width] (grey).

    Raises:
        UserError: The file is missing, is no image, is cut short or has pixels that are no colours (the message names
            it); an array of another shape or type.
    """
    from PIL import Image as pillow

    if isinstance(source, pillow.Image):
        return decode(source, getattr(source, "filename", "") or "the image")
    if isinstance(source, np.ndarray):
        return to_rgb(_image_from_array(source))
    if not isinstance(source, (str, PathLike)):
        raise UserError(
            f"an image is a {type(source).__name__}", "expected a path, a PIL image or a uint8 array [height, width, 3]"
        )
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{path}: {'is not a file' if path.exists() else 'no such file'}", "expected an image")
    try:
        stream = open_regular(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the image: {error.strerror or error}") from None
    with stream:
        return decode(stream, path)


class BadImage(UserError):
    """Bytes that are no image, or none that can be used."""


def decode(source: IO[bytes] | Image.Image, name: Any = None) -> Image.Image:
    """An RGB image, decoded completely, of an open file or of an image that may not have been loaded.

    Args:
        name: How messages call it; None where the caller adds the name.

    Raises:
        BadImage: It is no image, is cut short, or has too many pixels (:data:`PIL.Image.MAX_IMAGE_PIXELS`).
        UserError: Its pixels are no colours.
    """
    from PIL import Image as pillow

    called = "" if name is None else f"{name}: "
    with _without_warnings:
        try:
            image = source if isinstance(source, pillow.Image) else pillow.open(source, formats=_formats())
        except pillow.UnidentifiedImageError:
            raise BadImage(
                f"{called}not an image that Pillow can read", "expected JPEG, PNG, WebP or the like"
            ) from None
        except Exception as error:  # Decoders raise many types for bytes that are no image, and MemoryError.
            raise BadImage(f"{called}cannot read the image: {_one_line(error)}") from None
        try:
            image.load()
        except Exception as error:
            raise BadImage(f"{called}cannot decode the image: {_one_line(error)}", "is the file complete?") from None
        if not image.width or not image.height:
            raise BadImage(f"{called}the image has no pixels")
        return to_rgb(image, name)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of what is read. It knows more; one of them hands a file to Ghostscript, which runs programs."""
    from PIL import Image as pillow

    pillow.init()
    return tuple(name for name in FORMATS if name in pillow.OPEN)


def is_turned(image: Image.Image) -> bool:
    """Whether the EXIF data of an image says that it is to be turned or mirrored before it is shown."""
    try:
        with _without_warnings:
            return image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # What cannot be read says nothing.
        return False


def turned_remark(count: int, what: str = "") -> str:
    """One line about images that :func:`is_turned` finds; ``what``: ``"calibration"``."""
    have = "has a turn in its EXIF data" if count == 1 else "have a turn in their EXIF data"
    which = f"{counted(count, f'{what} image'.strip())} {have}"
    return f"{which}, which is not applied, as in the training of timm and torchvision"


def to_rgb(image: Image.Image, name: Any = None) -> Image.Image:
    """A new RGB image; equal to Pillow's conversion but for what that clips to white without a word.

    * 16-bit grey (``I;16`` and its byte orders) is divided by 257, rounded;
    * ``I`` likewise where it comes from a PNG (which has no 32-bit pixels) or goes beyond 255.

    Args:
        name: How messages call the image; by default its file name.

    Raises:
        UserError: Float pixels, which have no agreed range; integers below 0 or beyond 65535; a mode without a way to
            RGB.
    """
    name, hint = name or getattr(image, "filename", "") or "the image", "save it as 8-bit RGB"
    if image.mode == "F":
        raise UserError(f"{name}: float image (mode F)", hint)
    if image.mode == "I" or image.mode.startswith("I;16"):
        from PIL import Image as pillow

        values = np.asarray(image).astype(np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise UserError(f"{name}: pixels from {low} to {high} (mode {image.mode}), expected 0 to 65535", hint)
        if image.mode != "I" or image.format == "PNG" or high > 255:
            values = (values + 128) // 257
        image = pillow.fromarray(values.astype(np.uint8))
    try:
        return image.convert("RGB")
    except ValueError:
        raise UserError(f"{name}: an image of mode {image.mode} cannot be turned into RGB", hint) from None


class _WithoutWarnings:
    """Pillow warns of photos of 100 megapixels, which are fine, and of EXIF data and such that it cannot read.

    Python's filters are the whole program's, and threads read images: one filter of Pillow's own modules is there for
    as long as any of them does. ``warnings.catch_warnings`` would put back the list as another thread found it.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._filter = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._filter is None or self._filter not in warnings.filters[:1]:
                # The comment in it tells it from one of the program's own.
                warnings.filterwarnings("ignore", module=r"PIL\.(?#vpruner)")
                self._filter = warnings.filters[0]

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._filter in warnings.filters:
                warnings.filters.remove(self._filter)


_without_warnings = _WithoutWarnings()


def _image_from_array(array: np.ndarray) -> Image.Image:
    from PIL import Image as pillow

    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not shape_fits or not array.size:
        raise UserError(
            f"an image array is {array.dtype} {list(array.shape)}",
            "expected uint8 [height, width, 3] or [height, width]",
        )
    return pillow.fromarray(np.ascontiguousarray(array))


def _shorter_side(image: Image.Image, length: int) -> tuple[int, int]:
    """(height, width) with the shorter side ``length``; the other side is rounded down, as in torchvision's Resize."""
    if image.width <= image.height:
        return int(length * image.height / image.width), length
    return length, int(length * image.width / image.height)


def _keep_ratio(image: Image.Image, target: tuple[int, int], longest: bool) -> tuple[int, int]:
    """(height, width) that covers ``target``, or with ``longest`` fits into it; rounded to nearest, as in timm."""
    ratios = image.height / target[0], image.width / target[1]
    ratio = max(ratios) if longest else min(ratios)
    # An image 300 times as long as it is wide would round to nothing (timm stops there); one row is what is left of it.
    return max(1, round(image.height / ratio)), max(1, round(image.width / ratio))


def _crop_or_pad(image: Image.Image, size: tuple[int, int], fill: tuple[int, ...]) -> Image.Image:
    top, left = _offset(image.height, size[0]), _offset(image.width, size[1])
    if image.height < size[0] or image.width < size[1]:
        from PIL import Image as pillow

        canvas = pillow.new("RGB", (size[1], size[0]), fill)
        canvas.paste(image, (-left, -top))  # a side longer than the canvas hangs over it, and is cut there
        return canvas
    return image.crop((left, top, left + size[1], top + size[0]))


def _offset(have: int, want: int) -> int:
    """Where a centred crop of ``want`` pixels starts; negative where ``have`` is shorter and is padded.

    Cropping rounds half to even, padding puts the odd pixel behind: two rules, both torchvision's.
    """
    return -((want - have) // 2) if want > have else round((have - want) / 2)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def _three_numbers(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(map(_is_number, value)):
        raise UserError(f"preprocessing: {name} is {value!r}, expected three numbers (R, G, B)")
    return tuple(float(v) for v in value)


def _one_line(error: BaseException) -> str:
    """In one line, without the open file that Pillow puts at its end."""
    return " ".join(str(error).split()).partition(" <_io.")[0][:200] or type(error).__name__
