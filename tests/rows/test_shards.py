"""Files appear whole or not at all, and their bytes depend on their content alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.disk import unfinished
from siftline.rows.shards import (
    Manifest,
    Part,
    PartWriter,
    RowHash,
    building,
    point_latest,
    read_bucket,
    write_json,
    write_parquet,
    write_text,
)
from siftline.rows.verified import (
    AlteredError,
    canonical_json,
    content_hash,
    file_hash,
    read_parquet,
)

SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), ("text", pa.string())])


def table(texts):
    ids = [f"{i:06d}" for i in range(len(texts))]
    return pa.table({"id": ids, "text": texts}, schema=SCHEMA)


def noise(size, seed=0):
    """Text that zstd can't shrink away."""
    return np.random.default_rng(seed).bytes(size // 2).hex()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Parquet


def test_bytes_depend_on_the_table_alone(tmp_path):
    """Not on the clock, the path, the process, or how the table was chunked."""
    rows = table([noise(200, i) for i in range(500)])
    write_parquet(rows, tmp_path / "a.parquet")
    time.sleep(0.01)
    chunked = pa.concat_tables([rows.slice(0, 123), rows.slice(123)])
    write_parquet(chunked, tmp_path / "deeper" / "b.parquet")
    script = (
        "import sys, pyarrow.parquet as pq; from pathlib import Path\n"
        "from siftline.rows.shards import write_parquet\n"
        "write_parquet(pq.read_table(sys.argv[1]), Path(sys.argv[2]))"
    )
    source, target = tmp_path / "a.parquet", tmp_path / "c.parquet"
    subprocess.run([sys.executable, "-c", script, source, target], check=True)
    raw = source.read_bytes()
    assert raw == (tmp_path / "deeper" / "b.parquet").read_bytes() == target.read_bytes()
    other = rows.set_column(1, SCHEMA.field("text"), [pa.array(["x"] * 500)])
    write_parquet(other, target)
    assert target.read_bytes() != raw
    assert names(tmp_path) == ["a.parquet", "c.parquet", "deeper"]


def test_row_groups_stay_under_the_limit_whatever_the_rows_weigh(tmp_path):
    """Rows from 10 bytes to 60 kB: a limit in rows would put 100 MB in one group."""
    rng = np.random.default_rng(1)
    sizes = np.concatenate([rng.integers(10, 50, 400), rng.integers(20_000, 60_000, 40)])
    rows = table([noise(int(size), i) for i, size in enumerate(rng.permutation(sizes))])
    limit = 200_000
    path = tmp_path / "x.parquet"
    write_parquet(rows, path, row_group_bytes=limit)
    file = pq.ParquetFile(path)
    groups = [file.read_row_group(i) for i in range(file.num_row_groups)]
    assert len(groups) > 5
    assert max(group.combine_chunks().nbytes for group in groups) <= limit
    assert pa.concat_tables(groups).equals(rows)


def test_a_row_above_the_limit_is_a_group_of_its_own(tmp_path):
    rows = table(["a", noise(5000), "b"])
    write_parquet(rows, tmp_path / "x.parquet", row_group_bytes=1000)
    file = pq.ParquetFile(tmp_path / "x.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [1, 1, 1]
    write_parquet(rows.slice(0, 0), tmp_path / "empty.parquet")
    empty = tmp_path / "empty.parquet"
    assert read_parquet(empty, file_hash(empty)).schema.equals(SCHEMA)


def test_files_carry_what_readers_need(tmp_path):
    write_parquet(table([noise(100, i) for i in range(50)]), tmp_path / "x.parquet")
    file = pq.ParquetFile(tmp_path / "x.parquet")
    column = file.metadata.row_group(0).column(1)
    assert column.compression == "ZSTD"
    assert column.has_offset_index
    assert column.has_column_index
    assert column.is_stats_set
    assert file.schema_arrow.equals(SCHEMA)
    assert not file.schema_arrow.field("id").nullable


def test_content_defined_chunks_keep_the_rest_of_the_file(tmp_path):
    """One row put in at the front: pages after it are the same bytes, as the Hub wants them."""
    texts = [noise(1000, i) for i in range(6000)]
    raw = []
    for i, rows in enumerate((table(texts), table(["new", *texts]))):
        write_parquet(rows.select(["text"]), tmp_path / f"{i}.parquet")
        raw.append((tmp_path / f"{i}.parquet").read_bytes())
    step = 4096
    blocks = [raw[0][at : at + step] for at in range(0, len(raw[0]) - step, 50 * step)]
    found = sum(block in raw[1] for block in blocks)
    assert len(blocks) > 10
    assert found > len(blocks) / 2, f"{found} of {len(blocks)} blocks kept"


def test_page_checksums_are_there_for_other_readers(tmp_path):
    rows = table([noise(400, i) for i in range(100)])
    path = tmp_path / "x.parquet"
    write_parquet(rows, path)
    raw = path.read_bytes()
    metadata = pq.ParquetFile(path).metadata.row_group(0)
    starts = [
        metadata.column(i).dictionary_page_offset or metadata.column(i).data_page_offset
        for i in range(2)
    ]
    end = starts[1] + metadata.column(1).total_compressed_size
    silent, said = [], set()
    for at in np.random.default_rng(0).integers(starts[0], end, 60).tolist():
        broken = bytearray(raw)
        broken[at] ^= 0x04
        path.write_bytes(broken)
        try:
            if not pq.read_table(path, page_checksum_verification=True).equals(rows):
                silent.append(at)
        except (OSError, pa.ArrowInvalid) as error:
            said.add(str(error))
    assert not silent, f"wrong rows were read without an error: {silent}"
    assert any("CRC" in text for text in said), said


def test_our_reader_notices_every_flipped_bit(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(table(["a", "b"]), path)
    raw, written = path.read_bytes(), file_hash(path)
    said = set()
    for bit in range(0, 8 * len(raw), 7):
        broken = bytearray(raw)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with pytest.raises(AlteredError) as caught:
            read_parquet(path, written)
        said.add(str(caught.value))
    assert all(text.startswith(str(path)) and "\n" not in text for text in said)
    assert all("sha256" in text for text in said), said


def test_a_file_that_is_missing_or_cut_names_the_remedy(tmp_path):
    path = tmp_path / "x.parquet"
    with pytest.raises(ValueError, match=r"x\.parquet is missing .* run again"):
        read_parquet(path, "f" * 64)
    write_parquet(table(["a"] * 100), path)
    raw, written = path.read_bytes(), file_hash(path)
    for size in (0, 3, 40, len(raw) - 5):
        path.write_bytes(raw[:size])
        with pytest.raises(ValueError, match=r"x\.parquet is corrupt .*delete it and run again"):
            read_parquet(path, written)


# Atomic writes


def test_an_equal_file_is_left_alone(tmp_path):
    path = tmp_path / "m.json"
    write_json(path, {"b": 1, "a": [1, "é"]})
    before = path.stat()
    time.sleep(0.01)
    write_json(path, {"a": [1, "é"], "b": 1})
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    write_json(path, {"a": 2})
    assert path.stat().st_ino != before.st_ino
    assert json.loads(path.read_text()) == {"a": 2}


def test_a_text_file_that_is_no_text_is_replaced(tmp_path):
    (tmp_path / "m.json").write_bytes(b"\xff\xfe")
    write_json(tmp_path / "m.json", [1])
    assert json.loads((tmp_path / "m.json").read_text()) == [1]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "m.json"
    write_text(path, "old")

    def full(self, *args, **kwargs):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["m.json"]


def test_building_renames_once_and_shows_nothing_before(tmp_path):
    final = tmp_path / "deep" / "v1"
    with building(final) as folder:
        (folder / "data").mkdir()
        (folder / "data" / "x").write_text("1")
        assert not final.exists()
        assert folder.parent == final.parent
        assert folder.name.startswith(".")
    assert (final / "data" / "x").read_text() == "1"
    assert names(final.parent) == ["v1"]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_building_that_fails_leaves_nothing(tmp_path, kind):
    def build():
        with building(tmp_path / "v1") as folder:
            (folder / "x").write_text("1")
            raise kind("half way")

    with pytest.raises(kind):
        build()
    assert names(tmp_path) == []


def test_published_folders_are_immutable(tmp_path):
    with building(tmp_path / "v1") as folder:
        (folder / "x").write_text("1")
    before = (tmp_path / "v1" / "x").stat().st_ino
    with (
        pytest.raises(FileExistsError, match="immutable: publish under another name"),
        building(tmp_path / "v1"),
    ):
        pytest.fail("the body ran")
    assert (tmp_path / "v1" / "x").stat().st_ino == before
    assert names(tmp_path) == ["v1"]


def test_building_clears_what_a_killed_run_left(tmp_path):
    left = tmp_path / unfinished("v1")
    left.mkdir()
    (left / "stale").write_text("1")
    with building(tmp_path / "v1") as folder:
        (folder / "x").write_text("1")
    assert names(tmp_path / "v1") == ["x"]


READER = """
import os, sys, time
link, until = sys.argv[1], time.monotonic() + float(sys.argv[2])
reads, seen = 0, set()
print("ready", flush=True)
while time.monotonic() < until:
    with open(os.path.join(link, "x")) as file:  # fails if the link is ever gone
        seen.add(file.read())
    reads += 1
print(reads, len(seen))
"""


def test_latest_is_never_gone_for_a_reader(tmp_path):
    for version in ("v1", "v2"):
        with building(tmp_path / version) as folder:
            (folder / "x").write_text(version)
    point_latest(tmp_path, "v1")
    command = [sys.executable, "-c", READER, str(tmp_path / "latest"), "1.5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    swaps = 0
    while process.poll() is None:
        swaps += 1
        point_latest(tmp_path, f"v{swaps % 2 + 1}")
    said = process.stdout.read().split()
    assert process.returncode == 0
    reads, versions = map(int, said)
    assert swaps > 50
    assert reads > 100
    assert versions == 2, "the reader never saw a swap: the test would prove nothing"


def test_latest_is_relative_and_a_no_op_where_it_points_there(tmp_path):
    (tmp_path / "v1").mkdir()
    point_latest(tmp_path, "v1")
    inode = os.lstat(tmp_path / "latest").st_ino
    point_latest(tmp_path, "v1")
    assert os.lstat(tmp_path / "latest").st_ino == inode
    assert os.readlink(tmp_path / "latest") == "v1"
    point_latest(tmp_path, "v2")  # a dangling link is moved too
    point_latest(tmp_path, "v1")
    assert names(tmp_path) == ["latest", "v1"]


# Manifests, parts, hashes


def test_a_manifest_reads_back_and_its_bytes_are_stable(tmp_path):
    parts = (Part("rows", 0, "a.parquet", 3, "f" * 64), Part("rows", 1, "b.parquet", 4, "e" * 64))
    manifest = Manifest("v", 2, (*parts, Part("side", 0, "c.parquet", 9, "d" * 64)), {"b": 1})
    manifest.save(tmp_path / "m.json")
    loaded = Manifest.load(tmp_path / "m.json")
    assert loaded == manifest
    assert (loaded.rows("rows"), loaded.rows("side"), loaded.rows("none")) == (7, 9, 0)
    raw = (tmp_path / "m.json").read_bytes()
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == raw


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b'"x"', b"\xff\xfe", b'{"parts": [{}], "version": "", ']
)
def test_what_is_no_manifest_says_so(tmp_path, text):
    path = tmp_path / "manifest.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest .*delete it"):
        Manifest.load(path)


def test_parts_are_named_by_content_and_never_replaced(tmp_path):
    writer = PartWriter(tmp_path)
    writer.add("rows", 3, table(["a", "b"]))
    writer.add("rows", 3, table([]))
    (part,) = writer.parts
    path = tmp_path / part.file
    assert part.file.startswith("rows-b0003-")
    assert part.file == f"rows-b0003-{file_hash(path)[:16]}.parquet"
    assert (part.rows, part.sha256) == (2, file_hash(path))
    inode = path.stat().st_ino
    again = PartWriter(tmp_path)
    again.add("rows", 3, table(["a", "b"]))
    assert again.parts == writer.parts
    assert path.stat().st_ino == inode
    other = PartWriter(tmp_path, stem="b03")
    other.add("rows", 3, table(["a", "c"]))
    assert other.parts[0].file.startswith("b03-")
    assert len(names(tmp_path)) == 2


def test_read_bucket_concatenates_its_parts_in_order_and_gives_an_empty_table(tmp_path):
    writer = PartWriter(tmp_path)
    writer.add("rows", 0, table(["a"]))
    writer.add("rows", 1, table(["other"]))
    writer.add("rows", 0, table(["b", "c"]))
    manifest = Manifest("v", 4, tuple(writer.parts))
    got = read_bucket(tmp_path, manifest, "rows", 0, schema=SCHEMA)
    assert got.column("text").to_pylist() == ["a", "b", "c"]
    only = read_bucket(tmp_path, manifest, "rows", 0, schema=SCHEMA, columns=["text"])
    assert only.column_names == ["text"]
    empty = read_bucket(tmp_path, manifest, "rows", 2, schema=SCHEMA, columns=["id"])
    assert empty.num_rows == 0
    assert empty.schema == pa.schema([SCHEMA.field("id")])


@settings(max_examples=50)
@given(st.lists(st.text(max_size=5), max_size=8), st.data())
def test_row_hash_does_not_see_the_cut(texts, data):
    rows = table(texts)
    whole, cut = RowHash(), RowHash()
    whole.update(rows)
    at = data.draw(st.integers(0, len(texts)))
    cut.update(rows.slice(0, at))
    cut.update(rows.slice(at))
    assert whole.hexdigest() == cut.hexdigest()
    if len(set(texts)) > 1:
        turned = RowHash()
        turned.update(table(texts[1:] + texts[:1]))
        assert (turned.hexdigest() == whole.hexdigest()) == (texts[1:] + texts[:1] == texts)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(JSON)
def test_equal_json_has_equal_bytes_and_hashes(value):
    def turned(node):
        if isinstance(node, dict):
            return {key: turned(node[key]) for key in reversed(node)}
        return [turned(item) for item in node] if isinstance(node, list) else node

    assert canonical_json(turned(value)) == canonical_json(value)
    assert json.loads(canonical_json(value)) == value
    assert content_hash(turned(value)) == content_hash(value)
    assert content_hash([value]) != content_hash(value)
