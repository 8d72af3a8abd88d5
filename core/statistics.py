"""What a pruned model loses: accuracy and agreement with the dense model, on the same images, with intervals.

Two models are always compared image by image, so the interval of their difference is a paired one; it is much narrower
than the two intervals of the accuracies suggest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .finite import check_finite

#: Two-sided 95 % quantile of the normal distribution.
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its 95 % interval.

    Attributes:
        metric: ``top1``, ``top1_difference``, ``agreement``, ``kl`` (nats), ``cosine`` or ``relative_error``.
        value: The estimate.
        low, high: Its interval; both None where the images are too few to have one.
        count: Images.
    """

    metric: str
    value: float
    low: float | None
    high: float | None
    count: int

    def row(self, label: str, eval_set: str | None = None) -> dict[str, Any]:
        """A row about the model ``label``, on the evaluation set of that name, if it has one."""
        named = {} if eval_set is None else {"eval_set": eval_set}
        return {"schema": 1, "kind": "accuracy", "label": label, **named, **asdict(self)}


def proportion(metric: str, hits: np.ndarray) -> Estimate:
    """A share of images (bool [image]) with Wilson's score interval, which stays sensible near 0 and 1."""
    n, share = len(hits), float(np.mean(hits))
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return Estimate(metric, share, max(0.0, centre - half), min(1.0, centre + half), n)


def mean(metric: str, values: np.ndarray, *, least: float = -math.inf, most: float = math.inf) -> Estimate:
    """A mean of float [image] with its normal interval, clipped to what the quantity can be at ``least`` and ``most``.

    One image has no spread, so its mean has no interval.
    """
    values = np.clip(values, least, most)  # Rounding can leave the range: a cosine of 1 + 1e-16.
    n, value = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(metric, value, None, None, n)
    half = Z95 * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(metric, value, max(value - half, least), min(value + half, most), n)


def paired_difference(metric: str, hits: np.ndarray, reference: np.ndarray) -> Estimate:
    """Share of ``hits`` less share of ``reference`` (both bool [image]) with Tango's score interval for paired shares.

    Only images on which the two disagree move the estimate; with none of them in n images, the normal interval is a
    point, and this one is +- z^2 / (n + z^2), the Wilson limit of 0 in n.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17 (1998) 891-908.
    """
    n = len(hits)
    gained, lost = int(np.sum(hits & ~reference)), int(np.sum(~hits & reference))
    value = (gained - lost) / n

    def is_inside(difference: float) -> bool:
        """Whether the score test at the 5 % level does not reject this difference."""
        # Share of lost images, of highest likelihood under it: the larger root of 2 n q^2 + b q + c = 0.
        b = (2 * n + lost - gained) * difference - gained - lost
        c = -lost * difference * (1 - difference)
        share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        return (gained - lost - n * difference) ** 2 <= Z95**2 * max(variance, 0.0)

    return Estimate(metric, value, _edge(is_inside, value, -1.0), _edge(is_inside, value, 1.0), n)


def _edge(is_inside: Callable[[float], bool], inside: float, outside: float) -> float:
    """Bisect to where ``is_inside`` ends between the two; ``outside`` itself where it does not."""
    if is_inside(outside):
        return outside
    for _ in range(60):
        middle = 0.5 * (inside + outside)
        if is_inside(middle):
            inside = middle
        else:
            outside = middle
    return inside


@dataclass(frozen=True)
class Outputs:
    """Outputs of the compared models on the same images, in the same order.

    Attributes:
        of: label of the model -> float32 [image, output].
        labels: int64 [image] or None.
    """

    of: dict[str, np.ndarray]
    labels: np.ndarray | None


def collect_outputs(
    runners: dict[str, Callable[[Any], np.ndarray]],
    batches: Iterable[tuple[Any, Any]],
    *,
    on_batch: Callable[[int], None] = lambda count: None,
    not_finite: Callable[[str, np.ndarray], None] = lambda label, values: None,
) -> Outputs:
    """Run every model on every batch.

    Args:
        runners: label -> function from a batch of images to outputs float32 [batch, output].
        batches: (images, labels or None); images in whatever form the runners take, as long as it has a length.
        on_batch: Called with the number of images after each batch.
        not_finite: Called where outputs of a batch are not, with the label and all of its outputs up to there. What it
            raises ends the work before more images are read.
    """
    collected: dict[str, list[np.ndarray]] = {label: [] for label in runners}
    labels: list[np.ndarray] = []
    for images, batch_labels in batches:
        for label, run in runners.items():
            values = np.asarray(run(images), np.float32)
            collected[label].append(values)
            if not np.isfinite(values).all():
                not_finite(label, np.concatenate(collected[label]))
        if batch_labels is not None:
            labels.append(np.asarray(batch_labels))
        on_batch(len(images))
    return Outputs(
        {label: np.concatenate(parts) for label, parts in collected.items()}, np.concatenate(labels) if labels else None
    )


def compare(outputs: Outputs, *, baseline: str, output: str, classes: int | None = None) -> dict[str, list[Estimate]]:
    """Estimates for each model.

    With labels: top-1, and for each model but the baseline the paired difference to it. Always: agreement of the top
    class with the baseline and the KL divergence from the baseline's distribution, or for features the cosine. For
    values (patch tokens, maps) the squared error relative to the baseline's mean square, and where they are scores of
    classes the share of positions whose top class is the baseline's. The intervals of KL and cosine end where the
    quantities do: at 0, and at -1 and 1.

    Args:
        outputs: From :func:`collect_outputs`.
        baseline: The label of the dense model.
        output: ``"logits"``, ``"features"`` or ``"values"``.
        classes: Of values: how many classes they may be scores of, along the last or the first axis of an image.

    Raises:
        UserError: A model's outputs are not finite.
    """
    for label, values in outputs.of.items():
        check_finite(values, f"the {label} model")
    reference = outputs.of[baseline]
    result: dict[str, list[Estimate]] = {}
    for label, values in outputs.of.items():
        estimates: list[Estimate] = []
        if output == "logits":
            right = None
            if outputs.labels is not None:
                right = values.argmax(1) == outputs.labels
                estimates.append(proportion("top1", right))
            if label != baseline:
                if right is not None:
                    reference_right = reference.argmax(1) == outputs.labels
                    estimates.append(paired_difference("top1_difference", right, reference_right))
                estimates.append(proportion("agreement", values.argmax(1) == reference.argmax(1)))
                estimates.append(mean("kl", kl_divergence(reference, values), least=0.0))
        elif label != baseline and output == "values":
            axis = None if classes is None else _class_axis(reference.shape, classes)
            if axis is not None:
                same = values.argmax(axis) == reference.argmax(axis)
                estimates.append(mean("agreement", same.reshape(len(same), -1).mean(1), least=0.0, most=1.0))
            estimates.append(mean("relative_error", relative_errors(reference, values), least=0.0))
        elif label != baseline:
            estimates.append(mean("cosine", cosine(reference, values), least=-1.0, most=1.0))
        result[label] = estimates
    return result


def kl_divergence(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(logits)) in nats, float64 [image], from logits [image, class]."""
    log_p, log_q = (_log_softmax(np.asarray(values, np.float64)) for values in (reference, logits))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine similarity, float64 [image], of features [image, channel]."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return (one * other).sum(-1) / (np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)).clip(1e-30)


def relative_errors(reference: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean square of the difference over the mean square of the reference on all images: float64 [image]."""
    square = np.array([np.square(row, dtype=np.float64).mean() for row in reference])
    error = [np.square(row - own, dtype=np.float64).mean() for row, own in zip(reference, values, strict=True)]
    return np.array(error) / max(float(square.mean()), 1e-300)


def _class_axis(shape: tuple[int, ...], classes: int) -> int | None:
    """The axis of [image, ...] that counts the classes: the last, as of tokens, or the first behind the images."""
    return next((axis for axis in (len(shape) - 1, 1) if len(shape) > 2 and shape[axis] == classes), None)


def _log_softmax(values: np.ndarray) -> np.ndarray:
    values = values - values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))
