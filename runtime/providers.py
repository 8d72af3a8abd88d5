"""Execution providers of onnxruntime: those that it was built with, and those of other packages, which it loads.

A provider of another package is a shared library, which onnxruntime calls a plugin. It is registered once in a process,
its devices are asked for, and a session runs on one of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from ..core.choices import PLUGINS, PROVIDERS
from ..core.errors import UserError
from ..core.json_file import json_text
from ..core.text import first_line, onnxruntime_says, option

#: What brings a provider that is missing.
_INSTALL = {
    "cpu": "pip install 'vpruner[cpu]'",
    "cuda": "pip uninstall onnxruntime && pip install 'vpruner[gpu]', on a machine with an NVIDIA GPU",
    "tensorrt": "pip uninstall onnxruntime && pip install 'vpruner[gpu]' and the TensorRT that it was built for",
    **{
        name: f"pip install {package.replace('_', '-')}, then: {option('provider', f'{name}={package}')}"
        for name, package in PLUGINS.items()
    },
}
#: Kinds of devices that a provider may offer, in onnxruntime's words.
_DEVICES = ("cpu", "gpu", "npu")
_LIBRARY_SUFFIXES = (".so", ".dll", ".dylib")
_BUILT_IN = {name: full for name, full in PROVIDERS.items() if name not in PLUGINS}
#: How systems say that a library needs another one, which is not there.
_NEEDS_ANOTHER = re.compile("cannot open shared object|Library not loaded|LoadLibrary failed with error 126")
#: Resolved path of a library that this process registered -> names of the providers in it.
_registered: dict[Path, tuple[str, ...]] = {}
#: Name that the user gave -> what it stood for: later sessions may leave the library out.
_sources: dict[str, str] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Provider:
    """Where a session runs.

    Attributes:
        name: What results call it: ``"cpu"``, ``"openvino"``, ``"openvino:gpu"``.
        full: onnxruntime's name of it, as far as it is known without asking.
        options: Of the provider.
        source: Library or package that carries it; None for one that onnxruntime was built with.
        kind: Of the device, of :data:`_DEVICES`; None: the first that the library lists.
        device: onnxruntime's device of a plugin, once :func:`found_providers` has asked.
    """

    name: str
    full: str
    options: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    kind: str | None = None
    device: Any = None


def provider_name(name: str) -> str:
    """onnxruntime's name of a provider: ``"cuda"`` -> ``"CUDAExecutionProvider"``; full names stay."""
    if name.lower() in PROVIDERS:
        return PROVIDERS[name.lower()]
    if _is_full(name):
        return name
    raise UserError(
        f"there is no provider {name!r}",
        f"known are {', '.join(PROVIDERS)} and onnxruntime's own names; one of another package is NAME=PACKAGE",
    )


def _is_full(name: str) -> bool:
    """A library may have several: ``"OpenVINOExecutionProvider.AUTO"`` is one."""
    return name.partition(".")[0].endswith("ExecutionProvider")


def short_provider(name: str) -> str:
    """``"CUDAExecutionProvider"`` -> ``"cuda"``; unknown names stay."""
    return next((short for short, full in PROVIDERS.items() if full == name), name)


def wanted_providers(providers: Any) -> list[Provider]:
    """What ``providers`` of a session asks for, with the CPU last; nothing is loaded yet.

    Raises:
        UserError: It is no provider, or no list of them.
    """
    if providers is None:
        providers = ["cpu"]
    elif isinstance(providers, str) or _is_pair(providers):
        providers = [providers]
    expected = "expected a name such as 'cpu', (name, options), or a list of these"
    if not isinstance(providers, Iterable):
        raise UserError(f"providers is {providers!r}", expected)
    result: dict[str, Provider] = {}
    for item in providers:
        name, options = item if _is_pair(item) else (item, {})
        if not isinstance(name, str):
            raise UserError(f"a provider is {item!r}", expected)
        provider = _wanted(name, dict(options))
        result[provider.full] = provider
    result.setdefault(PROVIDERS["cpu"], Provider("cpu", PROVIDERS["cpu"]))
    return list(result.values())


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping)


def short_name(provider: str | tuple[str, Mapping[str, Any]]) -> str:
    """What results call a provider: ``("openvino:gpu=libov.so", {...})`` -> ``"openvino:gpu"``."""
    return wanted_providers([provider])[0].name


def _wanted(text: str, options: dict[str, Any]) -> Provider:
    label, given, source = text.partition("=")
    name, colon, kind = label.partition(":")
    if given:
        _check_given(text, name, source)
    if colon and kind not in _DEVICES:
        raise UserError(f"the provider {label!r} names the device {kind!r}", f"expected one of {', '.join(_DEVICES)}")
    source = source or _sources.get(name.lower(), "")
    if not source:
        full = provider_name(name)
    elif (full := PROVIDERS.get(name.lower(), name)) == name and not _is_full(name):
        full = name.lower()
    if full == PROVIDERS["cpu"] and options:
        raise UserError(
            f"the provider cpu takes no options, found {', '.join(options)}", "leave them out, or name another provider"
        )
    return Provider(f"{short_provider(full)}{colon}{kind}", full, options, source or None, kind or None)


def _check_given(text: str, name: str, source: str) -> None:
    """Refuse a NAME=LIBRARY under whose name rows would be taken for those of another provider."""
    expected = "expected NAME=LIBRARY, such as openvino=onnxruntime_ep_openvino, or NAME alone"
    if not (name and source):
        raise UserError(f"{option('provider', text)} has no {'library' if name else 'name'}", expected)
    if not re.fullmatch(r"[A-Za-z][\w.-]*", name):
        raise UserError(f"{option('provider', text)}: {name!r} is not one word of letters, digits and _.-", expected)
    if name.lower() in _BUILT_IN or name in _BUILT_IN.values():
        raise UserError(
            f"{option('provider', text)}: {name} is a provider of onnxruntime's own",
            "choose another name for the one in this library, which results will carry",
        )


def found_providers(ort: ModuleType, wanted: Sequence[Provider]) -> list[Provider]:
    """The same, with the names and devices of those that are plugins; registers their libraries.

    Raises:
        UserError: onnxruntime lacks one, a library cannot be loaded or offers no device, or onnxruntime loads none.
    """
    found = []
    for provider in wanted:
        if provider.source is not None:
            found.append(_plugin(ort, provider))
        elif device := _registered_elsewhere(ort, provider):
            found.append(_on(provider, device))
        elif provider.kind or provider.full not in ort.get_available_providers():
            built_with = f"install an onnxruntime that was built with {provider.full}"
            raise UserError(
                f"the installed onnxruntime has no provider {provider.name!r}, only "
                f"{', '.join(map(short_provider, ort.get_available_providers()))}",
                _INSTALL.get(short_provider(provider.full), built_with),
            )
        else:
            found.append(provider)
    if any(provider.full == PROVIDERS["cuda"] for provider in found) and hasattr(ort, "preload_dlls"):
        # Finds the CUDA and cuDNN libraries that pip installed, which are on no library path. It prints what it does
        # not find instead of raising; whether the provider came up is asked afterwards.
        with redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    return found


def missing_libraries(provider: Provider) -> str:
    """What to do where onnxruntime has a provider and does not run on it."""
    if provider.device is not None:
        return "check what the library needs; or pass providers='cpu'"
    install = _INSTALL.get(short_provider(provider.full), "install its libraries")
    return f"check the driver and libraries; {install}; or pass providers='cpu'"


# -- plugins ----------------------------------------------------------------------------------------------------------


def _plugin(ort: ModuleType, provider: Provider) -> Provider:
    library, preferred = _library(str(provider.source))
    if not hasattr(ort, "register_execution_provider_library") or not hasattr(
        ort.SessionOptions, "add_provider_for_devices"
    ):
        raise UserError(
            f"onnxruntime {ort.__version__} loads no providers of other packages", "pip install -U 'onnxruntime>=1.23'"
        )
    with _lock:
        devices = _devices(ort, library)
        if not devices and library not in _registered:
            _registered[library] = _register(ort, library, preferred or provider.full)
            devices = _devices(ort, library)
    names = list(dict.fromkeys(device.ep_name for device in devices))
    if not names:
        raise UserError(
            f"{provider.name}: onnxruntime {ort.__version__} loaded {library} and got no device from it; it lists "
            f"{_listed(ort.get_ep_devices())}",
            "check that the device is in this machine, with its driver and what the package asks for; or pass "
            "providers='cpu'",
        )
    if _is_full(provider.full) and provider.full not in names:
        raise UserError(f"{library} has no {provider.full}, only {', '.join(names)}", "give what it has another name")
    full = next((name for name in (provider.full, preferred) if name in names), names[0])
    kinds = [device for device in devices if device.ep_name == full and provider.kind in (None, _kind(device))]
    if not kinds:
        raise UserError(
            f"{provider.name}: {library} offers no such device, only {_listed(devices)}",
            "name another, or leave the device out",
        )
    _sources[provider.name.partition(":")[0].lower()] = str(provider.source)
    return _on(provider, kinds[0])


def _on(provider: Provider, device: Any) -> Provider:
    options = {name: str(value) for name, value in provider.options.items()}
    return Provider(provider.name, device.ep_name, options, provider.source, provider.kind, device)


def _registered_elsewhere(ort: ModuleType, provider: Provider) -> Any:
    """A device of a library that the program registered itself: onnxruntime takes it by its device only, and a session
    that names the provider would silently be one of the CPU."""
    for device in ort.get_ep_devices() if hasattr(ort, "get_ep_devices") else ():
        fits = device.ep_name == provider.full and provider.kind in (None, _kind(device))
        if fits and "library_path" in dict(device.ep_metadata):
            return device
    return None


def _library(source: str) -> tuple[Path, str | None]:
    """The library that ``source`` names or carries, and the provider that its package names first."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.resolve(), None
    if path.suffix.lower() in _LIBRARY_SUFFIXES or len(path.parts) > 1:
        raise UserError(f"{source}: no such file", "expected the shared library of an execution provider")
    module = _module(source)
    if module is None:
        known = source.replace("-", "_") in PLUGINS.values()
        raise UserError(
            f"{source} is neither a file nor an installed package",
            f"pip install {source.replace('_', '-')}"
            if known
            else "give the path of the library, or the name of an installed package",
        )
    try:
        package = importlib.import_module(module)
        library = Path(package.get_library_path()).resolve()
        preferred = package.get_ep_name() if hasattr(package, "get_ep_name") else None
    except AttributeError:
        raise UserError(
            f"the package {source} does not say which execution provider it carries (get_library_path)",
            "name its shared library instead",
        ) from None
    except Exception as error:
        raise UserError(f"the package {source} is of no use: {first_line(error)}", "install it again") from None
    return library, preferred


def _module(source: str) -> str | None:
    """The module to import for a package, by its own name or by that of its distribution."""
    name = source.replace("-", "_")
    if not name.isidentifier():
        return None
    if importlib.util.find_spec(name) is not None:
        return name
    try:
        top = metadata.distribution(source).read_text("top_level.txt")
    except metadata.PackageNotFoundError:
        return None
    return top.split()[0] if top else None


def _register(ort: ModuleType, library: Path, name: str) -> tuple[str, ...]:
    """Register a library; the names that onnxruntime lists since."""
    before = {device.ep_name for device in ort.get_ep_devices()}
    try:
        ort.register_execution_provider_library(name, str(library))
    except Exception as error:
        said = onnxruntime_says(error).replace(f"Failed to load library {library} with error: ", "")
        raise UserError(
            f"onnxruntime {ort.__version__} cannot load {library}: {said}",
            "install what it names"
            if _NEEDS_ANOTHER.search(said)
            else "it is no shared library of an execution provider, or it was built for another onnxruntime",
        ) from None
    return tuple(device.ep_name for device in ort.get_ep_devices() if device.ep_name not in before)


def _devices(ort: ModuleType, library: Path) -> list[Any]:
    """onnxruntime's devices of a library. Early releases do not say which library a device is of."""
    devices = list(ort.get_ep_devices())
    paths = [dict(device.ep_metadata).get("library_path") for device in devices]
    ours = [one for one, path in zip(devices, paths, strict=True) if path and Path(path).resolve() == library]
    return ours or [device for device in devices if device.ep_name in _registered.get(library, ())]


def _kind(device: Any) -> str:
    """``"cpu"``, ``"gpu"`` or ``"npu"``."""
    return str(device.device.type).rpartition(".")[2].lower()


def _listed(devices: Sequence[Any]) -> str:
    names = (f"{short_provider(one.ep_name)} on {_kind(one)} ({one.device.vendor or 'unknown'})" for one in devices)
    return ", ".join(names) or "no device"


@contextmanager
def logged_by(ort: ModuleType, provider: Provider) -> Iterator[int]:
    """How severe a message has to be for the log of a session, on onnxruntime's scale: 2 warning, 3 error, 4 fatal.

    What is an error arrives as an exception, and becomes one line; the log would say it a second time. But of the
    providers that onnxruntime was built with, the log is the only place that says why a library did not load. A plugin
    writes to the log of the process, whose level cannot be asked for: afterwards it is onnxruntime's own again.
    """
    if provider.device is None:
        yield 4 if provider.full == PROVIDERS["cpu"] else 3
        return
    ort.set_default_logger_severity(4)
    try:
        yield 4
    finally:
        ort.set_default_logger_severity(2)


def add_plugins(settings: Any, providers: Sequence[Provider], threads: int | None) -> None:
    """Put providers into the options of a session, where one of them is a plugin; the CPU is always last anyway."""
    for provider in providers:
        if provider.device is not None:
            settings.add_provider_for_devices([provider.device], _plugin_options(provider, threads))
        elif provider.full != PROVIDERS["cpu"]:
            settings.add_provider(provider.full, {name: str(value) for name, value in provider.options.items()})
    # So that unassigned_nodes can ask afterwards; releases that do not know it pass over it.
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")


def _plugin_options(provider: Provider, threads: int | None) -> dict[str, str]:
    """Options of a plugin that make it do what was asked for.

    OpenVINO reads neither the session's number of threads nor its own ``num_of_threads`` (1.8.1), and on processors
    with BF16 instructions it computes in bfloat16: on a tiny model that moved the logits by 5e-3 of the largest, and by
    5e-7 once it was told not to. What the caller says counts.
    """
    options = dict(provider.options)
    openvino = provider.full.partition(".")[0] == PROVIDERS["openvino"] and _kind(provider.device) == "cpu"
    if openvino and "load_config" not in options:
        # As a session of OpenVINO itself has it.
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            config.update(INFERENCE_NUM_THREADS=threads, ENABLE_CPU_PINNING=False)
        chooser = provider.full.partition(".")[2]  # "AUTO", which hands its devices' options on.
        options["load_config"] = json_text(
            {chooser: {"DEVICE_PROPERTIES": {"CPU": config}}} if chooser else {"CPU": config}
        )
    return options


def refuse_unused(session: Any, provider: Provider, path: str | os.PathLike) -> None:
    """A plugin that takes no node leaves all of the graph to the CPU, and a time measured would be the CPU's.

    Raises:
        UserError: It takes none.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return
    taken = {part.ep_name: len(part.get_nodes()) for part in session.get_provider_graph_assignment_info()}
    # Nothing is recorded where the graph has no node left once its constants are folded.
    if taken and provider.full not in taken:
        raise UserError(
            f"{path}: {provider.name} takes none of the {sum(taken.values())} nodes, the CPU would run them all",
            "pass providers='cpu', or write the graph for this provider",
        )
