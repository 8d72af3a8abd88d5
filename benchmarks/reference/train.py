"""Train a small reference ViT on a folder or tar of small labelled images, and write its model card.

    python benchmarks/reference/train.py --data cifar10_train.tar --eval-data cifar10_val.tar -o reference

writes ``reference.safetensors`` and ``reference.json`` (architecture, classes, preprocessing, recipe, accuracy); the
pair is what ``vpruner run reference.json`` takes. ``--init FILE`` starts from earlier weights of the same shape. A run
that was interrupted goes on, with the same arguments, after the last epoch that it finished: ``reference.state.pt``
holds what it needs for that, and is removed at the end.

Smaller models that one could train instead of pruning the reference, with the same recipe, at 0.63 of its
multiply-adds (fewer blocks) and 0.49 (narrower)::

    python benchmarks/reference/train.py --data ... --eval-data ... -o shallow --half --depth 5
    python benchmarks/reference/train.py --data ... --eval-data ... -o narrow --half --embed-dim 88

A larger reference, with 144 patches and 12 blocks, for a machine with a GPU::

    python benchmarks/reference/train.py --data ... --eval-data ... -o larger --half --device cuda \
        --img-size 48 --embed-dim 192 --depth 12 --num-heads 3

The whole data set lies in memory as uint8 and every augmentation is a tensor operation on a batch, because on two CPU
cores a per-image pipeline costs more than the model. The evaluation images choose nothing: they are reported on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.data import create_dataset
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer

from vpruner.core.files import file_sha256

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def load_images(source: str, size: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Decode every image of ``source``: uint8 [image, 3, size, size], int64 labels [image], class names."""
    dataset = create_dataset("", root=source)
    images = np.empty((len(dataset), 3, size, size), np.uint8)
    labels = np.empty(len(dataset), np.int64)
    for position, (image, label) in enumerate(dataset):
        image = image.convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), 3)  # 3: bicubic
        images[position], labels[position] = np.asarray(image).transpose(2, 0, 1), label
    # timm's folder reader and its tar reader name this table differently.
    index = getattr(dataset.reader, "class_to_idx", None) or dataset.reader.class_name_to_idx
    names = sorted(index, key=index.get)
    return torch.from_numpy(images), torch.from_numpy(labels), names


def random_crop_flip(images: torch.Tensor, pad: int, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to ``pad`` pixels (zeros come in) and mirror half of them: one gather for the batch."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (pad,) * 4)
    shift = torch.randint(0, 2 * pad + 1, (2, batch, 1), generator=generator).to(images.device)
    rows = shift[0] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(batch, width)
    flip = (torch.rand(batch, 1, generator=generator) < 0.5).to(images.device)
    columns = torch.where(flip, columns.flip(1), columns) + shift[1]
    which = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mix(images: torch.Tensor, targets: torch.Tensor, generator: torch.Generator):
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) with alpha 1, against the batch in reverse order."""
    share = torch.rand((), generator=generator).item()
    if torch.rand((), generator=generator) < 0.5:
        return share * images + (1 - share) * images.flip(0), share * targets + (1 - share) * targets.flip(0)
    height, width = images.shape[-2:]
    box_h, box_w = (int(side * math.sqrt(1 - share)) for side in (height, width))
    top = int(torch.randint(0, height - box_h + 1, (), generator=generator))
    left = int(torch.randint(0, width - box_w + 1, (), generator=generator))
    mixed = images.clone()
    mixed[:, :, top : top + box_h, left : left + box_w] = images.flip(0)[:, :, top : top + box_h, left : left + box_w]
    share = 1 - box_h * box_w / (height * width)
    return mixed, share * targets + (1 - share) * targets.flip(0)


@torch.inference_mode()
def top1(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, normalise) -> float:
    model.eval()
    right = 0
    for start in range(0, len(images), 500):
        logits = model(normalise(images[start : start + 500]))
        right += (logits.argmax(1).cpu() == labels[start : start + 500]).sum().item()
    return right / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="training images: what timm.data.create_dataset reads")
    parser.add_argument("--eval-data", required=True, help="images to report on")
    parser.add_argument("-o", "--output", default="reference", help="written as OUTPUT.safetensors and OUTPUT.json")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--init", help="safetensors to start from")
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=800)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--mix-probability", type=float, default=0.5, help="share of batches with mixup or cutmix")
    parser.add_argument(
        "--ema-steps", type=int, default=1000, help="time constant of the averaged weights that are kept"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--half", action="store_true", help="write float16 weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    # Explicit attention is twice as fast as SDPA in backward on a CPU; on a GPU it is the other way round.
    set_fused_attn(args.device != "cpu")
    images, labels, classes = load_images(args.data, args.img_size)
    eval_images, eval_labels, _ = load_images(args.eval_data, args.img_size)
    architecture = {
        "img_size": args.img_size,
        "patch_size": args.patch_size,
        "embed_dim": args.embed_dim,
        "depth": args.depth,
        "num_heads": args.num_heads,
        "num_classes": len(classes),
    }
    model = VisionTransformer(**architecture)
    if args.init:
        model.load_state_dict(load_file(args.init))
    model.to(args.device)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(1 - 1 / args.ema_steps)
    )
    mean, std = (torch.tensor(v, device=args.device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def normalise(batch: torch.Tensor) -> torch.Tensor:
        return (batch.to(args.device).float() / 255 - mean) / std

    decay = [p for p in model.parameters() if p.ndim > 1 and p.shape[0] > 1]
    plain = [p for p in model.parameters() if not (p.ndim > 1 and p.shape[0] > 1)]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}], lr=args.lr
    )
    steps_per_epoch = len(images) // args.batch_size
    total = args.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(step / args.warmup_steps, 0.5 * (1 + math.cos(math.pi * step / total))),
    )
    generator = torch.Generator().manual_seed(args.seed)
    forward = model if args.no_compile else torch.compile(model)

    def write(epochs_done: int, seconds: float) -> float:
        accuracy = top1(averaged.module, eval_images, eval_labels, normalise)
        state = {k: v.detach().cpu().contiguous() for k, v in averaged.module.state_dict().items()}
        if args.half:
            state = {k: v.half() for k, v in state.items()}
        weights = Path(args.output).with_suffix(".safetensors")
        partial = weights.with_suffix(".tmp")
        save_file(state, partial)
        partial.replace(weights)
        card = {
            "schema": 1,
            "class": "timm.models.vision_transformer.VisionTransformer",
            "args": architecture,
            "weights": weights.name,
            "sha256": file_sha256(weights),
            "classes": classes,
            "preprocessing": {
                "mean": MEAN,
                "std": STD,
                "size": [args.img_size, args.img_size],
                "scale": "pixel / 255 before mean and std",
                "interpolation": "bicubic",
            },
            "recipe": {
                k: v for k, v in vars(args).items() if k not in ("data", "eval_data", "output", "init", "threads")
            }
            | {"warm_start": bool(args.init), "epochs_done": epochs_done, "seconds": round(seconds)},
            "top1": {Path(args.eval_data).name: round(accuracy, 4)},
        }
        Path(args.output).with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
        return accuracy

    parts = {"model": model, "averaged": averaged, "optimiser": optimiser, "schedule": schedule}
    saved, first, started = Path(args.output).with_suffix(".state.pt"), 0, time.perf_counter()
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        first, started = state["epochs_done"], started - state["seconds"]
    for epoch in range(first, args.epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        running = 0.0
        for step in range(steps_per_epoch):
            chosen = order[step * args.batch_size : (step + 1) * args.batch_size]
            targets = F.one_hot(labels[chosen], len(classes)).float().to(args.device)
            targets = targets * (1 - args.label_smoothing) + args.label_smoothing / len(classes)
            batch = random_crop_flip(normalise(images[chosen]), args.img_size // 8, generator)
            if torch.rand((), generator=generator) < args.mix_probability:
                batch, targets = mix(batch, targets, generator)
            with torch.autocast(torch.device(args.device).type, torch.bfloat16):
                logits = forward(batch)
            loss = F.cross_entropy(logits.float(), targets)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            averaged.update_parameters(model)
            running += loss.item()
        seconds = time.perf_counter() - started
        accuracy = write(epoch + 1, seconds)
        state = {name: part.state_dict() for name, part in parts.items()}
        partial = saved.with_suffix(".tmp")
        torch.save(state | {"generator": generator.get_state(), "epochs_done": epoch + 1, "seconds": seconds}, partial)
        partial.replace(saved)
        print(
            f"epoch {epoch + 1}/{args.epochs}  loss {running / steps_per_epoch:.4f}  "
            f"top-1 {accuracy:.4f}  {seconds:.0f} s",
            flush=True,
        )
    saved.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
