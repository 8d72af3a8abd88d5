"""What pruning visual tokens costs in answers: questions about images, dense and pruned, on the same rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core import progress
from ...core.environment import environment
from ...core.errors import UserError
from ...core.files import file_sha256
from ...core.json_file import read_json_lines
from ...core.preprocess import load_image
from ...core.statistics import Estimate, paired_difference, proportion
from .baselines import Pruning, candidates_of
from .cost import tower_row
from .loading import LoadedVLM, normalise_answer
from .parts import find_parts

#: Version of the rows.
ROW_SCHEMA = 1


@dataclass(frozen=True)
class Question:
    """One row of a data set.

    Attributes:
        images: Files, at least one.
        text: The question.
        answers: Accepted answers, at least one.
        kind: Group that it is counted in, too; None: of none.
    """

    images: tuple[Path, ...]
    text: str
    answers: tuple[str, ...]
    kind: str | None = None

    def is_right(self, answer: str) -> bool:
        return normalise_answer(answer) in {normalise_answer(one) for one in self.answers}


_A_LINE = 'a line is {"image": "cat.png", "question": "...", "answer": "..."}'


def read_questions(path: str | Path, count: int | None = None) -> list[Question]:
    """Read questions from JSON lines: objects with ``image``, ``question``, ``answer`` and, if wanted, ``kind``.

    ``image`` is a file beside this one, or a list of files; ``answer`` one answer or a list of accepted ones.

    Args:
        count: Take the first so many; None: all.

    Raises:
        UserError: Not readable as that; the message names the line.
    """
    path = Path(path)
    lines = read_json_lines(path, "the questions in", _A_LINE)
    questions = list(itertools.islice(_questions(path, lines), count))
    if not questions:
        raise UserError(f"{path} holds no questions", _A_LINE)
    return questions


def _questions(path: Path, lines: Iterable[tuple[int, dict]]) -> Iterator[Question]:
    for number, row in lines:

        def refuse(what: str, number: int = number) -> UserError:
            return UserError(f"{path}, line {number}: {what}", _A_LINE)

        images, answers = _texts(row.get("image")), _texts(row.get("answer"))
        if not images:
            raise refuse("no 'image': a question without an image has no visual tokens")
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise refuse("no 'question'")
        if not answers:
            raise refuse("no 'answer'")
        kind = row.get("kind")
        if kind is not None and not isinstance(kind, str):
            raise refuse(f"kind is {kind!r}, expected text")
        files = tuple(path.parent / image for image in images)
        for file in files:
            if not file.is_file():
                raise refuse(f"there is no image {file}")
        yield Question(files, row["question"], answers, kind)


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(values) if values and all(isinstance(one, str) and one for one in values) else ()


@dataclass(frozen=True)
class Answers:
    """What each candidate answered.

    Attributes:
        of: label -> text for each question.
        right: label -> bool [question].
        visual_tokens: label -> mean over questions of the visual tokens that are left behind the last language layer.
        tower: label -> what the tower computed for a crop, see :func:`~vpruner.prune.vlm.cost.tower_row`.
    """

    of: dict[str, list[str]]
    right: dict[str, np.ndarray]
    visual_tokens: dict[str, float]
    tower: dict[str, dict[str, Any]]


def answer_questions(
    vlm: LoadedVLM,
    questions: Sequence[Question],
    prunings: Sequence[Pruning],
    *,
    batch_size: int = 1,
    max_new_tokens: int = 16,
) -> Answers:
    """Ask everything of the dense model and of each pruned form, batch by batch, greedily.

    Raises:
        UserError: An image cannot be read; or what a pruning asks for is not to be had with this model.
    """
    candidates = candidates_of(vlm.model, prunings)
    texts: dict[str, list[str]] = {label: [] for label in candidates}
    tokens = dict.fromkeys(candidates, 0)
    parts, tower = find_parts(vlm.model), {}
    with progress.stage("Answering", len(questions), unit="questions") as advance:
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            images = [[load_image(file) for file in question.images] for question in batch]
            inputs = vlm.inputs(images, [question.text for question in batch])
            given = int((inputs["input_ids"] == vlm.model.config.image_token_id).sum())
            for label, opened in candidates.items():
                with opened() as run, torch.inference_mode():
                    sequences = vlm.model.generate(**inputs, max_new_tokens=max_new_tokens)
                texts[label].extend(vlm.texts(sequences, inputs["input_ids"].shape[1]))
                tokens[label] += given if run is None else int(run.visual_tokens[:, -1].sum())
                tower[label] = tower_row(parts, run)
                if run is not None:
                    run.clear()
            advance(len(batch))
    return Answers(
        texts,
        {
            label: np.array([one.is_right(text) for one, text in zip(questions, some, strict=True)])
            for label, some in texts.items()
        },
        {label: total / len(questions) for label, total in tokens.items()},
        tower,
    )


def evaluate(
    vlm: LoadedVLM,
    data: str | Path,
    prunings: Sequence[Pruning],
    *,
    count: int | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 16,
) -> list[dict[str, Any]]:
    """Rows of ``vpruner vlm evaluate``: accuracy of each candidate, over all questions and over each kind.

    Metrics: ``accuracy`` (normalised exact match), and for each pruned form ``accuracy_difference`` to the dense model
    with the paired interval, and ``agreement``, the share of questions with the dense model's answer.
    """
    questions = read_questions(data, count)
    answers = answer_questions(vlm, questions, prunings, batch_size=batch_size, max_new_tokens=max_new_tokens)
    about = {
        "schema": ROW_SCHEMA,
        "kind": "vlm_accuracy",
        "model": vlm.name,
        "dtype": vlm.dtype,
        "data": Path(data).name,
        "data_sha256": file_sha256(data),
        "batch": batch_size,
        "max_new_tokens": max_new_tokens,
        "environment": environment(),
    }
    named = {one.label: one for one in prunings}
    return [
        {
            **estimate.row(label),
            **about,
            "question_kind": kind,
            "visual_tokens": answers.visual_tokens[label],
            "tower": answers.tower[label],
            "pruning": None if label == "dense" else named[label].to_json(),
        }
        for label in answers.of
        for kind, chosen in _groups(questions)
        for estimate in _estimates(answers, label, chosen)
    ]


def _groups(questions: Sequence[Question]) -> list[tuple[str | None, np.ndarray]]:
    """(kind, positions of its questions), all of them under None first."""
    kinds = sorted({question.kind for question in questions} - {None})
    of = np.array([question.kind or "" for question in questions])
    return [(None, np.arange(len(questions))), *((kind, np.flatnonzero(of == kind)) for kind in kinds)]


def _estimates(answers: Answers, label: str, chosen: np.ndarray) -> list[Estimate]:
    right = answers.right[label][chosen]
    estimates = [proportion("accuracy", right)]
    if label != "dense":
        same = [
            normalise_answer(answers.of[label][index]) == normalise_answer(answers.of["dense"][index])
            for index in chosen
        ]
        estimates.append(paired_difference("accuracy_difference", right, answers.right["dense"][chosen]))
        estimates.append(proportion("agreement", np.array(same)))
    return estimates
