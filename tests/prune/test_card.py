"""Any model card is opened or refused; the cases by name are in test_models.py."""

import json
import random
import shutil

import fuzz
import pytest

from vpruner.core import bundled
from vpruner.prune.models import open_model

#: What has been put into the arguments of a model to reach more than its architecture.
HOSTILE = {
    "pretrained": True,
    "pretrained_cfg": {"url": "http://127.0.0.1:9/x", "file": "/etc/passwd"},
    "pretrained_cfg_overlay": {"hf_hub_id": "a/b"},
    "checkpoint_path": "/etc/passwd",
    "cache_dir": "/tmp",
    "features_only": True,
    "device": "cuda",
    "dtype": "float16",
    "block_fn": "os.system",
    "norm_layer": "__import__",
    "embed_dim": 10**7,
    "depth": 10**9,
    "img_size": [10**9, 10**9],
    "patch_size": [1, 0],
    "num_heads": 0,
    "mlp_ratio": -4,
}


@pytest.mark.parametrize("seeds", fuzz.examples())
def test_any_card_is_opened_or_refused(seeds, tmp_path):
    card = json.loads(bundled.reference_card().read_text())
    # A depth and width at which a card that stays good costs little.
    card = {key: value for key, value in card.items() if key not in ("recipe", "top1", "sha256")}
    shutil.copy(bundled.reference_card().with_name(card["weights"]), tmp_path)
    path = tmp_path / "card.json"
    for seed in seeds:
        chance = random.Random(seed)
        changed = {**card, "args": dict(card["args"])}
        if chance.random() < 0.5:
            name = chance.choice(list(HOSTILE))
            changed["args"][name] = HOSTILE[name]
        if chance.random() < 0.3:
            changed = {**changed, "name": chance.choice(["vit_tiny_patch16_224", "resnet18", "hf-hub:a/b"])}
            del changed["class"]
        path.write_bytes(fuzz.mutated_json(changed, seed))
        with fuzz.survives(seed, tmp_path / "out"):
            open_model(str(path))
