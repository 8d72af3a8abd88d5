"""Train a small ViT that says for every patch of a mosaic of images which class lies there, and write its model card.

    python benchmarks/dense/train_mosaics.py --data cifar10_train.tar --eval-data cifar10_val.tar \
        -o benchmarks/dense/model/dense

writes ``dense.safetensors`` (float16) and ``dense.json`` (architecture, classes, preprocessing, recipe, accuracy per
patch). It starts from the weights of the bundled reference, whose position embedding is resampled to the larger grid;
ten minutes on two CPU cores. The smaller model that one could train instead of pruning that, with the same recipe, has
the first 5 of its 8 blocks::

    python benchmarks/dense/train_mosaics.py --data ... --eval-data ... -o benchmarks/dense/model/shallow --depth 5

A run that was interrupted goes on, with the same arguments, after the last step that it saved: ``dense.state.pt`` holds
what it needs for that, and is removed at the end. The evaluation images choose nothing: they are reported on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mosaics import SIDE, TILE, PatchViT, draw_mosaics, reported_mosaics
from safetensors.torch import load_file, save_file
from timm.data import create_dataset
from timm.layers import resample_abs_pos_embed, set_fused_attn
from torch import Tensor

from vpruner.core import bundled
from vpruner.core.files import file_sha256

#: What a run must share with the one that it goes on with.
SAME = ("init", "depth", "class_token", "steps", "batch_size", "lr", "warmup_steps", "weight_decay",
        "label_smoothing", "seed")  # fmt: skip


def load_images(source: str) -> tuple[Tensor, Tensor, list[str]]:
    """uint8 [image, 3, TILE, TILE], int64 labels [image], class names."""
    dataset = create_dataset("", root=source)
    images, labels = np.empty((len(dataset), 3, TILE, TILE), np.uint8), np.empty(len(dataset), np.int64)
    for position, (image, label) in enumerate(dataset):
        image = image.convert("RGB").resize((TILE, TILE), 3)  # 3: bicubic; as it is where the size is that already
        images[position], labels[position] = np.asarray(image).transpose(2, 0, 1), label
    # timm's folder reader and its tar reader name this table differently.
    index = getattr(dataset.reader, "class_to_idx", None) or dataset.reader.class_name_to_idx
    return torch.from_numpy(images), torch.from_numpy(labels), sorted(index, key=index.get)


def begin(model: PatchViT, weights: dict[str, Tensor]) -> None:
    """Load weights of a ViT with a class token for smaller images: its first blocks, and its head as it is."""
    own = model.state_dict()
    found = {name: value.float() for name, value in weights.items() if name in own}
    side = model.patch_embed.grid_size
    places = resample_abs_pos_embed(weights["pos_embed"].float(), list(side), num_prefix_tokens=1)
    found["pos_embed"] = places[:, 1 - model.num_prefix_tokens :]
    for name, value in found.items():
        # Another number of classes.
        if value.shape != own[name].shape and name.startswith("head."):
            found[name] = own[name]
    missing, _ = model.load_state_dict(found, strict=False)
    if missing:
        raise SystemExit(f"the weights to start from lack {', '.join(missing[:3])}")


@torch.inference_mode()
def accuracy(model: torch.nn.Module, mosaics: Tensor, classes: Tensor, normalise) -> float:
    """Share of patches whose class is named."""
    model.eval()
    parts = zip(mosaics.split(100), classes.split(100), strict=True)
    return sum((model(normalise(some)).argmax(-1) == wanted).sum().item() for some, wanted in parts) / classes.numel()


def write(model: PatchViT, output: Path, card: dict) -> None:
    """Weights in float16, and the card."""
    weights = output.with_suffix(".safetensors")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = weights.with_suffix(".tmp")
    save_file({name: value.detach().half().contiguous() for name, value in model.state_dict().items()}, partial)
    partial.replace(weights)
    card = {**card, "weights": weights.name, "sha256": file_sha256(weights)}
    output.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="training images: what timm.data.create_dataset reads")
    parser.add_argument("--eval-data", required=True, help="images to report on")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/dense/model/dense"))
    parser.add_argument("--init", help="model card to start from; default: the bundled reference")
    parser.add_argument("--depth", type=int, help="so many of its first blocks; default: all")
    parser.add_argument("--class-token", action="store_true", help="keep the class token, which nothing reads")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--eval-mosaics", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    # Explicit attention is twice as fast as SDPA in backward on a CPU.
    set_fused_attn(False)
    source = Path(args.init or bundled.reference_card())
    about = json.loads(source.read_text(encoding="utf-8"))
    images, labels, classes = load_images(args.data)
    eval_images, eval_labels, _ = load_images(args.eval_data)
    shape = about["args"]
    architecture = {
        "depth": args.depth or shape["depth"],
        "embed_dim": shape["embed_dim"],
        "num_heads": shape["num_heads"],
        "num_classes": len(classes),
        "class_token": args.class_token,
    }
    model = PatchViT(**architecture)
    begin(model, load_file(source.parent / about["weights"]))
    mean, std = (torch.tensor(about["preprocessing"][name]).view(1, 3, 1, 1) for name in ("mean", "std"))

    def normalise(batch: Tensor) -> Tensor:
        return (batch.float() / 255 - mean) / std

    decay = [p for p in model.parameters() if p.ndim > 1 and p.shape[0] > 1]
    plain = [p for p in model.parameters() if not (p.ndim > 1 and p.shape[0] > 1)]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}], lr=args.lr
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / args.warmup_steps, 0.5 * (1 + math.cos(math.pi * step / args.steps))),
    )
    generator = torch.Generator().manual_seed(args.seed)
    settings = {name: getattr(args, name) for name in SAME}
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule}
    saved, first, started = args.output.with_suffix(".state.pt"), 0, time.perf_counter()
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        if state["settings"] != settings:
            raise SystemExit(f"{saved} is of a run with other arguments: {state['settings']}; give those, or remove it")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        first, started = state["step"], started - state["seconds"]
    forward = model if args.no_compile else torch.compile(model)
    model.train()
    running = 0.0
    for step in range(first, args.steps):
        batch, wanted = draw_mosaics(images, labels, args.batch_size, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(normalise(batch))
        loss = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), label_smoothing=args.label_smoothing)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        running += loss.item()
        if (step + 1) % args.save_every and step + 1 != args.steps:
            continue
        seconds = time.perf_counter() - started
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"generator": generator.get_state(), "step": step + 1, "seconds": seconds, "settings": settings}
        partial = saved.with_suffix(".tmp")
        partial.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, partial)
        partial.replace(saved)
        print(f"step {step + 1}/{args.steps}  loss {running / (step % args.save_every + 1):.4f}  {seconds:.0f} s",
              flush=True)  # fmt: skip
        running = 0.0
    # What is written is what is reported on.
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    found = accuracy(model, *reported_mosaics(eval_images, eval_labels, args.eval_mosaics), normalise)
    print(f"accuracy per patch {found:.4f} on {args.eval_mosaics} mosaics")
    card = {
        "schema": 1,
        "class": "PatchViT of benchmarks/dense/mosaics.py",
        "args": architecture,
        "classes": classes,
        "preprocessing": {**about["preprocessing"], "size": [SIDE, SIDE]},
        "recipe": {**settings, "init": source.name, "seconds": round(time.perf_counter() - started)},
        "patch_accuracy": {Path(args.eval_data).name: round(found, 4), "mosaics": args.eval_mosaics},
    }
    write(model, args.output, card)
    saved.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
