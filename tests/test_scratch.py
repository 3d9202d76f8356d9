"""Scratch folders: there while they are used, gone afterwards, and after a kill."""

import subprocess
import sys

import pytest

from siftline.disk import scratch_folder


def test_it_is_gone_afterwards_and_others_in_use_stay(tmp_path):
    with scratch_folder(tmp_path / "new", "work") as first:
        (first / "file").write_text("x")
        with scratch_folder(tmp_path / "new", "work") as second:
            assert set((tmp_path / "new").iterdir()) == {first, second}
        assert list((tmp_path / "new").iterdir()) == [first]
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(KeyError), scratch_folder(tmp_path, "work"):
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from siftline.disk import scratch_folder\n"
        "with scratch_folder(Path(sys.argv[1]), 'work') as folder:\n"
        "    (folder / 'file').write_text('x'); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    assert done.returncode == 9
    assert (left / "file").exists()
    with scratch_folder(tmp_path, "other"):
        assert left.exists()
    with scratch_folder(tmp_path, "work"):
        assert not left.exists()
    assert list(tmp_path.iterdir()) == []
