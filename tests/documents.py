"""The pages that people read: their blocks of commands and code, and a folder in which these run on tiny files.

A comment ``<!-- needs: GPU -->`` right before a block says that it needs more than the tests have (see :data:`NEEDS`).
"""

from __future__ import annotations

import re
import shlex
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
#: What a marked block needs -> what the page says of it in words, before the block.
NEEDS = {"GPU": "NVIDIA GPU", "Jetson": "need a Jetson", "openvino": "package", "model": "needs a model in memory"}
SHELL = ("console", "sh", "bash")
BLOCK = re.compile(r"(?:<!-- needs: (.+?) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        before: Text of the page from the last heading on.
        needs: What it is marked with, or None.
    """

    page: str
    language: str
    text: str
    before: str
    needs: str | None

    @property
    def commands(self) -> list[list[str]]:
        """The command lines of a shell block as words, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def page_text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    text, found = page_text(page), []
    for match in BLOCK.finditer(text):
        before = text[: match.start()]
        section = before[max(before.rfind("\n#"), 0) :]
        found.append(Block(page, match[2], match[3], section, match[1]))
    return found


def shell_blocks(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in SHELL]


def python_blocks(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


# -- a folder for them ------------------------------------------------------------------------------------------------

#: Where the pages take images from.
IMAGE_FOLDERS = ("calibration", "train", "images", "validation", "val")
#: File that the pages use -> the file of the first page's run that it is a copy of.
COPIES = {
    "dense.onnx": "dense.onnx",
    "anything.onnx": "dense.onnx",
    "pruned.onnx": "pruned.onnx",
    "plan.json": "plan.json",
}
LEARN = ("--rounds", "1")
#: What makes a command of a page quick; it learns and measures little then.
QUICK = {"run": (*LEARN, "--seconds", "0.2", "--force"), "prune": LEARN, "profile": ("--seconds", "0.2")}


def make_workplace(folder: Path, patch) -> None:
    """Fill ``folder`` with tiny files under the names that the pages use; the run of the first page makes some of them.

    As long as ``patch`` (a ``pytest.MonkeyPatch``) lasts, the bundled model and images are tiny, so is timm's
    deit_small_patch16_224, and a rearrangement plays two episodes.
    """
    import timm
    from commands import call
    from tiny_cards import CLASSES, TINY, write_card, write_images

    from vpruner.core import bundled
    from vpruner.prune.rearrange.settings import RearrangeSettings

    for name in IMAGE_FOLDERS:
        (folder / name).mkdir()
        write_images(folder / name)
    for name in ("cat.jpg", "dog.png"):
        shutil.copy(folder / "val" / name[:3] / "0.png", folder / name)
    shutil.copy(ROOT / "tests" / "golden" / "inputs" / "theirs.onnx", folder / "model.onnx")

    assets = folder / "assets"
    assets.mkdir()
    write_card(assets).rename(assets / "reference.json")
    for name in ("reference.safetensors", "../deit_small.safetensors", "../deit_small.pth"):
        shutil.copy(assets / "tiny.safetensors", assets / name)
    for name in ("calibration", "evaluation"):
        with tarfile.open(assets / f"{name}.tar", "w") as tar:
            for kind in CLASSES:
                tar.add(folder / "val" / kind, kind)
    create = timm.create_model

    def create_model(name, *arguments, **options):
        if name == "deit_small_patch16_224":
            return timm.models.vision_transformer.VisionTransformer(**TINY)
        return create(name, *arguments, **options)

    patch.setattr(timm, "create_model", create_model)
    patch.setattr(bundled, "ASSETS", assets)
    # Whatever number of episodes a page has.
    few = RearrangeSettings(episodes=2, images=8)
    patch.setattr(RearrangeSettings, "for_tuning", lambda tuning, **given: few)
    commands = [words for block in shell_blocks("README.md") for words in block.commands]
    (run,) = (words for words in commands if words[:2] == ["vpruner", "run"])
    patch.chdir(folder)
    call(*run[1:], *QUICK["run"])
    keep_weights(folder)
    made = folder / run[run.index("-o") + 1]
    for name, source in COPIES.items():
        shutil.copy(made / source, folder / name)
    shutil.copytree(made, folder / "runs" / "demo")


def keep_weights(folder: Path) -> None:
    """Where the tuning of so little was undone, its weights are the model's own."""
    for plan in folder.glob("runs/*/plan.json"):
        if not (weights := plan.with_name("model.safetensors")).exists():
            shutil.copy(folder / "deit_small.safetensors", weights)
