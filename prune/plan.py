"""Token plans, under the name that programs of users import: see :mod:`vpruner.core.plan`."""

from ..core.plan import Geometry, TokenPlan

__all__ = ["Geometry", "TokenPlan"]
