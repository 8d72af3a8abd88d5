from __future__ import annotations

import getpass
import json
import os
import platform
import sys
from pathlib import Path

from vpruner.core.environment import cpu_model_from_cpuinfo, environment, usable_cores

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9354 32-Core Processor

processor\t: 1
model name\t: something else
"""
ARM = """processor\t: 0
CPU implementer\t: 0x41
CPU part\t: 0xd42
"""


def test_environment_is_json_and_names_no_one():
    value = environment()
    text = json.dumps(value)
    assert value["python"] == platform.python_version() and value["cores_usable"] >= 1
    assert value["packages"]["numpy"] and value["vpruner"]
    for private in (platform.node(), str(Path.home()), os.getcwd(), sys.prefix, getpass.getuser()):
        if len(private) > 4:  # a user called "root" or a host called "a" occurs in other words
            assert private not in text


def test_environment_does_not_import_what_it_names(monkeypatch):
    for name in ("torch", "onnxruntime", "timm", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now would fail
    environment()


def test_cpu_model():
    assert cpu_model_from_cpuinfo(X86) == "AMD EPYC 9354 32-Core Processor"
    assert cpu_model_from_cpuinfo(ARM) == "ARM implementer 0x41 part 0xd42"
    assert cpu_model_from_cpuinfo("") is None


def test_usable_cores_follow_a_container_quota(monkeypatch):
    from vpruner.core import environment as module

    for quota, cores in (("150000 100000", 1), ("50000 100000", 1), ("max 100000", 8), (None, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
        monkeypatch.setattr(module, "_text", lambda path, quota=quota: quota)
        assert usable_cores() == cores
