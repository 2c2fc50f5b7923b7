"""Files in and out: what is read, what is refused and why, and that writing is all or nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wnsurgery.errors import (
    InputError,
    InputMissingError,
    OutputError,
    OutputExistsError,
    UnsafeFileError,
    WnsurgeryError,
)
from wnsurgery.stores import Stored, check_output, map_store, read_store, write_store
from wnsurgery.stores.commit import committed
from wnsurgery.stores.pickles import scan
from wnsurgery.stores.safetensors_file import DTYPES
from wnsurgery.stores.staging import staged
from wnsurgery.stores.torch_file import Sink


def state():
    g = torch.Generator().manual_seed(0)
    return OrderedDict(a=torch.randn(4, 3, generator=g), b=torch.randn(5, generator=g), step=torch.tensor(7))


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


class Calls:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def marker(tmp_path):
    """A path that exists once hostile code has run."""
    return tmp_path / "owned"


# Reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.ckpt", "m.bin", "m.safetensors", "noext"])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_torch_files_are_told_by_content(tmp_path, name, old):
    """The bytes decide what a file is, whatever it is called, in both of torch's serialisations."""
    torch.save(state(), tmp_path / name, _use_new_zipfile_serialization=not old)
    stored = read_store(tmp_path / name)
    assert stored.format == "torch"
    assert type(stored.content) is OrderedDict
    assert same(stored.content, state())


def test_ties_come_back_as_ties(tmp_path):
    """Names that share one storage share it after reading and after writing again."""
    w = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": w, "b": w, "row": w[1]}, tmp_path / "in.pt")
    write_store(tmp_path / "out.pt", read_store(tmp_path / "in.pt"))
    again = read_store(tmp_path / "out.pt").content
    assert again["a"].data_ptr() == again["b"].data_ptr()
    again["a"][1, 0] = 99
    assert again["row"][0] == 99


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_safetensors_agrees_with_the_safetensors_package(tmp_path, dtype):
    """Every type and shape is read and written as the reference implementation reads and writes it."""
    raw = torch.arange(48, dtype=torch.uint8)
    cases = {"x": raw.view(dtype).reshape(2, -1), "empty": torch.empty(0, 3, dtype=dtype)}
    cases["scalar"] = raw[: dtype.itemsize].clone().view(dtype).reshape(())
    if dtype == torch.bool:
        cases = {k: v.view(torch.uint8).remainder(2).bool() for k, v in cases.items()}
    try:
        safetensors.torch.save_file(cases, tmp_path / "ref.safetensors", {"format": "pt"})
    except KeyError:
        pytest.skip(f"safetensors {safetensors.__version__} does not know the type")
    stored = read_store(tmp_path / "ref.safetensors")
    assert stored.metadata == {"format": "pt"}
    write_store(tmp_path / "ours.safetensors", stored)
    back = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    for key, tensor in cases.items():
        for found in (stored.content[key], back[key]):
            assert found.shape == tensor.shape
            assert found.dtype == dtype
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_safetensors_metadata_ties_and_strides(tmp_path):
    """Metadata is kept, tied and non-contiguous tensors are written whole."""
    w = torch.arange(6.0).reshape(2, 3)
    content = {"a": w, "b": w, "t": w.t(), "wide": torch.ones(3, dtype=torch.float64)}
    write_store(tmp_path / "x.safetensors", Stored(content, "safetensors", {"who": "é\n", "a": "1"}))
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"who": "é\n", "a": "1"}
        assert all(torch.equal(file.get_tensor(k), v) for k, v in content.items())


@pytest.mark.parametrize("length", range(1, 10))
def test_the_data_of_a_safetensors_file_is_aligned(tmp_path, length):
    """However long the names are, tensors start at a multiple of eight bytes."""
    write_store(tmp_path / "x.safetensors", Stored({"n" * length: torch.ones(3)}, "safetensors"))
    (header,) = struct.unpack("<Q", (tmp_path / "x.safetensors").read_bytes()[:8])
    assert (8 + header) % 8 == 0


def test_nan_and_infinity_survive(tmp_path):
    """Values that are not finite come back bit for bit from both formats."""
    x = torch.tensor([0x7FC00001, 0x7F800000, -0x800000, -0x80000000]).int().view(torch.float32)
    for name in ("x.pt", "x.safetensors"):
        write_store(tmp_path / name, Stored({"x": x}, "torch"))
        assert torch.equal(read_store(tmp_path / name).content["x"].view(torch.int32), x.view(torch.int32))


def test_files_without_checksums_are_read(tmp_path):
    """torch can be told to write no checksums; that is not damage."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(), tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_store(tmp_path / "m.pt").content, state())


def test_same_content_gives_the_same_bytes(tmp_path):
    """Bytes depend neither on the output's name nor on the process nor on the number of threads."""
    torch.save({"state_dict": state(), "epoch": 3}, tmp_path / "in.pt")
    safetensors.torch.save_file(dict(state()), tmp_path / "in.safetensors", {str(i): "x" for i in range(9)})
    code = (
        "import sys, torch; torch.set_num_threads(2); from wnsurgery.stores import read_store, write_store\n"
        "for a, b in zip(sys.argv[1::2], sys.argv[2::2]): write_store(b, read_store(a))"
    )
    files = [
        (tmp_path / f"in.{suffix}", tmp_path / f"some-other-name.{suffix}", tmp_path / f"a.{suffix}")
        for suffix in ("pt", "safetensors")
    ]
    command = [sys.executable, "-c", code, *(str(p) for source, out, _ in files for p in (source, out))]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    for source, out, here in files:
        write_store(here, read_store(source))
        assert here.read_bytes() == out.read_bytes()


# Refusing: what is not there or no checkpoint ------------------------------------------------------------


def test_missing_directory_fifo_and_device_are_refused(tmp_path):
    """Only regular files are opened; a FIFO does not hang the reader."""
    with pytest.raises(InputMissingError, match="no such file"):
        read_store(tmp_path / "none.pt")
    with pytest.raises(InputError, match="directory"):
        read_store(tmp_path)
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file"):
            read_store(path)
    with pytest.raises(InputError):
        read_store("nul\0byte")


def zipped(path, records):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            archive.writestr(name, data)


def test_other_kinds_of_files_say_what_to_do(tmp_path):
    """TorchScript, .pt2, ONNX, other zips, text, tar and empty files are refused with a sentence."""
    path = tmp_path / "m.pt"
    zipped(path, [("m/data.pkl", b"\x80\x02}."), ("m/constants.pkl", b""), ("m/code/x.py", b"")])
    with pytest.raises(InputError, match="TorchScript") as caught:
        read_store(path)
    assert "torch.jit.load" in caught.value.hint
    with pytest.warns(Warning) as _:
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(InputError, match="TorchScript"):
        read_store(path, trust_pickle=True)
    zipped(path, [("m/archive_format", b"pt2"), ("m/models/model.json", b"{}")])
    with pytest.raises(InputError, match="a program rather than weights") as caught:
        read_store(path)
    assert "torch.export.load" in caught.value.hint
    zipped(path, [("arr_0.npy", b"x")])
    with pytest.raises(InputError, match="not one that torch"):
        read_store(path)
    (tmp_path / "g.onnx").write_bytes(b"\x08\x07\x12\x00")
    with pytest.raises(InputError, match="ONNX"):
        read_store(tmp_path / "g.onnx")
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(InputError):
        read_store(path)
    for text in (b"", b"hello world, this is not a model", b"\0" * 64, b"<html>404</html>", b"version https://git-lfs"):
        path.write_bytes(text)
        with pytest.raises(InputError):
            read_store(path)


# Refusing: damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_every_truncation_is_an_input_error(tmp_path, kind):
    """A file cut short anywhere is refused, never read as something smaller."""
    path = tmp_path / ("m.safetensors" if kind == "safetensors" else "m.pt")
    if kind == "safetensors":
        safetensors.torch.save_file(dict(state()), path)
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in {*range(0, 40), *range(0, len(whole), 37), *range(len(whole) - 24, len(whole))}:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_store(path)


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path):
    """torch.load reads a damaged record without a word; the checksum says so."""
    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(b"\0" * 2000) + 1000] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["w"].count_nonzero() == 1
    with pytest.raises(InputError, match="damaged"):
        read_store(path)


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """A torch archive with its records passed through `change(name, data) -> data or None`."""
    with zipfile.ZipFile(path) as old:
        records = [(i.filename, old.read(i)) for i in old.infolist()]
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in records:
            made = change(name, data)
            if made is not None:
                new.writestr(name, made)


@pytest.mark.parametrize(
    "change",
    [
        lambda n, d: d[:-4] if n.endswith("data/0") else d,
        lambda n, d: d + b"\0" * 4 if n.endswith("data/0") else d,
        lambda n, d: None if n.endswith("data/0") else d,
        lambda n, d: None if n.endswith("data.pkl") else d,
        lambda n, d: d[:-3] if n.endswith("data.pkl") else d,
        lambda n, d: b"\xff" * 9 if n.endswith("data.pkl") else d,
        lambda n, d: b"middle" if n.endswith("byteorder") else d,
    ],
    ids=["short", "long", "missing", "no-pickle", "cut-pickle", "no-opcodes", "endianness"],
)
def test_records_that_do_not_fit_are_found(tmp_path, change):
    """A record shorter, longer or other than the pickle says is an input error."""
    torch.save(state(), tmp_path / "m.pt")
    rewritten(tmp_path / "m.pt", change)
    with pytest.raises(InputError):
        read_store(tmp_path / "m.pt")


def test_compressed_and_duplicate_records_are_refused(tmp_path):
    """A compressed record may be a bomb and a name there twice may be read twice differently."""
    torch.save(state(), tmp_path / "m.pt")
    rewritten(tmp_path / "m.pt", lambda _, d: d, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="compressed"):
        read_store(tmp_path / "m.pt")
    torch.save(state(), tmp_path / "m.pt")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "m.pt", "a") as archive:
        archive.writestr("m/data/0", b"0" * 48)
    with pytest.raises(InputError, match="twice"):
        read_store(tmp_path / "m.pt")


def rebuilt(*arguments):
    w = torch.arange(4.0)
    storage = torch.storage.TypedStorage(wrap_storage=w.untyped_storage(), dtype=w.dtype, _internal=True)
    return Calls(torch._utils._rebuild_tensor_v2, storage, *arguments, False, OrderedDict())


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (10**6, 10**6), (0, 0)),
        (0, (10,), (1,)),
        (3, (2,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2**40, 2**40), (1, 1)),
    ],
)
def test_stride_tricks_are_refused(tmp_path, offset, size, stride, old):
    """A tensor that claims memory its storage does not have never reaches a kernel."""
    torch.save({"x": rebuilt(offset, size, stride)}, tmp_path / "m.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(InputError):
        read_store(tmp_path / "m.pt")


def test_expanded_buffers_are_legitimate(tmp_path):
    """An expanded tensor of ordinary size is no trick."""
    torch.save({"x": torch.ones(1).expand(1000, 10)}, tmp_path / "m.pt")
    assert read_store(tmp_path / "m.pt").content["x"].shape == (1000, 10)


def raw_safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        (b"{", 0),
        (b"[]", 0),
        (b'{"a": 1}', 0),
        (b"{}", 4),
        ({"a": F32}, 4),
        ({"a": F32}, 12),
        ({"a": F32, "b": F32}, 8),
        ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, 12),
        ({"a": {**F32, "data_offsets": [4, 12]}}, 12),
        ({"a": {**F32, "shape": [3]}}, 8),
        ({"a": {**F32, "shape": [-2]}}, 8),
        ({"a": {**F32, "shape": [True, 2]}}, 8),
        ({"a": {**F32, "shape": [2.0]}}, 8),
        ({"a": {**F32, "shape": "2"}}, 8),
        ({"a": {**F32, "shape": [0, 2**70], "data_offsets": [0, 0]}}, 0),
        ({"a": {**F32, "dtype": "F99"}}, 8),
        ({"a": {**F32, "dtype": []}}, 8),
        ({"a": {**F32, "data_offsets": [8, 0]}}, 8),
        ({"a": {**F32, "data_offsets": [0]}}, 8),
        ({"a": {"dtype": "F32"}}, 8),
        (b'{"a": %b, "a": %b}' % ((json.dumps(F32).encode(),) * 2), 8),
        ({"__metadata__": {"a": 1}}, 0),
        ({"__metadata__": "x"}, 0),
        (b'{"a":' * 100_000, 0),
        (b"\xff\xfe", 0),
    ],
)  # fmt: skip
def test_hostile_safetensors_headers_are_input_errors(tmp_path, header, size):
    """Gaps, overlaps, wrong sizes, doubled names and headers that are no table are refused before reading on."""
    raw_safetensors(tmp_path / "m.safetensors", header, b"\0" * size)
    with pytest.raises(InputError):
        read_store(tmp_path / "m.safetensors")


def test_a_header_longer_than_the_file_allocates_nothing(tmp_path):
    """The length in the first eight bytes is compared with the file before it is believed."""
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(InputError, match="longer than the file"):
        read_store(tmp_path / "m.safetensors")


def samples():
    """One small file of each kind; the old serialisation writes memory addresses, so it is made once."""
    for old in (False, True):
        buffer = io.BytesIO()
        torch.save({"n": {"a": torch.ones(3)}, "e": 1}, buffer, _use_new_zipfile_serialization=not old)
        yield buffer.getvalue()
    yield safetensors.torch.save(dict(state()))


SAMPLES = tuple(samples())
CHANGES = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(kind=st.integers(0, len(SAMPLES) - 1), changes=CHANGES)
def test_mutated_files_raise_only_our_errors(tmp_path, kind, changes):
    """Whatever bytes are changed, the reader returns or raises an error of ours."""
    content = bytearray(SAMPLES[kind])
    for place, value in changes:
        content[place % len(content)] = value
    (tmp_path / "m.pt").write_bytes(content)
    try:
        read_store(tmp_path / "m.pt")
    except WnsurgeryError as error:
        assert error.exit_code in (3, 4)


# Refusing: code ------------------------------------------------------------------------------------------


def hostile_files(tmp_path, marker):
    bomb = Calls(os.system, f"touch {marker}")
    path = tmp_path / "m.pt"
    torch.save(bomb, path)
    yield "posix.system", path
    torch.save({"state_dict": state(), "hparams": Calls(eval, f"open({str(marker)!r}, 'w')")}, path)
    yield "builtins.eval", path
    torch.save({"a": bomb}, path, _use_new_zipfile_serialization=False)
    yield "posix.system", path
    torch.save({"a": bomb}, path, pickle_protocol=4)
    yield "posix.system", path
    for protocol in range(6):
        path.write_bytes(pickle.dumps(bomb, protocol))
        yield "posix.system", path
    path.write_bytes(b"cbuiltins\nexec\n(S'open(%r, chr(119))'\ntR." % str(marker))
    yield "builtins.exec", path
    path.write_bytes(b"(S'touch %s'\nios\nsystem\n." % str(marker).encode())
    yield "os.system", path
    torch.save(Calls(getattr, "text", "join"), path)
    yield "getattr", path
    torch.save(Calls(torch.hub.load, "x", "y"), path)
    yield "torch.hub.load", path


@pytest.mark.parametrize("variable", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "both"])
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, marker, monkeypatch, variable):
    """A pickle that calls anything is exit 4, names what it wanted, and has no effect, whatever the environment."""
    if variable is not None:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    if variable == "both":
        monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    for name, path in hostile_files(tmp_path, marker):
        with pytest.raises(UnsafeFileError) as caught:
            read_store(path)
        assert caught.value.exit_code == 4
        assert name in caught.value.message
        assert "trust_pickle" in caught.value.hint
        assert not marker.exists()


def test_torchs_own_restriction_is_asked_for_by_name(tmp_path, monkeypatch):
    """Behind our reading of the pickle stands torch's: weights_only is passed, so no variable can flip it."""
    asked = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: asked.append(kwargs) or load(*args, **kwargs))
    for old in (False, True):
        torch.save(state(), tmp_path / "m.pt", _use_new_zipfile_serialization=not old)
        read_store(tmp_path / "m.pt")
    assert [kwargs["weights_only"] for kwargs in asked] == [True, True]


def test_trust_runs_the_pickle(tmp_path, marker):
    """The switch does what it says: with it, the file's code runs (so the test above can fail)."""
    torch.save(Calls(os.system, f"touch {marker}"), tmp_path / "m.pt")
    read_store(tmp_path / "m.pt", trust_pickle=True)
    assert marker.exists()


def test_contradicting_environment_variables_are_no_traceback(tmp_path, monkeypatch):
    """torch refuses to load anything with both variables set; that is an input error here."""
    torch.save(state(), tmp_path / "m.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert same(read_store(tmp_path / "m.pt").content, state())
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(InputError):
        read_store(tmp_path / "m.pt")


def test_a_tar_behind_torchs_magic_number_is_not_unpacked(tmp_path):
    """A file that is both an old torch file and a tar must not make torch extract it."""
    head = bytearray(512)
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    info = tarfile.TarInfo("storages")
    info.size = 4
    head[:] = info.tobuf()
    head[: len(magic)] = magic
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    (tmp_path / "m.pt").write_bytes(bytes(head) + b"evil" + b"\0" * 1532)
    assert tarfile.is_tarfile(tmp_path / "m.pt")
    with pytest.raises(InputError):
        read_store(tmp_path / "m.pt")


def test_scan_names_globals_of_every_protocol():
    """The text reading of a pickle finds names in all protocols, through memo and stack."""
    for protocol in range(6):
        seen = scan(io.BytesIO(pickle.dumps([OrderedDict(), os.system, OrderedDict()], protocol)))
        assert set(seen.names) >= {"collections.OrderedDict", "posix.system"}
        assert seen.complete
    assert scan(io.BytesIO(b"\x80\x02junk")).complete is False


# Writing -------------------------------------------------------------------------------------------------


def listing(directory):
    return sorted(p.name for p in directory.iterdir())


def test_an_existing_output_is_not_overwritten(tmp_path):
    """Without force an output that exists stays byte for byte, and no temporary is left."""
    path = tmp_path / "out.pt"
    path.write_bytes(b"precious")
    with pytest.raises(OutputExistsError) as caught:
        write_store(path, Stored(state(), "torch"))
    assert caught.value.exit_code == 5
    assert path.read_bytes() == b"precious"
    assert listing(tmp_path) == ["out.pt"]
    write_store(path, Stored(state(), "torch"), force=True)
    assert same(read_store(path).content, state())
    assert listing(tmp_path) == ["out.pt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError(28, "No space")])
def test_failure_while_writing_leaves_the_old_output_and_no_temporary(tmp_path, error):
    """Any exception, KeyboardInterrupt included, leaves the directory as it was."""
    path = tmp_path / "out.pt"
    path.write_bytes(b"precious")
    expected = OutputError if isinstance(error, OSError) else error
    with pytest.raises(expected), committed(path, force=True) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"precious"
    assert listing(tmp_path) == ["out.pt"]


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path):
    """Two writers: without force the second finds the first one's file and leaves it."""
    path = tmp_path / "out.pt"
    with pytest.raises(OutputExistsError), committed(path, force=False) as file:
        file.write(b"ours")
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    assert listing(tmp_path) == ["out.pt"]


@pytest.mark.parametrize("name", ["big.pt", "big.safetensors"])
def test_a_full_disk_is_an_output_error(tmp_path, name):
    """The system's own reason reaches the message, and nothing is left behind."""
    code = (
        "import resource, sys, signal, torch; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from wnsurgery.stores import Stored, write_store; from wnsurgery.errors import OutputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: write_store(sys.argv[1], Stored({'a': torch.zeros(500_000)}, 'torch'))\n"
        "except OutputError as error: print(error); sys.exit(error.exit_code)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 5, ran.stderr
    assert "too large" in ran.stdout
    assert listing(tmp_path) == []


def test_the_last_write_is_whole_or_an_error(tmp_path):
    """Where the system takes only a part of what is written last, nothing appears under the output's name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match="too large"), committed(tmp_path / "out", force=False) as file:
            file.write(bytes(100_001))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_of_the_output_follows_the_umask(tmp_path, umask):
    """An output is as readable as any other new file."""
    old = os.umask(umask)
    try:
        write_store(tmp_path / "m.pt", Stored(state(), "torch"))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "m.pt").stat().st_mode) == 0o666 & ~umask


def test_output_checks(tmp_path):
    """Missing directories, other kinds of files and the input itself are refused before any work."""
    source = tmp_path / "in.pt"
    torch.save(state(), source)
    (tmp_path / "link.pt").symlink_to(source)
    (tmp_path / "hard.pt").hardlink_to(source)
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "nowhere.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    for same_file in (source, tmp_path / "link.pt", tmp_path / "hard.pt", tmp_path / "." / "in.pt"):
        with pytest.raises(OutputExistsError, match="the input"):
            check_output(same_file, source, force=True)
        assert check_output(same_file, source, in_place=True) == same_file
    for bad in (
        tmp_path / "none" / "out.pt",
        tmp_path,
        tmp_path / "pipe.pt",
        tmp_path / "dangling.pt",
        source / "x.pt",
    ):
        with pytest.raises(OutputError):
            check_output(bad, source, force=True, in_place=True)
    assert check_output(tmp_path / "new.pt", source) == tmp_path / "new.pt"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("links", [["/proc/self/fd/{}"], ["inner", "/proc/self/fd/{}"], ["fds/{}"]])
def test_the_links_of_the_system_are_no_outputs(tmp_path, links):
    """A link to an open file by way of /proc, as /dev/stdout is one, is refused and stays, whatever it leads to."""
    (tmp_path / "fds").symlink_to("/proc/self/fd")
    with (tmp_path / "open").open("wb") as file:
        last = tmp_path / links[-1].format(file.fileno())
        (tmp_path / "inner").symlink_to(last)
        output = tmp_path / "stdout"
        output.symlink_to(tmp_path / "inner" if len(links) > 1 else last)
        for path in (output, tmp_path / "fds" / str(file.fileno())):
            with pytest.raises(OutputError, match="belongs to the system"):
                check_output(path, force=True)
            assert path.is_symlink()
    with pytest.raises(OutputError, match="belongs to the system"):
        check_output("/dev/new.pt")
    (tmp_path / "out.pt").symlink_to("open")
    assert check_output(tmp_path / "out.pt", force=True) == tmp_path / "out.pt"


@pytest.mark.parametrize("name", ["\U0001f600" * 61 + ".pt", "é" * 120 + ".pt", "x" * 252 + ".pt", "\U0001f600" * 63])
def test_names_as_long_as_they_may_be(tmp_path, name):
    """What is written on the way has a name that is no longer than the output's own may be."""
    if len(name.encode()) > os.pathconf(tmp_path, "PC_NAME_MAX"):
        pytest.skip("shorter names here")
    with committed(tmp_path / name, force=False) as file:
        file.write(b"x")
    with staged(tmp_path / f"d{name}"[:-1], "work", force=False, resume=False) as staging, staging.file("a") as file:
        file.write(b"x")
    assert (tmp_path / name).read_bytes() == (tmp_path / f"d{name}"[:-1] / "a").read_bytes() == b"x"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path):
    """Checkpoint caches link to shared files: writing in place must not write through the link."""
    target = tmp_path / "blob"
    torch.save(state(), target)
    before = target.read_bytes()
    (tmp_path / "m.pt").symlink_to(target)
    write_store(tmp_path / "m.pt", Stored({"x": torch.ones(1)}, "torch"), force=True)
    assert target.read_bytes() == before
    assert not (tmp_path / "m.pt").is_symlink()


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    """Nested content, sparse or unpicklable things are errors of ours, and no file appears."""
    sparse = torch.eye(2).to_sparse()
    for content in ({"a": {"b": torch.ones(1)}}, {"epoch": 3}, {"s": sparse}, {1: torch.ones(1)}, [torch.ones(1)]):
        with pytest.raises(InputError, match="safetensors"):
            write_store(tmp_path / "x.safetensors", Stored(content, "torch"))
    with pytest.raises(OutputError, match="cannot be saved"):
        write_store(tmp_path / "x.pt", Stored({"f": lambda: 0}, "torch"))
    assert listing(tmp_path) == []


def test_a_sink_ends_without_its_file(tmp_path):
    """Python 3.13 prints what goes wrong when a forgotten sink closes itself, after its file or on a full disk."""
    with (tmp_path / "x").open("wb") as file:
        kept, gone = Sink(file), Sink(file)
        gone.write(b"a")
        gone.close()
        file.write(b"b")
    kept.close()
    assert (kept.closed, gone.closed, (tmp_path / "x").read_bytes()) == (True, True, b"ab")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("way", ["one", "many"])
def test_tensors_that_claim_terabytes_are_refused_before_anyone_computes(tmp_path, old, way):
    """A few bytes stretched by strides, in one tensor or in thousands, are damage; the read costs nothing."""
    if way == "one":
        v = torch.zeros(1, 1).expand(2**18, 2**18)
        content = {"a.weight_g": torch.ones(1, 1).expand(2**18, 1), "a.weight_v": v}
    else:
        flat = torch.zeros(1 << 16)
        content = {f"{i}": flat.as_strided((1 << 12, 1 << 12), (1, 1), i) for i in range(100)}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not old)
    for read in (map_store, read_store):
        with pytest.raises(InputError, match=r"fraction of its data|claim"):
            read(tmp_path / "m.pt")
