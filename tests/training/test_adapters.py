"""Adapters of peft: each that is accepted does what it is called, others are refused.

The mechanism of a type is looked for in the merged weights beside the base's, by linear algebra
that is written here: a rank, an orthogonal matrix, a scale a row, a count of moved entries.
"""

from dataclasses import replace

import pyarrow as pa
import pytest

from siftline.rows import schema
from siftline.training import sft as methods
from siftline.training.finetune import FineTune, finetune

BASE = FineTune(learning_rate=3e-3, epochs=2, batch_rows=10, max_length=96, warmup_ratio=0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small spend their time in waking threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr("siftline.training.finetune.draw_curve", lambda *_: None)


def rows(n=20):
    turns = [
        [schema.message("user", f"{i}+{i}?"), schema.message("assistant", f"It is {2 * i}")]
        for i in range(n)
    ]
    lines = [schema.make_row(each) for each in turns]
    return pa.Table.from_pylist(lines, schema=schema.ROW)


def train(base, out, config, data=None):
    data = rows() if data is None else data
    return finetune(base, data, out, config, seed=0, dataset_version="demo-0123456789ab")


TARGETS = ["q_proj", "v_proj", "down_proj"]
WIDE = {"target_modules": TARGETS}
"""On a matrix that is square, one that is not, and one wider than high."""


def rank_of(moved):
    """Singular values above rounding, in relation to the largest."""
    import torch

    values = torch.linalg.svdvals(moved.double())
    return int((values > 1e-4 * values[0]).sum())


def at_most(rank):
    return lambda before, after: 1 <= rank_of(after - before) <= rank


def entries(count):
    """So many numbers of a matrix move and no more."""
    return lambda before, after: 1 <= int((after != before).sum()) <= count(before)


def turned(before, after):
    """An orthogonal matrix before or behind it: singular values stay."""
    import torch

    ours, theirs = (torch.linalg.svdvals(part.double()) for part in (before, after))
    return torch.allclose(ours, theirs, rtol=2e-3)


def angles(before, after):
    """An orthogonal matrix behind it and a scale a row: angles between rows stay."""
    import torch

    ours, theirs = (torch.nn.functional.normalize(m.double(), dim=1) for m in (before, after))
    return torch.allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-5)


def scaled(before, after):
    """Each row, or each column, times a number."""
    ratio = after / before
    wide = (ratio - ratio.mean(dim=1, keepdim=True)).abs().max()
    high = (ratio - ratio.mean(dim=0, keepdim=True)).abs().max()
    return min(wide, high) < 1e-2


def products(before, after):
    """What is added has, divided by the weights, a small rank."""
    return 1 <= rank_of((after - before) / before) <= 4


def blocks_of(rank, parts):
    """Each block of a grid has a small rank, and the whole a larger one."""

    def test(before, after):
        moved = after - before
        grid = [b for band in moved.chunk(parts, 0) for b in band.chunk(parts, 1)]
        return all(rank_of(block) <= rank for block in grid)

    return test


def circulant(before, after):
    """In blocks of 16 a row is the one above it, shifted by one place."""
    import torch

    block = (after - before)[:16, :16]
    return any(torch.allclose(block[1], block[0].roll(way), atol=1e-5) for way in (1, -1))


def kept_directions(before, after):
    """Most of what is added is off the old weights' leading directions (0.71 by chance).

    OSF keeps gradients off them; Adam, which scales each number by itself, lets a little back.
    """
    import torch

    u, s, _ = torch.linalg.svd(before.double(), full_matrices=False)
    high = len(s) - len(s) // 2
    moved = after.double() - before.double()
    return (u[:, :high].T @ moved).norm() < 0.4 * moved.norm()


def anything(before, after):
    return True


MECHANISMS = {
    "LORA": ({"r": 3, **WIDE}, at_most(3)),
    "LORA dora": ({"type": "LORA", "r": 3, "use_dora": True, **WIDE}, anything),
    "LORA mica": ({"type": "LORA", "r": 3, "init_lora_weights": "mica", **WIDE}, at_most(3)),
    "LORA olora": ({"type": "LORA", "r": 3, "init_lora_weights": "olora", **WIDE}, at_most(6)),
    "LORA pissa": (
        {"type": "LORA", "r": 3, "init_lora_weights": "pissa_niter_4", **WIDE},
        at_most(6),
    ),
    "ADALORA": ({"init_r": 3, "target_r": 1, **WIDE}, at_most(3)),
    "ADAMSS": ({"r": 8, "num_subspaces": 2, "subspace_rank": 2, **WIDE}, at_most(16)),
    "BOFT": ({"boft_block_size": 4, **WIDE}, angles),
    "C3A": ({"block_size": 16, **WIDE}, circulant),
    "DEFT": ({"r": 3, **WIDE}, at_most(6)),
    "DELORA": ({"r": 3, **WIDE}, at_most(3)),
    "FOURIERFT": ({"n_frequency": 40, **WIDE}, anything),
    "FROD": (WIDE, anything),
    "GLORA": ({"r": 3, **WIDE}, anything),
    "GRALORA": ({"r": 4, "gralora_k": 2, **WIDE}, blocks_of(4, 2)),
    "HIRA": ({"r": 4, **WIDE}, products),
    "HRA": ({"r": 4, **WIDE}, turned),
    "IA3": ({**WIDE, "feedforward_modules": ["down_proj"]}, scaled),
    "LN_TUNING": ({}, anything),
    "LOHA": ({"r": 2, "alpha": 4, **WIDE}, at_most(4)),
    "LOKR": ({"r": 2, "alpha": 4, **WIDE}, anything),
    "MISS": ({"r": 4, **WIDE}, at_most(8)),
    "OFT": ({"oft_block_size": 4, **WIDE}, turned),
    "OSF": ({**WIDE}, kept_directions),
    "PEANUT": ({"r": 3, **WIDE}, anything),
    "PSOFT": ({"r": 4, **WIDE}, at_most(8)),
    "RANDLORA": ({"r": 4, **WIDE}, anything),
    "ROAD": ({"group_size": 16, **WIDE}, anything),
    "SHIRA": ({"r": 2, **WIDE}, entries(lambda m: 2 * sum(m.shape))),
    "SUPERTUNING": ({**WIDE}, entries(lambda m: m.numel() // 2)),
    "TINYLORA": ({"r": 2, "u": 8, **WIDE}, at_most(2)),
    "UNILORA": ({"r": 2, "theta_d_length": 64, **WIDE}, at_most(2)),
    "VBLORA": ({"r": 2, "vector_length": 16, "num_vectors": 8, **WIDE}, at_most(2)),
    "VERA": ({"r": 3, **WIDE}, at_most(3)),
    "WAVEFT": ({"n_frequency": 40, **WIDE}, anything),
}


@pytest.fixture(scope="module")
def biased(tiny, tmp_path_factory):
    """A model whose attention has biases, which BEFT trains."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("biased"), tiny.make_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_accepted_adapter_has_its_mechanism_tested():
    assert {name.split()[0] for name in [*MECHANISMS, "BEFT"]} == methods.ADAPTERS


@pytest.mark.parametrize("name", [*MECHANISMS, "BEFT"])
def test_an_adapter_does_what_it_is_called_and_merges_to_the_same(
    tiny_model, biased, tmp_path, monkeypatch, name
):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = biased if name == "BEFT" else tiny_model
    options, holds = MECHANISMS.get(name, ({"target_modules": ["q_proj", "v_proj"]}, anything))
    seen, export = {}, methods.export
    asked = torch.arange(40, 60)[None]

    def looked(trainer, *rest):
        model = trainer.model.eval()
        seen["trained"] = [n for n, part in model.named_parameters() if part.requires_grad]
        with torch.no_grad():
            seen["logits"] = model.get_base_model()(input_ids=asked).logits
        export(trainer, *rest)

    monkeypatch.setattr(methods, "export", looked)
    config = replace(
        BASE, method="peft", peft={"type": name, **options}, learning_rate=2e-2, epochs=1,
        batch_rows=2, accumulation=2, packing=False,
    )  # fmt: skip
    result = train(base, tmp_path / "m", config, rows(6))
    assert result.steps == 3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        logits = merged(input_ids=asked).logits
    assert torch.allclose(logits, seen["logits"], atol=2e-3), "merging changed the model"
    before, after = (load_file(d / "model.safetensors") for d in (base, tmp_path / "m"))
    assert before.keys() <= after.keys()
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    aimed = ("norm",) if name == "LN_TUNING" else tuple(options.get("target_modules", ()))
    if name == "BEFT":
        assert moved
        assert all(n.endswith("_proj.bias") for n in moved)
        return
    assert moved
    assert all(any(part in n for part in aimed) for n in moved), moved
    matrices = [n for n in moved if before[n].ndim == 2]
    assert all(holds(before[n], after[n]) for n in matrices), name
    assert matrices or name == "LN_TUNING"


def test_ranks_of_adalora_fall_by_its_schedule_to_the_target(tiny_model, tmp_path, monkeypatch):
    """The budget by the paper's cubic formula, recomputed here; what is kept at the end."""
    import torch
    from safetensors.torch import load_file
    from transformers import TrainerCallback

    from siftline.training.trainer import PlannedTrainer

    alive = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            values = [p for n, p in model.named_parameters() if ".lora_E." in n]
            alive.append(sum(int((part != 0).sum()) for part in values))

    begin = PlannedTrainer.train

    def watched(self, *rest, **more):
        self.add_callback(Watch())
        return begin(self, *rest, **more)

    monkeypatch.setattr(PlannedTrainer, "train", watched)
    options = {"type": "ADALORA", "init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 2}
    options["target_modules"] = ["q_proj", "v_proj"]
    config = replace(BASE, method="peft", peft=options, learning_rate=2e-2, epochs=1, batch_rows=2)
    result = train(tiny_model, tmp_path / "m", config)
    assert result.steps == 10
    first, last = 6 * 4, 2 * 4  # two modules in each of two layers

    def budget(step):
        if step <= 2:
            return first
        if step >= 8:
            return last
        return int((first - last) * (1 - (step - 2) / 6) ** 3 + last)

    assert alive[2:] == [budget(step) for step in range(3, 11)]
    before, after = (load_file(d / "model.safetensors") for d in (tiny_model, tmp_path / "m"))
    held = [rank_of(after[n] - before[n]) for n in before if not torch.equal(before[n], after[n])]
    assert sum(held) == last


def test_the_penalty_of_adalora_is_the_distance_from_orthonormal(tiny_model):
    import torch

    from siftline.training.trainer import orthogonality

    options = {"type": "ADALORA", "init_r": 4, "target_r": 2, "orth_reg_weight": 0.3}
    config = FineTune(method="peft", peft={**options, "target_modules": ["q_proj", "v_proj"]})
    model = methods.load_model(tiny_model, config, 0, 10)
    ids = torch.arange(40, 60)[None]
    plain = model.get_base_model()(input_ids=ids, labels=ids).loss
    theirs = model(input_ids=ids, labels=ids).loss - plain  # peft adds it to a model's own loss
    assert orthogonality(model.base_model).item() == pytest.approx(theirs.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("peft", "said"),
    [
        ({"type": "LORAX"}, "peft type 'LORAX' is unknown: choose"),
        ({"type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "can't be merged into the weights"),
        ({"type": "LORA", "rank": 4}, "unexpected keyword argument 'rank'"),
        ({"type": "LOHA", "target_modules": ["nothing"]}, "peft refuses LOHA"),
        ({"type": "poly"}, "mixes skills by the task of a row.*choose ADALORA"),
        ({"type": "XLORA"}, "gates adapters that were trained before.*choose ADALORA"),
        ({"type": "PVERA"}, "learns a distribution.*choose ADALORA"),
        ({"type": "LILY"}, "can't be merged.*choose ADALORA"),
        ({"type": "LORA", "init_lora_weights": "corda"}, "'corda'.*choose true, gaussian"),
        ({"type": "LORA", "init_lora_weights": "loftq"}, "'loftq'.*choose true, gaussian"),
        ({"type": "LORA", "init_lora_weights": "eva"}, "'eva'.*choose true, gaussian"),
        ({"type": "LORA", "loftq_config": {"loftq_bits": 4}}, "loftq_config.*method qlora"),
        ({"type": "LORA", "inference_mode": True}, "inference_mode of LORA trains nothing"),
        ({"type": "ADAMSS", "use_asa": True}, "use_asa of ADAMSS needs a callback"),
        ({"type": "ADALORA", "total_step": 7}, "total_step is 7, and the run has 4 steps"),
        ({"type": "ADALORA", "init_r": 4, "target_r": 4}, "target_r must be 1 or more and below"),
        ({"type": "BEFT", "target_modules": ["q_proj"]}, "BEFT can't be merged into this model"),
    ],
)
def test_an_adapter_that_can_not_be_trained_says_why(tiny_model, tmp_path, peft, said):
    with pytest.raises(ValueError, match=said):
        train(tiny_model, tmp_path / "m", replace(BASE, method="peft", peft=peft))
