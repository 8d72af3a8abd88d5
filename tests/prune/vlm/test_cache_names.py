"""Tokens are dropped alike whichever name the cache has: ``cache`` since transformers 5.24, before ``past_key_values``.

The names of the release that is not installed are put before the modules of the one that is, by signatures recorded
from both. Earlier releases themselves run in the last test.
"""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the vlm extra brings transformers")

from tiny_vlms import prompts, shared_vlm

from vpruner.prune.vlm import frame, saint
from vpruner.prune.vlm.parts import CACHE_NAMES, cache_in, cache_name

#: Release -> function -> its parameters there, without annotations. Those of 5.20 are those of 5.23.
RECORDED = {
    "5.23": {
        "LlamaModel": "self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, "
        "inputs_embeds=None, use_cache=None, **kwargs",
        "LlamaDecoderLayer": "self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, "
        "use_cache=False, position_embeddings=None, **kwargs",
        "LlamaAttention": "self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, "
        "**kwargs",
        "create_causal_mask": "config, inputs_embeds, attention_mask, past_key_values, position_ids=None, "
        "or_mask_function=None, and_mask_function=None, block_sequence_ids=None, layer_idx=None, "
        "allow_is_causal_skip=True",
    },
    "5.24": {
        "LlamaModel": "self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, "
        "use_cache=None, **kwargs",
        "LlamaDecoderLayer": "self, hidden_states, attention_mask=None, position_ids=None, cache=None, "
        "use_cache=False, position_embeddings=None, **kwargs",
        "LlamaAttention": "self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs",
        "create_causal_mask": "config, inputs_embeds, attention_mask, cache, position_ids=None, "
        "or_mask_function=None, and_mask_function=None, block_sequence_ids=None, layer_idx=None, "
        "allow_is_causal_skip=True",
    },
}
#: What the Makefile installs for the last test.
EARLIER = re.search(r"^TRANSFORMERS := (.*)", (Path(__file__).parents[3] / "Makefile").read_text(), re.M)[1].split()
PRUNED = [1, 3]


def renamed(values: dict, name: str) -> dict:
    return {name if key in CACHE_NAMES else key: value for key, value in values.items()}


def behind(original, parameters: str):
    """``original``, called through recorded ``parameters``; the other name of the cache is an error."""
    signature = inspect.signature(eval(f"lambda {parameters}: None"))
    own, theirs = cache_name(original), next(name for name in CACHE_NAMES if name in signature.parameters)

    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        # The first is the module, or a configuration.
        (_, first), *given = bound.arguments.items()
        given = dict(given)
        given.update(given.pop("kwargs", {}))
        assert not (set(CACHE_NAMES) - {theirs}) & set(given)
        return original(first, **renamed(given, own))

    call.__signature__ = signature
    return call


def speak(model, callers: str, release: str, patch) -> None:
    """Give the language model and all within the signatures of ``release``; it is called as ``callers`` would."""
    language = model.model.language_model
    modules = {"LlamaModel": language, "LlamaDecoderLayer": language.layers[0]}
    modules["LlamaAttention"] = language.layers[0].self_attn
    for name, module in modules.items():
        assert type(module).__name__ == name
        patch.setattr(type(module), "forward", behind(type(module).forward, RECORDED[release][name]))
    mask = behind(frame.create_causal_mask, RECORDED[release]["create_causal_mask"])
    patch.setattr(frame, "create_causal_mask", mask)

    def called_as(release: str, module, by_vpruner=lambda given: False) -> None:
        name = cache_name(eval(f"lambda {RECORDED[release]['LlamaModel']}: None"))

        def hook(module, args, given):
            return None if by_vpruner(given) else (args, renamed(given, name))

        patch.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    called_as(callers, language)
    for index, layer in enumerate(language.layers):
        called_as(release, layer)
        # In layers that drop tokens of a prompt; one token is decoded.
        called_as(
            release, layer.self_attn, lambda given, index=index: index in PRUNED and given["hidden_states"].shape[1] > 1
        )


@pytest.fixture
def patch(monkeypatch):
    undo = []
    monkeypatch.callback = undo.append
    yield monkeypatch
    for callback in undo:
        callback()


def decoded(model):
    batch = prompts([9, 5, 12], [1, 1, 2])
    with torch.inference_mode(), saint(model, "hybrid", keep=0.4, layers=PRUNED) as run:
        out = model.generate(
            **batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return torch.stack(out.logits), run.kv_bytes, [layer.keys.shape[2] for layer in cache_in(out).layers]


@pytest.mark.parametrize(("callers", "release"), [("5.23", "5.23"), ("5.24", "5.24"), ("5.23", "5.24")])
def test_a_cache_is_found_under_the_names_of_both_releases(callers, release, patch):
    model = shared_vlm("llava")
    expected, kv_bytes, lengths = decoded(model)
    speak(model, callers, release, patch)
    logits, kv_bytes_there, lengths_there = decoded(model)
    assert torch.equal(logits, expected)
    assert (kv_bytes_there, lengths_there) == (kv_bytes, lengths)
    assert lengths[-1] < lengths[0]


def test_the_release_that_is_installed_has_the_recorded_signatures():
    import transformers
    from transformers.models.llama import modeling_llama as llama

    release = transformers.__version__.rpartition(".")[0]
    if release not in {*RECORDED, "5.20"}:
        pytest.skip(f"the signatures of transformers {release} are not recorded")
    found = {name: inspect.signature(getattr(llama, name).forward) for name in ("LlamaModel", "LlamaDecoderLayer")}
    found["LlamaAttention"] = inspect.signature(llama.LlamaAttention.forward)
    found["create_causal_mask"] = inspect.signature(llama.create_causal_mask)
    for name, parameters in RECORDED["5.23" if release == "5.20" else release].items():
        bare = [part.replace(annotation=part.empty) for part in found[name].parameters.values()]
        recorded = inspect.signature(eval(f"lambda {parameters}: None")).parameters.values()
        assert bare == list(recorded), name


def test_a_cache_among_outputs():
    from transformers import DynamicCache

    cache = DynamicCache()
    for values in ({"cache": cache}, {"past_key_values": cache}, {"cache": None, "past_key_values": cache}):
        assert cache_in(values) is cache
    assert cache_in({"logits": 1}) is None
    with pytest.raises(TypeError, match="takes none of cache, past_key_values; it takes state"):
        cache_name(lambda state: None)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("release", EARLIER)
def test_earlier_releases_drop_tokens_alike(release, repository):
    """Every test of this folder, under another release."""
    folder = repository / ".transformers" / release
    if not folder.is_dir():
        pytest.skip(f"no .transformers/{release}; make test-all installs it")
    code = (
        "import sys, pytest, transformers; found = transformers.__version__; "
        f"assert found == '{release}', found; sys.exit(pytest.main(sys.argv[1:]))"
    )
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not nightly", "tests/prune/vlm"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


def test_the_least_release_is_among_those_that_are_tested(repository):
    least = re.search(r'^vlm = .*"transformers>=([\d.]+)"', (repository / "pyproject.toml").read_text(), re.M)[1]
    assert f"{EARLIER[0]}.".startswith(f"{least}.")
