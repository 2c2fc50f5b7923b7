"""Look a torch archive (a zip file) over before any of it reaches a tensor.

torch's own reader never compares checksums, and reads compressed records, so a damaged file gives wrong
weights without a word.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import IO

from wnsurgery.errors import InputError, printable
from wnsurgery.stores.mapped import Record

__all__ = ["check_archive", "read_directory"]

_BLOCK = 1 << 20


def check_archive(file: IO[bytes], path: Path) -> bytes:
    """Check names, sizes and checksums of a torch archive; returns the bytes of its pickle.

    Raises InputError when it is damaged, compressed, TorchScript, a `.pt2` package, or no torch file at all.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _refuse_other_kinds(path, [e.filename for e in entries])
            _check_directory(path, entries, file)
            for entry in entries:
                _check_record(path, archive, entry)
            return archive.read(_pickle_record(path, entries))
    except InputError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds on damaged directories
        raise InputError.of(path, f"damaged or truncated archive ({printable(error)})") from error
    finally:
        file.seek(0)


def read_directory(file: IO[bytes], path: Path, *, base: int = 0) -> tuple[bytes, dict[str, Record]]:
    """The pickle of a torch archive, and where every record lies, checksums of tensors left for whoever reads them.

    Args:
        file: the archive, opened for reading.
        path: its name, for messages.
        base: what to add to positions, where the archive is part of a larger file.

    Raises as `check_archive`.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _refuse_other_kinds(path, [e.filename for e in entries])
            _check_directory(path, entries, file)
            pickled = _pickle_record(path, entries)
            root = pickled.removesuffix("data.pkl")
            for entry in entries:
                if not entry.filename.startswith(f"{root}data/"):
                    _check_record(path, archive, entry)
            records = {e.filename.removeprefix(root): _located(file, path, e, base) for e in entries}
            _refuse_overlaps(path, [*records.values()], base + archive.start_dir)
            return archive.read(pickled), records
    except InputError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds on damaged directories
        raise InputError.of(path, f"damaged or truncated archive ({printable(error)})") from error


def _located(file: IO[bytes], path: Path, entry: zipfile.ZipInfo, base: int) -> Record:
    """Where the bytes of a record are: behind its own header, which must name it as the directory does."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise InputError.of(path, f"damaged: no header before the record {printable(entry.filename)}")
    flags, (named, extra) = struct.unpack("<H", header[6:8])[0], struct.unpack("<HH", header[26:30])
    name = file.read(named).decode("utf-8" if flags & 0x800 else "cp437")
    if name != entry.orig_filename:
        raise InputError.of(path, f"damaged: the record {printable(entry.filename)} is called {printable(name)}, too")
    start = base + entry.header_offset + 30 + named + extra
    return Record(entry.filename, start, start + entry.file_size, entry.CRC or 0)


def _refuse_overlaps(path: Path, records: list[Record], end: int) -> None:
    position, last = 0, "the beginning"
    for record in sorted(records, key=lambda r: r.start):
        if record.start < position or record.stop > end:
            what = f"overlaps {last}" if record.start < position else "reaches into the directory"
            raise InputError.of(path, f"damaged: the record {printable(record.name)} {what}")
        position, last = record.stop, printable(record.name)


def _refuse_other_kinds(path: Path, names: list[str]) -> None:
    last = {name.rpartition("/")[2] for name in names}
    if "archive_format" in last or "serialized_exported_program.json" in last:
        raise InputError.of(
            path,
            "a torch.export package (.pt2), which holds a program rather than weights",
            "load it with torch.export.load and save its state_dict with torch.save",
        )
    if "constants.pkl" in last:
        raise InputError.of(
            path,
            "a TorchScript archive, whose weights are compiled into a program",
            "load it with torch.jit.load and save its state_dict() with torch.save",
        )
    if "data.pkl" not in last:
        raise InputError.of(path, "a zip file, but not one that torch.save wrote")


def _check_directory(path: Path, entries: list[zipfile.ZipInfo], file: IO[bytes]) -> None:
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError.of(path, f"the record {printable(twice)} is there twice")
    length = file.seek(0, 2)
    if sum(entry.file_size for entry in entries) > length:
        raise InputError.of(path, "its records claim more bytes than the file has")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise InputError.of(
                path,
                f"the record {printable(entry.filename)} is compressed, which torch.save never does",
                "unpack it and pack it again without compression",
            )


def _check_record(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    if entry.CRC == 0:  # torch.serialization.set_crc32_options(False) writes files without checksums
        entry.CRC = None  # type: ignore[assignment]  # zipfile then compares nothing
        return
    try:
        with archive.open(entry) as record:
            while record.read(_BLOCK):
                pass
    except zipfile.BadZipFile as error:
        raise InputError.of(path, f"damaged: {printable(error)}") from error


def _pickle_record(path: Path, entries: list[zipfile.ZipInfo]) -> str:
    """The record torch reads: data.pkl in the directory of the archive's first record."""
    wanted = f"{entries[0].filename.partition('/')[0]}/data.pkl"
    if all(entry.filename != wanted for entry in entries):
        raise InputError.of(path, f"the record {printable(wanted)} is missing")
    return wanted
