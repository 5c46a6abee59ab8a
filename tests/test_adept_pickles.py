"""Adept's model files are pickles: whatever they ask for, nothing is executed or imported, and a file that lies about
its tensors is refused."""

from __future__ import annotations

import contextlib
import io
import os
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adept_helpers
import pytest
import torch
from adept_helpers import SMALL, contents, write_ranks
from checkpoint_helpers import random_tensors

from persimmon_fast import adept
from persimmon_fast.adept.pickles import RankFile, StandIn, read_rank
from persimmon_fast.adept.source import Member
from persimmon_fast.checkpoint import CheckpointFileError

PLACE = "here-comes-something"
WEIGHT = torch.arange(12, dtype=torch.float32).reshape(3, 4)
# (module, name) of callables that run code, read or write files, or load more pickles. None is ever called here.
_PYTHON = """
    os system|posix system|nt system|os popen|os execv|os remove|os fork|os putenv|posix unlink|commands getoutput
    subprocess Popen|subprocess run|subprocess call|subprocess check_output|subprocess getoutput
    __builtin__ eval|__builtin__ exec|__builtin__ execfile|__builtin__ compile|__builtin__ open|__builtin__ __import__
    __builtin__ getattr|__builtin__ setattr|__builtin__ globals|__builtin__ apply|__builtin__ map|__builtin__ bytearray
    builtins eval|builtins exec|builtins open|builtins breakpoint|builtins __import__|builtins getattr
    io open|io FileIO|_io open|codecs open|importlib import_module|runpy run_path|runpy _run_code
    code interact|pty spawn|pdb run|timeit timeit|cProfile run|profile run|trace Trace|bdb Bdb
    shutil rmtree|shutil move|pathlib Path.touch|pathlib Path.unlink|tempfile mkstemp|fileinput input|linecache getlines
    pickle loads|pickle load|_pickle loads|cPickle loads|marshal loads|copyreg _reconstructor|copy_reg _reconstructor
    types FunctionType|types CodeType|operator attrgetter|operator methodcaller|functools partial|functools reduce
    asyncio create_subprocess_shell|asyncio.subprocess create_subprocess_exec|multiprocessing Process|threading Thread
    socket socket|socket create_connection|urllib.request urlopen|urllib urlopen|webbrowser open
    http.client HTTPConnection|ftplib FTP|smtplib SMTP|ctypes CDLL|ctypes.util find_library|signal signal|sys exit
    sys setrecursionlimit|sys settrace|logging.config dictConfig|zipimport zipimporter|sqlite3 connect|venv create
    ensurepip bootstrap|site addsitedir|xml.sax parse|doctest testfile|unittest main|atexit register
    gc get_objects|inspect getsource|ast literal_eval
"""
_TORCH_AND_NUMPY = """
    torch load|torch.hub load|torch.jit load|torch.package PackageImporter|torch.serialization load
    torch.storage _load_from_bytes|torch.storage UntypedStorage|torch._utils _rebuild_meta_tensor_no_storage
    torch.utils.cpp_extension load_inline|torch.ops load_library|torch._tensor _rebuild_from_type_v2|torch save
    torch.distributed.run main|torch.utils.collect_env run|torch._C _jit_script_compile|torch.nn Linear
    numpy load|numpy fromfile|numpy memmap|numpy.testing._private.utils runstring|numpy.core.records fromfile
"""
_OTHER_PACKAGES = """
    pip._internal main|setuptools.command.easy_install main|pandas read_pickle|joblib load|dill loads|cloudpickle loads
    sympy sympify|yaml unsafe_load|tensorflow.keras.models load_model|transformers pipeline
    sklearn.externals.joblib load|megatron.initialize initialize_megatron|persimmon_fast.cli run
    adept_helpers write_adept|nowhere.at.all go
"""


def pairs(text: str) -> list[tuple[str, str]]:
    items = [item.strip() for line in text.strip().splitlines() for item in line.split("|")]
    return [(module, name) for module, name in (item.split(" ") for item in items)]


def test_there_are_enough_kinds_of_gadgets() -> None:
    assert len(set(pairs(_PYTHON) + pairs(_TORCH_AND_NUMPY))) > 100
    assert len(set(pairs(_OTHER_PACKAGES))) >= 15


def base(form: str, **more: Any) -> bytes:
    """A small model file."""
    content = {"args": adept_helpers.arguments(SMALL), "iteration": 1, "model": {"a": {"weight": WEIGHT}}, **more}
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=form == "zip")
    return out.getvalue()


def changed(data: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """A zip with other records."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return out.getvalue()


def with_code(form: str, code: bytes, place: str = "rng_state") -> bytes:
    """A model file whose pickle has these opcodes where a string was."""
    more: dict[str, Any] = {place: PLACE} if place == "rng_state" else {}
    if place == "args":
        more = {"args": adept_helpers.arguments(SMALL, tokenizer_type=PLACE)}
    if place == "model":
        more = {"model": {"a": {"weight": WEIGHT}, "b": PLACE}}
    placeholder = b"X" + struct.pack("<I", len(PLACE)) + PLACE.encode()
    data = base(form, **more)
    if form == "legacy":
        assert data.count(placeholder) == 1
        return data.replace(placeholder, code)

    def change(name: str, record: bytes) -> bytes:
        assert not name.endswith(".pkl") or record.count(placeholder) == 1
        return record.replace(placeholder, code)

    return changed(data, change)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(module: str, name: str, *arguments: str) -> bytes:
    """Opcodes: a global, a tuple of strings, a call."""
    return f"c{module}\n{name}\n(".encode() + b"".join(text(argument) for argument in arguments) + b"tR"


_events: list[str] | None = None
_WATCHED = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "exec",
    "compile",
    "ctypes.",
    "import",
    "tempfile.",
    "pty.",
    "urllib.",
)


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is not None and event.startswith(_WATCHED):
        _events.append(f"{event} {arguments[:1]}")


sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What Python reports of running, importing and starting things inside the block."""
    global _events
    _events = events = []
    try:
        yield events
    finally:
        _events = None


def read(data: bytes, folder: Path) -> RankFile:
    """read_rank of these bytes; nothing may run."""
    path = folder / "model_optim_rng.pt"
    path.write_bytes(data)
    member = Member(str(path), str(path), 0, len(data))
    with watched() as events:
        try:
            return read_rank(member)
        finally:
            assert events == []


@pytest.fixture(autouse=True, scope="module")
def _imported_lazily() -> None:
    """What the first reading imports is imported before it is watched."""
    for data in (base("legacy"), base("zip"), changed(base("zip"), lambda _, record: record)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Member, "open", lambda member, data=data: io.BufferedReader(io.BytesIO(data)))
            read_rank(Member("", "", 0, len(data)))


@pytest.fixture
def nothing_runs(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing but the file that is read may appear."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    yield tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_optim_rng.pt"]
    assert environment.items() <= os.environ.items()


def test_the_watch_sees_what_runs(tmp_path: Path) -> None:
    """torch's own loading, told to trust the file, shows what the others must not."""
    for module, name, argument, event in [
        ("posix", "system", f"touch {tmp_path}/ran", "os.system"),
        ("builtins", "exec", "1", "exec"),
        ("this_is_not_there", "x", "", "import"),
    ]:
        data = with_code("zip", call(module, name, argument))
        with watched() as events, contextlib.suppress(ImportError):
            torch.load(io.BytesIO(data), weights_only=False)
        assert event in {seen.split()[0] for seen in events}
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize(("module", "name"), [*pairs(_PYTHON), *pairs(_TORCH_AND_NUMPY)])
def test_a_pickle_that_asks_for_python_torch_or_numpy_is_refused(
    module: str, name: str, form: str, nothing_runs: Path
) -> None:
    code = call(module, name, f"touch {nothing_runs}/ran", "w")
    with pytest.raises(CheckpointFileError, match=rf"found one that asks for {module}\.{name}\. Nothing was executed"):
        read(with_code(form, code), nothing_runs)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize(("module", "name"), pairs(_OTHER_PACKAGES))
def test_a_pickle_that_asks_for_another_package_gets_a_stand_in(
    module: str, name: str, form: str, nothing_runs: Path
) -> None:
    """Also where that package is here and could be imported."""
    rank = read(with_code(form, call(module, name, f"{nothing_runs}/ran"), "args"), nothing_runs)
    assert rank.foreign == (f"{module}.{name}",)
    value = rank.arguments["tokenizer_type"]
    assert isinstance(value, StandIn)
    assert (type(value).__name__, value.arguments) == (name, (f"{nothing_runs}/ran",))
    with pytest.raises(CheckpointFileError, match=r"model\.b: expected a tensor, or a dict of names to such, found"):
        read(with_code(form, call(module, name), "model"), nothing_runs)


_ENUM = "cmegatron.model.enums\nModelType\n"
_ODD_OPCODES: dict[str, bytes] = {
    "inst": b"(" + text("true") + b"ios\nsystem\n",
    "obj": b"(cos\nsystem\n" + text("true") + b"o",
    "stack_global": text("os") + text("system") + b"\x93" + text("true") + b"\x85R",
    "stack_global_of_another_package": text("a.b") + text("C") + b"\x93)R",
    "extension_registry": b"\x82\x01",
    "newobj_ex": f"{_ENUM})}}\x92".encode("latin-1"),
    "persistent_id_as_text": b"Psystem\n",
    "persistent_id_of_a_module": b"(" + text("module") + text("os") + b"tQ",
    "storage_of_a_stand_in": b"(" + text("storage") + _ENUM.encode() + text("0") + text("cpu") + b"K\x04tQ",
    "storage_of_a_negative_size": b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("9")
    + text("cpu")
    + b"J\xff\xff\xff\xfftQ",
    "storage_of_2**62": b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("9")
    + text("cpu")
    + b"\x8a\x08\0\0\0\0\0\0\0\x40tQ",
    "call_of_a_string": text("os") + b")R",
    "build_of_a_list": b"]}" + text("__class__") + text("x") + b"sb",
    "items_of_a_stand_in": _ENUM.encode() + b")R" + text("a") + text("b") + b"s",
    "attribute_of_a_stand_in": b"cmegatron.model.enums\nModelType.__init__.__globals__\n"
    + b"}"
    + text("a")
    + text("b")
    + b"sb",
    "memo_that_was_not_put": b"h\xfe",
    "no_mark": b"t",
    "bytes_that_end": b"X\xff\xff\xff\x7f",
    "unknown_opcode": b"\xff",
    "a_module_with_a_space": b"cmegatron os\nsystem\n)R",
    "an_empty_module": b"c\n\n)R",
}


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("code", _ODD_OPCODES.values(), ids=_ODD_OPCODES)
def test_odd_opcodes_are_refused(code: bytes, form: str, nothing_runs: Path) -> None:
    with pytest.raises(CheckpointFileError):
        read(with_code(form, code, "args"), nothing_runs)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_state_given_to_a_stand_in_changes_nothing_of_it(form: str, nothing_runs: Path) -> None:
    """BUILD would call __setstate__ or set attributes of the class it names."""
    state = b"}(" + text("__class__") + text("x") + text("__setstate__") + text("y") + text("state") + b"N" + b"u"
    code = _ENUM.encode() + b")\x81" + state + b"b"
    value = read(with_code(form, code, "args"), nothing_runs).arguments["tokenizer_type"]
    assert isinstance(value, StandIn)
    assert value.state == {"__class__": "x", "__setstate__": "y", "state": None}
    assert value.__dict__.keys() == {"arguments", "state"}


# ---- what honest files hold ----


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_classes_of_modules_that_nobody_has_do_not_stand_in_the_way(form: str, tmp_path: Path) -> None:
    """args holds an enum and an object of Adept's code, which is not there when the file is read."""
    module = adept_helpers.absent_module()
    try:
        files = contents(SMALL, random_tensors(SMALL), model_type=module.ModelType(1), options=module.Options())
        write_ranks(tmp_path / "a", files, form)
    finally:
        adept_helpers.forget()
    with pytest.warns(UserWarning, match="no sentencepiece model"):
        done = adept.to_hugging_face(tmp_path / "a", tmp_path / "b")
    assert done.foreign == ("megatron.model.enums.ModelType", "megatron.model.enums.Options")
    assert "megatron" not in sys.modules


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_values_of_arguments_and_states_of_generators(form: str, tmp_path: Path) -> None:
    """numpy arrays, sets, dtypes, devices, paths, huge integers; rng_state and optimizer are passed over."""
    values = {"a": {1, 2}, "b": torch.device("cuda:3"), "c": Path("/data"), "d": 2**70, "e": (1, None), "f": b"bytes"}
    more = {"args": adept_helpers.arguments(SMALL, **values), "rng_state": adept_helpers.random_states()}
    rank = read(base(form, **more, optimizer={"exp_avg": torch.zeros(7, dtype=torch.float64)}), tmp_path)
    assert rank.arguments["params_dtype"] == torch.bfloat16
    assert {key: rank.arguments[key] for key in "abdef"} == {key: values[key] for key in "abdef"}
    assert rank.foreign == ()
    assert list(rank.tensors) == ["a.weight"]
    assert rank.iteration == 1


def test_a_file_saved_from_a_gpu_is_read_without_one(tmp_path: Path) -> None:
    data = base("zip", model={"a": {"weight": WEIGHT}})
    on_gpu = changed(data, lambda name, record: record.replace(text("cpu"), text("cuda:7")))
    assert on_gpu != data
    assert torch.equal(tensor_of(read(on_gpu, tmp_path)), WEIGHT)


def tensor_of(rank: RankFile, name: str = "a.weight") -> torch.Tensor:
    found = rank.tensors[name]
    data = Path(found.path).read_bytes()[found.offset :][: 4 * torch.Size(found.shape).numel()]
    return torch.frombuffer(bytearray(data), dtype=found.dtype).reshape(found.shape)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_parameters_views_and_shared_storages(form: str, tmp_path: Path) -> None:
    flat = torch.arange(40, dtype=torch.float32)
    model = {"p": torch.nn.Parameter(WEIGHT), "v": flat[4:16].view(3, 4), "w": flat[20:], "empty": torch.zeros(0, 3)}
    rank = read(base(form, model=model), tmp_path)
    assert torch.equal(tensor_of(rank, "p"), WEIGHT)
    assert torch.equal(tensor_of(rank, "v"), flat[4:16].view(3, 4))
    assert torch.equal(tensor_of(rank, "w"), flat[20:])
    assert rank.tensors["empty"].shape == (0, 3)


# ---- files that lie, or are damaged ----


def refused(data: bytes, match: str, folder: Path) -> None:
    with pytest.raises(CheckpointFileError, match=match):
        read(data, folder)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize(
    ("model", "match"),
    [
        ([], "pickle.*|model.: expected a tensor, or a dict"),
        ({"a": {3: WEIGHT}}, r"model\.a: expected a tensor, or a dict of names to such, found dict"),
        ({"a": 1.0}, r"model\.a: expected a tensor, .* found float"),
        ({"a": WEIGHT.double()}, "a: expected float32, float16 or bfloat16, found float64"),
        ({"a": WEIGHT.T}, r"a: expected a dense, contiguous tensor with data, found strides \(1, 4\)"),
        ({"a": WEIGHT.to_sparse()}, "asks for torch._utils._rebuild_sparse_tensor"),
        ({"a": torch._neg_view(WEIGHT)}, "a: expected a dense"),
    ],
)
def test_what_is_no_model(model: Any, match: str, form: str, tmp_path: Path) -> None:
    refused(base(form, model=model), match, tmp_path)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_dicts_inside_themselves_end(form: str, tmp_path: Path) -> None:
    """A dict in itself, and 2^60 paths through 60 dicts."""
    loop: dict[str, Any] = {}
    loop["a"] = loop
    refused(base(form, model=loop), "expected a tensor, .* found dicts nested too deep", tmp_path)
    many: dict[str, Any] = {"a": {}}
    for _ in range(8):
        many = dict.fromkeys("abcdefgh", many)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("persimmon_fast.adept.pickles._MAX_TENSORS", 1000)
        refused(base(form, model=many), "model: expected at most 1,000 tensors, found more", tmp_path)


def test_virtual_pipeline_stages_are_named(tmp_path: Path) -> None:
    out = io.BytesIO()
    torch.save({"args": None, "model0": {}, "model1": {}}, out)
    refused(out.getvalue(), 'a dict with "model", found the keys args, model0, model1. Virtual pipeline', tmp_path)


def replace_in_pickle(data: bytes, old: bytes, new: bytes) -> bytes:
    def change(name: str, record: bytes) -> bytes:
        if not name.endswith(".pkl"):
            return record
        assert record.count(old) == 1
        return record.replace(old, new)

    return changed(data, change)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    """torch grows a meta storage to what a tensor claims, so it has to be seen here."""
    shape = b"K\x03K\x04\x86"
    refused(
        replace_in_pickle(base("zip"), shape, b"K\x05K\x04\x86"),
        r"a.weight: expected a tensor inside storage 0, found bytes 0 to 80 of 48",
        tmp_path,
    )


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("claimed", [11, 13, 200])
def test_a_storage_of_another_size_than_its_bytes_is_refused(claimed: int, form: str, tmp_path: Path) -> None:
    data = base(form)
    positions = [
        position
        for (op, argument, position), (after, _, _) in zip(
            list(pickletools.genops(pickle_of(data, form))),
            list(pickletools.genops(pickle_of(data, form)))[1:],
            strict=False,
        )
        if (op.name, argument, after.name) in (("BININT1", 12, "TUPLE"), ("BININT1", 12, "NONE"))
    ]
    assert len(positions) == 1
    pickled = bytearray(pickle_of(data, form))
    pickled[positions[0] + 1] = claimed  # type: ignore[operator]
    damaged = (
        data.replace(pickle_of(data, form), bytes(pickled))
        if form == "legacy"
        else changed(data, lambda name, record: bytes(pickled) if name.endswith(".pkl") else record)
    )
    refused(damaged, rf"storage 0|storage \d+: expected {claimed} elements, found 12", tmp_path)


def pickle_of(data: bytes, form: str) -> bytes:
    """The pickle of the content."""
    if form == "zip":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.read(next(name for name in archive.namelist() if name.endswith(".pkl")))
    stream = io.BytesIO(data)
    for _ in range(3):
        list(pickletools.genops(stream))
    start = stream.tell()
    list(pickletools.genops(stream))
    return data[start : stream.tell()]


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_every_truncation_is_refused(form: str, tmp_path: Path) -> None:
    data = base(form)
    for length in [*range(4, len(data), 37), len(data) - 1]:
        refused(data[:length], "model_optim_rng.pt: ", tmp_path)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_flipped_bytes_are_refused_or_read_inside_the_file(form: str, nothing_runs: Path) -> None:
    data = base(form)
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 0x15
        try:
            rank = read(bytes(damaged), nothing_runs)
        except CheckpointFileError:
            continue
        for tensor in rank.tensors.values():
            assert tensor.offset >= 0
            assert tensor.offset + torch.Size(tensor.shape).numel() * tensor.dtype.itemsize <= len(data)


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    big = changed(base("zip"), lambda name, record: b"big" if name.endswith("byteorder") else record)
    refused(big, "byteorder: expected little, found b'big'", tmp_path)
    little = b"X\x0d\x00\x00\x00little_endianq\x02\x88"
    assert little in base("legacy")
    refused(base("legacy").replace(little, little[:-1] + b"\x89"), "byte order: expected little-endian", tmp_path)


def test_a_compressed_zip_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(base("zip"))) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(out.getvalue(), "expected an uncompressed zip record", tmp_path)
