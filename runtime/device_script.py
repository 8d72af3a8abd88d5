"""A script for a device that has TensorRT and no Python: it builds engines and times them with ``trtexec``.

It is POSIX sh and calls ``trtexec``, ``mkdir``, ``rm``, ``mv`` and ``cat``. What else tells of the device is asked if
it is there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import __version__
from ..core.choices import BUNDLE_TARGETS
from ..core.errors import UserError
from .trtexec import JETSON_PATH, RELEASES, Command

#: The script, the folder that it writes, and files in that.
SCRIPT, RESULTS, VERSION, DEVICE = "measure.sh", "results", "tensorrt.txt", "device.txt"
#: What a bundle says of itself.
RECORD = "bundle.json"
#: Options of ``trtexec`` that name a file which it writes.
_WRITES = "--saveEngine=*|--exportTimes=*|--exportProfile=*|--exportLayerInfo=*"

_HEAD = f"""#!/bin/sh
# Builds TensorRT engines of the ONNX files beside this script and times them. It needs sh and TensorRT's trtexec.
# sh {SCRIPT} [PATH OF TRTEXEC]
# TENSORRT=10 sh {SCRIPT}: where trtexec does not say its version.
# It writes the folder {RESULTS}: copy that back, beside {RECORD}, and type: vpruner profile BUNDLE

say() {{ printf '%s\\n' "$*"; }}
stop() {{
    printf '%s\\n' "{SCRIPT}: $*" >&2
    exit 2
}}

# What is done, its log, and the arguments of trtexec.
step() {{
    what=$1 log=$2
    shift 2
    say "$what"
    if ! "$trtexec" "$@" >"$log" 2>&1; then
        while IFS= read -r line; do
            case $line in *'[E]'* | *FAILED*) printf '  %s\\n' "$line" >&2 ;; esac
        done <"$log"
        stop "$what: trtexec failed, see {RESULTS}.part/$log"
    fi
    for word in "$@"; do
        case $word in
        {_WRITES})
            [ -s "${{word#*=}}" ] || stop "$what: trtexec wrote no ${{word#*=}}, see {RESULTS}.part/$log"
            ;;
        esac
    done
}}

# What the device says of itself, as far as it can: nothing here is a reason to stop.
fact() {{
    command -v "$1" >/dev/null 2>&1 || return 0
    say "## $*"
    "$@" 2>&1 || say "(exit code $?)"
}}
facts() {{
    say "# $1"
    fact uname -srm
    fact nvpmodel -q
    fact jetson_clocks --show
    fact nvidia-smi --format=csv \\
        --query-gpu=name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu
    for file in /etc/nv_tegra_release /proc/device-tree/model /sys/class/devfreq/*/cur_freq \\
        /sys/class/devfreq/*/max_freq /sys/class/thermal/thermal_zone*/temp; do
        [ -r "$file" ] || continue
        say "## $file"
        cat "$file" 2>/dev/null
        say ""
    done
}}

case $0 in */*) cd "${{0%/*}}" || stop "cannot enter its folder" ;; esac

trtexec=${{1:-${{TRTEXEC:-}}}}
if [ -n "$trtexec" ]; then
    command -v "$trtexec" >/dev/null 2>&1 || stop "there is no program $trtexec; give the path of trtexec"
elif command -v trtexec >/dev/null 2>&1; then
    trtexec=trtexec
elif [ -x {JETSON_PATH}/trtexec ]; then
    trtexec={JETSON_PATH}/trtexec
else
    stop "there is no trtexec on the PATH, nor in {JETSON_PATH}, where JetPack puts it (its package" \\
        "libnvinfer-bin); if it lies elsewhere: sh {SCRIPT} PATH_OF_TRTEXEC"
fi
# A path stays what it is when the folder changes.
case $trtexec in /*) ;; */*) trtexec=$PWD/$trtexec ;; esac

[ ! -e {RESULTS} ] || stop "{RESULTS} is there already: move it away first"
rm -rf {RESULTS}.part
mkdir {RESULTS}.part || stop "cannot write to $PWD"
cd {RESULTS}.part || stop "cannot enter {RESULTS}.part"

"$trtexec" --help >version.log 2>&1 || stop "$trtexec does not start, see {RESULTS}.part/version.log"
version=${{TENSORRT:-}}
[ -n "$version" ] || while IFS= read -r line; do
    case $line in *'[TensorRT v'*)
        version=${{line#*'[TensorRT v'}}
        version=${{version%%]*}}
        break
        ;;
    esac
done <version.log
# 8502 is 8.5.2, 100300 is 10.3.0.
case $version in
*[!0-9]*) unit= ;;
????) unit=1000 ;;
????? | ??????) unit=10000 ;;
*) unit= ;;
esac
release=$version
[ -z "$unit" ] || release=$((version / unit)).$((version % unit / 100)).$((version % 100))
"""

_TAIL = f"""
facts after >>{DEVICE} || stop "cannot write {DEVICE}"
cd .. || stop "cannot leave {RESULTS}.part"
mv {RESULTS}.part {RESULTS} || stop "cannot rename {RESULTS}.part to {RESULTS}"
say "Done. Copy the folder {RESULTS} back, beside {RECORD}, and type: vpruner profile BUNDLE"
"""
#: As sh matches it: 8502 is 8.5.2, 100300 is 10.3.0.
_PATTERNS = {"8": "8|8???", "10": "10|10????", "11": "11|11????"}


def device_script(commands: Mapping[str, Sequence[Command]]) -> str:
    """The script for the commands of some files.

    Args:
        commands: Of :func:`~vpruner.runtime.trtexec.trtexec_commands`, by label, for ``../FILE.onnx``; the baseline
            first. Their turns are taken in opposite orders, so that a device that warms up is not taken for a slow
            model.
    """
    releases = [one for one in RELEASES if any(one == each.release for each in next(iter(commands.values())))]
    known = " and ".join(filter(None, [", ".join(releases[:-1]), releases[-1]]))
    lines = [f'say "TensorRT $release"\nsay "$version" >{VERSION}', "facts before >" + DEVICE, "case $version in"]
    for release in releases:
        lines.append(f"{_PATTERNS[release]})")
        lines += [f"    {line}" for line in _steps(commands, release)]
        lines.append("    ;;")
    found = f"$trtexec is of TensorRT $release, and this script is for {known}"
    for target, (oldest, *_) in BUNDLE_TARGETS.items():
        if oldest not in releases:
            lines += [
                f"{_PATTERNS[oldest]})",
                f'    stop "{found}; write another bundle with: vpruner bundle --for {target}"',
                "    ;;",
            ]
    lines += [
        "*)",
        f"    stop \"$trtexec says that it is of TensorRT '$release', and this script is for {known};\" \\",
        f'        "if it is of one of these, say so: TENSORRT={releases[0]} sh {SCRIPT}"',
        "    ;;",
        "esac",
    ]
    return _HEAD + "\n".join(lines) + "\n" + _TAIL


def _steps(commands: Mapping[str, Sequence[Command]], release: str) -> list[str]:
    of_kind = {
        label: {kind: [c for c in found if (c.release, c.purpose) == (release, kind)] for kind in _KINDS}
        for label, found in commands.items()
    }
    labels, steps = list(commands), []
    for label in labels:
        steps += [_step(f"Building {label}", f"{label}.build.log", one) for one in of_kind[label]["build"]]
    turns = max(len(kinds["times"]) for kinds in of_kind.values())
    for turn in range(turns):
        for label in labels if turn % 2 == 0 else reversed(labels):
            what = f"Timing {label}, turn {turn + 1} of {turns}"
            steps.append(_step(what, f"{label}.times{turn + 1}.log", of_kind[label]["times"][turn]))
    for label in labels:
        steps += [_step(f"Timing the layers of {label}", f"{label}.layers.log", c) for c in of_kind[label]["layers"]]
    # The engines are what one deploys; what is copied back is small.
    engines = [w.partition("=")[2] for kinds in of_kind.values() for c in kinds["build"] for w in c.words if _SAVES(w)]
    return [*steps, *(f"mv -f {shlex.quote(f'./{engine}')} .. || stop 'cannot move an engine'" for engine in engines)]


_KINDS = ("build", "times", "layers")
_SAVES = re.compile("--saveEngine=").match


def _step(what: str, log: str, command: Command) -> str:
    return f"step {shlex.quote(what)} {shlex.quote(log)} {shlex.join(command.words[1:])}"


def readme(files: Sequence[str], seconds: float) -> str:
    """What is typed where, for the folder."""
    return f"""{" and ".join(files)} for TensorRT, written by vpruner {__version__}.

1. Copy this folder to the device. It needs TensorRT's own trtexec, and no Python.
2. Fix the clocks. On a Jetson: sudo nvpmodel -m MODE, then sudo jetson_clocks
3. Type: sh {SCRIPT}
   It builds the engines, times them for {seconds:g} seconds a turn and leaves the engines here.
4. Copy the folder {RESULTS} back to where vpruner is, beside {RECORD}, and type: vpruner profile FOLDER
"""


def read_version(path: Path) -> str:
    """``"10.3.0"`` from what the script wrote.

    Raises:
        UserError: It is no version.
    """
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if text in RELEASES:
        return text
    if not text.isdigit() or not 4 <= len(text) <= 6:
        raise UserError(f"{path} holds {text!r:.40}, expected a number such as 100300", f"run {SCRIPT} again")
    number = int(text)
    unit = 1000 if number < 10000 else 10000
    return f"{number // unit}.{number % unit // 100}.{number % 100}"


def read_device(path: Path) -> dict[str, str]:
    """What the device said of itself before and after: {"before nvpmodel -q": text}."""
    found: dict[str, list[str]] = {}
    when = name = ""
    for line in path.read_text(encoding="utf-8", errors="replace").replace("\0", "").splitlines():
        if line.startswith("# "):
            when = line[2:]
        elif line.startswith("## "):
            name = f"{when} {line[3:]}"
            found[name] = []
        elif name and line.strip():
            found[name].append(line.rstrip())
    return {name: "\n".join(lines)[:2000] for name, lines in found.items()}
