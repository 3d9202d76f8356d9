"""`siftline eval --harness`: tasks of lm-evaluation-harness, and what is refused without it."""

import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
from types import SimpleNamespace
from typing import ClassVar

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.cli import main
from siftline.training import harness
from siftline.training.harness import ANSWERS, TABLE, Harness, answers_of, prepared
from siftline.training.harness import summarise_harness as summarise

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)


@pytest.fixture
def call(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


# ---- what needs no harness ---------------------------------------------------------------------


def test_without_the_harness_one_line_says_how_to_get_it(call, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    code, out, err = call("eval", "model", "--harness", "arc_easy", "--out", tmp_path / "o")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        "error: --harness needs lm-evaluation-harness: pip install 'siftline[harness]'"
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["q.jsonl", "--harness", "a"], "FILE and --harness are two evaluations"),
        ([], "nothing to ask: give FILE..., or --harness TASK"),
        (["--harness", "a", "--verifier", "math"], "--verifier does not go with this evaluation"),
        (["--harness", "a", "--field", "answer=x"], "--field does not go with this evaluation"),
        (["q.jsonl", "--limit", "3"], "--limit does not go with this evaluation: it belongs to"),
        (["q.jsonl", "--apply-chat-template"], "--apply-chat-template does not go with"),
        (["--harness", "a,,b"], "tasks are 'a, , b': name them, task,task,…"),
        (["--harness", "a", "--device", "cuda:0,cuda:1"], "the harness runs on one, name it"),
        (["--harness", "a,a"], "tasks a, a: name each once"),
        (["--harness", "a", "--harness-path", "none"], "none is no folder: give the one with the"),
    ],
)
def test_mistakes_are_one_line(call, tmp_path, arguments, said):
    code, out, err = call("eval", "model", *arguments, "--out", tmp_path / "o")
    assert (code, out) == (1, "")
    assert said in err
    assert "Traceback" not in err


def test_a_folder_without_a_model(tiny_model, tmp_path):
    harness.check_model(tiny_model)
    with pytest.raises(ValueError, match=r"has no config\.json: give the directory of a model"):
        harness.check_model(tmp_path)


def test_settings_out_of_range():
    for wrong in ({"limit": 0}, {"shots": -1}, {"batch_rows": 0}):
        with pytest.raises(ValueError, match="it must be at least"):
            Harness(("a",), **wrong)


class Manager:
    """A task manager whose tasks fail to load with `error`, or are `tasks`."""

    all_tasks = ("arc_easy", "arc_challenge", "gsm8k")
    task_index: ClassVar = {}

    def __init__(self, error=None, tasks=None):
        self.error, self.tasks = error, tasks

    def load(self, names):
        if self.error is not None:
            raise self.error
        return {"tasks": self.tasks}


def missing():
    """As `datasets` fails: its own error, raised from one of the connection's."""
    try:
        raise ConnectionError("offline mode is enabled")
    except ConnectionError as error:
        raised = RuntimeError("Couldn't reach\n'openai/gsm8k'")
        raised.__cause__ = error
        return raised


def test_a_task_whose_data_are_elsewhere_names_the_remedy(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = (
        r"^harness task gsm8k: Couldn't reach 'openai/gsm8k': HF_HUB_OFFLINE is set and the data "
        "are not in the cache: fetch them once without it, or name tasks over local files"
    )
    with pytest.raises(ValueError, match=said):
        prepared(Manager(missing()), ["gsm8k"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(ValueError, match="the data come from the network: run where there is one"):
        prepared(Manager(missing()), ["gsm8k"])
    with pytest.raises(ValueError, match=r"no 'x\.jsonl': see the names, the task files and"):
        prepared(Manager(FileNotFoundError("no 'x.jsonl'")), ["gsm8k"])


def test_unknown_and_unguarded_tasks():
    with pytest.raises(ValueError, match="no harness task 'arc_esy': did you mean arc_easy"):
        prepared(Manager(), ["arc_esy"])
    with pytest.raises(ValueError, match="no harness task 'zzz': give its --harness-path"):
        prepared(Manager(), ["zzz"])
    unguarded = {"gsm8k": SimpleNamespace(UNSAFE_CODE=True)}
    with pytest.raises(ValueError, match="'gsm8k' runs the model's code unguarded: leave it out"):
        prepared(Manager(tasks=unguarded), ["gsm8k"])
    loaded = prepared(Manager(tasks={"gsm8k": SimpleNamespace()}), ["gsm8k"])
    assert set(loaded.load(["gsm8k"])["tasks"]) == {"gsm8k"}


def test_an_engine_the_harness_cannot_find(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == "lm_eval" else find(name)
    )

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    harness.check_installed()
    with pytest.raises(ValueError, match=r"needs the package vllm .*take --engine transformers"):
        harness.check_installed("vllm")


def sample(number, kind="none", **metrics):
    return {
        "doc_id": number, "doc_hash": f"h{number}", "filter": kind, "target": number,
        "filtered_resps": ["x"], "metrics": list(metrics), **metrics,
    }  # fmt: skip


def found(**more):
    """What the harness returns for a task of right and wrong, one of F1, and a group of both."""
    right = [sample(i, acc=float(i < 3), f1=i / 10) for i in range(10)]
    wrong = [sample(i, acc=0.0) for i in range(4)]
    return {
        "results": {
            "one": {"alias": "one", "acc,none": 0.3, "acc_stderr,none": 0.1527,
                    "f1,none": 0.45, "f1_stderr,none": 0.1},
            "two": {"alias": "two", "acc,none": 0.0, "acc_stderr,none": 0.0,
                    "ppl,none": 7.5, "ppl_stderr,none": "N/A"},
            "both": {"alias": "both", "acc,none": 3 / 14, "acc_stderr,none": 0.1,
                     "sample_count": {"acc,none": 14}},
            "even": {"alias": "even", "acc,none": 0.15, "acc_stderr,none": 0.1,
                     "sample_count": {"acc,none": 14}},
        },
        "group_subtasks": {"both": ["one", "two"], "even": ["both"], "one": []},
        "n-samples": {"one": {"original": 50, "effective": 10},
                      "two": {"original": 4, "effective": 4}},
        "n-shot": {"one": 5, "two": 0},
        "versions": {"one": 2.0, "two": "1"},
        "higher_is_better": {"one": {"acc": True}, "two": {"ppl": False}},
        "samples": {"one": right, "two": wrong},
        "lm_eval_version": "9.9",
        **more,
    }  # fmt: skip


def test_numbers_are_the_harness_s_and_intervals_wilson_s_where_they_hold():
    table = summarise(found())
    assert dict(table.schema) == TABLE
    lines = {(x["task"], x["metric"]): x for x in table.to_dicts()}
    assert list(lines) == sorted(lines)
    z2 = 1.959963984540054**2
    none = lines["two", "acc"]
    assert (none["value"], none["stderr"], none["low"], none["interval"]) == (0, 0, 0, "wilson")
    assert none["high"] == pytest.approx(z2 / (4 + z2))  # not 0, as its standard error says
    one = lines["one", "acc"]
    assert (one["n"], one["questions"], one["shots"], one["task_version"]) == (10, 50, 5, "2.0")
    half = math.sqrt(z2 * (0.21 / 10 + z2 / 400)) / (1 + z2 / 10)
    assert one["high"] - one["low"] == pytest.approx(2 * half)
    assert one["higher_is_better"] is True
    assert one["harness"] == "9.9"
    f1 = lines["one", "f1"]
    assert f1["interval"] == "normal"
    assert (f1["low"], f1["high"]) == pytest.approx((0.45 - 0.1 * z2**0.5, 0.45 + 0.1 * z2**0.5))
    ppl = lines["two", "ppl"]
    assert (ppl["value"], ppl["stderr"], ppl["interval"], ppl["low"]) == (7.5, None, None, None)
    both = lines["both", "acc"]
    assert (both["interval"], both["n"], both["questions"]) == ("wilson", 14, 54)
    # Not the mean over questions, so its tasks are weighed otherwise.
    assert lines["even", "acc"]["interval"] == "normal"
    narrow = summarise(found(), confidence=0.5)
    assert (narrow["high"] - narrow["low"] < table["high"] - table["low"]).drop_nulls().all()


def test_answers_keep_every_question_in_order():
    reversed_ = found(samples={k: v[::-1] for k, v in found()["samples"].items()})
    answers = answers_of(found())
    assert dict(answers.schema) == ANSWERS
    assert answers.equals(answers_of(reversed_))
    assert answers.height == 14
    assert json.loads(answers["metrics"][4]) == {"acc": 0.0, "f1": 0.4}
    assert summarise(reversed_).equals(summarise(found()))


@given(st.lists(st.booleans(), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_an_interval_holds_its_value_and_stays_a_share(judged):
    mean = sum(judged) / len(judged)
    line = summarise(
        found(
            results={"one": {"acc,none": mean, "acc_stderr,none": 0.0}},
            group_subtasks={},
            samples={"one": [sample(i, acc=value) for i, value in enumerate(judged)]},
        )
    ).to_dicts()[0]
    assert 0 <= line["low"] <= mean + 1e-12
    assert mean - 1e-12 <= line["high"] <= 1
    assert line["low"] < line["high"]


# ---- with it ---------------------------------------------------------------------------------

CHOICE = """
task: sums_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.5}}
"""
WRITTEN = """
task: sums_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 2}}
"""
FAR = "{{task: far, dataset_path: nobody/nothing, output_type: multiple_choice, test_split: test}}"
QUESTIONS = 12


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    lines = [
        {"question": f"{i}+{i}?", "choices": [str(2 * i), str(7 * i + 1)], "gold": i % 2,
         "answer": str(2 * i)}
        for i in range(QUESTIONS)
    ]  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tasks").mkdir()
    for name, text in (("choice", CHOICE), ("written", WRITTEN), ("far", FAR)):
        filled = text.format(data=folder / "data.jsonl", cache=folder / "cache")
        (folder / "tasks" / f"{name}.yaml").write_text(filled)
    return SimpleNamespace(folder=folder / "tasks", lines=lines)


def run(mini_tools, *arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return mini_tools.siftline("eval", *arguments, environment=environment)


def chosen_by_hand(folder, lines):
    """Which choice the model finds likelier, by plain forward passes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def log(question, choice):
        first, rest = tokenizer.encode(question), tokenizer.encode(" " + choice)
        with torch.no_grad():
            logs = model(torch.tensor([first + rest])).logits[0].log_softmax(-1)
        return sum(float(logs[len(first) + i - 1, token]) for i, token in enumerate(rest))

    return [max((0, 1), key=lambda i: log(x["question"], x["choices"][i])) for x in lines]


@installed
def test_tasks_over_local_files_through_the_command_line(mini_tools, tasks, tiny_model, tmp_path):
    names = ["--harness", "sums_choice,sums_written", "--harness-path", tasks.folder]
    done = run(mini_tools, tiny_model, *names, "--out", tmp_path / "o", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    lines = {(x["task"], x["metric"]): x for x in told["results"]}
    by_hand = chosen_by_hand(tiny_model, tasks.lines)
    right = [one == line["gold"] for one, line in zip(by_hand, tasks.lines, strict=True)]
    assert 0 < sum(right) < QUESTIONS, "nothing to tell apart"
    choice = lines["sums_choice", "acc"]
    assert choice["value"] == pytest.approx(sum(right) / QUESTIONS)
    assert choice["low"] < choice["value"] < choice["high"]
    assert (choice["n"], choice["questions"], choice["task_version"]) == (12, 12, "1.5")
    assert choice["harness"] == told["versions"]["harness"]
    written = lines["sums_written", "exact_match"]
    assert (written["value"], written["interval"]) == (0.0, "wilson")
    answers = pl.read_parquet(tmp_path / "o" / "answers.parquet").filter(task="sums_choice")
    assert [json.loads(m)["acc"] == 1 for m in answers["metrics"]] == right
    names = {path.name for path in (tmp_path / "o").iterdir()}
    assert names == {"answers.parquet", "harness.csv", "harness.json", "harness.png"}
    assert json.loads((tmp_path / "o" / "harness.json").read_text()) == told
    assert pl.read_csv(tmp_path / "o" / "harness.csv")["value"].to_list() == [
        line["value"] for line in told["results"]
    ]


@installed
def test_a_task_from_the_network_is_refused_and_a_limit_is_told(
    call, tasks, tiny_model, tmp_path, monkeypatch
):
    # The libraries read the variable once, when they are imported.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(importlib.import_module(module), "HF_HUB_OFFLINE", True)
    far = ["--harness", "far", "--harness-path", tasks.folder, "--out", tmp_path / "far"]
    code, out, err = call("eval", tiny_model, *far)
    assert (code, out) == (1, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: harness task far: ")
    assert "HF_HUB_OFFLINE is set and the data are not in the cache" in last
    near = ["--harness", "sums_choice", "--harness-path", tasks.folder, "--out", tmp_path / "o"]
    code, out, err = call("eval", tiny_model, *near, "--limit", 5)
    assert code == 0, err
    assert "5 of 12 questions" in out
    assert "no random sample" in out
