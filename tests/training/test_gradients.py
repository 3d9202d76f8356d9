"""Gradient features: against autograd and an explicit projection, Adam against torch's, planted."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.rows import schema
from siftline.rows.verified import AlteredError
from siftline.scoring.engines.base import Failed, ModelSpec
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import response_span
from siftline.selectors.less import Gradients
from siftline.stages.select import gradients as stage
from siftline.stages.select.gradients import warmed
from siftline.stages.select.options import Select
from siftline.training import gradients
from siftline.training import gradients as random_projection
from siftline.training.gradients import (
    GradientEngine,
    GradientModel,
    gradient_features,
    project,
    signs,
)
from siftline.training.warmup import read_snapshot, warm_up

ASKED = Gradients(dimensions=192, share=0.5, epochs=2, rank=4, learning_rate=5e-3, batch_rows=3)


def rows(n=10, say=lambda i: f"It is {2 * i}"):
    lines = []
    for i in range(n):
        turns = [schema.message("user", f"{i}+{i}?"), schema.message("assistant", say(i))]
        lines.append(schema.make_row(turns))
    return pa.Table.from_pylist(lines, schema=schema.ROW)


def questions(engine, table):
    return [response_span(engine.tokenizer, m) for m in table["messages"].to_pylist()]


@pytest.fixture(scope="module")
def spec(tiny_model):
    return ModelSpec(str(tiny_model), device="cpu", max_length=128, batch_tokens=256)


@pytest.fixture(scope="module")
def warm(spec, tmp_path_factory):
    return warm_up(spec, rows(), tmp_path_factory.mktemp("warm") / "up", ASKED, 3)


@pytest.fixture(scope="module")
def model(spec):
    return GradientModel(spec, ASKED, 3)


# ---- the projection ------------------------------------------------------------------------------


def splitmix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def by_the_definition(size, dimensions, seed):
    """The whole matrix of signs, entry by entry, in whole numbers of Python."""
    from siftline.kernels.draws import hash64

    words = -(-dimensions // 64)
    base = hash64(seed, "gradient projection")
    out = np.empty((size, dimensions))
    for j in range(size):
        for k in range(dimensions):
            number = j * words + k // 64
            word = splitmix((number * 0x9E3779B97F4A7C15 + base) % 2**64)
            out[j, k] = -1.0 if word >> (k % 64) & 1 else 1.0
    return out


@pytest.mark.parametrize("dimensions", [1, 64, 70])
def test_signs_are_hashes_of_their_place(dimensions):
    expected = by_the_definition(9, dimensions, 5)
    assert (signs(0, 9, dimensions, 5).numpy() == expected).all()
    assert (signs(4, 7, dimensions, 5).numpy() == expected[4:7]).all()
    if dimensions > 1:
        assert (signs(0, 9, dimensions, 6).numpy() != expected).any()


def test_signs_are_even_and_independent():
    found = signs(0, 4000, 128, 0).double()
    assert abs(float(found.mean())) < 4 / np.sqrt(found.numel())
    by_column = found.T @ found / len(found)
    assert float((by_column - torch.eye(128)).abs().max()) < 6 / np.sqrt(len(found))
    by_line = found[:200] @ found[:200].T / 128
    assert float((by_line - torch.eye(200)).abs().max()) < 6 / np.sqrt(128)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 130),
    st.integers(0, 9),
    st.floats(-3, 3),
    st.sampled_from([256, 4096, 1 << 20]),
)
def test_the_projection_is_linear_and_blocks_do_not_show(size, dimensions, seed, factor, block):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, size, generator=g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_projection.BLOCK_BYTES, "cpu", block)
        whole = project(a + factor * b, dimensions, seed)
    parts = project(a, dimensions, seed) + factor * project(b, dimensions, seed)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


def test_inner_products_are_kept_within_johnson_lindenstrauss():
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(60, 3000, generator=g), dim=1)
    x[30:] = torch.nn.functional.normalize(x[:30] + 0.4 * x[30:], dim=1)  # some are alike
    for dimensions in (512, 4096):
        y = project(x, dimensions, 1)
        wrong = (y @ y.T - x @ x.T).flatten()
        # With 1 - 1/n^2 no pair of n vectors is off by more than sqrt(8 log(n) * 2 / d) or so.
        assert float(wrong.abs().max()) < np.sqrt(16 * np.log(60) / dimensions)
        spread = np.sqrt(2 / dimensions)
        assert 0.4 * spread < float(wrong.std()) < spread


# ---- gradients -----------------------------------------------------------------------------------


def naive(model, tokens, span):
    """Gradient by plain transformers: cross-entropy of the span's tokens, peft's parameters."""
    ids = torch.tensor([tokens])
    logits = model.model(input_ids=ids).logits[0, span[0] - 1 : span[1] - 1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, span[0] : span[1]])
    parameters = [p for p in model.model.parameters() if p.requires_grad]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("snapshot", [None, 0, 1])
def test_features_are_those_of_autograd_and_an_explicit_projection(model, warm, snapshot):
    at = None if snapshot is None else warm[snapshot]
    engine = GradientEngine(model, at)
    asked = questions(engine, rows(4))
    found = np.stack(engine.features(asked, "gradient"))
    matrix = signs(0, model.size, 192, 3).double()
    plain = torch.stack([naive(model, *each) for each in asked])
    expected = torch.nn.functional.normalize(plain.double() @ matrix, dim=1)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert float(plain.abs().max()) > 1e-4


def test_an_update_is_the_next_step_of_adam(model, warm):
    engine = GradientEngine(model, warm[1])
    ((tokens, span),) = questions(engine, rows(1))
    model.load(warm[1])
    gradient = model.gradient(tokens, span)
    update = model.update(gradient, warm[1].step)
    # torch's own optimizer, in the state the warm-up left, takes a step on this row.
    start = torch.cat([p.detach().flatten() for p in model.parameters.values()])
    weights = [p.detach().double().clone() for p in model.parameters.values()]
    optimizer = torch.optim.Adam(weights, lr=1.0)
    moments = {kind: read_snapshot(warm[1].path, kind) for kind in ("mean", "square")}
    place = 0
    for name, weight in zip(model.parameters, weights, strict=True):
        weight.grad = gradient[place : place + weight.numel()].view_as(weight).double()
        place += weight.numel()
        optimizer.state[weight] = {
            "step": torch.tensor(float(warm[1].step)),
            "exp_avg": moments["mean"][name].double(),
            "exp_avg_sq": moments["square"][name].double(),
        }
    optimizer.step()
    moved = torch.cat([w.flatten() for w in weights]) - start.double()
    torch.testing.assert_close(-moved.float(), update, rtol=2e-4, atol=1e-5)
    assert float(torch.cosine_similarity(gradient, update, dim=0)) < 0.99


def test_neighbours_groups_and_order_change_nothing(model, warm, monkeypatch):
    engine = GradientEngine(model, warm[0])
    asked = questions(engine, rows(7, lambda i: "no" * (1 + 3 * i)))
    together = np.stack(engine.features(asked, "update"))
    alone = np.concatenate([engine.features([each], "update") for each in asked])
    np.testing.assert_allclose(together, alone, atol=2e-6)
    turned = np.stack(engine.features(asked[::-1], "update"))[::-1]
    np.testing.assert_allclose(together, turned, atol=2e-6)
    monkeypatch.setitem(gradients.HELD_BYTES, "cpu", 8 * model.size)  # two rows at a time
    np.testing.assert_allclose(np.stack(engine.features(asked, "update")), together, atol=2e-6)
    assert np.abs(together - together[:1])[1:].max() > 1e-2  # rows differ by more than the bound


def test_a_row_without_a_gradient_is_told(model, monkeypatch):
    engine = GradientEngine(model, None)
    asked = questions(engine, rows(3))
    real = model.gradient
    marks = iter([0.0, 1.0, float("nan")])
    monkeypatch.setattr(model, "gradient", lambda *row: real(*row) * next(marks))
    found = engine.features(asked, "gradient")
    assert found[0] == Failed("no_gradient")
    assert found[1].shape == (192,)
    assert found[2] == Failed("not_finite")


# ---- the warm-up ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["snapshot", "record"])
def test_a_damaged_warm_up_is_an_error(spec, warm, tmp_path, which):
    shutil.copytree(warm[0].path.parent, tmp_path / "up")
    path = tmp_path / "up" / ("warmup.json" if which == "record" else warm[1].path.name)
    raw = path.read_bytes()
    for damaged in (raw[:100] + bytes([raw[100] ^ 1]) + raw[101:], raw[:50], b""):
        path.write_bytes(damaged)
        with pytest.raises(AlteredError, match=f"{path.name} .*trained again"):
            warm_up(spec, rows(), tmp_path / "up", ASKED, 3)
    path.write_bytes(raw)
    assert [s.step for s in warm_up(spec, rows(), tmp_path / "up", ASKED, 3)] == [4, 8]


def test_a_warm_up_keeps_every_pass_and_learns(warm):
    first, second = warm
    assert (first.step, second.step) == (4, 8)  # ten rows, three a step
    assert first.weight + second.weight == pytest.approx(1)
    assert first.weight > second.weight  # the rate falls
    facts = json.loads((first.path.parent / "warmup.json").read_text())
    assert facts["loss"][-1] < facts["loss"][0]
    moved = [read_snapshot(s.path, "weight") for s in warm]
    assert moved[0].keys() == read_snapshot(first.path, "square").keys()
    assert any((moved[0][name] != moved[1][name]).any() for name in moved[0])
    assert sorted(p.name for p in first.path.parent.iterdir()) == [
        "step-000004.safetensors",
        "step-000008.safetensors",
        "warmup.json",
    ]


def test_a_killed_warm_up_goes_on_to_the_same_bytes(spec, warm, tmp_path):
    seen = []

    def dies(done, total):
        seen.append(done)
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_up(spec, rows(), tmp_path / "up", ASKED, 3, dies)
    assert not (tmp_path / "up" / "warmup.json").exists()
    shuffled = rows().take(np.random.default_rng(0).permutation(10))
    again = []
    found = warm_up(spec, shuffled, tmp_path / "up", ASKED, 3, lambda d, t: again.append(d))
    assert again == [5, 6, 7, 8]  # from the checkpoint of the first pass
    for one, other in zip(found, warm, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()
        assert (one.step, one.weight) == (other.step, other.weight)
    quiet = []
    assert warm_up(spec, rows(), tmp_path / "up", ASKED, 3, lambda d, t: quiet.append(d)) == found
    assert not quiet
    with pytest.raises(ValueError, match="a warm-up of something else"):
        warm_up(spec, rows(9), tmp_path / "up", ASKED, 3)


# ---- recorded features ---------------------------------------------------------------------------


def recorders(model, warm, root):
    return [Recorder(GradientEngine(model, s), model.spec, root) for s in warm]


def test_recorded_features_weigh_checkpoints_and_are_computed_once(model, warm, tmp_path):
    asked = recorders(model, warm, tmp_path)
    table = rows(5)
    long = rows(1, lambda i: "x" * 200)
    found, failed = gradient_features(asked, 0, pa.concat_tables([table, long]), target=False)
    assert failed == {long["id"][0].as_py(): "too_long"}
    assert {v.dtype.str for v in found.values()} == {"<f2"}
    for s, (engine, snapshot) in enumerate(zip((r.engine for r in asked), warm, strict=True)):
        own = np.stack(engine.features(questions(engine, table), "update"))
        part = np.stack([found[i] for i in table["id"].to_pylist()])[:, 192 * s : 192 * (s + 1)]
        np.testing.assert_allclose(part, own * snapshot.weight**0.5, atol=1e-3)
    np.testing.assert_allclose([np.linalg.norm(v.astype(float)) for v in found.values()], 1, 1e-3)
    assert [r.tally.computed for r in asked] == [5, 5]
    again = recorders(model, warm, tmp_path)
    more, _ = gradient_features(again, 0, rows(7), target=False)
    assert [(r.tally.computed, r.tally.found) for r in again] == [(2, 5), (2, 5)]
    assert all((more[i] == found[i]).all() for i in found)
    aims, _ = gradient_features(recorders(model, warm, tmp_path), 0, table, target=True)
    assert all((aims[i] != found[i]).any() for i in aims)


def test_what_decides_features_is_in_their_name(spec, model, warm, tiny, tmp_path):
    def name(asked=ASKED, seed=3, at=warm[0], of=spec):
        return GradientEngine(GradientModel(of, asked, seed), at).fingerprint()

    other = tiny.make_model(tmp_path / "other", seed=1)
    copy = tiny.make_model(tmp_path / "copy")
    same = name()
    assert name(of=replace(spec, path=str(copy))) == same
    different = {
        name(of=replace(spec, path=str(other))),
        name(at=warm[1]),
        name(at=None),
        name(seed=4),
        name(replace(ASKED, dimensions=64)),
    }
    assert len(different) == 5
    assert same not in different


def test_rows_of_the_targets_kind_score_higher(spec, tmp_path):
    sums = rows(8)
    colours = rows(8, lambda i: "blue red " + "green " * (i % 3))
    pool = pa.concat_tables([sums.slice(0, 6), colours.slice(0, 6)])
    wide = replace(ASKED, dimensions=2048)
    snapshots = warm_up(spec, pool, tmp_path / "up", wide, 0)
    asked = recorders(GradientModel(spec, wide, 0), snapshots, tmp_path / "store")
    of, _ = gradient_features(asked, 0, pool, target=False)
    for kind, other, target in ((sums, colours, sums), (colours, sums, colours)):
        to, _ = gradient_features(asked, 1, target.slice(6, 2), target=True)
        aim = np.mean([v.astype(float) for v in to.values()], axis=0)
        score = {i: float(v.astype(float) @ aim) for i, v in of.items()}
        own, rest = ([score[i] for i in t["id"].to_pylist() if i in score] for t in (kind, other))
        assert min(own) > max(rest)


def test_a_model_without_gradients_is_refused_before_the_warm_up(spec, tmp_path):
    for wrong, says in (
        ({"adapter": "somewhere"}, "merge it first"),
        ({"engine": "sentence-transformers"}, "has no gradients: give a local model"),
    ):
        with pytest.raises(ValueError, match=says):
            warmed(replace(spec, **wrong), rows(), tmp_path, ASKED, 0, print)
    assert not list(tmp_path.iterdir())


def test_target_rows_are_asked_first_and_one_without_features_ends_the_stage(monkeypatch):
    asked = []

    def features(seats, buckets, *, target):
        asked.append(target)
        yield 0, ({}, {"t": "too_long"} if target else {})

    monkeypatch.setattr(stage, "features", features)
    monkeypatch.setattr(stage, "warmed", lambda *given: [None])
    monkeypatch.setattr(stage, "differentiating", lambda *given: nullcontext([[]]))
    manifest = SimpleNamespace(rows=lambda name: 1)
    pool = SimpleNamespace(rows=None, buckets=1, manifest=manifest)
    monkeypatch.setattr(stage, "Pool", lambda path: pool)
    context = SimpleNamespace(
        stage=SimpleNamespace(name="select", options=Select("less")),
        recipe=SimpleNamespace(sets=SimpleNamespace(target=[SimpleNamespace(name="t")])),
        workspace=SimpleNamespace(model=Path, pool=Path, store=Path("store")),
        spec=lambda role: None,
        buckets=range(1),
        in_play=lambda bucket: ["a"],
        rows_of=lambda ids: rows(1),
        store_buckets=list,
        opened=SimpleNamespace(close=lambda: None),
        emit=lambda line: None,
    )
    with pytest.raises(ValueError, match=r"1 target rows have no gradient features.*too_long"):
        stage.featured(context)
    assert asked == [True]


def test_what_has_no_gradient_is_refused(spec):
    with pytest.raises(ValueError, match="merge it first"):
        GradientModel(replace(spec, adapter="somewhere"), ASKED, 0)
    with pytest.raises(ValueError, match="has no gradients: give a local model"):
        GradientModel(replace(spec, engine="sentence-transformers"), ASKED, 0)
    for wrong in ({"dimensions": 0}, {"share": 1.5}, {"learning_rate": 0.0}, {"rank": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(ASKED, **wrong)
