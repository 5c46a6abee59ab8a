"""A folder of large files that is written over several runs and appears whole.

Files are written to `.<name>.converting/files` beside the target, each under a temporary name, flushed, renamed, and
noted with its size in `state.json`. A run that is interrupted leaves that folder; the next run for the same plan keeps
the files that are noted and still have their size. A folder of another plan is deleted. At the end `files` takes the
target's name in one step.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from persimmon_fast.checkpoint_files import CheckpointSaveError
from persimmon_fast.checkpoint_save import flush

if TYPE_CHECKING:
    from typing_extensions import Self

_SPARE_BYTES = 2**26  # left free on the disk, and room for headers


class WorkFolder:
    """Use as a context manager: one process at a time.

    Args:
        target: folder that must not exist yet, or be empty.
        plan: what determines every byte of the files, as text.

    Raises:
        CheckpointSaveError: the target holds something, or another process writes it.
    """

    def __init__(self, target: str | os.PathLike[str], plan: str) -> None:
        self.target = Path(os.path.realpath(target))
        check_target(self.target)
        self._plan = hashlib.sha256(plan.encode()).hexdigest()
        self._folder = self.target.with_name(f".{self.target.name}.converting")
        self._files = self._folder / "files"
        self._done: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise CheckpointSaveError(
                str(self.target), "folder", "one conversion to it", "one that is running"
            ) from None
        self._resume()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done or not self._files.is_dir():  # nothing worth resuming, or finished
            shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)

    def _resume(self) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            state = json.loads((self._folder / "state.json").read_text())
            if state["plan"] == self._plan:
                self._done = {
                    name: size for name, size in state["files"].items() if (self._files / name).stat().st_size == size
                }
        if not self._done and self._files.exists():
            shutil.rmtree(self._files)
        self._files.mkdir(exist_ok=True)

    def is_done(self, name: str) -> bool:
        """Whether an earlier run wrote this file."""
        return name in self._done

    def require_space(self, num_bytes: int) -> None:
        """Refuses to begin what the disk cannot hold."""
        free = shutil.disk_usage(self._folder).free
        if free < num_bytes + _SPARE_BYTES:
            expected = f"{num_bytes + _SPARE_BYTES:,} bytes free on its disk"
            raise CheckpointSaveError(
                str(self.target), "disk", expected, f"{free:,}", "Make room or choose another disk."
            )

    def write(self, name: str, write: Callable[[IO[bytes]], None]) -> None:
        """Writes one file, unless an earlier run did; name may hold folders."""
        if self.is_done(name):
            return
        path = self._files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        self._done[name] = path.stat().st_size
        state = self._folder / "state.json.part"
        state.write_text(json.dumps({"plan": self._plan, "files": self._done}))
        flush(state)
        state.rename(self._folder / "state.json")

    def finish(self) -> None:
        """Gives the files the target's name. Whatever else is in the folder (of a run that was killed) goes."""
        for path in sorted(self._files.rglob("*"), reverse=True):
            if path.is_dir():
                flush(path)
            elif str(path.relative_to(self._files)) not in self._done:
                path.unlink()
        flush(self._files)
        check_target(self.target)
        self._files.rename(self.target)  # replaces an empty folder
        flush(self.target.parent)


def check_target(target: Path) -> None:
    """Refuses a folder that holds something."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        found = f"a folder with {next(target.iterdir()).name}" if target.is_dir() else "a file"
        raise CheckpointSaveError(str(target), "folder", "a new or empty folder", found, "Choose another name.")
