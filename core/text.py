"""Words in messages: counts, and names of options that a Python caller and a command line spell differently.

A message of the library never says ``--data``: its reader may have called a function. It says ``option("data")``,
which :func:`as_python` turns into ``'data'`` and the command line into ``--data``. ``command("prune", "MODEL")``
stands for ``model.prune(...)`` or ``vpruner prune MODEL``. Marks live in an error and on the way to
:func:`vpruner.core.progress.remark` only: text that is returned or written to a file goes through
:func:`vpruner.core.progress.words` first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_OPTION, _COMMAND, _END = "\x02", "\x03", "\x04"
_CONTROL = re.compile(f"[{_OPTION}{_COMMAND}{_END}]")
#: Around JSON, which writes control characters, such as a file's name may hold, as letters.
_MARK = re.compile(rf'([{_OPTION}{_COMMAND}])(\["[^{_OPTION}{_COMMAND}{_END}]*\]){_END}')
#: Words that stand for a value.
STAND_INS = frozenset(
    {"DENSE", "DIR", "FILE", "FOLDER", "IMAGES", "MAX", "MIN", "MODEL", "MODEL_FOLDER", "N", "OPT", "PLAN"}
    | {"FLOAT32_FILE_OF_THE_SAME_PLAN"}
)
#: What is called in Python for a command.
IN_PYTHON = {
    "run": "vpruner.run",
    "prune": "model.prune",
    "export": "model.export",
    "fold": "vpruner.fold_plan",
    "table": "vpruner.pipeline.table.make_table",
    "evaluate": "vpruner.evaluate",
    "profile": "vpruner.profile",
    "compare": "vpruner.compare",
    "build": "vpruner.build_engine",
    "predict": "vpruner.open(...).predict",
    "inspect": "vpruner.export.inspect.inspect_file",
    "check": "vpruner.export.check.check",
    "diagnose": "vpruner.pipeline.diagnose.diagnose",
    "convert": "vpruner.pipeline.convert.convert_checked",
}
#: Options that are no arguments by name of those calls: images come first, and results have a method to save them.
_NOT_IN_PYTHON = {"prune": {"data", "output"}, "export": {"output"}, "table": {"output"}}
#: Those that are arguments of ``open_model`` where a command is a method of the model.
_OF_MODEL = ("weights", "pretrained", "model_args")


def option(name: str, value: object = None) -> str:
    """A mark for an argument, by its name in Python: ``option("data", "DIR")`` is ``--data DIR`` on a command line.

    Args:
        name: In Python, as in ``eval_data``.
        value: What to give it, if that is to be said: True or False for a flag, one of :data:`STAND_INS` for a word
            that stands for a value.
    """
    return f"{_OPTION}{_encoded([name, value])}{_END}"


def command(name: str, *arguments: object, **options: object) -> str:
    """A mark for a command: ``command("prune", "MODEL", output="plan.json")`` is ``vpruner prune MODEL -o plan.json``.

    Args:
        arguments: What stands after the command, in order.
        options: Values by the Python name of their option, as in :func:`option`.
    """
    return f"{_COMMAND}{_encoded([name, [str(value) for value in arguments], list(options.items())])}{_END}"


def _encoded(value: object) -> str:
    return json.dumps(value, default=lambda other: other.item() if hasattr(other, "item") else str(other))


def translate(
    text: str, option: Callable[[str, Any], str], command: Callable[[str, list[str], dict[str, Any]], str]
) -> str:
    """Put words for every mark: ``option(name, value)``, ``command(name, arguments, options)``."""

    def words(match: re.Match) -> str:
        name, *rest = json.loads(match[2])
        return option(name, rest[0]) if match[1] == _OPTION else command(name, rest[0], dict(rest[1]))

    return _CONTROL.sub("?", _MARK.sub(words, text))


def as_python(text: str) -> str:
    """``text`` as a Python caller reads it: ``'data'``, ``data=DIR``, ``model.prune(..., select="content")``."""
    return translate(text, _argument, _call)


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(map(_literal, value))}{',' * (len(value) == 1)})"
    if not isinstance(value, str):
        return str(value)
    return value if value in STAND_INS else json.dumps(value, ensure_ascii=False)


def _argument(name: str, value: Any) -> str:
    return f"'{name}'" if value is None else f"{name}={_literal(value)}"


def _call(name: str, arguments: list[str], options: dict[str, Any]) -> str:
    called, left_out = IN_PYTHON.get(name, name), _NOT_IN_PYTHON.get(name, ())
    concrete = all(value != "..." and value.partition(".")[0] not in STAND_INS for value in arguments)
    shown = [_literal(value) for value in arguments] if arguments and concrete else ["..."]
    if called.startswith("model."):  # A method of the model that the command opens.
        opening = [_argument(key, options[key]) for key in _OF_MODEL if key in options]
        if opening or shown != ["..."]:
            called = f"vpruner.open_model({', '.join([*shown, *opening])}){called[5:]}"
        shown, left_out = ["..."], {*left_out, *_OF_MODEL}
    given = [_argument(key, value) for key, value in options.items() if key not in left_out]
    return f"{called}({', '.join([*shown, *given])})"


def counted(count: int, what: str) -> str:
    """``"1 image"``, ``"2,000 images"``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of another package's message, for a message of ours; the type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def onnxruntime_says(error: BaseException) -> str:
    """onnxruntime's message in one line, without its code and without the path, which the message of ours names."""
    text = " ".join(str(error).split()) or type(error).__name__
    # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from x.onnx failed:Protobuf parsing failed."
    text = text.rpartition("[ONNXRuntimeError] : ")[2].split(" : ", 2)[-1]
    text = re.sub("^Load model from .*? failed:(?:Fatal error: )?", "", text)
    # "/onnxruntime_src/.../model_load_utils.h:46 void onnxruntime::...(...) ONNX Runtime only *guarantees* ..."
    return re.sub(r"^/\S+\.(?:h|cc|cpp):\d+ .*?\) (?=[A-Z])", "", text)[:300].rstrip(".")


def openvino_says(error: BaseException) -> str:
    """OpenVINO's message in one line, without the places in its source."""
    # "Exception from src/inference/src/cpp/core.cpp:84:\nCheck 'false' failed at src/frontends/...cpp:151:\n..."
    text = re.sub(r"Exception from \S+:\d+:|\bCheck '.*' failed at \S+:\d+:", "", str(error))
    # "FrontEnd API failed with OpConversionFailure:\nModel wasn't fully converted.\nSummary:\n-- No conversion ..."
    text = re.split(r"FrontEnd API failed with \w+:|\nSummary:|\n-- ", text)[-1]
    text = re.sub(r'"/\S*/([^/"]+)"', r"\1", text)  # Its own libraries.
    return " ".join(text.split())[:300].rstrip(".") or type(error).__name__
