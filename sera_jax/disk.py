"""Files that are whole or not there, and what a disk that takes no more has to say."""

import contextlib
import ctypes
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

# What a disk answers that is full (a quota and a limit of file sizes included), read-only or broken.
_ANSWERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


class DiskError(ValueError):
    """A write that the disk refused: says where, why, how much was to be written and how much room there is."""


def refusal(path: str | os.PathLike[str], reason: str, need: int | None = None) -> DiskError:
    """The error to raise.

    Args:
        path: that was to be written. reason: in the system's words. need: bytes, None = not known.
    """
    place = pathlib.Path(path).absolute()
    while not place.exists():
        place = place.parent
    wanted = "" if need is None else f"{need:,} bytes to write, "
    return DiskError(
        f"{path} could not be written: {reason} ({wanted}{shutil.disk_usage(place).free:,} free there). Make room, or "
        "raise the quota."
    )


@contextlib.contextmanager
def guarded(path: str | os.PathLike[str], need: int | None = None) -> Iterator[None]:
    """Within it, an OSError of the disk becomes a DiskError about `path`, or about the file that it names; others pass.

    Args:
        need: bytes that are to be written, None = not known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _ANSWERS:
            raise
        raise refusal(error.filename or path, os.strerror(error.errno), need) from error


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A path beside `path` to write a file to. It becomes `path` at the end, on the disk; if anything fails, `path`
    stays what it was.

    Raises:
        DiskError: the disk took no more.
    """
    path = pathlib.Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes may write the same
    try:
        with guarded(path):
            yield beside
            sync(beside)
            os.replace(beside, path)
            sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync(path: str | os.PathLike[str]) -> None:
    """Returns when a file, or the names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Swaps two names, of files or folders, in one step: at no moment is either missing.

    Returns:
        Whether it did: False where the system (not Linux) or the file system (many that are on a network) cannot.

    Raises:
        OSError: they cannot be swapped for another reason.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def read_ahead(folder: str | os.PathLike[str]) -> int:
    """Has the system read a folder's files while the caller goes on; whoever opens them next finds them in memory.

    Returns:
        bytes of the files; 0 where the system has no such call.
    """
    if not hasattr(os, "posix_fadvise"):
        return 0
    total = 0
    for place in sorted(pathlib.Path(folder).rglob("*")):
        if place.is_file():
            with open(place, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            total += place.stat().st_size
    return total
