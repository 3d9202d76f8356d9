"""A model's fingerprint follows what it computes, not where it lies."""

import json
import shutil
from dataclasses import replace

from siftline.scoring.engines import ModelSpec
from siftline.scoring.fingerprint import directory_digest, model_fingerprint


def test_fingerprint_is_of_contents_not_of_the_path(tiny_model, tmp_path, tiny):
    copy = tmp_path / "another" / "name"
    shutil.copytree(tiny_model, copy)
    spec = ModelSpec(str(tiny_model))

    def of(spec):
        return model_fingerprint(spec, "transformers", "1")

    first = of(spec)
    assert of(replace(spec, path=str(copy), device="cpu", batch_tokens=7)) == first
    (copy / "README.md").write_text("a model card")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": "/elsewhere"}))
    assert of(replace(spec, path=str(copy))) == first
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    others = [
        replace(spec, dtype="bfloat16"),
        replace(spec, template="{{ messages[0].content }}"),
        replace(spec, path=str(copy)),
        replace(spec, path=str(tiny.make_model(tmp_path / "seed1", seed=1))),
    ]
    prints = [first, *map(of, others), model_fingerprint(spec, "vllm", "1")]
    assert len(set(prints)) == len(prints)
    before = directory_digest(copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert directory_digest(copy) != before
