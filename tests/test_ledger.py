"""ledger: first value wins, survives kills and corruption, is shared between processes, and is fast."""

import hashlib
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from sera_jax import ledger
from sera_jax.disk import DiskError

TAG = "0123456789abcdef"


def keys(*numbers: int) -> list[bytes]:
    return [ledger.branch_key([7], [number]) for number in numbers]


def file_of(folder) -> pathlib.Path:
    return pathlib.Path(folder) / f"{TAG}.logp"


def python(code: str, *args) -> subprocess.Popen:
    root = str(pathlib.Path(ledger.__file__).parents[1])
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=root, stdout=subprocess.PIPE, text=True)


def test_branch_key_is_the_hash_of_lengths_and_ids():
    prompt, branch = [1, 2, 70_000], [5]
    content = struct.pack("<QQ", 3, 1) + struct.pack("<iiii", 1, 2, 70_000, 5)
    assert ledger.branch_key(prompt, branch) == hashlib.blake2b(content, digest_size=16).digest()
    as_arrays = ledger.branch_key(np.array(prompt, np.int64), np.array(branch, np.int32))
    assert as_arrays == ledger.branch_key(prompt, branch)
    # The boundary counts, so does order; an empty prompt is allowed.
    variants = [([1, 2], [3]), ([1], [2, 3]), ([], [1, 2, 3]), ([2, 1], [3]), ([1, 2], [4])]
    assert len({ledger.branch_key(*v) for v in variants}) == len(variants)


def test_what_was_appended_is_found_again_bit_for_bit(tmp_path):
    values = np.random.default_rng(0).normal(-200, 50, 1000).astype(np.float32)
    book = ledger.Ledger(tmp_path / "new" / "ledger")
    assert np.isnan(book.look_up(TAG, keys(1, 2))).all()
    assert book.append(TAG, keys(*range(1000)), values) == 1000
    order = np.random.default_rng(1).permutation(1000)
    for reader in (book, ledger.Ledger(tmp_path / "new" / "ledger")):
        found = reader.look_up(TAG, keys(*order))
        assert found.dtype == np.float32 and found.tobytes() == values[order].tobytes()
        assert np.isnan(reader.look_up(TAG, keys(-1, 5, 2000))).tolist() == [True, False, True]
        assert np.isnan(reader.look_up("other", keys(5))).all()
        assert reader.look_up(TAG, []).shape == (0,)


def test_keys_with_zero_bytes_are_told_apart(tmp_path):
    # NumPy's byte strings drop trailing zeros when they leave the array; the table must not care.
    odd = [b"a" + bytes(15), bytes(16), bytes(15) + b"a", b"a" + bytes(14) + b"a"]
    book = ledger.Ledger(tmp_path)
    book.append(TAG, odd[:3], [1, 2, 3])
    assert ledger.Ledger(tmp_path).look_up(TAG, odd)[:3].tolist() == [1, 2, 3]
    assert np.isnan(ledger.Ledger(tmp_path).look_up(TAG, odd)[3])


def test_the_first_value_wins(tmp_path):
    book = ledger.Ledger(tmp_path)
    assert book.append(TAG, keys(1, 2, 1), [-1.0, -2.0, -9.0]) == 2
    size = file_of(tmp_path).stat().st_size
    assert book.append(TAG, keys(2, 1), [-8.0, -7.0]) == 0
    assert file_of(tmp_path).stat().st_size == size
    assert book.append(TAG, keys(3, 2), [-3.0, -6.0]) == 1
    for reader in (book, ledger.Ledger(tmp_path)):
        assert reader.look_up(TAG, keys(1, 2, 3)).tolist() == [-1, -2, -3]


def test_non_finite_values_are_refused_with_their_index(tmp_path):
    book = ledger.Ledger(tmp_path)
    message = r"log-prob 2 of 4 is nan, expected a finite number \(2 are not\)\. Nothing was written"
    with pytest.raises(ValueError, match=message):
        book.append(TAG, keys(1, 2, 3, 4), [0.0, 1.0, np.nan, -np.inf])
    assert not file_of(tmp_path).exists() or file_of(tmp_path).stat().st_size == 0


def test_bad_keys_counts_and_tags_are_refused(tmp_path):
    book = ledger.Ledger(tmp_path)
    with pytest.raises(ValueError, match="got 2 keys and 1 values"):
        book.append(TAG, keys(1, 2), [0.0])
    with pytest.raises(ValueError, match="ledger key 1 is b'short', expected 16 bytes"):
        book.look_up(TAG, [keys(1)[0], b"short"])
    for tag in ("../up", "", ".hidden", "a/b"):
        with pytest.raises(ValueError, match="expected up to 128 letters"):
            book.look_up(tag, keys(1))


@pytest.mark.parametrize("left", [1, 19, 20, 30])
def test_a_chunk_cut_short_by_a_crash_is_cut_off(tmp_path, left):
    book = ledger.Ledger(tmp_path)
    book.append(TAG, keys(1), [-1.0])
    whole = file_of(tmp_path).stat().st_size
    book.append(TAG, keys(2), [-2.0])
    with open(file_of(tmp_path), "r+b") as file:
        file.truncate(whole + left)
    after = ledger.Ledger(tmp_path)
    assert np.isnan(after.look_up(TAG, keys(1, 2))).tolist() == [False, True]
    after.append(TAG, keys(3), [-3.0])
    for reader in (after, ledger.Ledger(tmp_path)):
        assert reader.look_up(TAG, keys(1, 3)).tolist() == [-1, -3] and np.isnan(reader.look_up(TAG, keys(2)))
    assert file_of(tmp_path).stat().st_size == 2 * whole


@pytest.mark.parametrize("room", [0, 5, 20, 33])
def test_an_append_that_finds_the_disk_full(tmp_path, small_files, room):
    """The kernel cuts it off behind `room` bytes: what stood before stays, and the next append overwrites the rest, by
    the same ledger or by another run's."""
    book = ledger.Ledger(tmp_path)
    book.append(TAG, keys(1, 2), [-1.0, -2.0])
    whole = file_of(tmp_path).read_bytes()
    told = rf"^{file_of(tmp_path)} could not be written: File too large \(60 bytes to write, [\d,]+ free there\)"
    with small_files(len(whole) + room), pytest.raises(DiskError, match=told):
        book.append(TAG, keys(3, 4, 5), [-3.0, -4.0, -5.0])
    assert len(file_of(tmp_path).read_bytes()) == len(whole) + room and file_of(tmp_path).read_bytes().startswith(whole)
    for reader in (book, ledger.Ledger(tmp_path)):
        assert np.isnan(reader.look_up(TAG, keys(1, 2, 3))).tolist() == [False, False, True]
    writer = book if room % 2 else ledger.Ledger(tmp_path)
    assert writer.append(TAG, keys(3), [-33.0]) == 1
    for reader in (book, ledger.Ledger(tmp_path)):
        assert reader.look_up(TAG, keys(1, 2, 3)).tolist() == [-1, -2, -33]


def test_a_long_torn_chunk_leaves_nothing_behind_a_short_new_one(tmp_path):
    ledger.Ledger(tmp_path).append(TAG, keys(*range(10)), np.arange(10))
    os.truncate(file_of(tmp_path), file_of(tmp_path).stat().st_size - 1)
    book = ledger.Ledger(tmp_path)
    book.append(TAG, keys(3), [-3.0])
    assert file_of(tmp_path).stat().st_size == 20 + 16 + 4
    book.append(TAG, keys(4), [-4.0])
    assert ledger.Ledger(tmp_path).look_up(TAG, keys(3, 4)).tolist() == [-3, -4]


def test_blocks_never_filled_by_the_file_system_are_cut_off(tmp_path):
    ledger.Ledger(tmp_path).append(TAG, keys(1), [-1.0])
    with open(file_of(tmp_path), "ab") as file:
        file.write(bytes(4096))
    book = ledger.Ledger(tmp_path)
    book.append(TAG, keys(2), [-2.0])
    assert ledger.Ledger(tmp_path).look_up(TAG, keys(1, 2)).tolist() == [-1, -2]


@pytest.mark.parametrize("byte", [3, 9, 13, 18, 25, 37])
def test_a_corrupted_chunk_is_an_error_that_says_where_and_what_to_do(tmp_path, byte):
    part = "header" if byte < 20 else "body"
    book = ledger.Ledger(tmp_path)
    for number in range(3):
        book.append(TAG, keys(number), [-float(number)])
    size = file_of(tmp_path).stat().st_size // 3
    content = bytearray(file_of(tmp_path).read_bytes())
    content[size + byte] ^= 0x10
    file_of(tmp_path).write_bytes(content)
    name = re.escape(str(file_of(tmp_path)))
    message = rf"{name}: the chunk at byte {size} has a {part} .*truncate -s {size} {name}"
    for action in (lambda b: b.look_up(TAG, keys(1)), lambda b: b.append(TAG, keys(9), [0.0])):
        with pytest.raises(ValueError, match=message):
            action(ledger.Ledger(tmp_path))
    assert file_of(tmp_path).read_bytes() == content
    os.truncate(file_of(tmp_path), size)  # the advice
    assert np.isnan(ledger.Ledger(tmp_path).look_up(TAG, keys(0, 1))).tolist() == [False, True]


def test_a_file_deleted_or_cut_under_an_open_ledger_is_read_again(tmp_path):
    book = ledger.Ledger(tmp_path)
    book.append(TAG, keys(1), [-1.0])
    file_of(tmp_path).unlink()
    book.append(TAG, keys(2), [-2.0])
    assert np.isnan(ledger.Ledger(tmp_path).look_up(TAG, keys(1, 2))).tolist() == [True, False]
    assert book.look_up(TAG, keys(2)).tolist() == [-2]


def test_two_ledgers_see_each_others_values(tmp_path):
    first, second = ledger.Ledger(tmp_path), ledger.Ledger(tmp_path)
    first.append(TAG, keys(1), [-1.0])
    assert second.look_up(TAG, keys(1)).tolist() == [-1]
    assert second.append(TAG, keys(1, 2), [-9.0, -2.0]) == 1
    first.append(TAG, keys(3, 2), [-3.0, -9.0])
    for book in (first, second):
        assert book.look_up(TAG, keys(1, 2, 3)).tolist() == [-1, -2, -3]


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    code = """
import sys
from sera_jax import ledger
folder, me = sys.argv[1], int(sys.argv[2])
book = ledger.Ledger(folder)
for number in range(40):  # half of the keys are everybody's, with a value of one's own
    shared, own = ledger.branch_key([0], [number]), ledger.branch_key([1 + me], [number])
    book.append("t", [shared, own], [float(me), float(number)])
"""
    processes = [python(code, tmp_path, me) for me in range(3)]
    assert [p.wait(60) for p in processes] == [0, 0, 0]
    book = ledger.Ledger(tmp_path)
    for me in range(3):
        own = book.look_up("t", [ledger.branch_key([1 + me], [n]) for n in range(40)])
        assert own.tolist() == list(range(40))
    assert set(book.look_up("t", [ledger.branch_key([0], [n]) for n in range(40)])) <= {0.0, 1.0, 2.0}


def test_a_killed_process_leaves_what_it_had_appended(tmp_path):
    code = """
import sys, itertools, numpy as np
from sera_jax import ledger
book = ledger.Ledger(sys.argv[1])
for start in itertools.count(0, 2000):
    numbers = range(start, start + 2000)
    book.append("t", [ledger.branch_key([], [n]) for n in numbers], np.arange(start, start + 2000))
    print(start + 2000, flush=True)
"""
    process = python(code, tmp_path)
    lines = [process.stdout.readline() for _ in range(4)]
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.read().splitlines()
    process.wait()
    done = int(lines[-1])
    book = ledger.Ledger(tmp_path)
    found = book.look_up("t", [ledger.branch_key([], [n]) for n in range(done)])
    assert found.tolist() == list(range(done))
    book.append("t", [ledger.branch_key([9], [9])], [1.0])
    assert ledger.Ledger(tmp_path).look_up("t", [ledger.branch_key([9], [9])]).tolist() == [1.0]


def test_a_million_keys_are_quick(tmp_path):
    n = 1_000_000
    raw = np.random.default_rng(0).integers(0, 256, (n, 16), np.uint8).reshape(-1).view("S16")
    values = np.arange(n, dtype=np.float32)
    started = time.monotonic()
    ledger.Ledger(tmp_path).append(TAG, raw, values)
    found = ledger.Ledger(tmp_path).look_up(TAG, raw[::-1])
    seconds = time.monotonic() - started
    assert (found == values[::-1]).all()
    assert seconds < 30, f"{seconds:.1f} s for 10^6 keys"
    print(f"{seconds:.1f} s")


def test_file_tag_is_content_not_name(tmp_path):
    def write(name: str, config: bytes = b"{}", shards: tuple[bytes, ...] = (b"abc", b"d")) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes(config)
        (folder / "tokenizer.json").write_text(name)  # not part of the model
        for number, shard in enumerate(shards):
            (folder / f"model-{number}.safetensors").write_bytes(shard)
        return ledger.file_tag(folder)

    tag = write("one")
    assert re.fullmatch(r"[0-9a-f]{16}", tag) and write("two") == tag
    others = [write("c", config=b"{ }"), write("s", shards=(b"abd", b"d")), write("n", shards=())]
    others.append(write("b", shards=(b"ab", b"cd")))
    assert len({tag, *others}) == 5
    assert ledger.file_tag(tmp_path / "one" / "model-0.safetensors") != tag
    with pytest.raises(ValueError, match="absent holds no config.json, expected a Hugging Face folder"):
        ledger.file_tag(tmp_path / "absent")


def test_derived_tags_depend_on_every_part_and_its_place():
    parts = ("fingerprint", "start", "train", 2)
    assert ledger.derived_tag(*parts) == ledger.derived_tag(*parts)
    variants = [parts, (*parts[:3], 3), (*parts[:3], "2"), ("fingerprintstart", "", "train", 2)]
    assert len({ledger.derived_tag(*v) for v in variants}) == 4
    assert re.fullmatch(r"[0-9a-f]{16}", ledger.derived_tag(*parts))
