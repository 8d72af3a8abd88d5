"""Train a small LLaVA to answer questions about mosaics, on a CPU, from the weights of the reference ViT.

    python benchmarks/vlm/train_llava.py --data cifar10_train.tar --eval-data cifar10_val.tar -o benchmarks/vlm/model

writes a folder that ``LlavaForConditionalGeneration.from_pretrained`` and ``AutoProcessor.from_pretrained`` read:
a CLIP-shaped tower (class token, pre-norm, features of the layer before the last, as in LLaVA-1.5), a Llama and a
word-level tokenizer. Weights are stored in float16 and load as float32.

Four stages:

1. The tower starts as the reference ViT with its position embeddings tiled over the four cells, and with attention
   that prefers the own cell, as far as the weights alone can say that. It learns to tell what each cell holds from
   the mean of its patches (layer before the last), which cell a patch lies in, and, from the class token (last
   layer), which classes are there at all. The linear heads of this stage are thrown away.
2. The projector and the language model learn the answers on stored features of the frozen tower, patches averaged
   2 x 2, each at the position of its first patch, which costs two fifths.
3. The tower goes on alone, as in stage 1. Nothing in it depends on stage 2, so the two can run side by side.
4. All of it goes on together on all 256 patches of new mosaics.

No stage drops tokens: the model is not taught to stand pruning. But positions are drawn as if some were gone, because
a language model that has only seen 256 visual tokens reads no other distance between image and question, as those that
learned from texts do. All questions of a mosaic share its visual tokens and do not see each other.

Goes on where it stopped if OUTPUT/training.pt is there; the file is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from mosaic import (
    CLASSES,
    EMPTY,
    KINDS,
    PLACES,
    SIZE,
    Question,
    ask_count,
    ask_each_kind,
    ask_position,
    ask_presence,
    draw_cells,
    load_cells,
    paint,
)
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vpruner.core.bundled import reference_card
from vpruner.prune.models import open_model

sys.path.append(str(Path(__file__).resolve().parents[1] / "reference"))
from train import random_crop_flip

PATCH = 4
GRID = SIZE // PATCH
LAYERS = 8
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
#: Questions that a mosaic is asked in training.
SLOTS = 10
#: Tokens of the longest question with its answer, "what is at the top left ? ASSISTANT : airplane".
SLOT = 10


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; the words are those of the questions, the answers and the prompt."""
    words = {"USER", "ASSISTANT", ":", "?", "nothing", "yes", "no", *map(str, range(5))}
    for text in (ask_position([0] * 4, place).question for place in range(4)):
        words |= set(text.rstrip("?").split())
    for label, name in enumerate(CLASSES):
        questions = ask_count([0] * 4, label).question, ask_presence([0] * 4, label).question
        words |= {name, *(word for text in questions for word in text.rstrip("?").split())}
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=512,
    )


def make_processor(mean: list[float], std: list[float]) -> LlavaProcessor:
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=mean, image_std=std
    )
    return LlavaProcessor(
        image_processor,
        make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    width = 128
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            projection_dim=width,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def separate_cells(
    reference: VisionTransformer, images: torch.Tensor, gap: float = 5.0, amount: float = 0.03
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weights with which patches attend within their own cell of a mosaic, so that each cell is seen as it was alone.

    Without that, patches of four images attend to one another and the tower has to learn everything again: a linear
    probe on the mean patch of a cell tells 66 % of held-out cells right, with it 79 %, on single images 82 %.

    The three directions of the residual stream in which activations vary least are cleared of what is written and read
    there, and carry a code of the cell: the corners of a tetrahedron. Likewise the three directions of each head in
    which queries and keys say least carry that code into the attention.

    Args:
        reference: The model of single images; stays as it is.
        images: float [image, 3, 32, 32], preprocessed, to measure activations on.
        gap: How much larger the logits of patches of the own cell are than those of others.
        amount: Mean square of the code over that of the activations.

    Returns:
        Weights under timm's names, and the code that is to be added to the patches of each cell, float [cell, width].
    """
    width, blocks = reference.embed_dim, reference.blocks
    entering: dict[tuple[int, str], torch.Tensor] = {}
    hooks = [
        getattr(block, name).register_forward_pre_hook(
            lambda module, args, key=(index, name): entering.update({key: args[0].flatten(0, 1)})
        )
        for index, block in enumerate(blocks)
        for name in ("norm1", "norm2")
    ]
    reference(images)
    for hook in hooks:
        hook.remove()
    spread = {key: x.std(1, unbiased=False).mean().item() for key, x in entering.items()}
    normal = [F.layer_norm(x, (width,)) for x in entering.values()]
    # The mean over channels is no direction to use, as norms take it out.
    ones = torch.ones(width, width) * 1e3
    free = torch.linalg.eigh(sum(x.T @ x / len(x) for x in normal) + ones).eigenvectors[:, :3]
    others = torch.eye(width) - free @ free.T
    size = math.sqrt(amount * width) * sum(spread.values()) / len(spread)
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / math.sqrt(3)

    weights = {name: value.clone() for name, value in reference.state_dict().items()}
    weights["cls_token"] @= others
    weights["pos_embed"] @= others
    for name in (
        "patch_embed.proj",
        *(f"blocks.{i}.{part}" for i in range(len(blocks)) for part in ("attn.proj", "mlp.fc2")),
    ):
        for kind in ("weight", "bias"):
            value = weights[f"{name}.{kind}"]
            weights[f"{name}.{kind}"] = torch.tensordot(others, value, 1)
    for index, block in enumerate(blocks):
        for norm_name, linear_name in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            norm, linear = f"blocks.{index}.{norm_name}", f"blocks.{index}.{linear_name}"
            scale, shift = weights[f"{norm}.weight"], weights[f"{norm}.bias"]
            weight, bias = weights[f"{linear}.weight"], weights[f"{linear}.bias"]
            # What the layer makes of normalised activations, and the constant beside it.
            whole = torch.cat([weight * scale @ others, (weight @ shift + bias)[:, None]], 1)
            if norm_name == "norm1":
                head_dim = block.attn.head_dim
                # Codes of one cell have product size^2, of two cells a third of that with the other sign.
                strength = math.sqrt(gap * math.sqrt(head_dim) * 3 / 4) * spread[index, norm_name] / size
                code = torch.cat([strength * free.T, torch.zeros(3, 1)], 1)
                for start in range(0, width, head_dim):
                    query, key = (slice(first + start, first + start + head_dim) for first in (0, width))
                    left, values, right = torch.linalg.svd(whole[query].T @ whole[key])
                    kept = head_dim - 3
                    root = values[:kept, None].sqrt()
                    whole[query] = torch.cat([root * left[:, :kept].T, code])
                    whole[key] = torch.cat([root * right[:kept], code])
            weights[f"{linear}.weight"] = whole[:, :-1] / scale
            weights[f"{linear}.bias"] = whole[:, -1] - weights[f"{linear}.weight"] @ shift
            # The code adds to what the norm divides by.
            weights[f"{norm}.weight"] = scale * math.sqrt(1 + size**2 / width / spread[index, norm_name] ** 2)
    return weights, size * corners @ free.T


@torch.no_grad()
def load_reference(
    tower: CLIPVisionModel, weights: dict[str, torch.Tensor], code: torch.Tensor, pixels: torch.Tensor
) -> None:
    """Start ``tower`` as a ViT for images of one cell, in all four cells.

    CLIP's patch embedding has no bias, so the bias joins the position embeddings. And CLIP normalises what enters the
    first layer, which timm's ViT does not: a large constant in all position embeddings makes that norm divide all
    tokens by nearly the same number, and its scale and shift per channel, fitted to ``pixels``, undo it.

    Args:
        weights: Under timm's names.
        code: Added to the patches of each cell as they enter the first block, float [cell, width].
        pixels: Mosaics, float [mosaic, 3, 64, 64], preprocessed.
    """
    state = {"embeddings.class_embedding": weights["cls_token"].flatten()}
    state["embeddings.patch_embedding.weight"] = weights["patch_embed.proj.weight"]
    positions, half = weights["pos_embed"][0], GRID // 2
    patches = (positions[1:] + weights["patch_embed.proj.bias"]).view(half, half, -1).tile(2, 2, 1)
    state["embeddings.position_embedding.weight"] = torch.cat([positions[:1], patches.flatten(0, 1)])
    for layer in range(LAYERS):
        old, new = f"blocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            for part, value in zip("qkv", weights[f"{old}attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"{new}self_attn.{part}_proj.{kind}"] = value
            names = {"attn.proj": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2"}
            for timm_name, name in (names | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}).items():
                state[f"{new}{name}.{kind}"] = weights[f"{old}{timm_name}.{kind}"]
    for kind in ("weight", "bias"):
        state[f"post_layernorm.{kind}"] = weights[f"norm.{kind}"]
    missing, unexpected = tower.load_state_dict(state, strict=False)
    if unexpected or set(missing) != {"pre_layrnorm.weight", "pre_layrnorm.bias"}:
        raise RuntimeError(f"not the names of CLIPVisionModel: missing {missing}, unexpected {unexpected}")
    positions = tower.embeddings.position_embedding.weight
    wanted = tower.embeddings(pixels).flatten(0, 1)
    # Mean zero, or the norm would take it out.
    positions += 1.5 * torch.tensor([1.0, -1.0]).repeat(positions.shape[1] // 2)
    given = tower.embeddings(pixels).flatten(0, 1)
    normal = F.layer_norm(given, given.shape[-1:], eps=tower.config.layer_norm_eps)
    centred = normal - normal.mean(0)
    scale = (centred * wanted).sum(0) / centred.square().sum(0)
    tower.pre_layrnorm.weight.copy_(scale)
    tower.pre_layrnorm.bias.copy_(wanted.mean(0) - scale * normal.mean(0))
    entering = code * given.std(1, unbiased=False).mean() / scale
    positions[1:].view(2, half, 2, half, -1).add_(entering.view(2, 1, 2, 1, -1))


class TowerHeads(nn.Module):
    """Linear heads by which the tower learns; see stage 1 in the description of this file."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.Linear(width, len(CLASSES) + 1)
        self.place = nn.Linear(width, len(PLACES))
        self.presence = nn.Linear(width, len(CLASSES))
        self.register_buffer(
            "place_of_patch",
            torch.arange(4).view(2, 2).repeat_interleave(GRID // 2, 0).repeat_interleave(GRID // 2, 1).flatten(),
        )

    def loss(self, features: torch.Tensor, pooled: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Loss, and the share of filled cells that are told right, of features [mosaic, 256, width]."""
        grid = features.view(len(cells), 2, GRID // 2, 2, GRID // 2, -1)
        logits = self.cell(F.layer_norm(grid.mean((2, 4)).flatten(1, 2), features.shape[-1:]))
        places = self.place(features).flatten(0, 1)
        present = F.one_hot(cells, EMPTY + 1).amax(1)[:, :EMPTY].float()
        loss = (
            F.cross_entropy(logits.flatten(0, 1), cells.flatten(), label_smoothing=0.05)
            + 0.1 * F.cross_entropy(places, self.place_of_patch.repeat(len(cells)))
            + 0.5 * F.binary_cross_entropy_with_logits(self.presence(pooled), present)
        )
        filled = cells != EMPTY
        return loss, (logits.argmax(-1) == cells)[filled].float().mean().item()


def look(tower: CLIPVisionModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of the layer before the last [mosaic, 256, width] and the normalised class token [mosaic, width]."""
    output = tower(pixels, output_hidden_states=True)
    return output.hidden_states[-2][:, 1:], output.pooler_output


class Sheet:
    """Several questions about each mosaic as one sequence: what is fixed about it is made once.

    Sequence: ``<s> USER :``, the visual tokens, then ``slots`` slots of ``SLOT`` tokens, each a question with its
    answer and padding. A slot sees what precedes the slots and itself, at the positions that it would have alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, slots: int, pooled: bool) -> None:
        self.tokenizer = tokenizer
        self.start = torch.tensor(tokenizer("USER:").input_ids)
        self.slots = slots
        patches = torch.arange(GRID**2).view(GRID, GRID)
        self.visual = patches[::2, ::2].flatten() if pooled else patches.flatten()
        self.prefix = len(self.start) + len(self.visual)
        slot = torch.cat([torch.full((self.prefix,), -1), torch.arange(slots).repeat_interleave(SLOT)])
        allowed = (slot[None, :] == -1) | (slot[:, None] == slot[None, :])
        allowed &= torch.ones_like(allowed).tril()
        self.mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]

    def positions(self, mosaics: int, generator: torch.Generator | None) -> torch.Tensor:
        """int64 [mosaic, token]: the usual ones, or with a generator as if some patches, of some rows more, were gone.

        None is. But all images here have as many tokens, and a language model that has seen one distance between image
        and question alone cannot read any other; those of real LLaVAs have read texts of all lengths.
        """
        steps = torch.ones(mosaics, GRID**2, dtype=torch.long)
        if generator is not None:
            share = 0.1 + 0.9 * torch.rand(mosaics, 1, 1, generator=generator)
            share = share * (0.5 + torch.rand(mosaics, GRID, 1, generator=generator))
            missing = torch.rand(mosaics, GRID, GRID, generator=generator) > share
            # A third of the images as they are.
            missing &= torch.rand(mosaics, 1, 1, generator=generator) > 1 / 3
            steps -= missing.flatten(1).long()
        first = len(self.start)
        patches = first + (steps.cumsum(1) - 1).clamp(min=0)
        after = patches[:, -1:] + 1 + torch.arange(SLOT).repeat(self.slots)
        return torch.cat([torch.arange(first).expand(mosaics, -1), patches[:, self.visual], after], 1)

    @cache  # noqa: B019 - a sheet lives as long as the training.
    def tokens(self, question: Question) -> tuple[int, ...]:
        text = f"{question.question} ASSISTANT: {question.answer}"
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def loss(
        self,
        model: LlavaForConditionalGeneration,
        features: torch.Tensor,
        questions: list[list[Question]],
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of the answers, and the share of right ones by kind.

        ``features``: [mosaic, 256, width] of the tower; ``questions``: ``slots`` for each mosaic; ``generator``: see
        :meth:`positions`.
        """
        tokenizer, mosaics = self.tokenizer, len(features)
        if len(self.visual) < GRID**2:
            grid = features.transpose(1, 2).unflatten(2, (GRID, GRID))
            features = F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
        encoded = [[self.tokens(question) for question in row] for row in questions]
        padded = torch.tensor(
            [[[*ids, *[tokenizer.pad_token_id] * (SLOT - len(ids))] for ids in row] for row in encoded]
        )
        last = torch.tensor([[len(ids) - 1 for ids in row] for row in encoded])
        embed = model.get_input_embeddings()
        inputs = torch.cat(
            [
                embed(self.start).expand(mosaics, -1, -1),
                model.model.multi_modal_projector(features),
                embed(padded.flatten(1)),
            ],
            1,
        )
        hidden = model.model.language_model(
            inputs_embeds=inputs,
            attention_mask=self.mask.expand(mosaics, -1, -1, -1),
            position_ids=self.positions(mosaics, generator),
            use_cache=False,
        ).last_hidden_state
        at_answer = self.prefix + SLOT * torch.arange(self.slots) + last
        which = torch.stack([at_answer - 1, at_answer], -1).flatten(1)
        logits = model.lm_head(hidden.gather(1, which[..., None].expand(-1, -1, hidden.shape[-1])))
        logits = logits.unflatten(1, (self.slots, 2))
        answers = padded.gather(2, last[..., None])[..., 0]
        loss = F.cross_entropy(logits[:, :, 0].flatten(0, 1), answers.flatten())
        ends = torch.full_like(answers, tokenizer.eos_token_id)
        loss = loss + 0.1 * F.cross_entropy(logits[:, :, 1].flatten(0, 1), ends.flatten())
        right = logits[:, :, 0].argmax(-1) == answers
        names = [[question.kind for question in row] for row in questions]
        shares = {}
        for kind in KINDS:
            of_kind = torch.tensor([[name == kind for name in row] for row in names])
            shares[kind] = right[of_kind].float().mean().item()
        return loss, shares


def lesson(cells: list[int], generator: torch.Generator) -> list[Question]:
    """``SLOTS`` questions about one mosaic: two cells, four counts, and four presences, two of what is there.

    What is asked of one mosaic differs by class and answer: from single questions, drawn one by one, the language model
    learned the positions within 300 steps and nothing else in 700.
    """
    present = {label for label in cells if label != EMPTY}
    order = torch.randperm(len(CLASSES), generator=generator).tolist()
    there, absent = ([label for label in order if (label in present) == wanted] for wanted in (True, False))
    return [
        *(ask_position(cells, place) for place in torch.randperm(4, generator=generator).tolist()[:2]),
        *(ask_count(cells, label) for label in order[:4]),
        *(ask_presence(cells, label) for label in (there * 2)[:2] + absent[:2]),
    ]


def make_optimiser(modules: dict[nn.Module, float], steps: int, warmup: int):
    """AdamW with a rate for each module, and a schedule: linear warm-up, then a half cosine to 5 %."""
    groups = [
        {"params": [p for p in module.parameters() if (p.ndim > 1) == matrices], "lr": rate, "weight_decay": decay}
        for module, rate in modules.items()
        for matrices, decay in ((True, 0.05), (False, 0.0))
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))),
    )
    return optimiser, schedule


def write_model(folder: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor, card: dict) -> None:
    """Everything that ``from_pretrained`` needs, weights in float16, and the recipe in ``training.json``."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # preprocessor_config.json, for who wants the tower alone.
    weights = folder / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes files private.
    (folder / "training.json").write_text(json.dumps(card, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 training images: folder or tar")
    parser.add_argument("--eval-data", required=True, help="CIFAR-10 images to report on")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder of the model")
    parser.add_argument("--tower-steps", type=int, default=500)
    parser.add_argument("--tower-batch", type=int, default=16)
    parser.add_argument("--tower-lr", type=float, default=3e-4)
    parser.add_argument("--mosaics", type=int, default=3000, help="mosaics whose features the language model learns on")
    parser.add_argument("--pooled-steps", type=int, default=1600)
    parser.add_argument("--pooled-batch", type=int, default=8)
    parser.add_argument("--pooled-lr", type=float, default=1e-3)
    parser.add_argument("--again-steps", type=int, default=600)
    parser.add_argument("--full-steps", type=int, default=300)
    parser.add_argument("--full-batch", type=int, default=16)
    parser.add_argument("--full-lr", type=float, default=5e-4)
    parser.add_argument("--eval-mosaics", type=int, default=250)
    parser.add_argument("--save-seconds", type=float, default=120, help="between checkpoints")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)

    card = json.loads(reference_card().read_text())
    mean, std = card["preprocessing"]["mean"], card["preprocessing"]["std"]
    processor = make_processor(mean, std)
    tokenizer = processor.tokenizer
    torch.manual_seed(args.seed)
    model = LlavaForConditionalGeneration._from_config(make_config(tokenizer), attn_implementation="sdpa")
    tower = model.model.vision_tower
    heads = TowerHeads(tower.config.hidden_size)
    images, eval_images = load_cells(args.data), load_cells(args.eval_data)

    def normalise(pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        cells = draw_cells(count, generator)
        return normalise(paint(cells, images, generator, partial(random_crop_flip, pad=4, generator=generator))), cells

    generator = torch.Generator().manual_seed(args.seed)
    reference = open_model().adapter.model
    singles = normalise(torch.cat([some[:40] for some in images]))
    load_reference(tower, *separate_cells(reference, singles), draw(64, generator)[0])
    eval_cells = draw_cells(args.eval_mosaics, torch.Generator().manual_seed(1))
    eval_generator = torch.Generator().manual_seed(2)
    eval_pixels = normalise(paint(eval_cells, eval_images, eval_generator))
    eval_questions = [ask_each_kind(row, eval_generator) for row in eval_cells.tolist()]

    checkpoint = args.output / "training.pt"
    done = {"tower": 0, "pooled": 0, "again": 0, "full": 0}
    seconds = 0.0
    saved: dict = {}
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        heads.load_state_dict(saved["heads"])
        done |= saved["done"]
        seconds = saved["seconds"]
        print(f"goes on from {checkpoint}: {done}", flush=True)
    started = time.perf_counter() - seconds

    def seed_of(stage: str, step: int) -> int:
        return (args.seed * len(done) + list(done).index(stage) + 1) * 1_000_000 + step

    def train(stage: str, modules: dict[nn.Module, float], steps: int, warmup: int, step: Callable) -> None:
        """Run the steps of a stage that are not done yet; ``step(generator)`` gives the loss and shares to print."""
        optimiser, schedule = make_optimiser(modules, steps, warmup)
        if done[stage] and saved.get("stage") == stage:
            optimiser.load_state_dict(saved["optimiser"])
            schedule.load_state_dict(saved["schedule"])
        average: dict[str, float] = {}
        written = time.perf_counter()
        while done[stage] < steps:
            # A generator per step: a run that was stopped draws what one that was not would have drawn.
            loss, shares = step(torch.Generator().manual_seed(seed_of(stage, done[stage])))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for module in modules for p in module.parameters()], 1.0)
            optimiser.step()
            schedule.step()
            done[stage] += 1
            for name, value in {"loss": loss.item(), **shares}.items():
                average[name] = 0.95 * average.get(name, value) + 0.05 * value
            if done[stage] % 20 == 0:
                shown = "  ".join(f"{name} {value:.3f}" for name, value in average.items())
                print(f"{stage} {done[stage]}/{steps}  {shown}  {time.perf_counter() - started:.0f} s", flush=True)
            if done[stage] == steps or time.perf_counter() - written > args.save_seconds:
                state = {
                    "model": model.state_dict(),
                    "heads": heads.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "schedule": schedule.state_dict(),
                    "stage": stage,
                    "done": done,
                    "seconds": time.perf_counter() - started,
                }
                partial_file = checkpoint.with_suffix(".tmp")
                torch.save(state, partial_file)
                partial_file.replace(checkpoint)
                written = time.perf_counter()

    def tower_step(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        pixels, cells = draw(args.tower_batch, generator)
        loss, share = heads.loss(*look(tower, pixels), cells)
        return loss, {"cells": share}

    @torch.no_grad()
    def features_of(pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([look(tower, batch)[0] for batch in pixels.split(16)])

    @torch.no_grad()
    def told_right() -> float:
        """Share of held-out cells that the heads of stage 1 tell right."""
        features, pooled = zip(*(look(tower, batch) for batch in eval_pixels.split(25)), strict=True)
        return round(heads.loss(torch.cat(features), torch.cat(pooled), eval_cells)[1], 4)

    @torch.no_grad()
    def answered_right() -> dict[str, float]:
        """Share of the held-out questions, one of each kind per mosaic, that are answered right."""
        eval_sheet, total = Sheet(tokenizer, len(KINDS), pooled=False), dict.fromkeys(KINDS, 0.0)
        for start in range(0, len(eval_pixels), 25):
            pixels, questions = (some[start : start + 25] for some in (eval_pixels, eval_questions))
            _, shares = eval_sheet.loss(model, features_of(pixels), questions)
            total = {kind: total[kind] + share * len(pixels) for kind, share in shares.items()}
        return {kind: round(right / len(eval_pixels), 4) for kind, right in total.items()}

    # The heads are new and the tower is not: they must not lag behind and spoil it.
    train("tower", {tower: args.tower_lr, heads: 10 * args.tower_lr}, args.tower_steps, 30, tower_step)
    tower.requires_grad_(False)
    print(f"tower on held-out mosaics: {told_right()}", flush=True)

    language = [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    if done["pooled"] < args.pooled_steps:
        stored_pixels, stored_cells = draw(args.mosaics, torch.Generator().manual_seed(args.seed + 1))
        stored = features_of(stored_pixels)
        sheet = Sheet(tokenizer, SLOTS, pooled=True)

    def pooled_step(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        chosen = torch.randint(len(stored), (args.pooled_batch,), generator=generator)
        questions = [lesson(row, generator) for row in stored_cells[chosen].tolist()]
        return sheet.loss(model, stored[chosen], questions, generator)

    train("pooled", dict.fromkeys(language, args.pooled_lr), args.pooled_steps, 50, pooled_step)
    tower.requires_grad_(True)
    train("again", {tower: args.tower_lr, heads: args.tower_lr}, args.again_steps, 30, tower_step)
    print(f"tower on held-out mosaics: {told_right()}", flush=True)
    whole_sheet = Sheet(tokenizer, SLOTS, pooled=False)

    def full_step(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        pixels, cells = draw(args.full_batch, generator)
        features, pooled = look(tower, pixels)
        tower_loss, share = heads.loss(features, pooled, cells)
        questions = [lesson(row, generator) for row in cells.tolist()]
        loss, shares = whole_sheet.loss(model, features, questions, generator)
        return loss + 0.5 * tower_loss, {"cells": share, **shares}

    rates = {**dict.fromkeys(language, args.full_lr), tower: 0.3 * args.full_lr, heads: args.full_lr}
    train("full", rates, args.full_steps, 20, full_step)
    found = {"cells": told_right(), **answered_right()}
    print(f"on held-out mosaics: {found}", flush=True)
    recipe = {k: v for k, v in vars(args).items() if k not in ("data", "eval_data", "output")}
    found["mosaics"] = args.eval_mosaics
    write_model(
        args.output,
        model,
        processor,
        {"classes": CLASSES, "recipe": recipe, "seconds": round(time.perf_counter() - started), "held out": found},
    )
    checkpoint.unlink()


if __name__ == "__main__":
    main()
