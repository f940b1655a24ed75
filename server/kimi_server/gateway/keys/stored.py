"""Writes a file of keys: one writer at a time, and a reader sees the old file or the new one, never a part."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from kimi_server.gateway.config.yaml_file import SettingsError, read_bytes

PRIVATE = 0o600


def change(path: Path, edit: Callable[[str], str], create: bool = False) -> None:
    """Replace the file by what `edit` makes of its text; with `create` a file that is not there is an empty text.

    Mode and owner stay. A link stays one: what it leads to is replaced. Raises SettingsError.
    """
    path = path.resolve()
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise SettingsError(f"{path.parent} cannot be opened: {error.strerror}.") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # not on the file, which is another after this
        there = path.exists()
        text = edit(read_bytes(path).decode() if there or not create else "")
        _replace(path, text.encode(), path.stat() if there else None)
        os.fsync(folder)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be replaced: {error.strerror}; if it is mounted as a single file, edit it at its source."
        ) from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8: save it as UTF-8.") from None
    finally:
        os.close(folder)


def _replace(path: Path, content: bytes, before: os.stat_result | None) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            if before is not None and (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
            os.fchmod(file.fileno(), PRIVATE if before is None else before.st_mode & 0o7777)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
