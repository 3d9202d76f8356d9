"""Nothing altered is believed: every kind of file, every kind of damage, cold and warm."""

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siftline.rows import verified
from siftline.rows.schema import ADDED, ROW, make_row, message
from siftline.rows.shards import read_named, write_json, write_named, write_parquet
from siftline.rows.verified import (
    AlteredError,
    SchemaError,
    UnhashedError,
    conform,
    file_hash,
    read_hashed,
    read_parquet,
    with_hash,
)
from siftline.scoring.fingerprint import confirm_files, directory_digest, record_files
from siftline.store.namespace import Journal
from siftline.store.store import Namespace, Store

# ---- a file's hash, once ---------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch):
    """Counts the files whose bytes are hashed."""
    names = []

    def counting(handle, name):
        names.append(Path(handle.name).name)
        return original(handle, name)

    original = verified.hashlib.file_digest
    monkeypatch.setattr(verified.hashlib, "file_digest", counting)
    monkeypatch.setattr(verified, "_hashed", {})
    return names


def aged(path, seconds=60.0):
    """As if the file had been written before; its time of change is that of now."""
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_a_file_is_hashed_once_in_a_process(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(verified, "FINE_STEP", 0.0)
    path = tmp_path / "x"
    path.write_bytes(b"one")
    first = file_hash(path)
    assert [file_hash(path) for _ in range(5)] == [first] * 5
    assert hashed == ["x"]
    shutil.copy2(path, tmp_path / "y")  # another inode is another file
    assert file_hash(tmp_path / "y") == first
    assert hashed == ["x", "y"]


def test_a_change_that_keeps_size_and_time_is_noticed(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(verified, "FINE_STEP", 0.0)
    path = aged(tmp_path / "x") if (tmp_path / "x").write_bytes(b"one") else None
    first, status = file_hash(path), path.stat()
    with path.open("r+b") as handle:
        handle.write(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert path.stat().st_size == status.st_size
    assert file_hash(path) != first


def test_a_file_of_this_moment_is_hashed_again(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(verified, "FINE_STEP", 60.0)
    path = tmp_path / "x"
    path.write_bytes(b"one")
    assert file_hash(path) == file_hash(path)
    assert hashed == ["x", "x"]


def test_whole_seconds_are_told_from_finer_times():
    second = 10**9
    coarse, fine = (1, 1, 1, 100 * second, 100 * second), (1, 1, 1, 100 * second, 100 * second + 7)
    assert not verified._settled(coarse, 101.0)
    assert verified._settled(coarse, 102.5)
    assert verified._settled(fine, 101.0)
    assert not verified._settled(fine, 100.01)


def test_trust_ends(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(verified, "FINE_STEP", 0.0)
    path = tmp_path / "x"
    path.write_bytes(b"one")
    file_hash(path)
    monkeypatch.setattr(verified, "TRUSTED_SECONDS", 0.0)
    file_hash(path)
    assert hashed == ["x", "x"]


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path, real, read = tmp_path / "x.parquet", pq.ParquetFile, []
    write_parquet(pa.table({"a": [1]}), path)
    good, sha256 = path.read_bytes(), file_hash(path)
    write_parquet(pa.table({"a": [2]}), tmp_path / "other.parquet")

    def swapping(at):
        read.append(at)
        if len(read) == 1:
            shutil.copy(tmp_path / "other.parquet", path)
        return real(at)

    monkeypatch.setattr(verified.pq, "ParquetFile", swapping)
    with pytest.raises(AlteredError, match="is corrupt or was replaced"):
        read_parquet(path, sha256)
    path.write_bytes(good)
    assert read_parquet(path, sha256)["a"].to_pylist() == [1]


# ---- columns by name, before any cast --------------------------------------------------------


def renamed(kind, old, new):
    """A type with a field of that name, wherever it stands, called otherwise."""
    if pa.types.is_list(kind):
        return pa.list_(renamed(kind.value_type, old, new))
    if pa.types.is_struct(kind):
        return pa.struct(
            [(new if f.name == old else f.name, renamed(f.type, old, new)) for f in kind]
        )
    return kind


NAMES = [*ROW.names, "role", "content", "reasoning", "tool_calls"]


@pytest.mark.parametrize("name", NAMES)
def test_a_cast_invents_no_null(tmp_path, name):
    """The footer of a part with one bit flipped: a field of another name, read as nulls."""
    rows = [make_row([message("user", f"q{i}"), message("assistant", "a")]) for i in range(3)]
    whole = pa.Table.from_pylist(rows, schema=ROW)
    other = chr(ord(name[0]) ^ 1) + name[1:]
    fields = renamed(pa.struct(list(ROW)), name, other)
    raw = pa.Table.from_arrays(whole.columns, names=[f.name for f in fields])
    if name not in ROW.names:
        messages = [[renamed_keys(m, name, other) for m in row["messages"]] for row in rows]
        at = raw.column_names.index("messages")
        raw = raw.set_column(at, "messages", pa.array(messages, fields[at].type))
    path = tmp_path / "x.parquet"
    write_parquet(raw, path)
    for columns in (None, ROW.names):
        with pytest.raises(SchemaError, match=rf"x\.parquet .*{name} is not there.*delete it"):
            read_parquet(path, file_hash(path), schema=ROW, columns=columns)
    assert conform(whole, ROW, path).equals(whole)


def renamed_keys(line, old, new):
    return {new if key == old else key: value for key, value in line.items()}


def test_types_and_surplus_columns_are_told_too(tmp_path):
    rows = pa.table({"a": pa.array([1, 2], pa.int64())})
    with pytest.raises(SchemaError, match="a is int64, not int32"):
        conform(rows, pa.schema([("a", pa.int32())]), tmp_path)
    with pytest.raises(SchemaError, match="a is not known"):
        conform(rows, pa.schema([]), tmp_path)
    loose = pa.schema([f.with_nullable(True) for f in ADDED])
    assert conform(loose.empty_table(), ADDED, tmp_path).schema == ADDED


def test_rows_are_counted(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(pa.table({"a": [1, 2]}), path)
    with pytest.raises(AlteredError, match="2 rows, its manifest says 3"):
        read_parquet(path, file_hash(path), rows=3)


# ---- JSON that holds its own hash ------------------------------------------------------------

JSON = st.dictionaries(
    st.text(max_size=4).filter(lambda key: key != "sha256"),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    max_size=5,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=JSON, data=st.data())
def test_a_flipped_bit_of_hashed_json_is_an_error_or_no_change(tmp_path, value, data):
    path = tmp_path / "m.json"
    write_json(path, with_hash(value))
    assert read_hashed(path, "a file") == verified.plain(value)
    raw = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    found, error = outcome(read_hashed, path, "a file")
    if error is None:
        assert found == verified.plain(value)
    else:
        assert isinstance(error, AlteredError | UnhashedError)
        assert str(error).startswith(str(path))
        assert "\n" not in str(error)


def outcome(function, *arguments):
    """What a call gives, or the ValueError it raises."""
    try:
        return function(*arguments), None
    except ValueError as error:
        return None, error


@pytest.mark.parametrize("text", ["", "\n", "{", "[]", "null", '{"a": 1', "{}", '{"a": 1}'])
def test_what_holds_no_hash_is_one_line(tmp_path, text):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"m\.json is not a manifest .*delete it and run again"):
        read_hashed(path, "a manifest")


# ---- damage ----------------------------------------------------------------------------------


def flipped(place):
    def damage(path, other, older):
        raw = bytearray(path.read_bytes())
        at = {"head": 1, "middle": len(raw) // 2, "foot": len(raw) - 7}[place]
        raw[at] ^= 0x02
        path.write_bytes(raw)

    return damage


def cut(path, other, older):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swapped(path, other, older):
    shutil.copy2(other, path)


def older_copy(path, other, older):
    shutil.copy2(older, path)


DAMAGE = {
    "flip head": flipped("head"),
    "flip middle": flipped("middle"),
    "flip foot": flipped("foot"),
    "cut": cut,
    "empty": lambda path, other, older: path.write_bytes(b""),
    "delete": lambda path, other, older: path.unlink(),
    "swap": swapped,
    "older copy": older_copy,
}

RECIPE = """
name: small
seed: 3
pool:
  name: p
  buckets: 2
  max_quarantine: 0.5
  inputs: [{path: "${SMALL}/in/pool.jsonl"}]
sets:
  test: [{name: t, buckets: 1, inputs: [{path: "${SMALL}/in/test.jsonl"}]}]
models:
  none: {path: "${SMALL}/model"}
scorers:
  length: {kind: column, column: length}
stages:
  - duplicates
  - decontamination
  - select: {method: balanced_random}
budget: {unit: rows, size: 12}
canaries: {per_kind: 3}
"""


def quiet(line): ...


def write_inputs(folder, rows):
    folder.mkdir(parents=True)
    words = "red blue green white black brown grey pink gold plum lime teal".split()  # noqa: SIM905
    lines = []
    for i in range(rows):
        prompt = f"How many {words[i % 12]} {words[i * 5 % 11]} birds has farm {i}, {i * 7}?"
        reply = f"It has {i} birds, of which {i % 3} are {words[i * 7 % 12]} and {i} fly {i * i}."
        line = {"prompt": prompt, "completion": reply, "source": f"s{i % 2}", "length": i}
        lines.append(json.dumps(line))
    lines = [f"{{broken {rows}", *lines, lines[0]]  # a line for quarantine, and a copy
    (folder / "pool.jsonl").write_text("\n".join(lines) + "\n")
    question = f"What has two wheels, a bell and {rows} spokes?"
    line = {"prompt": question, "completion": "A bicycle.", "answer": "x"}
    (folder / "test.jsonl").write_text(json.dumps(line) + "\n")


def chain(root):
    """The chain as the assets run it, then every reader of its end; the version's name and bytes.

    Raises:
        ValueError: where something is not what was written.
    """
    from siftline.assets.shared import build
    from siftline.cli.recipes import summary
    from siftline.ingest.pool import Pool
    from siftline.recipe.parse import parse
    from siftline.report.story import explain
    from siftline.stages.arms import curated_version
    from siftline.stages.models import engines
    from siftline.stages.publish import publish_curated
    from siftline.stages.reporting import write_report
    from siftline.stages.run import outputs, run_stage
    from siftline.stages.scorers import score_quality, scorer_table
    from siftline.stages.status import coverage
    from siftline.workspace import Workspace

    import yaml  # isort: skip

    os.environ["SMALL"] = str(root.parent)  # a path is no part of what a recipe is
    recipe = parse(yaml.safe_load(RECIPE))
    workspace = Workspace(root)
    for name in ("p", "t"):
        build(workspace, recipe, name, quiet)
    with engines() as opened:
        found = score_quality(workspace, recipe, "length", opened, quiet)
    assert found.manifest.info["failed"] == 0
    for stage in recipe.stages:
        run_stage(workspace, recipe, stage.name, quiet)
    published = publish_curated(workspace, recipe)
    version, rows = curated_version(workspace, recipe)
    done = outputs(workspace, recipe)
    # A run that finds everything reads no rows; other verbs do.
    score = scorer_table(workspace, recipe, "length").reader()
    for bucket in range(2):
        Pool(workspace.pool("p")).rows(bucket)
        score(bucket)
        for _, output in done:
            output.decisions(bucket)
    coverage(workspace, workspace.scores("p", "rows", "length"))
    explain(workspace, rows["id"][0].as_py(), [(recipe, done)])
    explain(workspace, "pool.jsonl:1", [(recipe, done)])
    if not (workspace.report("small") / f"{version}.json").exists():  # it takes most of the time
        write_report(workspace, recipe, None, [])
    numbers = summary(workspace, recipe)
    for _, output in done:
        for part in output.manifest.parts:
            output.table(part.table.removeprefix("side_"))
    assert version == published.version
    files = {p: (root / p).read_bytes() for p in kept_files(root)}
    return version, files, numbers["rows"]


def kept_files(root):
    latest = (root / "curated" / "small" / "latest").resolve()
    return sorted(str(p.relative_to(root)) for p in latest.rglob("*") if p.is_file())


FILES = {
    "pool manifest": "pool/p/manifest.json",
    "pool rows": "pool/p/rows-b0000-*.parquet",
    "provenance": "pool/p/provenance-b0001-*.parquet",
    "quarantine": "pool/p/quarantine-*.parquet",
    "evaluation set": "pool/t/rows-*.parquet",
    "score manifest": "scores/p/rows/length/manifest.json",
    "scores": "scores/p/rows/length/scores-b0001-*.parquet",
    "stage manifest": "stages/small/decontamination/*.json",
    "last stage manifest": "stages/small/select/*.json",
    "decisions": "stages/small/duplicates/parts/decisions-b0000-*.parquet",
    "last decisions": "stages/small/select/parts/decisions-b0001-*.parquet",
    "canaries": "stages/small/decontamination/parts/side_canaries-*.parquet",
    "side table": "stages/small/select/parts/side_ranks-*.parquet",
    "version manifest": "curated/small/*/manifest.json",
    "version rows": "curated/small/*/data/*.parquet",
    "version removed": "curated/small/*/removed/*.parquet",
    "version card": "curated/small/*/README.md",
    "report": "reports/small/*.json",
}
COLD = {
    "pool": ("scores", "stages", "curated"),
    "scores": ("stages", "curated"),
    "stages": ("curated",),
    "curated": (),
    "reports": (),
}
"""What is not there yet when a file of a folder is read for the first time."""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A root with the whole chain, what it made, and a root of fewer rows for older copies."""
    folders = {}
    for name, rows in (("older", 30), ("now", 40)):
        home = tmp_path_factory.mktemp(name)
        write_inputs(home / "in", rows)
        chain(home / "root")
        folders[name] = home
    # The older state's files lie beside today's, as they do where a pool grew in place.
    made = chain(folders["now"] / "root")
    assert made[2]["decontamination"]["in"] == 40
    return SimpleNamespace(home=folders["now"], older=folders["older"] / "root", made=made)


def only(root, pattern):
    """The file of a kind; `latest` is the same folder again."""
    (found,) = [p for p in sorted(root.glob(pattern)) if "latest" not in p.parts]
    return found


@pytest.fixture
def copy(house, tmp_path):
    """`copy(name)` is a root like the house's, with its inputs, that may be damaged."""

    def make(name):
        root = tmp_path / name / "root"
        shutil.copytree(house.home / "root", root, symlinks=True)
        shutil.copytree(house.home / "in", root.parent / "in")
        return root

    return make


CASES = [
    (kind, state)
    for kind, pattern in FILES.items()
    for state in ("warm", "cold")
    if state == "warm" or COLD[pattern.partition("/")[0]]
]


@pytest.mark.parametrize(("kind", "state"), CASES)
def test_no_damage_ends_in_another_version_without_an_error(kind, state, house, copy):
    pattern, said = FILES[kind], {}
    chosen = {name: damage for name, damage in DAMAGE.items() if name != "flip head"}  # time
    for name, damage in chosen.items():
        root = copy(name.replace(" ", "-"))
        path = only(root, pattern)
        if state == "cold":
            for folder in COLD[pattern.partition("/")[0]]:
                shutil.rmtree(root / folder)
        before = path.read_bytes()
        damage(path, another(house.home, path), only(house.older, pattern))
        assert not path.exists() or path.read_bytes() != before, name
        made, error = outcome(chain, root)
        said[name] = "the same version" if error is None else str(error)
        if error is None:
            assert made == house.made, name
        else:
            assert isinstance(error, AlteredError), (name, said[name])
            assert path.name in said[name], (name, said[name])
            assert "\n" not in said[name]
        shutil.rmtree(root.parent)
    # What is there and is read is never taken for what it was.
    read = [name for name in chosen if said[name] == "the same version"]
    assert set(read) <= ALLOWED.get(kind, {"delete"}), {name: said[name] for name in read}


def another(home, path):
    """A valid file of the same format that says something else."""
    found = sorted((home / "root").glob(f"pool/t/*{path.suffix}"))
    return found[0] if found else home / "in" / "test.jsonl"


ALLOWED = {
    # A manifest of other inputs is no damage but another state, which a run brings up to date.
    "pool manifest": {"delete", "older copy"},
    "score manifest": {"delete", "swap", "older copy"},
}


def test_the_remedy_of_a_damaged_part_works(house, copy):
    root = copy("mended")
    path = only(root, FILES["decisions"])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(AlteredError, match=r"delete it and run again"):
        chain(root)
    path.unlink()
    assert chain(root) == house.made


def test_an_older_manifest_of_a_pool_is_caught_by_a_stage_alone(house, copy):
    from siftline.ingest.pool import Pool

    root = copy("alone")
    path = root / "pool" / "p" / "manifest.json"
    now = path.read_bytes()
    shutil.copy2(house.older / "pool" / "p" / "manifest.json", path)
    with pytest.raises(AlteredError, match=r"manifest\.json is not the newest manifest of its"):
        Pool(path.parent)
    path.write_bytes(now)
    Pool(path.parent)
    shutil.copy2(house.older / "pool" / "p" / "manifest.json", path)
    assert chain(root) == house.made  # a run makes it again
    Pool(path.parent)


def test_a_manifest_without_a_hash_is_made_again(house, copy):
    """As earlier versions of Siftline wrote it: nothing has to be removed by hand."""
    root = copy("earlier")
    for path in [*root.glob("pool/*/manifest.json"), *root.glob("s*/**/*.json")]:
        body = json.loads(path.read_text())
        del body["sha256"]
        path.write_text(json.dumps(body))
    assert chain(root) == house.made


# ---- a published version as an input file ----------------------------------------------------


def read_by_ingest(version):
    from siftline.ingest.files import fingerprint
    from siftline.ingest.source import Source

    fingerprint([Source(str(version.parent / "latest" / "data"))])


def read_by_training(version):
    from siftline.training.material import read_rows
    from siftline.training.sft import FineTune

    read_rows(sorted((version.parent / "latest" / "data").iterdir()), FineTune())


def read_by_train(version):
    from siftline.cli.train import _shards

    for place in (version.parent, version, version / "data"):
        _shards([place])


def read_by_dedup(version):
    from siftline.deduplication.files import open_tables

    files = [str(path) for path in sorted((version / "data").iterdir())]
    open_tables(files, ["id"], version.parent / "scratch")


@pytest.mark.parametrize(
    "read",
    [read_by_ingest, read_by_training, read_by_train, read_by_dedup],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("name", [n for n in DAMAGE if n != "delete"])
def test_a_damaged_shard_is_no_input(read, name, make_version, tmp_path):
    rows = [make_row([message("user", f"q{i}"), message("assistant", "a")]) for i in range(9)]
    tables = [pa.Table.from_pylist(part, schema=ROW) for part in (rows[:6], rows[6:])]
    version = make_version(tmp_path / "curated", tables)
    read(version)
    first, second = sorted((version / "data").iterdir())
    DAMAGE[name](first, second, second)
    with pytest.raises(AlteredError, match=f"{first.name} .*published versions never change"):
        read(version)


@pytest.mark.parametrize("what", ["data/train-00001-of-00002.parquet", "manifest.json"])
def test_a_version_that_lost_a_file_is_not_trained_on(what, make_version, tmp_path):
    tables = [pa.table({"id": ["a"]}), pa.table({"id": ["b"]})]
    version = make_version(tmp_path / "curated", tables)
    (version / what).unlink()
    with pytest.raises(AlteredError, match=f"{Path(what).name} is missing"):
        read_by_train(version)


def test_a_surplus_shard_is_no_part_of_a_version(make_version, tmp_path):
    version = make_version(tmp_path / "curated", [pa.table({"id": ["a"]})])
    pq.write_table(pa.table({"id": ["b"]}), version / "data" / "train-00001-of-00002.parquet")
    with pytest.raises(AlteredError, match="is no file of this version"):
        read_by_train(version)


# ---- what no chain holds without a model: store, models, indexes, named files ----------------

RECORD = pa.schema([("key", pa.string()), ("value", pa.float64())])


def records(keys):
    return pa.table({"key": keys, "value": [float(len(k)) for k in keys]}, schema=RECORD)


def store_at(root, scorer="toy"):
    store = Store(root, Namespace(scorer, 1, "weights"), RECORD)
    for keys in (["a", "bb"], ["ccc"]):
        with store.writer(3) as append:
            append(records(keys))
    return store


@pytest.mark.parametrize("name", [n for n in DAMAGE if n != "delete"])
def test_a_damaged_store_part_is_an_error(name, tmp_path):
    store = store_at(tmp_path / "store")
    other = store_at(tmp_path / "store", "other")
    first, second = store.files.parts(3)
    DAMAGE[name](first, other.files.parts(3)[1], second)
    for read in (lambda: store.read(3), lambda: store.keys(3)):
        with pytest.raises(AlteredError, match=f"{first.name} is corrupt .*asked again"):
            read()
    first.unlink()  # as it says: what it held is asked again
    assert len(store.keys(3)) in (1, 2)


def test_a_part_of_another_namespace_is_an_error(tmp_path):
    store, other = (store_at(tmp_path / "store", name) for name in ("toy", "other"))
    part = other.files.parts(3)[0]
    shutil.copy(part, store.folder / "parts" / part.name)
    with pytest.raises(AlteredError, match=f"holds records of {other.folder.name}"):
        store.read(3)


def test_a_journal_of_another_namespace_is_an_error(tmp_path):
    store, other = (store_at(tmp_path / "store", name) for name in ("toy", "other"))
    journal = Journal(
        store.folder / "journals" / "b03-1-1.journal", other.files.stamped(other.schema)
    )
    journal.append(records(["z"]))
    journal.close()
    with pytest.raises(AlteredError, match="holds records of other-"):
        store.read(3)


def test_parts_of_earlier_versions_are_read(tmp_path):
    """They say no namespace; their names hold hashes all the same."""
    store = store_at(tmp_path / "store")
    write_named(records(["old"]), store.folder / "parts", "b03")
    assert store.keys(3) == {"a", "bb", "ccc", "old"}
    assert store.read(3).height == 4


def test_a_namespace_file_of_another_namespace_is_told(tmp_path):
    store, other = (store_at(tmp_path / "store", name) for name in ("toy", "other"))
    shutil.copy(other.folder / "namespace.json", store.folder / "namespace.json")
    with pytest.raises(AlteredError, match=r"namespace\.json is that of other-"):
        store.files.load()
    store_at(tmp_path / "store")  # writes it again
    assert store.files.load() == store.files.namespace


@pytest.fixture
def model(tmp_path):
    """A folder as training leaves it."""
    folder = tmp_path / "model"
    for name, text in (
        ("config.json", '{"a": 1}'),
        ("model.safetensors", "weights" * 99),
        ("tokenizer.json", '{"b": 2}'),
        ("training.json", '{"facts": {}}'),
        ("README.md", "a card"),
        ("adapter/adapter_config.json", '{"c": 3}'),
        ("adapter/adapter_model.safetensors", "weights" * 50),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    record_files(folder)
    return folder


MODEL_FILES = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "training.json",
    "adapter/adapter_model.safetensors",
    "siftline-files.json",
]


@pytest.mark.parametrize("file", MODEL_FILES)
def test_a_damaged_model_is_no_other_model(file, model):
    path = model / file
    raw = path.read_bytes()
    for name, damage in DAMAGE.items():
        if name == "delete" and file == "siftline-files.json":
            continue  # then it is a model from elsewhere, and names itself by what it is
        other = model / ("tokenizer.json" if file != "tokenizer.json" else "config.json")
        damage(path, other, model / "README.md")
        with pytest.raises(ValueError, match=f"{path.name} .*trained again|is missing") as caught:
            directory_digest(model)
        assert "\n" not in str(caught.value)
        path.write_bytes(raw)
    before = directory_digest(model)
    (model / "README.md").write_text("another card")
    confirm_files(model)
    assert directory_digest(model) == before


@pytest.mark.parametrize("name", [n for n in DAMAGE if n != "delete"])
def test_a_file_named_by_its_hash(name, tmp_path):
    table = pa.table({"a": list(range(50))})
    write_named(table, tmp_path / "x", "0123")
    write_named(pa.table({"a": [1]}), tmp_path / "x", "4567")
    assert read_named(tmp_path / "x", "0123").equals(table)
    path, other = sorted((tmp_path / "x").iterdir())
    DAMAGE[name](path, other, other)
    with pytest.raises(AlteredError, match=path.name):
        read_named(tmp_path / "x", "0123")
    path.unlink()
    assert read_named(tmp_path / "x", "0123") is None


def test_two_files_of_one_name_are_told(tmp_path):
    write_named(pa.table({"a": [1]}), tmp_path, "0123")
    write_named(pa.table({"a": [2]}), tmp_path, "0123")
    with pytest.raises(AlteredError, match="say the same twice: delete both"):
        read_named(tmp_path, "0123")


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """Two files in an index, and the index as it was after the first."""
    from siftline.cli import main

    folder = tmp_path_factory.mktemp("index")
    for k in range(3):
        texts = [f"row {i} of file {k} has words {i * k} and more {i}" for i in range(20)]
        pq.write_table(pa.table({"text": texts}), folder / f"{k}.parquet")
    for k in range(2):
        with pytest.raises(SystemExit) as ended:
            main(["dedup", str(folder / f"{k}.parquet"), "--index", str(folder / "index"),
                  "--out", str(folder / f"o{k}"), "--json"])  # fmt: skip
        assert not ended.value.code
        shutil.copytree(folder / "index", folder / f"index{k}")
    return folder


INDEX_FILES = ["manifest.json", "sets.bin", "keys-00000.parquet", "keys-00001.parquet",
               "decisions-00001.parquet", "changes-00001.parquet"]  # fmt: skip


@pytest.mark.parametrize("file", INDEX_FILES)
def test_a_damaged_index_is_an_error_and_stays_as_it_is(file, indexed, tmp_path, capsys):
    from siftline.cli import main

    for name, damage in DAMAGE.items():
        index = tmp_path / name.replace(" ", "-")
        shutil.copytree(indexed / "index1", index)
        older = indexed / "index0" / file
        other = "keys-00001.parquet" if file == "keys-00000.parquet" else "keys-00000.parquet"
        damage(index / file, index / other, older if older.exists() else indexed / "2.parquet")
        if file == "keys-00000.parquet" and name == "older copy":
            continue  # it never changed
        if file == "manifest.json" and name == "delete":
            continue  # then the folder holds files of nobody, see opened()
        before = {p.name: p.read_bytes() for p in index.iterdir()}
        for file_name in ("2.parquet", "1.parquet"):  # one more, and one that is known
            with pytest.raises(SystemExit) as ended:
                main(["dedup", str(indexed / file_name), "--index", str(index),
                      "--out", str(tmp_path / "out"), "--json"])  # fmt: skip
            assert ended.value.code == 1, name
            (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error:")]
            assert str(index) in line, (name, line)
        assert {p.name: p.read_bytes() for p in index.iterdir()} == before, name
