"""Published versions of every shape of conversation, for tests of what others read of them."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.rows.card import CardInfo
from siftline.rows.curated import REMOVED, publish
from siftline.rows.schema import ROW, make_row, message

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Looks up {name}.",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string"}},
                "required": [key],
            },
        },
    }
    for name, key in (("weather", "city"), ("time", "zone"))
]


def call(name: str, identity: str | None = None, **arguments: Any) -> dict[str, Any]:
    """A call as a row's JSON has it."""
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made | ({"id": identity} if identity else {})


def calling(content: str, *calls: dict[str, Any], reasoning: str | None = None) -> dict[str, Any]:
    """An assistant's message with calls."""
    return message("assistant", content, reasoning=reasoning, tool_calls=json.dumps(calls))


USER, SYSTEM = message("user", "Weather in Łódź?"), message("system", "Be\nbrief.")
SAID = message("assistant", "  It is 3 °C.\n\n    def f():\n        pass")
PLAIN = {
    "plain": [USER, SAID],
    "system": [SYSTEM, USER, SAID],
    "turns": [USER, message("assistant", "Which day?"), message("user", "Today."), SAID],
}
REASONED = {
    "reasoned": [USER, message("assistant", "3.", reasoning="It is\nwinter.")],
    "reasoned turns": [
        USER,
        message("assistant", "Which day?", reasoning="Unclear."),
        message("user", "Today."),
        message("assistant", "3.", reasoning="Clear."),
    ],
}
TOOLED = {
    "call": [USER, calling("", call("weather", "c1", city='Łódź "PL"'))],
    "words": [USER, calling("I look.", call("weather", "c1", city="Łódź"), reasoning="Look.")],
    "answer": [
        SYSTEM,
        USER,
        calling("", call("weather", "c1", city="Łódź", days=[1, None]), reasoning="Look."),
        message("tool", '{"t": 3}', tool_call_id="c1", name="weather"),
        message("assistant", "3.", reasoning="It says 3."),
    ],
    "parallel": [
        USER,
        calling("", call("weather", city="Łódź"), call("time", zone="CET")),
        message("tool", "3"),
        message("tool", "12:00"),
        message("assistant", "3 at noon."),
    ],
}


def row_table(shapes: dict[str, list[dict[str, Any]]]) -> pa.Table:
    """Rows whose source says their shape; those of `TOOLED` come with tools."""
    rows = [
        make_row(chat, source=name, tools=json.dumps(TOOLS) if name in TOOLED else None)
        for name, chat in shapes.items()
    ]
    return pa.Table.from_pylist(rows, schema=ROW)


def configs() -> dict[str, pa.Table]:
    """One pair and two verifiable prompts."""
    turn = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    ask = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2?"}]
    good, bad = ([{"role": "assistant", "content": c}] for c in ("#### 4", "#### 5"))
    pair = [{"id": "p", "prompt": ask, "chosen": good, "rejected": bad}]
    pairs = pa.schema([("id", pa.string()), *((n, turn) for n in ("prompt", "chosen", "rejected"))])
    told = [{"id": "r", "prompt": ask, "answer": "4", "verifier": "math"}]
    texts = [(name, pa.string()) for name in ("answer", "verifier")]
    verifiable = pa.schema([("id", pa.string()), ("prompt", turn), *texts])
    return {
        "preferences": pa.Table.from_pylist(pair, schema=pairs),
        "rlvr": pa.Table.from_pylist(told, schema=verifiable),
    }


def make_version(root: Path, shapes: dict[str, list[dict[str, Any]]]) -> Path:
    """Publishes the shapes and both further configs; returns the version's folder."""
    table = row_table(shapes)
    scores = pl.DataFrame(
        {"id": table["id"].to_pylist(), "sift_source": table["source"].to_pylist()}
    )
    card = CardInfo("mixed", "mit", configs=(("preferences", "pairs"), ("rlvr", "prompts")))
    done = publish(
        table,
        scores,
        pl.DataFrame(schema=REMOVED),
        root=root,
        seed=0,
        identity={},
        card=card,
        configs=configs(),
    )
    return done.path
