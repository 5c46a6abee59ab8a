"""Where the files of one of Adept's checkpoints lie: a release tar, read in place, or a folder of its content.

    8b_base_model_release/                          the base; in a tar or unpacked
        adept_vocab.model                           sentencepiece
        latest_checkpointed_iteration.txt           which iteration counts
        iter_NNNNNNN/mp_rank_RR/model_optim_rng.pt  one file a tensor parallel rank

Source: persimmon-ai-labs/adept-inference, megatron/checkpointing.py (names); README.md (the sums of the releases).
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persimmon_fast.checkpoint_files import CheckpointFileError, CheckpointNotFoundError, shown
from persimmon_fast.config_file import CONFIG_NAME, download_hint
from persimmon_fast.tokenizer import MODEL_NAMES

PUBLISHED_MD5 = {
    "8b_base_model_release.tar": "cd0320cba9efad9ccd18e9ec4d16ae1b",
    "8b_chat_model_release.tar": "663aeace07269c44e90f4e8bcd07f32a",
}
TRACKER_NAME = "latest_checkpointed_iteration.txt"
_RANK_FILE = re.compile(
    r"(?P<base>.*?)(?:(?:^|/)iter_(?P<iteration>\d{7,}))?(?:^|/)mp_rank_(?P<rank>\d{2,})(?P<stage>_\d{3,})?"
    r"/model(?:_optim)?_rng\.pt"
)
_LAYOUT = f"iter_*/mp_rank_*/model_optim_rng.pt beside {TRACKER_NAME}"
_READ_BYTES = 2**22


@dataclass(frozen=True)
class Member:
    """A file, or one inside a tar: `size` bytes at `offset` of the file `path`. `name` is for messages."""

    name: str
    path: str
    offset: int
    size: int

    def open(self) -> io.BufferedReader:
        """Its bytes as a file of its own."""
        return io.BufferedReader(_Window(self))

    def read(self) -> bytes:
        with self.open() as file:
            return file.read()


class _Window(io.RawIOBase):
    """Bytes [offset, offset + size) of a file, as a seekable file."""

    def __init__(self, member: Member) -> None:
        self._file = open(member.path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        self._start, self._size, self._position = member.offset, member.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence] + offset
        if self._position < 0:
            raise ValueError(f"seek to {self._position}")
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._size - self._position)])
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True)
class AdeptSource:
    """The files of one iteration.

    Attributes:
        path: the tar, folder or file that was given.
        ranks: one model file per tensor parallel rank, in order.
        beside: the other files of the base that may matter, by file name.
        iteration: as the folder's name says, None where there is no such folder.
    """

    path: str
    ranks: tuple[Member, ...]
    beside: Mapping[str, Member]
    iteration: int | None

    def tokenizer(self, *more_names: str) -> Member | None:
        """The sentencepiece model, under its usual names or others."""
        return next(
            (self.beside[name] for name in ("adept_vocab.model", *MODEL_NAMES, *more_names) if name in self.beside),
            None,
        )


def open_source(path: str | os.PathLike[str]) -> AdeptSource:
    """Finds the checkpoint in a tar, in a folder (the base, one above it, or one below), or takes one rank's file.

    Raises:
        CheckpointNotFoundError: nothing there, no rank's file, or one missing.
        CheckpointFileError: several checkpoints, pipeline parallel stages, a compressed or damaged tar.
    """
    path = os.path.abspath(path)
    if os.path.isdir(path):
        return _chosen(path, _folder_members(Path(path)))
    if not os.path.isfile(path):
        hint = download_hint(os.path.relpath(path)).removeprefix("; ")
        raise CheckpointNotFoundError(path, "path", "Adept's release tar or its unpacked folder", "nothing there", hint)
    with open(path, "rb") as file:
        start = file.read(4)
    if not start.startswith((b"PK\x03\x04", b"\x80\x02")):  # neither a zip nor a pickle
        return _chosen(path, _tar_members(path))
    folder = Path(path).parent
    if _RANK_FILE.fullmatch(path):
        return _chosen(path, _folder_members(folder))
    beside = {file.name: Member(str(file), str(file), 0, file.stat().st_size) for file in _files(folder)}
    return AdeptSource(path, (beside[os.path.basename(path)],), beside, None)


def _files(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_file())


def _folder_members(folder: Path) -> list[Member]:
    """Files whose names may matter, from two folders above (where an iteration or a rank was given) to three below."""
    inside = re.fullmatch(r"iter_\d{7,}|mp_rank_\d{2,}(_\d{3,})?", folder.name)
    above = [folder.parent, folder.parent.parent] if inside else []
    found = [file for parent in above for file in _files(parent)]
    for depth in range(4):
        pattern = "*/" * depth
        names = ("model_optim_rng.pt", "model_rng.pt") if depth > 1 else ("*",)
        found += [file for name in names for file in sorted(folder.glob(pattern + name)) if file.is_file()]
    return [Member(str(file), str(file), 0, file.stat().st_size) for file in dict.fromkeys(found)]


def _tar_members(path: str) -> list[Member]:
    members: dict[str, Member] = {}
    length = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                name = os.path.normpath(info.name)
                if not info.isfile():
                    continue
                if name in members or info.issparse():
                    found = "two of that name" if name in members else "a sparse one"
                    raise CheckpointFileError(path, name, "each file once and whole", found)
                if info.offset_data + info.size > length:
                    found = f"{length:,} bytes, {info.offset_data + info.size - length:,} too few for it"
                    raise CheckpointFileError(path, name, "the whole file in the tar", found, "Download it again.")
                members[name] = Member(name, path, info.offset_data, info.size)
    except (tarfile.TarError, ValueError) as error:
        if isinstance(error, CheckpointFileError):
            raise
        hint = "A compressed tar (.tar.gz) must be decompressed first; a damaged one downloaded again."
        raise CheckpointFileError(path, "file", "a tar", shown(str(error)), hint) from None
    return list(members.values())


def _chosen(path: str, members: Iterable[Member]) -> AdeptSource:
    """The one checkpoint among the members, at the iteration that its tracker names."""
    members = list(members)
    groups: dict[tuple[str, str], dict[int, Member]] = {}
    for member in members:
        match = _RANK_FILE.fullmatch(member.name)
        if match is None:
            continue
        if match["stage"]:
            hint = "Merge the pipeline stages with the code that wrote them."
            raise CheckpointFileError(
                path, member.name, "tensor parallel ranks alone", "a pipeline parallel stage", hint
            )
        ranks = groups.setdefault((match["base"], match["iteration"] or ""), {})
        if ranks.setdefault(int(match["rank"]), member) is not member:
            raise CheckpointFileError(path, member.name, "one model file a rank", "model_rng.pt and model_optim_rng.pt")
    bases = sorted({base for base, _ in groups})
    if not groups:
        found = ", ".join(shown(os.path.basename(member.name)) for member in members[:5]) or "no file"
        is_ours = any(os.path.basename(member.name) == CONFIG_NAME for member in members)
        hint = "This is a Hugging Face folder: --to adept converts it." if is_ours else ""
        raise CheckpointNotFoundError(path, "model files", _LAYOUT, found, hint)
    if len(bases) > 1:
        hint = "Give the folder of one of them."
        raise CheckpointFileError(path, "model files", "one checkpoint", f"{len(bases)}: {', '.join(bases[:3])}", hint)
    base = bases[0]
    beside = {os.path.basename(m.name): m for m in members if os.path.dirname(m.name) == base}
    iterations = {iteration for _, iteration in groups}
    iteration = iterations.pop() if len(iterations) == 1 else _tracked(path, base, beside, iterations)
    ranks = groups[base, iteration]
    missing = sorted(set(range(max(ranks) + 1)) - ranks.keys())
    if missing:
        where = os.path.dirname(os.path.dirname(ranks[max(ranks)].name))
        raise CheckpointNotFoundError(
            path, f"{where}/mp_rank_{missing[0]:02}", f"{max(ranks) + 1} ranks", f"{len(ranks)} of them"
        )
    return AdeptSource(path, tuple(ranks[i] for i in sorted(ranks)), beside, int(iteration) if iteration else None)


def _tracked(path: str, base: str, beside: Mapping[str, Member], iterations: set[str]) -> str:
    """The iteration that latest_checkpointed_iteration.txt names."""
    expected = f"one of the iterations {', '.join(sorted(iterations)[:5])}"
    if TRACKER_NAME not in beside:
        raise CheckpointNotFoundError(
            path, f"{base}/{TRACKER_NAME}", expected, "no such file", "Give one iter_ folder."
        )
    text = beside[TRACKER_NAME].read()[:100].decode("ascii", "replace").strip()
    for iteration in iterations:
        if iteration and text.isdigit() and int(iteration) == int(text):
            return iteration
    raise CheckpointFileError(path, TRACKER_NAME, expected, shown(repr(text)), "Give one iter_ folder.")


def check_md5(path: str, expected: str, progress: bool) -> None:
    """Reads the whole file and compares its MD5.

    Raises:
        CheckpointFileError: it is another.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    digest = hashlib.md5(usedforsecurity=False)
    show = progress and sys.stderr.isatty()
    with (
        open(path, "rb") as file,
        tqdm(
            total=os.path.getsize(path), desc="Checking MD5", unit="B", unit_scale=True, delay=1.0, disable=not show
        ) as bar,
    ):
        while block := file.read(_READ_BYTES):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != expected.lower():
        hint = "The download is incomplete or damaged, or the file is another one than its name says."
        raise CheckpointFileError(path, "MD5", expected.lower(), digest.hexdigest(), hint)
