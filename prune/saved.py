"""The state of a learning that may be killed: what every finished stage came to, in a folder of its own.

The folder holds ``stages.safetensors``, written whole after every stage, ``rearrange.pt``, the checkpoint of a
rearrangement between its batches of episodes, and the lock of the process that writes them. A learning that was killed
goes on after the last stage that it had finished, and comes to what it would have come to: every stage is a function of
the state before it, the images and the seed. What the state goes with is written into it, and compared before anything
is taken from it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.content_plan import ContentPlan
from ..core.errors import UserError
from ..core.files import atomic_path
from ..core.json_file import json_text, parse_json
from ..core.metadata import PREFIX
from ..core.plan import TokenPlan
from ..core.progress import remark
from ..core.text import first_line, option
from .calibration import Judgement
from .learned import Stage
from .ranks import launched
from .stages import State

#: Version of the state, and under what name it stands in the metadata of its file.
SCHEMA, KEY = 1, f"{PREFIX}learning"
#: The files of the folder.
STAGES, REARRANGEMENT, LOCK = "stages.safetensors", "rearrange.pt", ".lock"


class StateError(UserError):
    """A state that cannot be gone on from."""


@dataclass(eq=False)
class SavedState:
    """Where a learning keeps its state, and whether it goes on from what is there.

    As a context around the learning and what is made of it: the state is removed at its end, and kept if it does not
    get there, which is said.

    Raises:
        UserError: ``folder`` is something else than such a state.
    """

    folder: Path
    resume: bool = False
    _lock: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise UserError(
                f"{self.folder} is where the state of this run is kept, and it is no folder", "move that away"
            )
        foreign = [path.name for path in self.files() if path.name not in (STAGES, REARRANGEMENT) or path.is_dir()]
        if foreign:
            raise UserError(
                f"{self.folder} is where the state of this run is kept, and it holds {min(foreign)}", "move that away"
            )

    def files(self) -> list[Path]:
        """What lies in the folder, but for files that are being written."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return [path for path in found if not path.name.startswith(".")]

    @property
    def rearrangement(self) -> Path:
        return self.folder / REARRANGEMENT

    def take(self) -> None:
        """Keep other processes off the folder until the context is left or this process ends.

        Raises:
            UserError: Another process has it.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"{self.folder} is the state of a run that another process is busy with",
                "wait until that run has ended, or choose another output",
            ) from None
        self._lock = lock

    def begin(self) -> None:
        """Forget what an earlier learning left of a rearrangement, which would be taken for this one's."""
        self.rearrangement.unlink(missing_ok=True)

    def __enter__(self) -> SavedState:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not launched().first or self._lock is None:
            return
        self._lock.release()
        if error is None:
            shutil.rmtree(self.folder)
        elif self.files() and not isinstance(error, StateError):
            on = option("resume", True)
            remark(f"what was learned so far is kept in {self.folder}; to go on, run the same with {on}")

    def save(self, state: State, identity: Mapping[str, Any]) -> None:
        """Replace what is there.

        Args:
            identity: JSON values: what the state goes with.
        """
        from safetensors.torch import save_file

        kept: list[Mapping[str, Tensor]] = []

        def place(weights: Mapping[str, Tensor] | None) -> int | None:
            """The same tensors are written once, however many stages left them as they were."""
            if weights is None:
                return None
            found = next((index for index, other in enumerate(kept) if other is weights), len(kept))
            kept[found:] = kept[found:] or [weights]
            return found

        said = {
            "schema": SCHEMA,
            "identity": identity,
            "plan": state.plan.to_json(),
            "content": _json_of(state.content),
            "weights": place(state.weights),
            "judgement": _json_of(state.judgement),
            "stages": [
                {
                    "name": stage.name,
                    "method": stage.method,
                    "plan": stage.plan.to_json(),
                    "weights": place(stage.weights),
                    "kept": stage.kept,
                    "seconds": stage.seconds,
                    "judgement": _json_of(stage.judgement),
                    "note": stage.note,
                    "details": dict(stage.details),
                    "content": _json_of(stage.content),
                }
                for stage in state.stages
            ],
        }
        tensors = {f"{index}/{name}": value for index, weights in enumerate(kept) for name, value in weights.items()}
        if state.moments is not None:
            tensors["moments"] = torch.from_numpy(state.moments)
        with atomic_path(self.folder / STAGES) as temporary:
            if self._lock is None:
                self.take()
            contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(contiguous, temporary, {KEY: json_text(said)})

    def read(self, identity: Mapping[str, Any], like: Mapping[str, Tensor]) -> State | None:
        """What was saved; None where no stage was finished.

        Args:
            identity: What it must go with.
            like: State-dict name -> tensor of the model: weights come in their dtype and on their device.

        Raises:
            StateError: It is of another learning, or cannot be read.
        """
        path = self.folder / STAGES
        if not path.exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                said = parse_json((file.metadata() or {})[KEY], str(path), expected=dict)
                if said["schema"] != SCHEMA:
                    raise ValueError(f"schema {said['schema']}, expected {SCHEMA}")
                found = said["identity"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            different = [name for name in {**identity, **found} if found.get(name) != identity.get(name)]
            state = None if different else _state_of(said, tensors, like)
        except (SafetensorError, OSError, UserError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(
                f"{path} is not the state of a run: {first_line(error, 120)}",
                f"leave out {option('resume')} to begin anew",
            ) from None
        if different:
            name = different[0]
            raise StateError(
                f"{self.folder} is the state of another run, with {name} {found.get(name)!s:.24}; here it is "
                f"{identity.get(name)!s:.24}",
                f"leave out {option('resume')} to begin anew",
            )
        return state


def _json_of(value: Judgement | ContentPlan | None) -> Any:
    return None if value is None else value.to_json()


def _state_of(said: Mapping[str, Any], tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    kept: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, slash, name = key.partition("/")
        if slash:
            kept.setdefault(int(index), {})[name] = value.to(like[name])

    def judgement(value: Mapping[str, Any] | None) -> Judgement | None:
        return None if value is None else Judgement(**value)

    def content(value: Any) -> ContentPlan | None:
        return None if value is None else ContentPlan.from_json(value)

    def learned(part: Mapping[str, Any]) -> dict[str, Any]:
        """What a state and the record of a stage have in common."""
        return {
            "plan": TokenPlan.from_json(part["plan"]),
            "weights": None if part["weights"] is None else kept[part["weights"]],
            "content": content(part["content"]),
            "judgement": judgement(part["judgement"]),
        }

    plain = ("name", "method", "kept", "seconds", "note", "details")
    stages = tuple(Stage(**{name: part[name] for name in plain}, **learned(part)) for part in said["stages"])
    moments = tensors["moments"].numpy() if "moments" in tensors else None
    return State(**learned(said), moments=moments, stages=stages)
