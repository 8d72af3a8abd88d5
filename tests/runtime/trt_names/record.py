"""Write the names that a release of TensorRT has: ``python record.py OUT.json`` where ``import tensorrt`` works.

The files beside this script were made with it. 8.5.3 imports on a machine without a GPU (``pip install
tensorrt==8.5.3.1`` for Python 3.10; its plugin library wants cuBLAS and cuDNN at load time). Newer releases need their
libraries only once something is called, so nine functions that do nothing let their bindings load alone::

    pip download --no-deps --only-binary=:all: tensorrt_cu13_bindings==11.4.0.106 && unzip -d bindings *.whl
    for name in initLibNvInferPlugins getPluginRegistry getNvOnnxParserVersion getBuilderPluginRegistry \\
        createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL createInferRuntime_INTERNAL \\
        createInferRefitter_INTERNAL createInferBuilder_INTERNAL; do echo "int $name(void) { return 0; }"; done >stub.c
    for lib in nvinfer nvonnxparser nvinfer_plugin; do
        gcc -shared -fPIC -fno-builtin stub.c -Wl,-soname,lib$lib.so.11 -o lib$lib.so.11; done
    LD_LIBRARY_PATH=. PYTHONPATH=bindings/tensorrt_bindings python record.py 11.4.json 11.4.0.106

The bindings are then the module ``tensorrt`` itself, and their version is the second argument.
"""

import json
import sys

#: Enums of which all members are kept, with their numbers.
ENUMS = [
    "BuilderFlag",
    "DataType",
    "HardwareCompatibilityLevel",
    "LayerInformationFormat",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "ProfilingVerbosity",
    "TacticSource",
    "TensorIOMode",
    "TensorLocation",
    "DeviceType",
    "LayerType",
]
#: Classes of which all public attributes are kept.
CLASSES = [
    "Builder",
    "EngineInspector",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "ILogger",
    "IOptimizationProfile",
    "IProfiler",
    "IProgressMonitor",
    "IHostMemory",
    "INetworkDefinition",
    "ITensor",
    "ITimingCache",
    "Logger",
    "OnnxParser",
    "Runtime",
]


def public(value):
    return sorted(name for name in dir(value) if not name.startswith("_"))


def names(module, version):
    return {
        "version": version,
        "module": [name for name in public(module) if not name.islower() or name == "init_libnvinfer_plugins"],
        "enums": {
            name: {member: int(value) for member, value in getattr(module, name).__members__.items()}
            for name in ENUMS
            if hasattr(module, name)
        },
        "classes": {name: public(getattr(module, name)) for name in CLASSES if hasattr(module, name)},
    }


if __name__ == "__main__":
    import tensorrt

    version = sys.argv[2] if len(sys.argv) > 2 else tensorrt.__version__
    with open(sys.argv[1], "w", encoding="utf-8") as stream:
        json.dump(names(tensorrt, version), stream, indent=1, sort_keys=True)
        stream.write("\n")
