"""The file a memory travels in: a zip of stored members with a manifest that names and hashes each.

A zip because every tool can list one, stored because then no member is larger than the file it came in;
no links, devices or long names as in a tar. Nothing is ever unpacked to disk: members are read as bytes,
so a name in the file can lead nowhere. ``BundleReader`` takes what ``BundleWriter`` writes and no other zip.
Knows bytes and names; what they say is in ``bundle``.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from msa_memory.errors import LimitError, StorageError

__all__ = ["BundleReader", "BundleWriter", "FORMAT", "FORMAT_VERSION", "MANIFEST", "Member"]

FORMAT, FORMAT_VERSION = "msa-memory-bundle", 1
MANIFEST = "manifest.json"

_NAME = re.compile(r"(documents|messages)-\d{6}\.jsonl|states-\d{6}\.safetensors")
_MOST_MEMBERS = 1_000_000
_MOST_DIRECTORY_BYTES = 256 * 1024 * 1024
_MOST_MANIFEST_BYTES = 256 * 1024 * 1024
_CHUNK = 1 << 20
_END, _END64, _LOCAL = b"PK\x05\x06", b"PK\x06\x06", b"PK\x03\x04"
_HAS_DESCRIPTOR = 0x08  # the writer streams: sizes follow the data and stand in the directory


class Member(NamedTuple):
    """Where a member's bytes lie in the file, and their checksum: SHA-256, of the manifest CRC-32."""

    name: str
    start: int
    size: int
    checksum: str


class BundleWriter:
    """Members in, pieces of the file out; does no input or output of its own."""

    def __init__(self) -> None:
        self._pipe = _Pipe()
        self._zip = zipfile.ZipFile(self._pipe, "w", zipfile.ZIP_STORED)
        self._members: dict[str, dict[str, Any]] = {}
        self._whole = hashlib.sha256()
        self.size = 0
        """Bytes given out so far."""

    @property
    def sha256(self) -> str:
        """SHA-256 of everything given out so far."""
        return self._whole.hexdigest()

    def member(self, name: str, parts: Iterable[bytes | memoryview]) -> Iterator[bytes]:
        """Write one member; yields what is to be appended to the file."""
        digest, size = hashlib.sha256(), 0
        with self._zip.open(_entry(name), "w", force_zip64=True) as target:
            for part in parts:
                target.write(part)
                digest.update(part)
                size += memoryview(part).nbytes
                yield self._taken()
        self._members[name] = {"bytes": size, "sha256": digest.hexdigest()}
        yield self._taken()

    def finish(self, about: Mapping[str, Any]) -> Iterator[bytes]:
        """Write the manifest, ``about`` and the list of members, and end the file."""
        manifest = {"format": FORMAT, "version": FORMAT_VERSION, **about, "members": dict(self._members)}
        yield from self.member(MANIFEST, [json.dumps(manifest, indent=1).encode()])
        self._zip.close()
        yield self._taken()

    def _taken(self) -> bytes:
        data = self._pipe.take()
        self._whole.update(data)
        self.size += len(data)
        return data


class BundleReader:
    """An open bundle whose names, sizes and places have been checked; ``read`` checks the content.

    Raises StorageError for a file that is damaged or no bundle, LimitError for one that claims too much.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self._file = file
        entries = self._directory()
        self.manifest = self._read_manifest(entries.pop(MANIFEST, None))
        self.members = self._matched(entries)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open and check the bundle at ``path``; close it after use."""
        try:
            file = path.open("rb")
        except OSError as error:
            raise StorageError(f"cannot read the bundle {path}: {error.strerror}; check the path") from error
        try:
            return cls(path, file)
        except OSError as error:
            file.close()
            raise StorageError(f"cannot read the bundle {path}: {error.strerror or error}") from error
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def names(self, kind: str) -> list[str]:
        """Members of a kind (documents, messages, states), in order."""
        return sorted(name for name in self.members if name.startswith(f"{kind}-"))

    def read(self, name: str) -> bytes:
        """All bytes of a member, once they match their SHA-256."""
        member = self.members.get(name)
        if member is None:
            raise self._damaged(f"it lacks {name}")
        data = self._at(member.start, member.size)
        self.check(member, hashlib.sha256(data).hexdigest())
        return data

    def check(self, member: Member, sha256: str) -> None:
        """StorageError unless ``sha256`` is what the manifest says of the member."""
        if sha256 != member.checksum:
            raise self._damaged(f"{member.name} has SHA-256 {sha256[:16]}, expected {member.checksum[:16]}")

    def verify(self) -> None:
        """Read everything once and check it."""
        for member in self.members.values():
            digest = hashlib.sha256()
            for start, size in chunks(member):
                digest.update(self._at(start, size))
            self.check(member, digest.hexdigest())

    def _at(self, start: int, size: int) -> bytes:
        try:
            self._file.seek(start)
            data = self._file.read(size)
        except OSError as error:
            raise StorageError(f"cannot read the bundle {self.path}: {error.strerror or error}") from error
        if len(data) != size:
            raise self._damaged(f"it ends {size - len(data)} bytes early")
        return data

    def _directory(self) -> dict[str, Member]:
        """The members a plain stored zip declares, each in a place of its own, with their CRC-32 for now."""
        total = self._file.seek(0, 2)
        self._check_directory_size(total)
        try:
            with zipfile.ZipFile(self._file) as archive:
                found = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
            raise self._damaged(f"it is no zip file ({str(error)[:80]!a})") from error
        entries: dict[str, Member] = {}
        end = 0
        for info in sorted(found, key=lambda info: info.header_offset):
            if info.filename in entries:
                raise self._damaged(f"it holds {info.filename[:60]!a} twice")
            member = self._placed(info)
            if info.header_offset < end or member.start + member.size > total:
                raise self._damaged(f"{member.name} lies over something else")
            entries[member.name], end = member, member.start + member.size
        return entries

    def _check_directory_size(self, total: int) -> None:
        """Refuse a directory that would fill memory before it is read; the end record says its size."""
        tail = self._at(max(0, total - 98), min(total, 98))
        if len(tail) < 22 or tail[-22:-18] != _END or tail[-2:] != b"\0\0":
            raise self._damaged("it does not end as a bundle does")
        count, size = struct.unpack("<HL", tail[-12:-10] + tail[-10:-6])
        if len(tail) == 98 and tail[:4] == _END64:
            count, size = struct.unpack("<QQ", tail[32:48])
        if count > _MOST_MEMBERS or size > _MOST_DIRECTORY_BYTES:
            raise LimitError(
                f"the bundle {self.path} declares {count} members in {size} bytes of directory; "
                f"the limits are {_MOST_MEMBERS} and {_MOST_DIRECTORY_BYTES}"
            )

    def _placed(self, info: zipfile.ZipInfo) -> Member:
        name = info.filename
        if name != MANIFEST and not _NAME.fullmatch(name):
            raise self._damaged(f"it holds the unknown member {name[:60]!a}")
        is_link = info.create_system == 3 and (info.external_attr >> 16) & 0o170000 not in (0, 0o100000)
        if is_link or info.flag_bits & ~_HAS_DESCRIPTOR:
            raise self._damaged(f"{name} is encrypted or no plain file")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise self._damaged(f"{name} is compressed; members of a bundle are stored as they are")
        header = self._at(info.header_offset, 30)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        start = info.header_offset + 30 + name_bytes + extra_bytes
        if header[:4] != _LOCAL or self._at(info.header_offset + 30, name_bytes) != name.encode():
            raise self._damaged(f"{name} has another name in its own header")
        return Member(name, start, info.file_size, f"{info.CRC:08x}")

    def _read_manifest(self, member: Member | None) -> dict[str, Any]:
        if member is None:
            raise self._damaged(f"it has no {MANIFEST}")
        if member.size > _MOST_MANIFEST_BYTES:
            raise LimitError(
                f"the manifest of {self.path} has {member.size} bytes; the limit is {_MOST_MANIFEST_BYTES}"
            )
        data = self._at(member.start, member.size)
        if member.checksum != f"{zlib.crc32(data):08x}":
            raise self._damaged("its manifest does not match its checksum")
        try:
            manifest = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._damaged("its manifest is not JSON") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise self._damaged("its manifest is not a bundle's")
        if manifest.get("version") != FORMAT_VERSION:
            raise StorageError(
                f"the bundle {self.path} has format {str(manifest.get('version'))[:20]!a}, this version "
                f"reads {FORMAT_VERSION}; upgrade msa-memory"
            )
        return manifest

    def _matched(self, entries: Mapping[str, Member]) -> dict[str, Member]:
        """The members with their checksums, when directory and manifest name the same."""
        listed = self.manifest.get("members")
        if not isinstance(listed, dict) or listed.keys() != entries.keys():
            raise self._damaged("its manifest lists other members than it holds")
        members = {}
        for name, member in sorted(entries.items()):
            entry = listed[name]
            if not isinstance(entry, dict) or entry.get("bytes") != member.size:
                raise self._damaged(f"{name} has {member.size} bytes, its manifest says otherwise")
            members[name] = member._replace(checksum=str(entry.get("sha256")))
        return members

    def _damaged(self, why: str) -> StorageError:
        return StorageError(f"the bundle {self.path} cannot be trusted: {why}; export it again")


def chunks(member: Member) -> Iterator[tuple[int, int]]:
    """Start and size of the pieces in which to read a member."""
    end = member.start + member.size
    for start in range(member.start, end, _CHUNK):
        yield start, min(_CHUNK, end - start)


class _Pipe:
    """A file that can only be written to the end; ``take`` empties it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes | memoryview) -> int:
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing to close."""

    def take(self) -> bytes:
        data = b"".join(self._parts)
        self._parts.clear()
        return data


def _entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)  # dated 1980: the same memory gives the same bytes
    info.external_attr = 0o600 << 16
    return info
