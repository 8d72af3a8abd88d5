"""Names of models: timm's, and what to say of those that other libraries and the hub have."""

from __future__ import annotations

import difflib
import re

import timm

from ..core.errors import UserError
from ..core.text import command, option

#: Before the name of a repository on the Hugging Face hub, and before a folder that timm saved.
HUB, LOCAL_FOLDER = ("hf-hub:", "hf_hub:"), "local-dir:"
#: torchvision's name -> timm's for the same architecture.
_TORCHVISION = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
}
#: Name of a repository without its owner, with _ for - -> timm's name.
_REPOSITORIES = (
    (r"clip_vit_(\w+)_patch(\d+)(?:_(\d+))?", lambda m: f"vit_{m[1]}_patch{m[2]}_clip_{m[3] or 224}"),
    (r"siglip_(\w+)_patch(\d+)_(\d+)", lambda m: f"vit_{m[1]}_patch{m[2]}_siglip_{m[3]}"),
    (r"dinov2_with_registers_(small|base|large|giant)", lambda m: f"vit_{m[1]}_patch14_reg4_dinov2"),
    (r"dinov2_(small|base|large|giant)", lambda m: f"vit_{m[1]}_patch14_dinov2"),
    (r"dino_vit([sb])(\d+)", lambda m: f"vit_{dict(s='small', b='base')[m[1]]}_patch{m[2]}_224"),
    (r"(\w+)_in21k", lambda m: m[1]),
    (r"(\w+)", lambda m: m[1]),
)


def check_name(spec: str, pretrained: bool) -> None:
    """Refuse a name that timm does not have, and one whose settings would be downloaded unasked.

    Raises:
        UserError: It says what the name is and what to give in its place.
    """
    if spec.startswith(LOCAL_FOLDER):
        return
    if spec.startswith(HUB):
        if pretrained:
            return
        raise UserError(
            f"{spec} is on the Hugging Face hub, and nothing is downloaded without {option('pretrained')}",
            _of_repository(spec.partition(":")[2]),
        )
    name = spec.split(".")[0]
    if timm.is_model(name) and "/" not in spec:
        return
    if known := _TORCHVISION.get(spec):
        raise UserError(
            f"{spec} is torchvision's name, expected timm's, which is {known}",
            f"timm's own weights: {command('run', known, pretrained=True)}; those of torchvision have names "
            "of their own and cannot be loaded",
        )
    if re.fullmatch(r"[\w.-]+/[\w.@-]+", spec):
        raise UserError(
            f"{spec} is neither a path nor a timm model name; it looks like a repository on the Hugging Face hub",
            _of_repository(spec),
        )
    near = difflib.get_close_matches(name[:80], timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "run: python -c 'import timm; print(timm.list_models())'"
    raise UserError(f"timm {timm.__version__} has no model {spec[:200]!r}", hint)


def _of_repository(repository: str) -> str:
    """What works in place of a repository's name: timm's own, if it has one, or the files of it."""
    owner, _, name = repository.partition("@")[0].rpartition("/")
    if owner == "timm" and timm.is_model(name.split(".")[0]):
        given = command("run", name, weights="FILE")
        return (
            f"give timm's name and the file model.safetensors of the repository: {given}; or let timm download it: "
            + (command("run", name, pretrained=True))
        )
    found = timm_name(name)
    own = f"timm's weights of that architecture: {command('run', found, pretrained=True)}; or " if found else ""
    return f"{own}download the repository into a folder, and give the folder: {command('run', 'MODEL_FOLDER')}"


def timm_name(name: str) -> str | None:
    """timm's name of the architecture in a repository; None where it has none that is known here."""
    plain = name.lower().replace("-", "_")
    for pattern, made in _REPOSITORIES:
        match = re.fullmatch(pattern, plain)
        if match and timm.is_model(made(match)):
            return made(match)
    return None
