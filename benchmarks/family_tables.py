"""The table of the rows of families.py."""

from __future__ import annotations

import re

#: Kind of work -> whether it can be masked in the files of a row.
KINDS = ("keys", "queries", "mlps")
EXPORTERS = {"dynamo": "dynamo", "torchscript": "TorchScript"}
#: Of files that are recorded.
OTHERS = {"tensorflow": "Keras on TensorFlow", "jax": "Keras on JAX", "torch": "Keras on PyTorch", "tf2onnx": "tf2onnx",
          "jax2onnx": "jax2onnx"}  # fmt: skip
HEADS = ("family", "models", "library", "exporters", "keys", "queries", "MLPs", "learns", "what is left whole, and why")
#: Where a reason names a node of one file.
NODE = re.compile(r",? (?:at|behind) node .*? \(\w+\)")


def families(rows: list[dict]) -> str:
    """One line for each family, in the order of the rows; libraries of which all is equal share one."""
    lines: dict[tuple, tuple[list[str], list[str]]] = {}
    for row in rows:
        models, libraries = lines.setdefault((row["family"], *_cells(row)), ([], []))
        models.append(row["models"])
        libraries.append(row["library"])
    table = [f"| {' | '.join(cells)} |" for cells in (HEADS, ["---"] * len(HEADS))]
    for (family, *cells), (models, libraries) in lines.items():
        table.append(f"| {' | '.join((family, '; '.join(models), ', '.join(libraries), *cells))} |")
    return "\n".join([*table, "", _caption(rows)])


def _cells(row: dict) -> tuple[str, ...]:
    """Exporters, keys, queries, MLPs, learns, why."""
    files = row["files"]
    good = [file for file in files if _works(file)]
    # Of files that differ, the table shows the best; the last column says which give less.
    best = max(good, key=_masked, default=None)
    if best is None:
        return _exporters(files), *["none"] * len(KINDS), "no", _why(row, max(files, key=_reached))
    counts = [_count(best[kind], row["blocks"]) for kind in KINDS]
    learns = [file["learns"] for file in good if _masked(file)]
    less = " and ".join(
        sorted({(EXPORTERS | OTHERS)[file["exporter"]] for file in good if _masked(file) < _masked(best)})
    )
    why = [_why(row, best), f"less from {less}" if less else ""]
    return _exporters(files), *counts, "yes" if learns and all(learns) else "no", "; ".join(filter(None, why))


def _works(file: dict) -> bool:
    return "found" in file and not {"geometry", "mask", "fold"} & set(file["problems"]) and _masked(file) > 0


def _masked(file: dict) -> int:
    return sum(file[kind] for kind in KINDS)


def _reached(file: dict) -> int:
    """How far a file came that does not work."""
    return 2 if "found" in file else "export" not in file["problems"]


def _exporters(files: list[dict]) -> str:
    """Those whose files onnxruntime runs, and those that were not tried."""
    parts = []
    for exporter, name in (EXPORTERS | OTHERS).items():
        own = [file for file in files if file["exporter"] == exporter]
        runs = [file["open_batch"] for file in own if "export" not in file["problems"]]
        if runs:
            only = "" if len(runs) == len(own) else ", open batch" if runs[0] else ", fixed batch"
            parts.append(f"{name}{only}")
        elif not own and exporter in EXPORTERS and files[0]["exporter"] not in (None, *OTHERS):
            parts.append(f"{name} not tried")
    return "; ".join(parts) or "none"


def _count(count: int, blocks: int) -> str:
    return "all" if count == blocks else "none" if not count else f"{count} of {blocks}"


def _why(row: dict, file: dict) -> str:
    """Why less than all is masked."""
    if "build" in file["problems"]:
        return f"the library does not make it: {file['problems']['build']}"
    if "export" in file["problems"]:
        return "no exporter writes a file that onnxruntime runs"
    problems = [f"{text.partition(': ')[2]}" for text in list(file["problems"].values())[:1]]
    found, blocks = file.get("found", 0), row["blocks"]
    stages = [f"{blocks - found} of {blocks} blocks are in other stages"] if 0 < found < blocks else []
    reasons = list(dict.fromkeys(NODE.sub("", reason) for reason in file.get("reasons", ())))
    return "; ".join(text.replace("|", r"\|") for text in (*stages, *reasons, *problems))


def _caption(rows: list[dict]) -> str:
    """What was tried, and with which versions."""
    packages = rows[-1]["environment"]["packages"]
    named = ", ".join(f"{name} {packages[name]}" for name in ("torch", "timm", "transformers", "onnx", "onnxruntime"))
    exporters = [file["exporter"] for row in rows for file in row["files"]]
    recorded = sum(exporter in OTHERS for exporter in exporters)
    others = f", and {recorded} files that Keras and exporters of JAX wrote" if recorded else ""
    folded = [file["folded"] for row in rows for file in row["files"] if "folded" in file]
    return (
        f"{len(rows)} tiny models with random weights, {len(exporters) - recorded} exports: by `torch.onnx.export` "
        "with `dynamo=True` (opset 20) and without (TorchScript, opset 17), with a fixed or an open "
        f"batch{others}; {named}. A random plan was folded into {len(folded)} of them. In onnxruntime the folded graph "
        f"differs from the masked one by at most {max(folded):.0e} of the largest number of an output."
    )
