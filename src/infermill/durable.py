"""Files of this machine that are there whole or not at all, after a crash, too."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# File systems without O_TMPFILE or without hard links, kernels that do not know it, and systems without /proc.
_NO_NAMELESS_FILES = {
    errno.EOPNOTSUPP,
    errno.EISDIR,
    errno.EINVAL,
    errno.ENOENT,
    errno.ENOSYS,
    errno.EPERM,
    errno.EXDEV,
}


def create_durably(path: Path, content: bytes) -> bool:
    """A private file, made durable and then linked to its name: there whole, or not at all, after a crash too."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    if _link_nameless(path, content):
        return True
    with private_file(path, content) as private:
        try:
            os.link(private, path)
        except PermissionError:  # the private file was written, so that it is not this
            raise OSError(errno.ENOTSUP, "the file system does not support hard links") from None
    return True


def _link_nameless(path: Path, content: bytes) -> bool:
    """The same by a file that has no name before it is linked, and leaves nothing behind; False where there is none."""
    if not hasattr(os, "O_TMPFILE"):
        return False
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.fdopen(os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.link(f"/proc/self/fd/{file.fileno()}", path.name, dst_dir_fd=folder, follow_symlinks=True)
    except OSError as error:
        if error.errno in _NO_NAMELESS_FILES:
            return False
        raise
    finally:
        os.close(folder)
    return True


@contextmanager
def private_file(path: Path, content: bytes) -> Iterator[Path]:
    """A durable file beside `path`, for as long as the context lasts."""
    private = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with private.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield private
    finally:
        private.unlink(missing_ok=True)
