"""A tiny random LLaVA in a folder, as save_pretrained writes it: model, word-level tokenizer, image processor."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_vlms import IMAGE, PATCHES, PINPOINTS, VISION, tiny_vlm

WORDS = (
    "USER",
    "ASSISTANT",
    ":",
    "?",
    ".",
    "what",
    "is",
    "there",
    "how",
    "many",
    "a",
    "cat",
    "dog",
    "in",
    "this",
    "image",
)


def save_vlm(folder: Path, chat_template: str | None = None, kind: str = "llava") -> Path:
    """Save :func:`tiny_vlms.tiny_vlm` in float32 with a processor that makes one token of each word it knows."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = tiny_vlm(kind).float()
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    special = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "<image>": IMAGE, "<video>": 61}
    vocabulary = {**special, **{word: 3 + index for index, word in enumerate(WORDS)}}
    vocabulary |= {f"word{index}": index for index in range(64) if index not in vocabulary.values()}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<video>"],
    )
    size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    default = dict(vision_feature_select_strategy="default", num_additional_image_tokens=1)
    common = dict(tokenizer=fast, chat_template=chat_template)
    if kind == "llava":
        images = transformers.CLIPImageProcessorPil(size=size, crop_size=size)
        processor = transformers.LlavaProcessor(images, patch_size=VISION["patch_size"], **default, **common)
    elif kind == "next":
        images = transformers.LlavaNextImageProcessorPil(size=size, crop_size=size, image_grid_pinpoints=PINPOINTS)
        processor = transformers.LlavaNextProcessor(images, patch_size=VISION["patch_size"], **default, **common)
    else:
        images = transformers.LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=PINPOINTS)
        processor = transformers.LlavaOnevisionProcessor(
            images,
            video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
            num_image_tokens=PATCHES,
            vision_feature_select_strategy="full",
            **common,
        )
    processor.save_pretrained(folder)
    return folder


def write_questions(folder: Path, count: int, seed: int = 0) -> Path:
    """Questions about smooth random images, of two kinds; every third about two images."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        files = []
        for number in range(1 + (index % 3 == 2)):
            pixels = random.integers(0, 255, (3, 3, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            files.append(f"{index}-{number}.png")
            Image.fromarray(pixels).save(folder / files[-1])
        text, kind = (("is there a cat ?", "exists"), ("how many ?", "count"))[index % 2]
        rows.append({"image": files if len(files) > 1 else files[0], "question": text, "answer": "cat", "kind": kind})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answered(model: torch.nn.Module, folder: Path, path: Path, tokens: int) -> list[str]:
    """What transformers itself answers to each question, one by one, without anything of ours."""
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(folder)
    texts = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        files = row["image"] if isinstance(row["image"], list) else [row["image"]]
        text = "USER: " + "\n".join(["<image>"] * len(files)) + f"\n{row['question']} ASSISTANT:"
        pictures = [[Image.open(path.parent / file) for file in files]]
        inputs = processor(images=pictures, text=[text], return_tensors="pt")
        assert int((inputs["input_ids"] == IMAGE).sum()) >= PATCHES * len(files)
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        texts.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts
