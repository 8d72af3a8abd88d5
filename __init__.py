"""vpruner: learn which tokens a Vision Transformer can do without, and ship the smaller static graph.

Importing this package imports nothing heavy: torch, timm, onnx, onnxruntime and tensorrt are extras that are imported
where they are used, and the names below when they are first asked for. ``docs/python.md`` is the guide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# No name is one of a package here (prune, export, ...): importing that package would put it in the name's place.
__all__ = [
    "ContentPlan", "DataSpec", "ExportSpec", "Exported", "Finished", "Geometry", "GraphError", "Images", "LearnSpec",
    "Measurements", "MethodSpec", "Model", "ModelSpec", "ParityError", "PlanError", "PrecisionSpec", "Preprocessing",
    "Pruned", "Sink", "TimingSpec", "TokenPlan", "UserError", "build_engine", "compare", "evaluate", "fold_plan",
    "open", "open_images", "open_model", "profile", "progress", "run",
]  # fmt: skip

if TYPE_CHECKING:
    from .api import Model, build_engine, compare, evaluate, fold_plan, open_model, profile, run
    from .core.content_plan import ContentPlan
    from .core.errors import GraphError, ParityError, PlanError, UserError
    from .core.plan import Geometry, TokenPlan
    from .core.preprocess import Preprocessing
    from .core.progress import Sink
    from .core.progress import reporting as progress
    from .core.specs import DataSpec, ExportSpec, LearnSpec, ModelSpec, PrecisionSpec, TimingSpec
    from .pipeline.export import Exported, MethodSpec
    from .pipeline.images import Images, open_images
    from .pipeline.pruned import Pruned
    from .report.measurements import Finished, Measurements
    from .runtime.opening import open

#: Module -> names that it is asked for.
_MODULES = {
    "api": "Model build_engine compare evaluate fold_plan open_model profile run",
    "core.content_plan": "ContentPlan",
    "core.errors": "GraphError ParityError PlanError UserError",
    "core.plan": "Geometry TokenPlan",
    "core.preprocess": "Preprocessing",
    "core.progress": "Sink progress",
    "core.specs": "DataSpec ExportSpec LearnSpec ModelSpec PrecisionSpec TimingSpec",
    "pipeline.export": "Exported MethodSpec",
    "pipeline.images": "Images open_images",
    "pipeline.pruned": "Pruned",
    "report.measurements": "Finished Measurements",
    "runtime.opening": "open",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOME[name]}", __name__), "reporting" if name == "progress" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
