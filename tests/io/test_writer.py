from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from retex_cli.errors import RetexError, UsageError
from retex_cli.io import writer as writer_module
from retex_cli.io.checkpoint import open_checkpoint
from retex_cli.io.writer import Output, TensorSpec, Writer, open_output

TENSORS = {
    "w": torch.arange(12.0).view(3, 4),
    "empty": torch.empty(0, 5),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.0),
    "ids": torch.arange(2),
}


def specs(tensors: Mapping[str, torch.Tensor] = TENSORS) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(
    target: Path,
    tensors: Mapping[str, torch.Tensor] = TENSORS,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    limit: int = 10**9,
    files: Mapping[str, bytes | Path] | None = None,
    meanwhile: Callable[[Writer], None] = lambda writer: None,
) -> None:
    with open_output(
        Output.parse(target),
        specs(tensors),
        metadata=metadata or {},
        overwrite=overwrite,
        max_shard_size=limit,
        side_files=files or {},
    ) as writer:
        for tensor in tensors.values():
            writer.write(tensor)
        meanwhile(writer)
        assert writer.bytes_written == writer.total_bytes == sum(spec.nbytes for spec in specs(tensors))


def read_all(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor] = TENSORS) -> bool:
    return set(found) == set(expected) and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_file_reads_back_with_the_library(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    write(path, metadata={"recipe": "mean"})
    assert same(load_file(path))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "recipe": "mean"}
    assert leftovers(tmp_path) == []


def test_a_folder_has_its_side_files_and_one_weight_file(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    files: dict[str, bytes | Path] = {
        "config.json": b"{}",
        "1_Pooling/config.json": b"[]",
        "vocab.txt": tmp_path / "vocab.txt",
    }
    write(tmp_path / "out", files=files, meanwhile=lambda writer: writer.side_file("README.md", b"# card"))
    found = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert found == ["1_Pooling/config.json", "README.md", "config.json", "model.safetensors", "vocab.txt"]
    assert (tmp_path / "out/vocab.txt").read_text() == "a\nb\n"
    assert same(read_all(tmp_path / "out"))
    assert leftovers(tmp_path) == []


def test_shards_have_an_index_and_read_back(tmp_path: Path) -> None:
    write(tmp_path / "out", limit=24, metadata={"by": "test"})
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert same(read_all(tmp_path / "out"))
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "by": "test"}


def test_chunks_may_end_anywhere(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(7.0), "none": torch.empty(0), "b": torch.arange(5.0)}
    flat = torch.cat(list(tensors.values()))
    with open_output(Output.parse(tmp_path / "m"), specs(tensors), metadata={}, max_shard_size=28) as writer:
        for start in range(0, 12, 3):
            writer.write(flat[start : start + 3])
    assert same(read_all(tmp_path / "m"), tensors)


def test_claimed_places_are_filled_in_any_order(tmp_path: Path) -> None:
    with open_output(Output.parse(tmp_path / "m"), specs(), metadata={}, max_shard_size=40) as writer:
        claims = [(writer.claim(t.numel(), t.dtype), t.reshape(-1)) for t in TENSORS.values()]
        for claim, data in reversed(claims):
            writer.fill(claim, data)
        with pytest.raises(ValueError, match="not what the place was claimed for"):
            writer.fill(claims[0][0], torch.zeros(3))
    with open_checkpoint(tmp_path / "m") as found:
        assert len(found.files) > 1
        assert all(torch.equal(found.read(name), value) for name, value in TENSORS.items())


def test_odd_sizes_are_laid_out_so_that_torch_can_view_them(tmp_path: Path) -> None:
    tensors = {"mask": torch.ones(3, dtype=torch.bool), "w": torch.arange(2.0), "ids": torch.arange(2)}
    write(tmp_path / "out.safetensors", tensors)
    assert same(load_file(tmp_path / "out.safetensors"), tensors)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        secret = tmp_path / "private.json"
        secret.write_text("{}")
        secret.chmod(0o600)
        write(tmp_path / "one.safetensors")
        write(tmp_path / "m", limit=24, files={"config.json": b"{}", "tokenizer.json": secret, "sub/x.json": b""})
    finally:
        os.umask(before)
    assert (tmp_path / "one.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
    for path in (tmp_path / "m").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_overwriting_leaves_no_stale_shard_and_no_stale_side_file(tmp_path: Path) -> None:
    write(tmp_path / "m", limit=8, files={"config.json": b"{}", "vocab.txt": b"old"})
    assert len(list((tmp_path / "m").glob("model-*"))) > 1
    write(tmp_path / "m", {"new": torch.ones(1)}, overwrite=True)
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["model.safetensors"]
    write(tmp_path / "m", limit=8, overwrite=True)
    assert not (tmp_path / "m" / "model.safetensors").exists()
    assert same(read_all(tmp_path / "m"))
    assert leftovers(tmp_path) == []


def test_without_overwrite_nothing_is_touched(tmp_path: Path) -> None:
    for name in ("m", "m.safetensors"):
        write(tmp_path / name)
        with pytest.raises(RetexError, match="already exists"):
            write(tmp_path / name, {"new": torch.ones(1)})
        assert same(read_all(tmp_path / name))


@pytest.mark.parametrize("name", ["m", "m.safetensors"])
@pytest.mark.parametrize("failure", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_the_old_output(tmp_path: Path, name: str, failure: BaseException) -> None:
    write(tmp_path / name)

    def fail(writer: Writer) -> None:
        raise failure

    with pytest.raises(type(failure)):
        write(tmp_path / name, {"new": torch.ones(1)}, overwrite=True, meanwhile=fail)
    assert same(read_all(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failure_without_an_old_output_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="tensor 'w' got 0 of 48 bytes"),
        open_output(Output.parse(tmp_path / "new/deep/m"), specs(), metadata={}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_the_old_output_and_its_rest_is_swept(tmp_path: Path) -> None:
    write(tmp_path / "m")
    script = (
        "import os, sys, torch; from retex_cli.io.writer import *\n"
        "specs = [TensorSpec('w', torch.float32, (9,))]\n"
        "with open_output(Output.parse(sys.argv[1]), specs, metadata={}, overwrite=True) as writer:\n"
        "    writer.write(torch.ones(4)); os._exit(9)"
    )
    source = Path(writer_module.__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "m"], env={**os.environ, "PYTHONPATH": str(source)}
    )
    assert child.wait() == 9
    assert leftovers(tmp_path) == [f".m.tmp-{child.pid}"]
    assert same(read_all(tmp_path / "m"))
    write(tmp_path / "m", {"new": torch.ones(1)}, overwrite=True)
    assert leftovers(tmp_path) == []
    assert list(read_all(tmp_path / "m")) == ["new"]


def test_a_folder_that_cannot_be_renamed_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RetexError, match="cannot be written: Input/output error"):
        write(tmp_path / "m", {"new": torch.ones(1)}, overwrite=True)
    assert same(read_all(tmp_path / "m"))
    assert leftovers(tmp_path) == []


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    real, used = os.pwrite, [0]

    def pwrite(fd: int, data: memoryview, position: int) -> int:
        used[0] += len(data)
        if used[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("name", ["m", "m.safetensors"])
def test_a_full_disk_is_one_clear_line_and_the_old_output_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tensors = {str(k): torch.zeros(1000) for k in range(5)}
    write(tmp_path / name)
    full_disk(monkeypatch, after=10_000)
    with pytest.raises(RetexError, match=r"the disk is full after 8,000 of 20,000 bytes") as caught:
        write(tmp_path / name, tensors, overwrite=True)
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.hint
    monkeypatch.undo()
    assert same(read_all(tmp_path / name))
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_while_it_is_flushed_is_the_same_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RetexError, match="the disk is full"):
        write(tmp_path / "m", {str(k): torch.zeros(1000) for k in range(5)})
    assert list(tmp_path.iterdir()) == []


def test_advice_to_the_disk_that_is_refused_or_unknown_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refused(fd: int, position: int, count: int, advice: int) -> None:
        asked.append(count)
        raise OSError(errno.EINVAL, "Invalid argument")

    large = {"large": torch.arange(100_000.0)}
    monkeypatch.setattr(os, "posix_fadvise", refused, raising=False)
    write(tmp_path / "refused.safetensors", large)
    assert sum(asked) == 400_000
    monkeypatch.delattr(os, "posix_fadvise")
    write(tmp_path / "unknown.safetensors", large)
    for name in ("refused", "unknown"):
        assert torch.equal(load_file(tmp_path / f"{name}.safetensors")["large"], large["large"])


def test_a_partial_write_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: real(fd, data[:7], position))
    write(tmp_path / "m.safetensors")
    monkeypatch.undo()
    assert same(read_all(tmp_path / "m.safetensors"))


def test_errors_of_the_work_are_not_taken_for_errors_of_the_output(tmp_path: Path) -> None:
    def fail(writer: Writer) -> None:
        raise FileNotFoundError(errno.ENOENT, "an input vanished")

    with pytest.raises(FileNotFoundError, match="an input vanished"):
        write(tmp_path / "m", meanwhile=fail)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(3), "tensor 'w' got 12 of 16 bytes"),
        (torch.ones(5), "4 bytes more"),
        (torch.ones(4).double(), "announced as torch.float32, the data is torch.float64"),
    ],
)
def test_data_that_does_not_match_the_header_is_a_bug(tmp_path: Path, data: torch.Tensor, message: str) -> None:
    output, one = Output.parse(tmp_path / "m"), [TensorSpec("w", torch.float32, (4,))]
    with pytest.raises(ValueError, match=message), open_output(output, one, metadata={}) as writer:
        writer.write(data)
    assert list(tmp_path.iterdir()) == []


def test_placeholders_are_patched_in_every_header(tmp_path: Path) -> None:
    mark, digest = "@@digest@@", "0123456789"
    write(tmp_path / "m", limit=24, metadata={"sha": mark}, meanwhile=lambda writer: writer.patch(mark, digest))
    for path in (tmp_path / "m").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["sha"] == digest
    assert same(read_all(tmp_path / "m"))


@pytest.mark.parametrize(("old", "new"), [("@@@@", "123"), ("@@@@", "12ä4"), ("@@@@", '12"4'), ("nope", "1234")])
def test_a_patch_that_would_break_the_header_is_a_bug(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(ValueError, match=r"patch|not in the header"):
        write(tmp_path / "m", metadata={"a": "@@@@ twin twin"}, meanwhile=lambda writer: writer.patch(old, new))


def test_a_patch_reaches_every_place_in_the_header(tmp_path: Path) -> None:
    write(tmp_path / "m", metadata={"a": "twin and twin"}, meanwhile=lambda writer: writer.patch("twin", "1234"))
    with safe_open(next((tmp_path / "m").glob("*.safetensors")), "pt") as file:
        assert file.metadata()["a"] == "1234 and 1234"


def test_a_side_file_cannot_leave_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RetexError, match="may not leave"):
        write(tmp_path / "m", files={"../evil.json": b""})
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real.safetensors", {"old": torch.ones(1)})
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    write(tmp_path / "link.safetensors", overwrite=True)
    assert (tmp_path / "link.safetensors").is_symlink()
    assert same(read_all(tmp_path / "real.safetensors"))


class Pipe(io.RawIOBase):
    """A stream that takes a few bytes at a time, as a pipe does."""

    def __init__(self) -> None:
        self.received = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        part = bytes(memoryview(data))[:5]  # type: ignore[arg-type]
        self.received += part
        return len(part)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Pipe:
    stream = Pipe()
    monkeypatch.setattr(writer_module, "standard_output", lambda: stream)
    return stream


def to_stdout(tensors: Mapping[str, torch.Tensor]) -> None:
    with open_output(Output.parse("-"), specs(tensors), metadata={"a": "@@@@"}) as writer:
        for tensor in tensors.values():
            writer.write(tensor)


@pytest.mark.parametrize("odd", [False, True])
def test_standard_output_streams_the_same_bytes_as_a_file(tmp_path: Path, pipe: Pipe, odd: bool) -> None:
    tensors = {"w": torch.arange(3.0), **({"mask": torch.ones(3, dtype=torch.bool), "v": torch.ones(2)} if odd else {})}
    to_stdout(tensors)
    write(tmp_path / "m.safetensors", tensors, metadata={"a": "@@@@"})
    assert bytes(pipe.received) == (tmp_path / "m.safetensors").read_bytes()


def test_standard_output_cannot_be_patched(pipe: Pipe) -> None:
    with (
        pytest.raises(ValueError, match="already gone"),
        open_output(Output.parse("-"), [], metadata={"a": "@@@@"}) as writer,
    ):
        writer.patch("@@@@", "1234")


def test_a_closed_pipe_is_one_clear_line(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_to_nobody(data: object) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(pipe, "write", write_to_nobody)
    with pytest.raises(RetexError, match="the reader closed the pipe"):
        to_stdout(TENSORS)


def test_a_terminal_gets_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(UsageError, match="terminal"):
        to_stdout(TENSORS)


def test_a_written_folder_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertModel(config)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    write(tmp_path / "m", state, limit=2000, files={"config.json": config.to_json_string().encode()})
    loaded = BertModel.from_pretrained(tmp_path / "m")
    assert same({name: tensor.detach() for name, tensor in loaded.state_dict().items()}, state)
