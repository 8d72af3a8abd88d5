"""How far two float32 forms of a model may be apart: a multiple of what float32 costs the model itself.

Models with massive activations are legitimate, and lose three digits of float32 to them. No constant fits them and
others. Differences here are relative to the output's scale, see :func:`relative_difference`.
"""

from __future__ import annotations

import numpy as np

#: Two programs add up in different orders, so each is off in its own way; and the error is measured on a few images.
MULTIPLE = 10
#: What rounding alone may make of any model: a ViT's output is a sum of hundreds of rounded numbers.
FLOOR = 512 * float(np.finfo(np.float32).eps)
#: Beyond this a comparison would pass wrong graphs. A model that needs more cannot be checked in float32.
MOST = 0.05
#: Rounding of float64 where that of float32 is 1.
FLOAT64 = float(np.finfo(np.float64).eps / np.finfo(np.float32).eps)


def allowed(own_error: float | None) -> float:
    """The largest relative difference that passes, for a model's own float32 error; None: it is not known."""
    return min(max(FLOOR, MULTIPLE * (own_error or 0.0)), MOST)


def relative_difference(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Largest over images of max |candidate - reference| / max |reference|; NaN where either holds one."""
    rows = reference.reshape(len(reference), -1)
    scale = np.abs(rows).max(1)
    gap = np.abs(candidate.reshape(rows.shape) - rows).max(1)
    # max() passes NaN on, and NaN passes no tolerance.
    return float(np.max(gap / np.where(scale == 0, 1, scale)))
