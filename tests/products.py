"""Few cases of many: the fast run takes those that matter, ``make test-all`` takes the rest too."""

import itertools
from collections.abc import Collection, Sequence

import pytest


def sampled(cases: Sequence, fast: Collection) -> list:
    """All ``cases`` as parameters; those that are not in ``fast`` are nightly."""
    missing = [case for case in fast if case not in cases]
    assert fast and not missing, f"not among the cases: {missing}"
    return [case if case in fast else pytest.param(case, marks=pytest.mark.nightly) for case in cases]


def pairs(*axes: Sequence) -> list[tuple]:
    """Combinations in which any two values of two axes meet at least once; the first values come first.

    Greedy: of the product, the combination that brings the most new pairs, again and again.
    """
    product = list(itertools.product(*axes))
    places = list(itertools.combinations(range(len(axes)), 2))

    def met(case: tuple) -> set:
        return {(one, other, case[one], case[other]) for one, other in places}

    left, chosen = set().union(*map(met, product)), []
    while left:
        chosen.append(max(product, key=lambda case: len(met(case) & left)))
        left -= met(chosen[-1])
    return chosen
