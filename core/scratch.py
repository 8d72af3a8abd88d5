"""Temporary files and folders whose names say whose they are, so that what a killed process left can be removed.

A name is ``.OUTPUT.vpruner-HOST-PID-BOOT-START.RANDOM``. HOST is a hash of the machine and of its space of process
numbers: of another machine on a shared file system, or of another container, it cannot be known what runs, and nothing
of theirs is touched. BOOT and START tell the process from a later one that got its number.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from .boundary import no_room_below

_MARKER = re.compile(r"vpruner-([0-9a-f]{8})-(\d+)-([0-9a-f]{8})-(\d+)\.")
#: Ends the name of a folder that stepped aside for a new one.
ASIDE = ".old"


def marker() -> str:
    """What the names of this process's temporary files hold."""
    pid = os.getpid()  # Asked each time: a forked process is another one.
    return f"vpruner-{_host()}-{pid}-{_boot()}-{_start_of(pid) or 0}."


class _Folder(tempfile.TemporaryDirectory):
    """One that says where there is no room left, which no user named."""

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if found := no_room_below(self.name, error):
            raise found from error


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder in the system's place for temporary files; those of dead processes are removed first."""
    place = Path(tempfile.gettempdir())
    remove_leftovers(place, "")
    return _Folder(prefix=f".{marker()}", dir=place)


def remove_leftovers(place: Path, name: str | None = None) -> None:
    """Remove from the folder ``place`` what dead processes of this machine and this user left there.

    A finished folder that had stepped aside when its process died goes back to its own name, if nothing is there.

    Args:
        name: Of the output that they were for; None: whatever they were for.
    """
    try:
        entries = [entry for entry in os.scandir(place) if entry.name.startswith(".") and ".vpruner-" in entry.name]
    except OSError:
        return
    # What stepped aside comes last: the name it goes back to is free then, if it ever is.
    for entry in sorted(entries, key=lambda entry: entry.name.endswith(ASIDE)):
        found = _MARKER.search(entry.name)
        if found is None:
            continue
        output = entry.name[1 : found.start()].removesuffix(".")
        if (name is not None and output != name) or _may_live(*found.groups()) or not _is_mine(entry):
            continue
        with suppress(OSError):  # Another process may do the same at the same time.
            if entry.name.endswith(ASIDE) and output and not os.path.lexists(place / output):
                os.rename(entry.path, place / output)
            elif entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


def _may_live(host: str, pid: str, boot: str, start: str) -> bool:
    """Whether the process that made a name may be running; certain only for this machine since it was started."""
    if host != _host():
        return True
    if boot != _boot():
        return False
    if os.name == "nt":  # os.kill would end the process there.
        return True
    if not os.path.isdir("/proc/self"):
        try:
            os.kill(int(pid), 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            return True
        return True
    return _start_of(int(pid)) == int(start)


def _is_mine(entry: os.DirEntry[str]) -> bool:
    """In a place that others write to, a name proves nothing."""
    try:
        return not hasattr(os, "getuid") or entry.stat(follow_symlinks=False).st_uid == os.getuid()
    except OSError:
        return False


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None for one that is over or not to be seen."""
    try:
        # The second field, the program's name, is in brackets and may hold any sign.
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None


@functools.cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return "00000000"


@functools.cache
def _host() -> str:
    known = [platform.node()]
    for read in (lambda: Path("/etc/machine-id").read_text().strip(), lambda: os.readlink("/proc/self/ns/pid")):
        try:
            known.append(read())
        except OSError:
            known.append("")
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]
