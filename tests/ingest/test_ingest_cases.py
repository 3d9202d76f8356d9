"""Small files that once went wrong, each with what must come of it, and their siblings."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.ingest.readers import Source, read_sources

CASES = Path(__file__).parents[1] / "cases"
U, A, S, T = "user", "assistant", "system", "tool"
PARIS = '[{"function":{"arguments":%s,"name":"w"},"type":"function"}]'


def read(path, **options):
    """Rows as lists of messages without empty fields; bad ones, faults, what was set aside."""
    holds = options.pop("holds", "responses")
    good, bad, faults, aside = [], [], [], {}
    for batch in read_sources([Source(str(path), **options)], holds=holds):
        for row, rejected in zip(batch.rows.to_pylist(), batch.rejected, strict=True):
            kept = [tuple(v for v in m.values() if v is not None) for m in row["messages"]]
            (bad if rejected else good).append(kept)
        faults += [(q["line"], q["reason"]) for q in batch.quarantine.to_pylist()]
        aside |= batch.aside
    return good, bad, faults, aside


QA = [(U, "Q"), (A, "A")]
GOOD_BAD = ([[(U, "Q"), (A, "good")]], [[(U, "Q"), (A, "bad")]], [], {})
G_B = ([[(U, "Q"), (A, "g")]], [[(U, "Q"), (A, "b")]], [], {})
WANTED = {
    "alpaca_history": (
        [[(U, "first"), (A, "a1"), (U, "second"), (A, "a2"), (U, "third"), (A, "o")]],
        [],
        [],
        {},
    ),
    "alpaca_leading_indent": ([[(U, "Complete\ndef f(a,b):"), (A, "    return a+b")]], [], [], {}),
    "axolotl_train_false": ([], [], [(1, "no_loss")], {}),
    "conversations_system_col": ([[(S, "S"), *QA]], [], [], {}),
    "dolly": ([[(U, "I\nC"), (A, "R")]], [], [], {"category": 1}),
    "dpo_lf": G_B,
    "first_gpt": ([[(A, "Hello"), *QA]], [], [], {}),
    "hist": (
        [
            [
                (U, "What is the capital of Norway?"),
                (A, "Oslo."),
                (U, "And its population?"),
                (A, "About 700 thousand."),
            ],
            [(U, "And its population?"), (A, "About 700 thousand.")],
        ],
        [],
        [],
        {},
    ),
    "image": ([], [], [(1, "media"), (2, "media")], {}),
    "images_placeholder": ([], [], [(1, "media")], {}),
    "last_turn_user": ([], [], [(1, "no_response")], {}),
    "metamath": ([[(U, "Q"), (A, "R")]], [], [], {"type": 1}),
    "num_answer": ([[(U, "2+2"), (A, "4")]], [], [], {}),
    "openai_legacy_function_call": (
        [
            [
                (U, "weather?"),
                (A, "", PARIS % r'"{\"c\":\"Paris\"}"'),
                (T, "sunny", "w"),
                (A, "It is sunny"),
            ]
        ],
        [],
        [],
        {},
    ),
    "openai_weight0_mid": ([[(U, "Q"), (A, "bad answer", 0), (U, "no"), (A, "good")]], [], [], {}),
    "reasoning_effort_kwargs": ([QA], [], [], {"chat_template_kwargs": 1}),
    "sharegpt_bad_call_json": ([], [], [(1, "function_call")], {}),
    "system_mid": ([[(U, "Q"), (S, "S"), (A, "A")]], [], [], {}),
    "system_prompt_col": ([[(S, "S"), (U, "Q"), (A, "R")]], [], [], {}),
    "tool_call_id": (
        [
            [
                (U, "Q"),
                (
                    A,
                    "",
                    '[{"function":{"arguments":"{}","name":"f"},"id":"call_1","type":"function"}]',
                ),
                (T, "1", "call_1"),
                (A, "A"),
            ]
        ],
        [],
        [],
        {},
    ),
    "trl_pref_conv_explicit": GOOD_BAD,
    "trl_pref_conv_implicit": GOOD_BAD,
    "trl_prompt_completion_conv": ([QA], [], [], {}),
    "trl_prompt_only": ([], [], [(1, "no_response")], {}),
    "trl_tool_calling": (
        [
            [
                (U, "weather?"),
                (A, "", PARIS % '{"c":"Paris"}'),
                (T, "sunny", "w"),
                (A, "It is sunny"),
            ]
        ],
        [],
        [],
        {},
    ),
    "trl_unpaired_kto": GOOD_BAD,
    "two_users": ([[(U, "Q1"), (U, "Q2"), (A, "A")]], [], [], {}),
    "ultrafeedback": (*G_B[:3], {"messages": 1}),
    "weight": (
        [[(U, "q"), (A, "a wrong reply", 0), (U, "again"), (A, "a right reply")]],
        [],
        [],
        {},
    ),
}


@pytest.mark.parametrize("name", WANTED)
def test_what_comes_of_each_layout(name):
    assert read(CASES / "ingest" / f"{name}.jsonl") == WANTED[name]


def test_every_file_of_the_cases_has_a_test():
    there = {path.stem for path in (CASES / "ingest").glob("*.jsonl")}
    assert there == {*WANTED, "axolotl_input_output"}


def test_a_mask_over_templated_text_is_refused_by_name():
    with pytest.raises(ValueError, match="segments hold templated text with a mask of the loss"):
        read(CASES / "ingest" / "axolotl_input_output.jsonl")


def test_prompts_are_rows_of_a_pool_of_prompts():
    read_prompt = lambda name: read(CASES / "ingest" / f"{name}.jsonl", holds="prompts")  # noqa: E731
    assert read_prompt("trl_prompt_only") == ([[(U, "Q"), (A, "")]], [], [], {})
    assert read_prompt("num_answer")[0] == [[(U, "2+2"), (A, "")]]
    assert read_prompt("weight")[2] == [(1, "has_response")]
    assert read_prompt("metamath")[3] == {"response": 1, "type": 1}


@pytest.mark.parametrize(
    ("columns", "answer"),
    [
        ({"ground_truth": "4 "}, "4"),
        ({"reward_model": {"style": "rule", "ground_truth": "4"}}, "4"),
        ({"solution": "\\boxed{4}"}, "\\boxed{4}"),
        ({"answer": 4, "solution": "long"}, "4"),
        ({"constraints": [{"id": "x"}]}, '[{"id":"x"}]'),
        (
            {"instruction_id_list": ["a:b"], "kwargs": [{"n": 1, "m": None}]},
            '{"instruction_id_list":["a:b"],"kwargs":[{"n":1}]}',
        ),
        ({}, None),
    ],
)
def test_references_of_prompts_by_the_names_in_use(tmp_path, columns, answer):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": [TURNS[0]], **columns}))
    (batch,) = read_sources([Source(str(path))], holds="prompts")
    (row,) = batch.rows.to_pylist()
    assert (row["answer"], row["answer_from"]) == (answer, "independent" if answer else None)
    assert [m["content"] for m in row["messages"]] == ["Q", ""]
    assert set(batch.aside) == {"reward_model"} & set(columns) | {"solution"} & (
        set(columns) if "answer" in columns else set()
    )


CALL = {"name": "f", "arguments": "{}"}
TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
LF = [
    {"role": "user", "content": [{"type": "text", "value": "Q"}], "loss_weight": 0.0},
    {"role": "assistant", "content": [{"type": "text", "value": "A"}], "loss_weight": 1.0},
]


def turn(**more):
    return [TURNS[0], {**TURNS[1], **more}]


SIBLINGS = [
    # (record, good rows, bad rows, reasons, set aside)
    ({"messages": LF}, [QA], [], [], {}),
    (
        {"chosen_messages": LF, "rejected_messages": [LF[0], {**LF[1], "content": "b"}]},
        [QA],
        [[(U, "Q"), (A, "b")]],
        [],
        {},
    ),
    (
        {"query": "Q", "response": "A", "history": [["q", "a"]], "system": "S"},
        [[(S, "S"), (U, "q"), (A, "a"), *QA]],
        [],
        [],
        {},
    ),
    ({"question": "Q", "response": "A", "context": "C"}, [], [], ["part_of_question"], {}),
    ({"question": "Q", "response": "A", "options": ["x"]}, [], [], ["part_of_question"], {}),
    ({"query": "Q", "response": "A", "choices": [], "context": ""}, [QA], [], [], {}),
    ({"question": "Q", "response": "A", "is_correct": False}, [], [], ["label"], {}),
    ({"messages": TURNS, "accepted": False}, [], [], ["label"], {}),
    ({"messages": TURNS, "correct": True}, [QA], [], [], {"correct": 1}),
    ({"messages": TURNS, "correct": "A"}, [QA], [], [], {"correct": 1}),
    ({"messages": turn(mask=True)}, [], [], ["loss_mask"], {}),
    ({"messages": TURNS, "rejected_response": "b"}, [QA], [[(U, "Q"), (A, "b")]], [], {}),
    ({"instruction": "Q", "input": "", "output": ["A", "b"]}, [QA], [[(U, "Q"), (A, "b")]], [], {}),
    (
        {"instruction": "Q", "chosen": "A", "rejected": "b", "history": [["q", "a"]]},
        [[(U, "q"), (A, "a"), *QA]],
        [[(U, "q"), (A, "a"), (U, "Q"), (A, "b")]],
        [],
        {},
    ),
    (
        {"question": "Q", "chosen": "A", "rejected": "b", "system": "S"},
        [[(S, "S"), *QA]],
        [[(S, "S"), (U, "Q"), (A, "b")]],
        [],
        {},
    ),
    (
        {
            "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
            "kto_tag": False,
        },
        [],
        [QA],
        [],
        {},
    ),
    ({"messages": TURNS, "label": True}, [QA], [], [], {}),
    ({"messages": TURNS, "label": 0}, [], [QA], [], {}),
    ({"messages": TURNS, "label": "False"}, [], [QA], [], {}),
    ({"messages": TURNS, "label": 3}, [], [], ["label"], {}),
    ({"messages": TURNS, "label": "physics"}, [QA], [], [], {"label": 1}),
    ({"prompt": "Q", "completion": "A", "system_prompt": "S"}, [[(S, "S"), *QA]], [], [], {}),
    ({"messages": turn(weight=0.5)}, [], [], ["weight"], {}),
    ({"messages": turn(loss=False)}, [], [], ["no_loss"], {}),
    ({"messages": [{**TURNS[0], "train": True}, TURNS[1]]}, [], [], ["prompt_loss"], {}),
    ({"messages": turn(training_detail=[{"begin_offset": 0}])}, [], [], ["loss_mask"], {}),
    ({"messages": TURNS, "weight": 0.2}, [], [], ["weight"], {}),
    ({"messages": TURNS, "weight": 1}, [QA], [], [], {"weight": 1}),
    ({"messages": TURNS, "train": False}, [], [], ["no_loss"], {}),
    ({"messages": TURNS, "loss_mask": [0, 1]}, [], [], ["loss_mask"], {}),
    ({"messages": TURNS, "history": [["a", "b"]]}, [], [], ["history"], {}),
    ({"messages": TURNS, "images": []}, [QA], [], [], {}),
    ({"prompt": "Q", "completion": "A", "image_path": "a.png"}, [], [], ["media"], {}),
    ({"messages": turn(images=["a"])}, [], [], ["media"], {}),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
                TURNS[1],
            ]
        },
        [],
        [],
        ["media"],
        {},
    ),
    ({"question": "<image>\nWho?", "answer": "They."}, [], [], ["media"], {}),
    ({"question": "What is <|vision_start|>?", "answer": "A."}, [], [], ["media"], {}),
    (
        {
            "question": "Is `<image>` a tag?",
            "answer": "Use <video src=a></video> or the <video> tag here.",
        },
        [[(U, "Is `<image>` a tag?"), (A, "Use <video src=a></video> or the <video> tag here.")]],
        [],
        [],
        {},
    ),
    ({"messages": turn(thinking="t")}, [[(U, "Q"), (A, "A", "t")]], [], [], {}),
    (
        {
            "messages": [
                TURNS[0],
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "t"},
                        {"type": "text", "text": "A"},
                    ],
                },
            ]
        },
        [[(U, "Q"), (A, "A", "t")]],
        [],
        [],
        {},
    ),
    (
        {"question": "Q", "answer": "A", "reasoning_content": "t"},
        [[(U, "Q"), (A, "A", "t")]],
        [],
        [],
        {},
    ),
    (
        {"messages": turn(function_call=CALL)},
        [[(U, "Q"), (A, "A", '[{"function":{"arguments":"{}","name":"f"},"type":"function"}]')]],
        [],
        [],
        {},
    ),
    ({"messages": turn(function_call={"arguments": "{}"})}, [], [], ["function_call"], {}),
    (
        {"messages": [{**TURNS[0], "name": "Ann"}, TURNS[1]]},
        [[(U, "Q", "Ann"), (A, "A")]],
        [],
        [],
        {},
    ),
    (
        {"messages": turn(mood="calm"), "topic": "x"},
        [QA],
        [],
        [],
        {"messages[].mood": 1, "topic": 1},
    ),
    ({"prompt": "\tQ \n", "completion": "  A\r\n"}, [[(U, "\tQ \n"), (A, "  A\r\n")]], [], [], {}),
]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("number", range(len(SIBLINGS)))
def test_columns_and_keys_that_change_what_a_row_means(tmp_path, number, ending):
    record, good, bad, reasons, aside = SIBLINGS[number]
    path = tmp_path / f"x.{ending}"
    if ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pa.Table.from_pylist([record])
        except pa.ArrowInvalid:
            pytest.skip("no table holds such a record")
        pq.write_table(table, path)
    else:
        path.write_text(json.dumps([record] if ending == "json" else record))
    assert read(path) == (good, bad, [(1, reason) for reason in reasons], aside)


def test_null_arguments_of_a_call_stay_where_they_were_written(tmp_path):
    def record(**arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return {
            "messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
        }

    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record(a=None, b={"c": None})) + "\n" + json.dumps(record(z=1)))
    good, *_ = read(path)
    calls = [json.loads(row[1][2])[0]["function"]["arguments"] for row in good]
    assert calls == [{"a": None, "b": {"c": None}}, {"z": 1}]


def test_columns_that_come_late_are_read_like_the_first(tmp_path):
    """A layout is told from the first 200 records; what a record means is told from itself."""
    plain = {"instruction": "Q", "output": "A"}
    late = [
        {**plain, "history": [["q", "a"]]},
        {**plain, "system": "S"},
        {**plain, "input": "I"},
        {**plain, "label": False},
        {**plain, "images": ["a.png"]},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [plain] * 300 + late))
    good, bad, faults, _ = read(path)
    assert good[300:] == [[(U, "q"), (A, "a"), *QA], [(S, "S"), *QA], [(U, "Q\nI"), (A, "A")]]
    assert bad == [QA]
    assert faults == [(305, "media")]


def test_a_column_can_be_set_aside_or_mapped_against_its_name(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "Q", "completion": "A", "label": 3, "weight": 0.5}))
    assert read(path)[2] == [(1, "weight")]
    assert read(path, set_aside=("weight", "label")) == ([QA], [], [], {"weight": 1, "label": 1})
    path.write_text(json.dumps({"prompt": "Q", "completion": "A", "desirable": False}))
    assert read(path, columns={"label": "desirable"}) == ([], [QA], [], {})
    with pytest.raises(ValueError, match="mapped and set aside"):
        Source("x.jsonl", columns={"label": "a"}, set_aside=("a",))


@pytest.mark.parametrize("line", (CASES / "ids" / "recorded.jsonl").read_text("utf-8").splitlines())
def test_rows_that_were_read_rightly_keep_their_ids(tmp_path, line):
    known = json.loads(line)
    path = tmp_path / "toy.jsonl"
    path.write_text(json.dumps(known["record"]))
    (batch,) = read_sources([Source(str(path), **known["settings"])])
    assert batch.rows["id"].to_pylist() == known["ids"]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1)
SAID = TEXT.filter(lambda text: text.strip())


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(SAID, SAID, st.booleans()), max_size=3),
    SAID,
    SAID,
    st.sampled_from(["weight", "train", "loss", "training"]),
    st.none() | SAID,
    st.none() | st.booleans(),
)
def test_texts_weights_and_labels_come_through_to_the_character(
    tmp_path_factory, earlier, asked, answered, key, system, label
):
    turns = [{"role": "system", "content": system}] if system else []
    want = [("system", system, None)] if system else []
    for question, reply, learned in earlier:
        turns += [{"role": "user", "content": question}]
        turns += [{"role": "assistant", "content": reply, key: int(learned)}]
        want += [(U, question, None), (A, reply, None if learned else 0)]
    turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    want += [(U, asked, None), (A, answered, None)]
    path = tmp_path_factory.mktemp("chat") / "x.jsonl"
    path.write_text(json.dumps({"messages": turns, "label": label}))
    (batch,) = read_sources([Source(str(path))])
    (row,) = batch.rows.to_pylist()
    assert [(m["role"], m["content"], m["weight"]) for m in row["messages"]] == want
    assert batch.rejected == [label is False]
    assert not batch.aside
