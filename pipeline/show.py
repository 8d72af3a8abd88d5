"""Draw a plan on an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import UserError
from ..core.plan import TokenPlan
from ..core.text import command
from .folders import check_output

if TYPE_CHECKING:
    from PIL import Image


def show(source: Path, image: str | None, output: Path) -> TokenPlan:
    """Draw what each block does with the patches of an image, by a plan.json or pruned.onnx; returns the plan."""
    from ..core.files import atomic_path
    from ..core.ours import marked_picture
    from ..core.preprocess import Preprocessing, load_image
    from ..report.tokens import draw_plan

    check_output(output, ".png", source, image)
    if source.suffix.lower() == ".onnx":
        from ..runtime.ort import OrtSession

        with OrtSession(source) as session:
            metadata = session.metadata
        if metadata.rule is not None:
            raise UserError(
                f"{source} holds no token plan: {metadata.rule['method']} chooses the tokens of each image",
                f"give a pruned.onnx that {command('fold')} wrote, or a plan.json",
            )
        if metadata.token_plan is None:
            raise UserError(f"{source} holds no token plan", "give a pruned.onnx or a plan.json")
        plan = metadata.token_plan
        preprocessing = metadata.preprocessing
    else:
        plan = TokenPlan.load(source)
        described = plan.provenance.get("preprocessing")
        preprocessing = Preprocessing.from_json(described) if described else None
    picture = load_image(image) if image else bundled_image()
    if preprocessing is not None:
        picture = preprocessing.crop(picture)
    with atomic_path(output) as temporary:
        draw_plan(picture, plan).save(temporary, format="PNG", pnginfo=marked_picture())
    return plan


def bundled_image() -> Image.Image:
    """One of the bundled evaluation images, read without the packages that data sets need."""
    import io
    import tarfile

    from PIL import Image as pillow

    from ..core import bundled

    with tarfile.open(bundled.evaluation_data()) as archive:
        member = next(member for member in archive if member.isfile() and member.name.startswith("dog/"))
        return pillow.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")
