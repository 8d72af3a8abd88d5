"""Options that several commands share, and the Specs that they become."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click
from click.core import ParameterSource

from ..core.choices import (
    CROP_MODES,
    DEVICES,
    EPISODES,
    EPISODES_UNTUNED,
    EVAL_IMAGES,
    IMAGES,
    INT8_IMAGES,
    INTERPOLATIONS,
    IO,
    LOSSES,
    ONNX_RUNTIMES,
    PROVIDERS,
    REARRANGEMENTS,
    RUNTIMES,
    SELECTIONS,
    TARGET,
    TUNINGS,
)
from ..core.errors import UserError
from ..export.targets import TARGETS
from .types import PerChannel, Seconds, evaluation_sets, key_values, precision_names, provider_options


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


def refuse_given(what: str, *takes: str) -> None:
    """Refuse options of the running command that were typed and have no effect.

    Args:
        what: Has no use for them: an option that was typed, or what is read.
        takes: Names of the arguments of those that it uses, besides itself and what every command has.
    """
    context = click.get_current_context()
    useful = {*takes, what.lstrip("-").replace("-", "_"), "as_json", "quiet"}
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if isinstance(parameter, click.Option) and parameter.name not in useful
        and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]  # fmt: skip
    if given:
        one = len(given) == 1
        raise UserError(
            f"{', '.join(given)} {'has' if one else 'have'} no effect with {what}",
            f"leave {'it' if one else 'them'} out",
        )


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
        help="Weights of MODEL (.safetensors, .pth, .pt or .bin), in place of those that a model card names.",
    ),
    click.option(
        "--model-arg",
        "model_args",
        multiple=True,
        metavar="KEY=VALUE",
        callback=key_values,
        help="Argument of the model's architecture, such as img_size=384; may be repeated.",
    ),
    click.option(
        "--resample",
        is_flag=True,
        help="Load weights of another patch size, with a resampled patch kernel; such a model has to be trained again.",
    ),
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="|".join((*DEVICES[:3], "cuda:1", *DEVICES[3:])),
    help="Where PyTorch computes; auto takes a GPU that works, else the CPU.",
)
reading_options = stacked(
    click.option("--strict", is_flag=True, help="Stop at the first unreadable image instead of skipping it."),
    click.option(
        "--workers",
        type=click.IntRange(0),
        help="Threads that read images while the model computes  [default: the cores but one]",
    ),
)
calibration_options = stacked(
    click.option("--data", metavar="PATH", help="Calibration images: a folder, a .tar, or a timm data set (hfds/...)."),
    click.option(
        "--images",
        default=IMAGES,
        show_default=True,
        type=click.IntRange(1),
        help="Most calibration images to use.",
    ),
    click.option(
        "--loss",
        default="auto",
        show_default=True,
        type=click.Choice(("auto", *LOSSES)),
        help="Loss that tokens are scored by: on labels, on the model's own predictions, on its features, or on its "
        "output as it is; auto takes labels if there are any.",
    ),
    click.option(
        "--rounds",
        type=click.IntRange(1),
        help="Rounds of scoring and searching; 1 is the plain Fisher search  [default: up to 8]",
    ),
    click.option(
        "--seed",
        default=0,
        show_default=True,
        type=click.IntRange(0, 2**63 - 1),
        help="Seed of everything random: the choice of images, and the search.",
    ),
    reading_options,
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
        help="Mean of pixel values between 0 and 1; needed if an ONNX file does not say how images are prepared.",
    ),
    click.option(
        "--std", metavar="R,G,B", type=PerChannel(), help="Standard deviation of pixel values between 0 and 1."
    ),
    click.option(
        "--interpolation",
        type=click.Choice(INTERPOLATIONS),
        help="Filter that resizes images  [default: the file's, or bicubic]",
    ),
    click.option(
        "--crop-pct", type=float, help="Fraction of the resized image that the crop keeps  [default: the file's, or 1]"
    ),
    click.option(
        "--crop-mode",
        type=click.Choice(CROP_MODES),
        help="Crop the middle, ignore the aspect ratio, or pad the border  [default: the file's, or center]",
    ),
    _gathered_preprocessing,
)
eval_data_option = click.option(
    "--eval-data",
    multiple=True,
    metavar="[NAME=]PATH",
    callback=evaluation_sets,
    help="Evaluation images: nothing is learned from them. May be repeated with names: what is lost on each set is "
    "reported, and everything else goes by the first.",
)
eval_images_option = click.option(
    "--eval-images",
    default=EVAL_IMAGES,
    show_default=True,
    type=click.IntRange(1),
    help="Most evaluation images to use.",
)
target_option = stacked(
    click.option(
        "--target",
        default=TARGET,
        show_default=True,
        type=float,
        help="Budget, as a fraction of the dense model's cost.",
    ),
    click.option(
        "--cost",
        default="macs",
        show_default=True,
        metavar="macs|latency:TABLE.json",
        help="Unit of the budget: MACs, or milliseconds from a table that vpruner table measured.",
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
        help="What to refit after tokens are removed: weights cost nothing at run time, gates cost a little.",
    ),
    click.option(
        "--select",
        default="static",
        show_default=True,
        type=click.Choice(SELECTIONS),
        help="static works on the same patches in every image; content on equally many, and each image chooses which.",
    ),
    click.option(
        "--episodes",
        show_default=f"{EPISODES} with --tune weights, else {EPISODES_UNTUNED}",
        type=click.IntRange(1),
        help="Most episodes of --rearrange ppo; each tries one plan. Ctrl-C ends it early with the best plan so far.",
    ),
    click.option(
        "--time-limit",
        show_default="none",
        metavar="SECONDS",
        type=Seconds(0.1),
        help="Most time for --rearrange ppo, which ends by itself when more episodes are not worth it.",
    ),
    click.option(
        "--resume",
        is_flag=True,
        help="Continue a run that was stopped. Its state lies next to the output until a run finishes.",
    ),
)
io_option = click.option(
    "--io",
    default="float32",
    show_default=True,
    type=click.Choice(IO),
    help="fp16 and bf16: keep inputs and outputs in float32, or convert them too.",
)
precision_options = stacked(
    click.option(
        "--precision",
        "precisions",
        multiple=True,
        metavar="NAME[,NAME...]",
        callback=precision_names,
        help="Also write the file in these precisions: fp16, bf16, int8 (static, calibrated on images), int8-dynamic "
        "(for CPUs); may be repeated  [default: fp32 alone]",
    ),
    io_option,
)
int8_images_option = click.option(
    "--images",
    default=INT8_IMAGES,
    show_default=True,
    type=click.IntRange(1),
    help="Most calibration images to use.",
)
deploy_option = click.option(
    "--for",
    "deploy_for",
    type=click.Choice(tuple(TARGETS)),
    help="Write the opset and the operators that this runtime takes.",
)
export_options = stacked(
    deploy_option,
    click.option(
        "--opset", type=click.IntRange(16, 23), help="ONNX opset  [default: 20, with --for the newest it takes]"
    ),
    click.option("--dynamic-batch", is_flag=True, help="Leave the batch size open."),
    click.option("--batch-size", default=1, show_default=True, type=click.IntRange(1), help="Batch size of the graph."),
)
runtime_option = click.option(
    "--runtime",
    default="auto",
    show_default=True,
    type=click.Choice(("auto", *RUNTIMES)),
    help="What runs the file: onnxruntime, OpenVINO or TensorRT. auto takes onnxruntime for an ONNX file, TensorRT for "
    "an engine.",
)
onnx_runtime_option = click.option(
    "--runtime",
    default="ort",
    show_default=True,
    type=click.Choice(ONNX_RUNTIMES),
    help="What runs ONNX files: onnxruntime or OpenVINO.",
)


def _gathered_provider(command: Callable) -> Callable:
    """Hand the options of a provider on with its name, as the pair ``(name, options)``, where there are any."""

    @functools.wraps(command)
    def gathering(*arguments: Any, provider: str, provider_options: dict[str, str], **options: Any) -> Any:
        if provider_options and options.get("runtime") not in (None, "auto", "ort"):
            raise UserError(f"--provider-option goes with onnxruntime, not with --runtime {options['runtime']}")
        return command(*arguments, provider=(provider, provider_options) if provider_options else provider, **options)

    return gathering


provider_choice = stacked(
    click.option(
        "--provider",
        default="cpu",
        show_default=True,
        metavar="NAME[=LIBRARY]",
        help=f"onnxruntime provider: {', '.join(PROVIDERS)}, or the name that onnxruntime gives it. LIBRARY brings one "
        "that is not built in: a shared library, or the Python package that carries it. With --runtime openvino: the "
        "device, cpu, gpu or npu.",
    ),
    click.option(
        "--provider-option",
        "provider_options",
        multiple=True,
        metavar="KEY=VALUE",
        callback=provider_options,
        help="Option of the onnxruntime provider, as its documentation names it; may be repeated.",
    ),
    _gathered_provider,
)
runtime_options = stacked(
    provider_choice, click.option("--threads", type=click.IntRange(1), help="Threads  [default: one per core]")
)
trust_option = click.option(
    "--trust",
    is_flag=True,
    help="Load an engine even if its record is missing or does not fit. An engine can run code: trust only your own.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
