"""Output folders and files: checked before any work, finished in one step."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import UserError
from ..core.files import scratch_beside, what_is_there, written_to
from ..core.ours import is_ours
from ..core.scratch import ASIDE, remove_leftovers
from ..core.text import option

#: What a run writes; a new run may replace a folder that holds nothing else.
RUN_FILES = re.compile(
    r"(plan\.json|(dense|tuned|pruned(\.(fp16|bf16|int8|int8-dynamic))?)\.onnx(\.\w+\.data)?|model\.safetensors|results\.jsonl"
    r"|report\.(html|md))"
)


@contextmanager
def finished_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``output`` when the block succeeds and vanishes when it does not.

    Raises:
        UserError: ``output`` holds something (without ``force``) or something that no run writes (with it), is the
            current folder, or cannot be made.
    """
    output = output.resolve()  # A link stays a link: what it points to is replaced.
    if Path.cwd().is_relative_to(output):
        raise UserError(
            f"{output} is the folder you are in",
            f"choose a folder of its own with {option('output')}, such as runs/mine",
        )
    remove_leftovers(output.parent, output.name)
    check_free(output, force=force)
    with scratch_beside(output, folder=True) as scratch:
        yield scratch
        check_free(output, force=force)  # Again: another run may have finished there in the meantime.
        scratch.chmod(0o755)  # mkdtemp makes private folders.
        # The old folder steps aside until the new one stands: nothing that fails in between loses both.
        aside = scratch.with_name(scratch.name + ASIDE)
        if output.exists():
            output.rename(aside)
        scratch.replace(output)
        shutil.rmtree(aside, ignore_errors=True)


def check_free(output: Path, *, force: bool) -> None:
    """Refuse an output folder that would cost the user anything."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(
            f"{output} is {'a file' if output.is_file() else what_is_there(output)}",
            f"choose another folder with {option('output')}",
        )
    found = sorted(output.iterdir())
    if found and not force:
        raise UserError(
            f"{output} exists already",
            f"choose another folder with {option('output')}, or replace it with {option('force', True)}",
        )
    refuse_foreign(output, [path for path in found if not (RUN_FILES.fullmatch(path.name) and is_ours(path))], "run")


def refuse_foreign(output: Path, foreign: Sequence[Path], what: str) -> None:
    """Refuse a folder with files that no ``what`` wrote, be it under a name of our own."""
    if foreign:
        raise UserError(
            f"{output} holds {foreign[0].relative_to(output)}, which no {what} wrote",
            f"choose another folder with {option('output')}, or move that away",
        )


def check_output(
    output: Path,
    suffix: str | Sequence[str],
    *inputs: str | Path | None,
    name: str = "output",
    known: bool = False,
) -> None:
    """Refuse, before any work, a file that cannot be written, that the command still needs, or that is not ours.

    Args:
        output: The file to write.
        suffix: What its name must end in, or several of which one; empty: whatever the user likes.
        inputs: Files the command reads; None for those not given.
        name: Of the argument that the user named it with.
        known: Whether the command makes sure by itself that what is there is its own, or adds to it.

    Raises:
        UserError: Says which.
    """
    suffixes = [suffix] if isinstance(suffix, str) else list(suffix)
    ending = " or ".join(suffixes)
    file = f"a {ending} file" if ending else "a file"
    if ending and output.suffix.lower() not in suffixes:
        raise UserError(f"{output} does not end in {ending}", f"name {file} with {option(name)}")
    if output.is_dir():
        raise UserError(f"{output} is a folder", f"name {file} with {option(name)}")
    for path in inputs:
        if path is not None and Path(path).exists() and output.exists() and output.samefile(path):
            raise UserError(f"{output} is read by this command", f"choose another name with {option(name)}")
    target = written_to(output)
    if not known and target.exists() and not is_ours(output):  # By its own name: a link's target may have none.
        raise UserError(
            f"{output} is there already, and vpruner did not write it",
            f"choose another name with {option(name)}, or move it away",
        )
    place = next(parent for parent in target.absolute().parents if parent.exists())
    try:
        # Tried, not asked for: to the superuser every folder seems writable, /proc too.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError:
        raise UserError(f"cannot write to {place}", f"choose another place with {option(name)}") from None
