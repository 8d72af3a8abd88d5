"""A vision-language model as its users have it: from a folder or the hub, with the processor that writes prompts."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from ...core.errors import UserError
from ...core.extras import require
from ...core.text import first_line
from ..device import resolve
from ..weights_file import tensors_only
from .folder import check_settings
from .parts import find_parts
from .tower import quiet_transformers

#: What ``--dtype`` takes; "auto" is what the weights are saved in.
#: ``NAME`` or ``OWNER/NAME``.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
#: The prompt of models whose processor has no chat template, as LLaVA-1.5 was trained with.
PLAIN_PROMPT = "USER: {images}\n{question} ASSISTANT:"


@dataclass(frozen=True)
class LoadedVLM:
    """A model with its processor.

    Attributes:
        model: The transformers model, in evaluation mode.
        processor: Images and text -> what the model takes.
        name: The last part of what the user named.
    """

    model: nn.Module
    processor: Any
    name: str

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> str:
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def prompt(self, question: str, images: int = 1) -> str:
        """The text of one turn about ``images`` images, up to where the answer begins.

        Raises:
            UserError: No image, or a chat template that leaves the images out.
        """
        if images < 1:
            raise UserError(f"the prompt {_shortened(question)} has no image", "give at least one image with it")
        token = self.processor.image_token
        if token in question:
            raise UserError(
                f"the question {_shortened(question)} holds the placeholder {token}", "leave it out: it is put in here"
            )
        if getattr(self.processor, "chat_template", None) is None:
            return PLAIN_PROMPT.format(images="\n".join([token] * images), question=question)
        content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        if text.count(token) != images:
            raise UserError(
                f"the chat template of {self.name} wrote {text.count(token)} {token} for {images} image(s)",
                "correct chat_template.jinja in its folder",
            )
        return text

    def inputs(self, images: Sequence[Sequence[Image]], questions: Sequence[str]) -> dict[str, torch.Tensor]:
        """What ``generate`` takes, for a batch of prompts, padded on the left.

        Args:
            images: For each question its images, at least one.
        """
        prompts = [self.prompt(question, len(some)) for question, some in zip(questions, images, strict=True)]
        batch = self.processor(
            # Nested: LLaVA-OneVision cuts an image that is alone in its prompt into crops, and others not.
            images=[list(some) for some in images],
            text=prompts,
            return_tensors="pt",
            padding=len(prompts) > 1,
            **({"padding_side": "left"} if len(prompts) > 1 else {}),
        )
        kind = next(self.model.parameters()).dtype
        return {
            name: value.to(self.device, kind) if value.is_floating_point() else value.to(self.device)
            for name, value in batch.items()
            if name != "token_type_ids"
        }

    def texts(self, sequences: torch.Tensor, prompt_tokens: int) -> list[str]:
        """The answers in what ``generate`` returned: int64 [prompt, token], prompts included."""
        answers = sequences[:, prompt_tokens:]
        return [text.strip() for text in self.processor.batch_decode(answers, skip_special_tokens=True)]


def open_vlm(spec: str, *, device: str = "auto", dtype: str = "auto") -> LoadedVLM:
    """Open a vision-language model through ``from_pretrained``.

    Args:
        spec: A local folder, or a name on the hub.
        device: As of :attr:`~vpruner.core.specs.ModelSpec.device`.
        dtype: One of :data:`~vpruner.core.choices.VLM_DTYPES`.

    Raises:
        UserError: It cannot be loaded, or is no model whose visual tokens can be pruned; the message names what it is.
    """
    transformers, place = require("transformers"), resolve(device)
    folder = Path(spec)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(
            f"{spec} holds no config.json", "give a folder that save_pretrained wrote, or a name on the hub"
        )
    # Else the hub client says which letters names may have, which helps nobody who mistyped a path.
    if not folder.exists() and not _HUB_NAME.fullmatch(spec):
        raise UserError(
            f"there is no folder {spec}", "give a folder that save_pretrained wrote, or a name on the hub (OWNER/NAME)"
        )
    try:
        with quiet_transformers():
            # A folder's settings are data: they may not make transformers run code or fetch it, nor ask the user to.
            local = folder.exists()
            described, _ = transformers.PreTrainedConfig.get_config_dict(spec, local_files_only=local)
            check_settings(described, spec)
            config = transformers.AutoConfig.from_pretrained(spec, local_files_only=local, trust_remote_code=False)
            if type(config) not in transformers.AutoModelForImageTextToText._model_mapping:
                raise UserError(
                    f"{spec} is a {config.model_type!r} model, which answers no questions about images",
                    "supported are LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision",
                )
            with tensors_only():
                model = transformers.AutoModelForImageTextToText.from_pretrained(
                    spec, dtype=dtype, local_files_only=local, trust_remote_code=False
                )
            model = model.to(place).eval()
            processor = transformers.AutoProcessor.from_pretrained(
                spec, local_files_only=local, trust_remote_code=False
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{spec} cannot be loaded: {first_line(error)}",
            "give a folder with model, tokenizer and processor, as save_pretrained writes them, or a name on the hub",
        ) from None
    find_parts(model)
    if not hasattr(processor, "image_token") or not hasattr(processor, "batch_decode"):
        raise UserError(
            f"{spec} has a {type(processor).__name__}, which cannot write prompts with images",
            "save the processor of the model there: AutoProcessor.from_pretrained(...).save_pretrained(FOLDER)",
        )
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Whatever the model samples with by default: answers are compared, so they are greedy.
    model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return LoadedVLM(model, processor, folder.name)


#: Articles, and numbers as words, as answers of VQA data sets are compared.
_ARTICLES = {"a", "an", "the"}
_NUMBERS = dict(
    zip(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        map(str, range(11)),
        strict=True,
    ),
    none="0",
)
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def normalise_answer(text: str) -> str:
    """Lower case, no punctuation and articles, numbers up to ten as digits, single blanks: "The Cat." -> "cat"."""
    # A hyphen or a dot inside a word is part of it for some and not for others; both become the same here.
    words = text.lower().translate(_PUNCTUATION).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def _shortened(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= most else text[: most - 1] + "…")
