"""Files are whole or not there, whatever the disk says; and what it says is told."""

import contextlib
import ctypes
import errno
import os
import re
import resource
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sera_jax import disk
from sera_jax.disk import DiskError


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a.json"
    with disk.whole(path) as beside:
        beside.write_text("one")
        assert not path.exists() and beside.parent == tmp_path
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError, match="killed"), disk.whole(path) as beside:
        beside.write_text("tw")
        raise RuntimeError("killed")
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with disk.whole(path) as beside:
        beside.write_text("two")
    assert path.read_text() == "two"


def test_two_folders_change_places(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    swapped = disk.exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / "is").read_text() for name in "ab"] == (["b", "a"] if swapped else ["a", "b"])
    assert swapped or not sys.platform.startswith("linux")
    if swapped:
        with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "c"))):
            disk.exchange(tmp_path / "c", tmp_path / "b")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())  # another system
    assert disk.exchange(tmp_path / "a", tmp_path / "b") is False


def test_a_write_that_the_system_stops_half_way(tmp_path, small_files):
    """A real limit of the kernel: part of the bytes are written before it refuses."""
    path = tmp_path / "t.parquet"
    table = pyarrow.table({"x": np.arange(3)})
    with disk.whole(path) as beside:
        pyarrow.parquet.write_table(table, beside)
    before = path.read_bytes()
    with pytest.raises(DiskError) as error, small_files(5000), disk.whole(path) as beside:
        pyarrow.parquet.write_table(pyarrow.table({"x": np.random.default_rng(0).normal(size=9999)}), beside)
    assert str(error.value).startswith(f"{path} could not be written: File too large (")
    assert str(error.value).endswith(" free there). Make room, or raise the quota.")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_what_a_disk_may_answer(tmp_path, code):
    with pytest.raises(DiskError) as error, disk.guarded(tmp_path / "no" / "such" / "file", 1234567):
        raise OSError(code, os.strerror(code))
    told = f"{tmp_path}/no/such/file could not be written: {os.strerror(code)} (1,234,567 bytes to write, "
    assert str(error.value).startswith(told)
    assert isinstance(error.value, ValueError) and error.value.__cause__.errno == code


def test_an_error_that_names_its_file_is_about_that_file(tmp_path):
    with pytest.raises(DiskError, match="^/x/y could not be written: No space left"), disk.guarded(tmp_path):
        raise OSError(errno.ENOSPC, "full", "/x/y")


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "refused"), FileNotFoundError(2, "gone"), KeyError("k")])
def test_other_errors_pass(tmp_path, error):
    """A reward function that asks a server raises OSErrors, too."""
    with pytest.raises(type(error)), disk.guarded(tmp_path):
        raise error


def test_files_are_read_ahead(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    for name, size in (("a", 5000), ("inner/b", 70000)):
        (tmp_path / name).write_bytes(bytes(size))
    told, advise = [], os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *how: told.append(how) or advise(fd, *how))
    assert disk.read_ahead(tmp_path) == 75000
    assert told == [(0, 0, os.POSIX_FADV_WILLNEED)] * 2
    monkeypatch.delattr(os, "posix_fadvise")
    assert disk.read_ahead(tmp_path) == 0


def test_the_limit_of_these_tests_is_taken_back(tmp_path, small_files):
    with contextlib.suppress(OSError), small_files(10):
        (tmp_path / "a").write_bytes(bytes(11))
    assert (tmp_path / "a").stat().st_size == 10
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    (tmp_path / "a").write_bytes(bytes(11))
