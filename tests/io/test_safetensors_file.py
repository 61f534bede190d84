from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from retex_cli.errors import RetexError
from retex_cli.io.dtypes import DTYPES
from retex_cli.io.safetensors_file import SafetensorsFile
from retex_cli.io.tensors import SCRATCH_BYTES

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWO = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def filled(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()).reshape(shape) % 3).to(dtype)


def test_every_element_type_reads_as_the_library_wrote_it(tmp_path: Path) -> None:
    tensors = {code: filled(dtype, (3, 4)) for code, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / "all.safetensors")
    file = SafetensorsFile(tmp_path / "all.safetensors")
    assert set(file.tensors) == set(DTYPES)
    for code, expected in tensors.items():
        found = file.read(code)
        assert found.dtype == expected.dtype
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_scalars_and_empty_tensors_keep_their_shape(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 7), "näme": torch.ones(1, 1)}
    save_file(tensors, tmp_path / "odd.safetensors")
    file = SafetensorsFile(tmp_path / "odd.safetensors")
    assert {name: info.shape for name, info in file.tensors.items()} == {"scalar": (), "empty": (0, 7), "näme": (1, 1)}
    assert file.tensors["scalar"].numel == 1
    assert file.tensors["empty"].nbytes == 0
    for name, expected in tensors.items():
        assert torch.equal(file.read(name), expected)
    file.read_into("empty", 0, torch.empty(0))
    out = torch.zeros(1)
    file.read_into("scalar", 0, out)
    assert out.item() == 2.5


def test_tensors_come_in_the_order_of_their_data(tmp_path: Path) -> None:
    path = tmp_path / "order.safetensors"
    path.write_bytes(packed({"late": TWO, "early": ONE}, bytes(16)))
    assert list(SafetensorsFile(path).tensors) == ["early", "late"]


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("wanted", [*FLOATS, torch.float64])
def test_ranges_are_converted_as_torch_converts(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    tensor = torch.randn(700, 11, generator=torch.Generator().manual_seed(0)).to(stored)
    save_file({"w": tensor}, tmp_path / "w.safetensors")
    file = SafetensorsFile(tmp_path / "w.safetensors")
    for start, count in ((0, 7700), (1, 7698), (7699, 1), (13, 0)):
        out = torch.full((count,), 9.0, dtype=wanted)
        file.read_into("w", start, out)
        assert torch.equal(out, tensor.flatten()[start : start + count].to(wanted))


def test_a_conversion_larger_than_the_scratch_memory_is_complete(tmp_path: Path) -> None:
    count = SCRATCH_BYTES + 17  # bfloat16: more than two rounds through the scratch memory
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"w": tensor}, tmp_path / "w.safetensors")
    out = torch.empty(count)
    SafetensorsFile(tmp_path / "w.safetensors").read_into("w", 0, out)
    assert torch.equal(out, tensor.float())


def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    tensors = {str(k): torch.full((50_000,), float(k)).bfloat16() for k in range(8)}
    save_file(tensors, tmp_path / "w.safetensors")
    file = SafetensorsFile(tmp_path / "w.safetensors")
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(20):
            out = torch.empty(50_000)
            file.read_into(name, 0, out)
            if not torch.equal(out, tensors[name].float()):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_reads_go_to_own_memory_and_nothing_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    file = SafetensorsFile(path)
    tensor = file.read("w")
    tensor.zero_()
    assert torch.equal(file.read("w"), torch.ones(1000))
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) not in maps.read_text()


@pytest.mark.parametrize(
    ("start", "out"),
    [
        (-1, torch.empty(2)),
        (9, torch.empty(2)),
        (0, torch.empty(2, 2)),
        (0, torch.empty(4)[::2]),
        (0, torch.empty(2, device="meta")),
    ],
)
def test_a_request_that_does_not_fit_is_a_bug_of_the_caller(tmp_path: Path, start: int, out: torch.Tensor) -> None:
    save_file({"w": torch.ones(10)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="w: "):
        SafetensorsFile(tmp_path / "w.safetensors").read_into("w", start, out)


DAMAGE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "truncated safetensors file: 0 bytes, the header alone needs 8"),
    "no header": (struct.pack("<Q", 50), "truncated safetensors file: the header claims 50 bytes, the file has 8"),
    "oversized": (
        struct.pack("<Q", 2**40) + b"{}",
        "oversized safetensors header: it claims 1,099,511,627,776 bytes, the format allows 100,000,000",
    ),
    "no json": (packed(b"{{{{"), "damaged safetensors header: "),
    "no text": (packed(b"\xff\xfe{}"), "damaged safetensors header: "),
    "nested": (packed(b"[" * 200_000), "damaged safetensors header: "),
    "a list": (packed([]), "damaged safetensors header: it is not a JSON object"),
    "twice": (packed(b'{"a":1,"a":1}'), "damaged safetensors header: 'a' is there twice"),
    "metadata": (packed({"__metadata__": {"a": 1}}), "damaged safetensors header: __metadata__ may hold text only"),
    "entry": (packed({"a": 3}), "damaged header: the entry of tensor 'a' is not an object"),
    "dtype": (packed({"a": {**ONE, "dtype": "F7"}}, bytes(8)), "tensor 'a' has the unknown dtype 'F7'"),
    "shape": (packed({"a": {**ONE, "shape": [-2]}}, bytes(8)), "damaged header: tensor 'a' has the shape [-2]"),
    "shape type": (
        packed({"a": {**ONE, "shape": [True]}}, bytes(8)),
        "damaged header: tensor 'a' has the shape [True]",
    ),
    "offsets": (
        packed({"a": {**ONE, "data_offsets": [8, 0]}}, bytes(8)),
        "damaged header: tensor 'a' has the data_offsets [8, 0]",
    ),
    "byte count": (
        packed({"a": {**ONE, "shape": [3]}}, bytes(8)),
        "tensor 'a' has 8 bytes, its shape [3] in F32 needs 12",
    ),
    "overlap": (
        packed({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12)),
        "overlapping tensors: 'b' starts at byte 4, 'a' ends at 8",
    ),
    "same place": (packed({"a": ONE, "b": ONE}, bytes(8)), "overlapping tensors: 'b' starts at byte 0, 'a' ends at 8"),
    "gap": (
        packed({"a": ONE, "b": {**ONE, "data_offsets": [12, 20]}}, bytes(20)),
        "damaged header: 4 bytes between 'a' and 'b' belong to no tensor",
    ),
    "cut off": (
        packed({"a": ONE, "b": TWO}, bytes(15)),
        "truncated safetensors file: tensor 'b' is cut off, the data should have 16 bytes and has 15",
    ),
    "tail": (packed({"a": ONE}, bytes(9)), "1 bytes after the last tensor belong to no tensor"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_file_and_tensor(tmp_path: Path, kind: str) -> None:
    content, message = DAMAGE[kind]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(RetexError) as caught:
        SafetensorsFile(path)
    assert caught.value.message.startswith(f"{path}: {message}")
    assert "\n" not in caught.value.message


def test_the_undamaged_neighbour_of_all_those_files_opens(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(packed({"a": ONE, "b": TWO}, bytes(16)))
    assert list(SafetensorsFile(path).tensors) == ["a", "b"]


def test_a_failed_open_gives_its_descriptor_back(tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(packed({"a": ONE}, bytes(9)))
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    for _ in range(5):
        with pytest.raises(RetexError):
            SafetensorsFile(path)
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 40))
def test_no_damaged_byte_is_more_than_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int, cut: int
) -> None:
    content = bytearray(packed({"__metadata__": {"k": "v"}, "a": ONE, "b": TWO}, bytes(16)))
    content[at % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content[: len(content) - cut])
    with contextlib.suppress(RetexError):
        file = SafetensorsFile(path)
        for name, info in file.tensors.items():
            assert file.read(name).shape == info.shape
        file.close()


def test_a_file_cut_while_it_is_read_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(RetexError, match="was cut short while tensor 'w' was read"):
        file.read("w")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RetexError, match=r"nowhere\.safetensors: cannot be read: No such file"):
        SafetensorsFile(tmp_path / "nowhere.safetensors")


def test_the_library_s_note_of_tied_weights_is_understood(tmp_path: Path) -> None:
    save_file({"emb": torch.ones(2)}, tmp_path / "w.safetensors", metadata={"head": "emb", "format": "pt"})
    assert SafetensorsFile(tmp_path / "w.safetensors").aliases == {"head": "emb"}
