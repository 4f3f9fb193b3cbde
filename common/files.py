"""Files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write `content` so that after any kill `path` holds the old content or the new one, never a part; `durable`:
    also after a power cut.

    Raises OSError (a full disk among others); the temporary file is removed then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if durable:
            write_through(temporary, content)
        else:
            temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_through(path: Path, content: bytes) -> None:
    """Write `content` to the disk itself; for files that a rename of theirs, or of their folder, will make seen."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def give_to_owner_of(folder: Path, path: Path) -> None:
    """What root makes in a service's folder belongs to the service, or it could not go on."""
    if os.geteuid() == 0:
        owner = folder.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
