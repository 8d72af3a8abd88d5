"""Options that several commands share, and the Specs that they become."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ..core.choices import (
    CROP_MODES,
    EPISODES,
    EPISODES_UNTUNED,
    EVAL_IMAGES,
    IMAGES,
    INT8_IMAGES,
    INTERPOLATIONS,
    IO,
    LOSSES,
    PROVIDERS,
    REARRANGEMENTS,
    SELECTIONS,
    TARGET,
    TIME_LIMIT,
    TUNINGS,
)
from ..export.targets import TARGETS
from .types import PerChannel, Seconds, key_values, precision_names


def specs(**kinds: type) -> Callable:
    """Hand a command's options on as Specs: ``@specs(model=ModelSpec)`` gives it one argument ``model``.

    Each field of a Spec is the option of the same name; one that was not given keeps the Spec's own default. An option
    may go into several. It must stand nearest to the command, below the options.
    """

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def gathering(*arguments: Any, **options: Any) -> Any:
            built, taken = {}, set()
            for name, kind in kinds.items():
                named = {field.name: "model" if field.name == "what" else field.name for field in fields(kind)}
                given = {field: options[option] for field, option in named.items() if options.get(option) is not None}
                built[name] = kind(**given)
                taken.update(option for option in named.values() if option in options)
            rest = {name: value for name, value in options.items() if name not in taken}
            return command(*arguments, **rest, **built)

        return gathering

    return decorate


def stacked(*decorators: Callable) -> Callable:
    def decorate(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


model_options = stacked(
    click.argument("model", required=False),
    click.option("--pretrained", is_flag=True, help="Let timm download the weights of MODEL."),
    click.option(
        "--weights",
        metavar="FILE",
        help="Weights of MODEL: .safetensors, .pth, .pt or .bin; a card's or the reference's own are then not read.",
    ),
    click.option(
        "--model-arg",
        "model_args",
        multiple=True,
        metavar="KEY=VALUE",
        callback=key_values,
        help="Argument for the model, such as img_size=384; may be repeated.",
    ),
)
calibration_options = stacked(
    click.option("--data", metavar="PATH", help="Calibration images: a folder, a .tar, or a timm data set (hfds/...)."),
    click.option(
        "--images",
        default=IMAGES,
        show_default=True,
        type=click.IntRange(1),
        help="Calibration images to use, at most.",
    ),
    click.option(
        "--loss",
        default="auto",
        show_default=True,
        type=click.Choice(("auto", *LOSSES)),
        help="What the gradients are of: labels, the model's own distribution, or its features.",
    ),
    click.option(
        "--rounds",
        type=click.IntRange(1),
        help="Rounds of scoring and searching; by default up to 8, 1 is plain Fisher.",
    ),
    click.option(
        "--seed",
        default=0,
        show_default=True,
        type=click.IntRange(0, 2**63 - 1),
        help="Of the choice of images and random directions.",
    ),
    click.option("--strict", is_flag=True, help="Stop at the first unreadable image instead of skipping it."),
)


def _gathered_preprocessing(command: Callable) -> Callable:
    """Hand the options of :data:`preprocessing_options` on as one mapping, ``preprocessing``, of those given."""

    @functools.wraps(command)
    def gathering(*arguments: Any, **options: Any) -> Any:
        found = {name: options.pop(name) for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
        given = {name: value for name, value in found.items() if value is not None}
        return command(*arguments, preprocessing=given, **options)

    return gathering


#: How images become the input of an ONNX file that does not say it. The command gets one argument ``preprocessing``,
#: which :func:`vpruner.core.preprocess.resolve_preprocessing` takes.
preprocessing_options = stacked(
    click.option(
        "--mean",
        metavar="R,G,B",
        type=PerChannel(),
        help="Of pixels between 0 and 1, subtracted from them; for ONNX files that do not say how images are prepared.",
    ),
    click.option("--std", metavar="R,G,B", type=PerChannel(), help="Divided by after that."),
    click.option(
        "--interpolation",
        type=click.Choice(INTERPOLATIONS),
        help="Of resizing  [default: the file's, or bicubic]",
    ),
    click.option(
        "--crop-pct", type=float, help="Share of the resized image that the crop keeps  [default: the file's, or 1]"
    ),
    click.option(
        "--crop-mode",
        type=click.Choice(CROP_MODES),
        help="Crop the middle, squash to the size, or fill up  [default: the file's, or center]",
    ),
    _gathered_preprocessing,
)
eval_data_option = click.option(
    "--eval-data", metavar="PATH", help="Images to report on; none of them is used to prune."
)
eval_images_option = click.option(
    "--eval-images",
    default=EVAL_IMAGES,
    show_default=True,
    type=click.IntRange(1),
    help="Images to report on, at most.",
)
target_option = stacked(
    click.option(
        "--target",
        default=TARGET,
        show_default=True,
        type=float,
        help="Budget as a fraction of the dense model's cost.",
    ),
    click.option(
        "--cost",
        default="macs",
        show_default=True,
        metavar="macs|latency:TABLE.json",
        help="What the budget is of: MACs, or milliseconds by a table that vpruner table measured.",
    ),
)
stage_options = stacked(
    click.option(
        "--rearrange",
        default="ppo",
        show_default=True,
        type=click.Choice(REARRANGEMENTS),
        help="Move tokens within the budget: by reinforcement learning, by greedy swaps, or not.",
    ),
    click.option(
        "--tune",
        default="weights",
        show_default=True,
        type=click.Choice(TUNINGS),
        help="What to refit to the tokens that are left: weights are free at run time, gates are not.",
    ),
    click.option(
        "--select",
        default="static",
        show_default=True,
        type=click.Choice(SELECTIONS),
        help="Keep the same patches of every image, or as many of each, chosen by similarity.",
    ),
    click.option(
        "--episodes",
        show_default=f"{EPISODES} with --tune weights, else {EPISODES_UNTUNED}",
        type=click.IntRange(1),
        help="Episodes of --rearrange ppo, each of which tries a plan, at most; Ctrl-C ends it early with the best one "
        "so far.",
    ),
    click.option(
        "--time-limit",
        default=TIME_LIMIT,
        show_default=True,
        metavar="SECONDS",
        type=Seconds(0.1),
        help="Time for the episodes of --rearrange ppo: no batch of 16 begins that would outlast it, after the first.",
    ),
    click.option(
        "--checkpoint",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Save the state of --rearrange ppo there, and go on from it where it exists.",
    ),
)
io_option = click.option(
    "--io",
    default="float32",
    show_default=True,
    type=click.Choice(IO),
    help="fp16 and bf16: inputs and outputs stay float32, or change too.",
)
precision_options = stacked(
    click.option(
        "--precision",
        "precisions",
        multiple=True,
        metavar="NAME[,NAME...]",
        callback=precision_names,
        help="Write the file in these precisions too: fp16, bf16, int8 (static, calibrated on images), int8-dynamic "
        "(for CPUs); may be repeated  [default: fp32 alone]",
    ),
    io_option,
)
int8_images_option = click.option(
    "--images",
    default=INT8_IMAGES,
    show_default=True,
    type=click.IntRange(1),
    help="Calibration images to use, at most.",
)
deploy_option = click.option(
    "--for",
    "deploy_for",
    type=click.Choice(tuple(TARGETS)),
    help="Write the graph in the form that this runtime takes: opset, operators, fusion.",
)
export_options = stacked(
    deploy_option,
    click.option(
        "--opset", type=click.IntRange(16, 23), help="ONNX opset  [default: 20, with --for the newest it takes]"
    ),
    click.option("--dynamic-batch", is_flag=True, help="Leave the batch size open."),
    click.option("--batch-size", default=1, show_default=True, type=click.IntRange(1), help="Batch size of the graph."),
)
runtime_options = stacked(
    click.option(
        "--provider",
        default="cpu",
        show_default=True,
        metavar="NAME",
        help=f"onnxruntime provider: {', '.join(PROVIDERS)}, or onnxruntime's own name of one.",
    ),
    click.option("--threads", type=click.IntRange(1), help="Threads; by default all cores."),
)
trust_option = click.option(
    "--trust",
    is_flag=True,
    help="Engines: load one whatever lies beside it. An engine can carry code; trust only what you built.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
