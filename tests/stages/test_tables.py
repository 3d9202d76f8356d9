"""Score tables: cut into the pool's buckets whatever the store's cut, never met by other inputs."""

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.rows.schema import bucket_of
from siftline.stages.scores import ScoreTable, reasons_of
from siftline.store.store import BUCKETS

SCHEMA = pa.schema([("id", pa.string()), ("value", pa.float64())])


class FakePool:
    def __init__(self, buckets):
        self.buckets = buckets


def by_store(ids, failed):
    """Lines and reasons by store bucket, in rising order, empty ones left out."""
    for bucket in range(BUCKETS):
        here = [i for i in ids if bucket_of(i, BUCKETS) == bucket]
        lines = pl.DataFrame(
            {"id": here, "value": [float(int(i[:4], 16)) for i in here]},
            schema={"id": pl.String, "value": pl.Float64},
        )
        reasons = {i: "too_long" for i in failed if bucket_of(i, BUCKETS) == bucket}
        if here or reasons:
            yield bucket, (lines.sample(fraction=1, shuffle=True, seed=1), reasons)


identities = st.lists(st.integers(0, 2**32 - 1), unique=True, max_size=60).map(
    lambda numbers: [f"{n:08x}" + "0" * 24 for n in numbers]
)


@given(identities, st.sampled_from([1, 2, 4, 16, 64]), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_every_line_lies_in_its_bucket_and_sorted(tmp_path_factory, ids, buckets, lost):
    kept, failed = ids[lost:], ids[:lost]
    table = ScoreTable(tmp_path_factory.mktemp("table"), SCHEMA, {"made": "of"})
    assert table.reader() is None
    manifest = table.write(
        FakePool(buckets), by_store(kept, failed), lambda: {"computed": 7, "failed": 99}
    )
    read = table.reader()
    assert read is not None
    frames = [read(bucket) for bucket in range(buckets)]
    for bucket, frame in enumerate(frames):
        own = frame["id"].to_list()
        assert own == sorted(own)
        assert all(bucket_of(i, buckets) == bucket for i in own)
    assert sorted(i for frame in frames for i in frame["id"].to_list()) == sorted(kept)
    assert manifest.info["scored"] == len(kept)
    assert manifest.info["failed"] == len(failed)
    assert manifest.info["computed"] == 7
    assert reasons_of(table.folder, manifest) == ({"too_long": len(failed)} if failed else {})


def test_the_cut_of_the_pool_does_not_move_the_version(tmp_path):
    ids = [f"{n * 7919 % 2**32:08x}" + "0" * 24 for n in range(1, 90000, 997)]
    versions = {
        ScoreTable(tmp_path / str(n), SCHEMA, {})
        .write(FakePool(n), by_store(ids, []), dict)
        .version
        for n in (1, 8, 16, 32)
    }
    assert len(versions) == 1


def test_other_inputs_and_missing_parts_are_not_read(tmp_path):
    ids = [f"{n:08x}" + "0" * 24 for n in range(5)]
    ScoreTable(tmp_path, SCHEMA, {"model": "a"}).write(FakePool(2), by_store(ids, []), dict)
    assert ScoreTable(tmp_path, SCHEMA, {"model": "a"}).reader() is not None
    assert ScoreTable(tmp_path, SCHEMA, {"model": "b"}).reader() is None
    paired = ScoreTable(tmp_path / "pair", SCHEMA, {"scale": (1, 3)})
    paired.write(FakePool(2), by_store(ids, []), dict)
    assert paired.reader() is not None, "a tuple comes back from JSON as a list"
    next(tmp_path.glob("scores-*.parquet")).unlink()
    assert ScoreTable(tmp_path, SCHEMA, {"model": "a"}).found() is None


def test_a_writer_that_fails_leaves_the_table_that_was_there(tmp_path):
    ids = [f"{n:08x}" + "0" * 24 for n in range(5)]
    before = ScoreTable(tmp_path, SCHEMA, {"v": 1})
    before.write(FakePool(1), by_store(ids, []), dict)

    def broken():
        yield 0, (pl.DataFrame({"id": ids[:1], "value": [9.0]}), {})
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        ScoreTable(tmp_path, SCHEMA, {"v": 2}).write(FakePool(1), broken(), dict)
    read = before.reader()
    assert read is not None
    assert read(0)["value"].to_list() == [0.0] * 5
