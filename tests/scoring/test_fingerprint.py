"""A model's fingerprint follows what it computes, not where it lies."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest

from siftline.scoring.engines.base import ENGINES, ModelSpec, Server
from siftline.scoring.fingerprint import directory_digest, model_digest, model_fingerprint

SERVER = Server("http://127.0.0.1:1/v1")


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


def test_a_revision_counts_for_every_engine_and_its_absence_changes_nothing(tiny_model):
    for engine in ENGINES:
        server = SERVER if engine == "server" else None
        if engine == "sentence-transformers":
            continue  # another layout of files
        spec = ModelSpec(str(tiny_model), engine=engine, server=server)
        prints = {
            model_fingerprint(replace(spec, revision=revision), engine, "1")
            for revision in (None, "a", "b")
        }
        assert len(prints) == 3
        # The formula of the first release: stored scores are found again.
        parts = {
            "model": directory_digest(tiny_model),
            "adapter": None,
            "dtype": "float32",
            "template": None,
            "backend": engine,
            "version": "1",
        }
        old = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        assert model_fingerprint(spec, engine, "1") == old


def test_only_a_server_may_lack_weights_and_then_needs_a_revision(tiny_model, tiny, tmp_path):
    folder = tmp_path / "tokenizer"
    tiny.make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    bare = ModelSpec(str(folder), engine="server", server=SERVER)
    for spec in (bare, replace(bare, revision="")):
        with pytest.raises(ValueError, match=r"has no weights.*set the model's revision") as error:
            model_fingerprint(spec, "server", "1")
        assert "\n" not in str(error.value)
    for engine in ("transformers", "vllm"):
        local = ModelSpec(str(folder), engine=engine, revision="a")
        with pytest.raises(ValueError, match="has no weights: expected"):
            model_fingerprint(local, engine, "1")
    named = replace(bare, revision="a")
    first = model_fingerprint(named, "server", "1")
    elsewhere = Server("http://127.0.0.1:2/v1", model="other", concurrency=1)
    assert model_fingerprint(replace(named, server=elsewhere), "server", "1") == first
    assert model_fingerprint(replace(named, revision="b"), "server", "1") != first
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert model_digest(replace(named, path=str(copy))) == model_digest(named)
    tiny.make_tokenizer(bos=True).save_pretrained(copy)
    assert model_digest(replace(named, path=str(copy))) != model_digest(named)
    # Weights beside the tokenizer count for themselves.
    whole = replace(bare, path=str(tiny_model))
    assert model_digest(whole) == directory_digest(tiny_model)
