"""What other trainers' own data loaders make of a version with reasoning and tool calls.

    python benchmarks/bench_trainers.py --work DIR --trainer axolotl@REVISION=SOURCE[:LIBRARIES] ...

Publishes a version of every shape of conversation, exports it to each trainer, and lets the
trainer's own loading code turn the export into tokens and labels (`trainer_probes.py`). They are
held against ours, `scoring.spans.response_span`, under the same chat template: Qwen 3's, as TRL
ships it, which the trainers have under that name or take from the tokenizer. SOURCE is the folder a
trainer's package lies in, LIBRARIES a folder of packages that it needs in other versions.

Columns: rows exported; rows loaded; rows whose text is ours to the character; rows whose loss text
is ours; rows where it is ours but for the tags of a thought and the white space around them, which
templates force and some trainers leave out of the loss; rows whose loss text holds the whole of the
response's content, reasoning and calls. A pair counts where both of its responses do. Of rlvr, text
is the prompt that a model is asked with, loss the answer that the reward is given.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
COUNTS = ("text", "loss", "said", "held")
KINDS = ("sft", "preferences", "rlvr")
WORDS = ("Łódź", "Paris", 'the "old" town', "a\nline", "x < y & z", "  spaced  ", "東京", "{}")


def shapes(versions):
    """Rows of every shape, each with every text of `WORDS`."""
    found = {}
    for word in WORDS:
        for name, chat in (versions.PLAIN | versions.REASONED | versions.TOOLED).items():
            turns = [dict(turn) for turn in chat]
            last_user = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
            turns[last_user]["content"] += f" ({word})"
            turns[-1]["content"] = f"{turns[-1]['content']} {word}".strip()
            if turns[-1]["tool_calls"]:
                turns[-1]["content"] = turns[-1]["content"].removesuffix(word).strip()
                calls = json.loads(turns[-1]["tool_calls"])
                calls[0]["function"]["arguments"]["city"] = word
                turns[-1]["tool_calls"] = json.dumps(calls)
            if turns[-1]["reasoning"]:
                turns[-1]["reasoning"] = f"{turns[-1]['reasoning']} {word}".strip()
            found[f"{name} {word}"] = turns
    return found


def configs(versions):
    """Preference pairs and verifiable prompts of every plain shape, each with every text."""
    import pyarrow as pa

    kinds = {name: table.schema for name, table in versions.configs().items()}
    pairs, prompts = [], []
    for number, word in enumerate(WORDS):
        for name, chat in versions.PLAIN.items():
            turns = [{"role": t["role"], "content": t["content"]} for t in chat]
            prompt, last = turns[:-1], turns[-1]["content"]
            prompt[-1]["content"] += f" ({word})"
            said = {
                half: [{"role": "assistant", "content": f"{last} {end} {word}".strip()}]
                for half, end in (("chosen", "Yes."), ("rejected", "No."))
            }
            identity = f"{name} {number}"
            pairs.append({"id": identity, "prompt": prompt, **said})
            told = {"answer": word, "verifier": "exact"}
            prompts.append({"id": identity, "prompt": prompt, **told})
    return {
        "preferences": pa.Table.from_pylist(pairs, schema=kinds["preferences"]),
        "rlvr": pa.Table.from_pylist(prompts, schema=kinds["rlvr"]),
    }


def published(versions, work):
    """The version, and its rows by id."""
    made, further = shapes(versions), configs(versions)
    versions.configs = lambda: further
    # Which rows of a table come with tools is told by their names.
    versions.TOOLED = dict.fromkeys(n for n in made if n.split()[0] in versions.TOOLED)
    folder = versions.make_version(work / "mixed", made)
    rows = {"sft": {row["id"]: row for row in versions.row_table(made).to_pylist()}}
    rows |= {n: {row["id"]: row for row in table.to_pylist()} for n, table in further.items()}
    return folder, rows


def make_tokenizer(tiny, folder):
    """A byte-level tokenizer with Qwen's special tokens and Qwen 3's chat template."""
    import trl

    template = (Path(trl.__file__).with_name("chat_templates") / "qwen3.jinja").read_text()
    tokenizer = tiny.make_tokenizer(template=template)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    # The name that transformers 4 and 5 both read.
    config = folder / "tokenizer_config.json"
    said = json.loads(config.read_text())
    said["additional_special_tokens"] = said.pop("extra_special_tokens")
    config.write_text(json.dumps(said))
    return tokenizer


def held(response, loss):
    """Whether a text of loss tokens holds the response's content, reasoning and calls."""
    from siftline.scoring.templates import missing_from_response

    return not missing_from_response(response, loss)


def compare(kind, tokenizer, ids, lines, rows):
    """Counts of one trainer, and how texts differ."""
    counts, kinds = Counter(), Counter()
    for identity, line in zip(ids, lines, strict=True):
        row = rows[identity]
        if kind == "rlvr":
            asked = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, tokenize=False
            )
            found = [differences(line["prompt"], asked, line["answer"], row["answer"])]
            found[0]["held"] = line["answer"] == row["answer"]
        elif kind == "preferences":
            chats = [[*row["prompt"], *row[half]] for half in ("chosen", "rejected")]
            found = [conversation(tokenizer, c, None, p) for c, p in zip(chats, line, strict=True)]
        else:
            found = [conversation(tokenizer, row["messages"], row["tools"], line)]
        for name in COUNTS:
            counts[name] += all(part[name] for part in found)
        kinds.update(how for part in found for how in part["how"])
    return counts, kinds


def conversation(tokenizer, messages, tools, line):
    """One conversation as a trainer has it beside ours."""
    from siftline.rows.native import native_messages
    from siftline.scoring.spans import response_span

    tokens, (start, end) = response_span(tokenizer, messages, tools=tools)
    ours, our_loss = tokenizer.decode(tokens), tokenizer.decode(tokens[start:end])
    loss = tokenizer.decode([t for t in line["labels"] if t != -100])
    found = differences(tokenizer.decode(line["tokens"]), ours, loss, our_loss)
    return found | {"held": held(native_messages(messages)[-1], loss)}


def differences(text, ours, loss, our_loss):
    """Which of the counts hold, and how the texts part."""
    text, loss = text.rstrip("\n"), loss.rstrip("\n")
    ours, our_loss = ours.rstrip("\n"), our_loss.rstrip("\n")
    how = [("text", first_difference(ours, text))] if text != ours else []
    how += [("loss", first_difference(our_loss, loss))] if loss != our_loss else []
    same = {"text": text == ours, "loss": loss == our_loss, "said": bare(loss) == bare(our_loss)}
    return same | {"how": how}


def bare(text):
    """A text without the tags of thoughts and the white space around them."""
    return re.sub(r"\s*</?think>\s*", "", text).strip()


def first_difference(ours, theirs):
    """The two texts from a little before they part."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    at = min(len(ours), len(theirs)) if at is None else at
    return f"{ours[max(0, at - 12) : at + 24]!r} | {theirs[max(0, at - 12) : at + 24]!r}"


def loaded(name, kind, source, libraries, export, tokenizer_folder, out):
    """What a trainer makes of an export, or why it could not."""
    python = [str(ROOT / "src"), *([libraries] if libraries else [])]
    probe = Path(__file__).with_name("trainer_probes.py")
    places = [str(place) for place in (export, tokenizer_folder, out)]
    done = subprocess.run(
        [sys.executable, str(probe), name, kind, source, *places],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(python), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return None, done.stderr.strip().splitlines()[-1]
    return json.loads(out.read_text()), ""


def beside(name):
    """A module of the tests, which make the rows."""
    sys.path.insert(0, str(ROOT / "tests"))
    return __import__(name)


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="Scratch folder; made anew.")
    parser.add_argument(
        "--trainer", action="append", required=True, metavar="NAME@REV=SOURCE[:LIBS]"
    )
    parser.add_argument("--kind", action="append", choices=KINDS, help="By default all of them.")
    given = parser.parse_args()
    from siftline.export.write import export

    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    folder, rows = published(beside("versions"), given.work)
    tokenizer = make_tokenizer(beside("tiny"), given.work / "tokenizer")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("transformers", "trl", "datasets"))
    print(f"{date.today()}, {libraries} here; template qwen3")
    tools = sum(bool(row["tools"]) for row in rows["sft"].values())
    sizes = ", ".join(f"{kind} {len(rows[kind])}" for kind in KINDS)
    print(f"rows: {sizes}; of sft with tools {tools}")
    columns = "".join(f"{name:>10}" for name in ("exported", "loaded", *COUNTS))
    print(f"{'trainer':<14} {'kind':<11}{columns}  left out")
    for asked in given.trainer:
        told, _, place = asked.partition("=")
        name, _, revision = told.partition("@")
        out = given.work / name
        done = export(folder, name, out)
        print(f"{name}, revision {revision or 'unknown'}")
        for kind in given.kind or KINDS:
            show(name, kind, place, done, out, tokenizer, rows[kind], given.work)


def show(name, kind, place, done, out, tokenizer, rows, work):
    """Prints the lines of one trainer and kind."""
    label = f"{name:<14} {kind:<11}"
    if kind not in done.rows:
        print(f"{label}  it has none")
        return
    source, _, packages = place.partition(":")
    report = work / f"{name}-{kind}.json"
    lines, error = loaded(name, kind, source, packages, out, work / "tokenizer", report)
    left = ", ".join(f"{n} {why}" for why, n in done.left_out.get(kind, {}).items()) or "-"
    ids = exported_ids(out, kind)
    if lines is None:
        print(f"{label}{len(ids):>10}  failed: {error}")
    elif len(lines) != len(ids):
        print(f"{label}{len(ids):>10}{len(lines):>10}  not compared")
    else:
        counts, kinds = compare(kind, tokenizer, ids, lines, rows)
        figures = (len(ids), len(lines), *(counts[key] for key in COUNTS))
        print(f"{label}{''.join(f'{n:>10}' for n in figures)}  {left}")
        for (what, shown), count in kinds.most_common(6):
            print(f"    {count} texts, {what}: {shown}")


def exported_ids(out, kind):
    """Ids of an export's rows in order."""
    if (out / f"{kind}.parquet").exists():
        import pyarrow.parquet as pq

        return pq.read_table(out / f"{kind}.parquet")["id"].to_pylist()
    lines = (out / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["id"] for line in lines]


if __name__ == "__main__":
    main()
