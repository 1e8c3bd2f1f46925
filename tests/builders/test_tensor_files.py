"""Safetensors files: read as the library reads them, written so that it can, and refused where they lie."""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelspec.builders import tensor_writer
from modelspec.builders.errors import EnvironmentFailed, Misuse
from modelspec.builders.tensor_files import read_directory, read_files, read_header
from modelspec.builders.tensor_writer import Planned, buffers_of, plan, write_file, write_files


def samples() -> dict[str, Tensor]:
    """Tensors of every kind, odd sizes, random bits."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool)
    found = {str(dtype): torch.randn(3, 5, 7).to(dtype) for dtype in dtypes}
    return found | {"scalar": torch.tensor(1.5), "long": torch.randn(1001), "one": torch.ones(1, dtype=torch.uint8)}


def bits(tensor: Tensor) -> bytes:
    return b"".join(map(bytes, buffers_of(tensor)))


def test_what_the_library_writes_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = samples()
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_header(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = found[name]
        assert bits(stored.read()) == bits(tensor) == b"".join(stored.buffers())
        assert (stored.read().dtype, stored.shape) == (tensor.dtype, tuple(tensor.shape))
        if tensor.dim():
            assert torch.equal(stored.mapped().double(), tensor.double())


def test_the_library_reads_what_is_written_and_the_digest_is_the_files(tmp_path: Path) -> None:
    tensors = samples()
    heard: list[int] = []
    path = tmp_path / "a.safetensors"
    written = write_file(path, [plan(name, tensor) for name, tensor in tensors.items()], heard.append)
    again = load_file(path)
    assert again.keys() == tensors.keys()
    assert all(bits(again[name]) == bits(tensor) for name, tensor in tensors.items())
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert written.bytes == path.stat().st_size
    assert sum(heard) == sum(tensor.nbytes for tensor in tensors.values())
    assert all(stored.begin % stored.item == 0 for stored in read_header(path).values())


def test_a_tensor_larger_than_a_buffer_comes_in_order(tmp_path: Path) -> None:
    tensor = torch.randint(0, 256, (5_000_003, 2), dtype=torch.uint8)
    write_file(tmp_path / "a.safetensors", [plan("x", tensor)])
    stored = read_header(tmp_path / "a.safetensors")["x"]
    assert len(list(stored.buffers())) > 1
    assert torch.equal(stored.read(), tensor)


def test_parts_and_rows_of_a_tensor_are_tensors(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6, 5)
    write_file(tmp_path / "a.safetensors", [plan("x", tensor)])
    stored = read_header(tmp_path / "a.safetensors")["x"]
    assert torch.equal(stored.part(5, (3, 5)).read(), tensor[2, 3:])
    assert torch.equal(stored.part(2, (6, 5)).rows(4, 9).read(), tensor[2, 4:])


def test_many_tensors_are_cut_into_files_and_each_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_writer, "MAX_SHARD_BYTES", 1000)
    tensors = {f"t{i}": torch.randn(n) for i, n in enumerate((100, 100, 100, 400, 50))}
    files = write_files(tmp_path, [plan(name, tensor) for name, tensor in tensors.items()])
    assert [names for _, names in files.values()] == [("t0", "t1"), ("t2",), ("t3",), ("t4",)]
    assert list(files) == [f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    found = read_files(tmp_path / name for name in files)
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in tensors.items())


def test_a_full_disk_is_one_clear_error_and_leaves_no_thread() -> None:
    before = threading.active_count()
    with pytest.raises(EnvironmentFailed, match=r"cannot write /dev/full, 64,000,000 bytes .*No space left"):
        write_file(Path("/dev/full"), [plan("x", torch.zeros(16_000_000))])
    assert threading.active_count() == before


def test_a_source_that_fails_ends_the_writing(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x" * 4
        raise Misuse("the source ends here")

    with pytest.raises(Misuse, match="the source ends here"):
        write_file(tmp_path / "a.safetensors", [Planned("x", "F32", (2,), broken)])


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return path


def entry(begin: int, end: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


LIES: dict[str, tuple[Any, bytes, str]] = {
    "truncated": ({"a": entry(0, 4), "b": entry(4, 8)}, b"x" * 7, "truncated.*b is the last"),
    "overlong": ({"a": entry(0, 4)}, b"x" * 5, r"overlong.*a is the last"),
    "overlapping": ({"a": entry(0, 4), "b": entry(2, 6)}, b"x" * 6, "b overlaps a"),
    "twice the same bytes": ({"a": entry(0, 4), "b": entry(0, 4)}, b"x" * 4, "overlaps"),
    "a gap": ({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12, "b leaves a gap behind a"),
    "a gap at the start": ({"a": entry(4, 8)}, b"x" * 8, "a leaves a gap behind the header"),
    "out of range": ({"a": entry(0, 4), "b": entry(2**50, 2**50 + 4)}, b"x" * 4, "b leaves a gap"),
    "backwards": ({"a": entry(4, 0)}, b"x" * 4, "a: its offsets span -4 bytes"),
    "too few bytes for the shape": (
        {"a": entry(0, 4, (2,))},
        b"x" * 4,
        r"a: its offsets span 4 bytes, .* takes 8",
    ),
    "negative shape": ({"a": entry(0, 4, (-1,))}, b"x" * 4, "a: shape and data_offsets must be"),
    "true as a size": ({"a": entry(0, 4, (True,))}, b"x" * 4, "a: shape and data_offsets must be"),
    "half sizes": ({"a": entry(0, 4, (0.5,))}, b"x" * 4, "a: shape and data_offsets must be"),
    "huge shape": ({"a": entry(0, 4, (2**70,))}, b"x" * 4, "a: shape and data_offsets must be"),
    "unknown dtype": ({"a": entry(0, 4, (1,), "F31")}, b"x" * 4, "a: dtype 'F31' is not known"),
    "dtype no text": ({"a": entry(0, 4, (1,), [])}, b"x" * 4, "a: dtype"),
    "another key": ({"a": entry(0, 4) | {"more": 1}}, b"x" * 4, "a: dtype, shape and data_offsets"),
    "a missing key": ({"a": {"dtype": "F32"}}, b"x" * 4, "a: dtype, shape and data_offsets"),
    "a list": ([], b"", "not a JSON object"),
    "a key twice": (b'{"a": 1, "a": 2}', b"", "the key 'a' stands twice"),
    "not JSON": (b"{", b"", "not a readable safetensors file"),
    "deep": (b"[" * 100_000, b"", "not a readable safetensors file"),
    "NaN": (b'{"a": NaN}', b"", "NaN is not a number"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not a readable safetensors file"),
}


@pytest.mark.parametrize(("header", "data", "message"), LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_one_error_naming_the_file(
    header: Any, data: bytes, message: str, tmp_path: Path
) -> None:
    path = raw(tmp_path / "a.safetensors", header, data)
    with pytest.raises(Misuse, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0", b"x" * 999, (2**40).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file_is_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(Misuse, match="not a readable safetensors file"):
        read_header(tmp_path / "a.safetensors")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_an_error_or_leaves_every_byte_accounted_for(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_file(path, [plan("a", torch.zeros(3)), plan("b", torch.zeros(2, 2))])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        found = read_header(path)
    except Misuse as error:
        assert str(path) in str(error)
    else:
        assert sum(stored.bytes for stored in found.values()) == 28


def test_a_file_cut_after_its_header_was_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_file(path, [plan("a", torch.zeros(30))])
    stored = read_header(path)["a"]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(Misuse, match="ends inside a"):
        stored.read()
    path.unlink()
    with pytest.raises(Misuse, match=os.strerror(errno.ENOENT)):
        stored.read()


INDICES: dict[str, tuple[Any, str]] = {
    "outside": ({"a": "../b.safetensors"}, "not the name of a safetensors file"),
    "absolute": ({"a": "/etc/passwd"}, "not the name of a safetensors file"),
    "a pickle": ({"a": "model.bin"}, "not the name of a safetensors file"),
    "no map": (None, "weight_map must map"),
    "numbers": ({"a": 3}, "weight_map must map"),
    "a missing file": ({"a": "a.safetensors", "b": "absent.safetensors"}, r"absent\.safetensors: missing.* places b"),
    "a missing tensor": ({"a": "a.safetensors", "z": "a.safetensors"}, r"a\.safetensors: z is missing"),
    "a tensor elsewhere": ({"a": "b.safetensors", "b": "a.safetensors"}, "is missing, which"),
    "a tensor left out": ({"a": "a.safetensors", "b": "b.safetensors"}, "c is not in model.safetensors.index.json"),
}


@pytest.mark.parametrize(("where", "message"), INDICES.values(), ids=INDICES.keys())
def test_an_index_that_lies_is_one_error(where: Any, message: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({"b": torch.zeros(1), "c": torch.zeros(1)}, tmp_path / "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(Misuse, match=message):
        read_directory(tmp_path)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda folder: None, "neither model.safetensors nor"),
    "a pickle alone": (lambda folder: (folder / "pytorch_model.bin").touch(), "a pickle, which may run code"),
    "index no JSON": (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
    "index key twice": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"a": 1, "a": 1}'),
        "the key 'a' stands twice",
    ),
}


@pytest.mark.parametrize(("make", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_directory_without_readable_weights_is_one_error(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(Misuse, match=message):
        read_directory(tmp_path)


def test_a_tensor_in_two_files_is_one_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(Misuse, match=r"b\.safetensors: x stands in a\.safetensors too"):
        read_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
