"""A disk that is full, read-only or forbidden, at every writer: one line, the file, the remedy."""

import errno
import os
import sqlite3
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftline import disk
from siftline.cli import guarded, main
from siftline.disk import (
    check_folder,
    check_temporary,
    explained,
    need,
    refused_database,
    scratch_folder,
    writing,
)
from siftline.kernels.sets.spill import values_room
from siftline.pipelines.execute import prepare_home
from siftline.rows.shards import building, write_json, write_parquet
from siftline.workspace import Workspace

NOISE = pa.table({"a": np.random.default_rng(0).random(400_000)})  # 3.2 MB that no packing shrinks
OWNER = os.geteuid() == 0


@contextmanager
def mounted(folder, size):
    """A small disk of its own; skips where this process may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not OWNER or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs (root); the limit of a file's size is tested")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def full(tmp_path):
    """A disk of a megabyte of its own: a file that is still open keeps its room when removed."""
    with mounted(tmp_path / "small", "1m") as folder:
        yield folder


def by_safetensors(path):
    from safetensors.numpy import save_file

    save_file({"a": NOISE["a"].to_numpy()}, path)


def by_torch(path):
    import torch

    torch.save({"a": torch.rand(800_000)}, path)


def by_sqlite(path):
    with sqlite3.connect(path) as file:
        file.execute("create table a (x)")
        file.executemany("insert into a values (?)", [("x" * 1000,)] * 3000)


def by_dagster(path):
    import sqlalchemy

    with sqlalchemy.create_engine(f"sqlite:///{path}").begin() as connection:
        connection.execute(sqlalchemy.text("create table a (x)"))
        for _ in range(3):
            text = "insert into a values (randomblob(1000000))"
            connection.execute(sqlalchemy.text(text))


def by_faiss(path):
    import faiss

    index = faiss.IndexFlatL2(16)
    index.add(np.zeros((50_000, 16), np.float32))
    faiss.write_index(index, str(path))


WRITERS = {
    "parquet": lambda path: pq.write_table(NOISE, path),
    "polars": lambda path: pl.from_arrow(NOISE).write_parquet(path),
    "numpy": lambda path: np.save(path.with_suffix(".npy"), NOISE["a"].to_numpy()),
    "spilled sets": lambda path: values_room(800_000, path.with_name("spilled"), 0).fill(1),
    "numpy's file": lambda path: NOISE["a"].to_numpy().tofile(path),
    "text": lambda path: path.write_bytes(b"x" * 3_000_000),
    "safetensors": by_safetensors,
    "torch": by_torch,
    "sqlite": by_sqlite,
    "dagster's sqlite": by_dagster,
    "faiss": by_faiss,
}


def said(call, *arguments):
    with pytest.raises(OSError, match=r".+") as error:
        call(*arguments)
    line = str(error.value)
    assert "\n" not in line
    assert "[Errno" not in line
    return line


def written(writer, path):
    with writing(path):
        writer(path)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_with_file_and_remedy(full, writer):
    path = full / "file"
    line = said(written, WRITERS[writer], path)
    assert line.startswith(f"No space left for {path}")
    assert line.endswith("free some and run again; what was committed is kept")


CHILD = """
import importlib.util, pathlib, resource, signal, sys
spec = importlib.util.spec_from_file_location("writers", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for name in ("parquet", "polars", "text", "safetensors"):
    path = pathlib.Path(sys.argv[2], name)
    try:
        module.written(module.WRITERS[name], path)
    except OSError as error:
        told = str(error)
        assert told.startswith(f"{path} is larger than files may be here: raise the limit"), told
    else:
        raise AssertionError(name)
print("all told")
"""


def test_a_limit_on_the_size_of_files_is_told(tmp_path):
    """Without a disk of its own: what `ulimit -f` refuses, in a process of its own."""
    command = [sys.executable, "-c", CHILD, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "all told\n", done.stderr


def test_what_is_written_appears_whole_or_not_at_all(full):
    for _ in range(5):  # pyarrow's own file ends the process, now and then
        assert str(full / "a.parquet") in said(write_parquet, NOISE, full / "a.parquet")
    assert str(full / "a.json") in said(write_json, full / "a.json", ["x" * 2_000_000])
    with (
        pytest.raises(OSError, match=f"No space left for {full / 'folder'}"),
        building(full / "folder") as folder,
    ):
        (folder / "x").write_bytes(b"x" * 3_000_000)
    assert list(full.iterdir()) == []


def test_a_writer_of_scratch_files_that_names_none_is_told(full):
    """As Arrow's streams, which rows are put in order with."""

    def spooled():
        with (
            scratch_folder(full, "publish") as folder,
            pa.ipc.new_stream(str(folder / "s"), NOISE.schema) as stream,
        ):
            stream.write_table(NOISE)

    assert str(full) in said(spooled)
    assert list(full.iterdir()) == []


def test_a_database_that_a_full_disk_left_without_tables_is_told(full):
    """As Dagster's of a run, which is made when the run begins and read when it ends."""
    import sqlalchemy

    def run():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            read()

    def read():
        with sqlalchemy.create_engine(f"sqlite:///{full / 'run.db'}").begin() as connection:
            connection.execute(sqlalchemy.text("select * from event_logs"))

    for call in (run, lambda: (fill(full), read())):
        with pytest.raises(OSError, match=f"No space left for {full}"), writing(full):
            call()


def fill(folder):
    with (folder / "most").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


@pytest.mark.parametrize(
    ("said", "told"),
    [("database or disk is full", "No space left for "), ("disk I/O error", "(I/O error)")],
)
def test_what_a_disk_refused_a_database_is_told_from_its_sentence(tmp_path, said, told):
    whole = f"sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) {said}\n[SQL: INSERT]"
    line = str(refused_database(whole, tmp_path))
    assert told in line
    assert str(tmp_path) in line
    assert "\n" not in line
    assert refused_database(f"ValueError: row 3 says {said}", tmp_path) is None
    assert refused_database(whole.replace(said, "no such table: runs"), tmp_path) is None


def test_a_read_only_disk_and_a_forbidden_folder_are_told(tmp_path):
    with mounted(tmp_path / "fixed", "1m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        for call in (check_folder, lambda path: write_json(path / "a.json", 1)):
            assert "is on a read-only file system: mount it for writing" in said(call, folder / "x")
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))
    assert str(explained(denied)) == (
        f"no permission for {tmp_path / 'x'}: change its permissions, or name another folder"
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is no folder: name another one"):
        check_folder(tmp_path / "file" / "below")


@pytest.mark.skipif(not OWNER, reason="needs root to become somebody else")
def test_a_folder_of_somebody_else_is_told(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o755)
    code = (
        "import os, sys; from pathlib import Path; from siftline.cli import guarded\n"
        "from siftline.pipelines.execute import prepare_home\n"
        "from siftline.workspace import Workspace\n"
        "os.setuid(12345); guarded(lambda: prepare_home(Workspace(Path(sys.argv[1]))))"
    )
    for path in [*folder.parents, folder][:3]:
        path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no permission for {folder}")
    assert len(done.stderr.splitlines()) == 1


def test_long_work_does_not_begin_without_room(full, tmp_path, capsys, monkeypatch):
    line = said(prepare_home, Workspace(full))
    assert line.startswith(f"{full} has ")
    assert "a run needs at least 34 MB: free some" in line
    pq.write_table(
        pa.table({"text": [os.urandom(64).hex() for _ in range(80_000)]}), tmp_path / "a.parquet"
    )
    with pytest.raises(SystemExit):
        main(["dedup", str(tmp_path / "a.parquet"), "--out", str(full / "out")])
    told = capsys.readouterr().err
    assert told.startswith(f"error: {full / 'out'} has ")
    assert "the output needs at least" in told
    assert not (full / "out").exists()
    need(tmp_path / "not" / "there", 1, "it")


def test_an_output_of_dedup_on_a_full_disk_is_told(full):
    from siftline.deduplication.files import PieceWriter

    def write():
        with (
            building(full / "out") as folder,
            PieceWriter(folder / "kept.parquet", NOISE.schema) as writer,
        ):
            for batch in NOISE.to_batches():
                writer.add(batch)

    assert f"No space left for {full / 'out'}" in said(write)
    assert not (full / "out").exists()


def test_training_on_a_full_disk_is_refused_before_it_starts(full, tiny_model, tokenizer):
    from siftline.rows.schema import ROW, make_row, message
    from siftline.training.finetune import finetune
    from siftline.training.sft import FineTune

    rows = [make_row([message("user", f"{i}?"), message("assistant", "42")]) for i in range(4)]
    (full / "most").write_bytes(b"x" * 1_000_000)
    with pytest.raises(OSError, match=r"has [\d. KB]+ (bytes )?free and the trained model needs"):
        finetune(
            tiny_model,
            pa.Table.from_pylist(rows, schema=ROW),
            full / "out",
            FineTune(),
            seed=0,
            dataset_version="v",
        )


def test_a_bad_tmpdir_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    with pytest.raises(SystemExit):
        main(["cache", "ls", "--root", str(tmp_path)])
    assert capsys.readouterr().err == (
        f"error: TMPDIR is '{tmp_path / 'gone'}', which is no folder: make it, or unset TMPDIR\n"
    )
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    check_temporary()
    monkeypatch.delenv("TMPDIR")
    check_temporary()


def test_other_errors_are_left_alone(capsys):
    said_so = [
        ValueError("a row says: no space left on device"),
        KeyError("no space left on device"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        BlockingIOError(errno.EAGAIN, "busy"),
        RuntimeError("CUDA is sad"),
    ]
    for error in said_so:
        assert explained(error, Path("/")) is None
        with pytest.raises(type(error)), writing(Path("/")):
            raise error
    with pytest.raises(RuntimeError, match="CUDA"):
        guarded(lambda: (_ for _ in ()).throw(RuntimeError("CUDA is sad")))
    inner = OSError(errno.ENOSPC, "No space left on device", "/a")
    with (
        pytest.raises(OSError, match="No space left for /a") as error,
        writing(Path("/b")),
        writing(Path("/c")),
    ):
        raise inner
    assert error.value.errno == errno.ENOSPC
    assert disk.free_bytes(Path("/nowhere/at/all")) > 0


def test_a_parquet_file_has_the_bytes_that_pyarrow_writes(tmp_path):
    table = NOISE.slice(0, 5000)
    write_parquet(table, tmp_path / "a.parquet")
    with pq.ParquetWriter(
        tmp_path / "b.parquet", table.schema, compression="zstd", write_page_index=True,
        write_page_checksum=True, use_content_defined_chunking=True,
    ) as writer:  # fmt: skip
        writer.write_table(table, row_group_size=table.num_rows)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_model_or_adapter_as_a_pickle_is_refused_in_one_line(tiny_model, tmp_path):
    import shutil

    from siftline.scoring.engines.base import ModelSpec, check_directory

    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m" / "training_args.bin").write_bytes(b"x")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"x")
    spec = ModelSpec(str(tmp_path / "m"))
    check_directory(spec)  # safetensors stand beside it, and are what is loaded
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin' is a model as a pickle.*convert to safe"
    ):
        check_directory(spec)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is an adapter as a pickle.*convert to safetensors"):
        check_directory(ModelSpec(str(tiny_model), adapter=str(tmp_path / "a")))


def test_a_folder_named_like_a_recipe_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "demo").mkdir()
    (tmp_path / "my.yaml").mkdir()
    for name in ("mine", "my.yaml"):
        with pytest.raises(SystemExit):
            main(["report", name, "--root", str(tmp_path / "root")])
        assert capsys.readouterr().err == (
            f"error: {name} is a folder, no recipe: name a YAML file in it\n"
        )
    from siftline.cli.options import named_recipe

    assert named_recipe("demo", ()).name == "demo"  # the shipped one, whatever lies here
    monkeypatch.setenv("SIFTLINE_RECIPES", str(tmp_path))
    assert named_recipe("demo", ()).name == "demo"
