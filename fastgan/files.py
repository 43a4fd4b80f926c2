"""Files that appear whole or not at all, where writing was tried before the work started."""

import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_whole(path):
    """A context in which a file beside ``path`` is to be written, which then takes its name.

    An OSError of writing to an open file (a full disk) does not say which file it was: here it gets the name.
    """
    path, temporary = Path(path), _temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def _temporary_name(path):
    path = Path(path)
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")  # others may write the same file


def remove_left_over(folder):
    """Remove what `written_whole` left in a folder in processes that were killed."""
    for path in Path(folder).glob("*.*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and not _is_running(int(process)):
            path.unlink(missing_ok=True)


def _is_running(process):
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        pass
    return True


def write_text(path, text):
    """Write a text file whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def version_of(path):
    """A fingerprint of a file, which every ``written_whole`` of it changes; None where there is no file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


@contextmanager
def alone_in(folder):
    """A context that one process at a time can be in for an existing folder, where its file system knows locks.

    Raises:
        ValueError: another process is in it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is training in {os.fspath(folder)} right now") from error
        except OSError:  # no locks there
            pass
        yield
    finally:
        os.close(descriptor)


def check_writable(name, path, *, folder=False):
    """Raise ValueError, naming the option, unless the file ``path`` can be written, or files into the folder ``path``.

    Folders on the way may be missing: they are not made, and nothing else stays behind either.
    """
    path = os.fspath(path)
    if not path:
        raise ValueError(f"{name} must be the name of a {'folder' if folder else 'file'}; got ''")
    try:
        path.encode()
    except UnicodeEncodeError:  # TensorBoard, and whatever is printed, can do nothing with such a name
        raise ValueError(f"{name} must be a name in UTF-8; got {path.encode('utf-8', 'replace').decode()!r}") from None
    place = Path(path) if folder else Path(path).parent
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path if folder else _temporary_name(path))  # fails where a name is too long
        while not os.path.lexists(place):
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"{name} {path!r} cannot be written: {place}: {error.strerror}") from error
