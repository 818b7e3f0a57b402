"""Files are safe from crashes, links and hostile names; headers are checked before memory is used."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import files
from config import UserError
from files import (
    damaged_files,
    flush_to_disk,
    printable,
    read_json,
    replace_file,
    replacing,
    write_directory,
    write_json,
)
from hub.weights import stored_tensors, write_tensors


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    writers = {"text": lambda p: replace_file(p, "x"), "json": lambda p: write_json(p, {}), "tensors": one_tensor}
    for name, write in writers.items():
        link = tmp_path / name
        link.symlink_to(outside)
        write(link)
        assert not link.is_symlink()
    assert outside.read_text() == "mine"


def one_tensor(path: Path) -> None:
    write_tensors(path, {"a": torch.ones(2)})


def test_a_temporary_file_has_a_random_name_and_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x.tmp", ".x.tmp", ".x.jsonl.tmp"):
        (tmp_path / name).write_text("mine")
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    replace_file(tmp_path / "x.jsonl", "new")
    assert {path: path.read_text() for path in before} == before
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0")
    (tmp_path / ".0.x.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="File exists"):
        replace_file(tmp_path / "x.jsonl", "newer")
    assert not (tmp_path / "elsewhere").exists()


def test_a_failed_replacement_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_windows_does_not_flush_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def refuse_directories(path: Path, flags: int) -> int:
        opened.append(path)
        if path.is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        assert flags & os.O_RDWR  # Windows flushes files that are open for writing only
        return real_open(path, flags)

    real_open = os.open
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse_directories)
        patch.setattr(os, "name", "nt")
        flush_to_disk(tmp_path)
        flush_to_disk(tmp_path / "file")
    assert opened == [tmp_path / "file"]


def test_checksums_cover_subdirectories_and_nothing_outside(tmp_path: Path) -> None:
    def write(directory: Path) -> dict[str, str]:
        (directory / "sub").mkdir()
        (directory / "sub/file").write_text("a")
        (directory / "known").write_text("b")
        return {"known": "a checksum that another rank has computed"}

    write_directory(tmp_path / "place", write)
    assert damaged_files(tmp_path / "place") == ["known"]
    (tmp_path / "place/sub/file").write_text("changed")
    assert damaged_files(tmp_path / "place") == ["known", "sub/file"]
    write_json(tmp_path / "place/checksums.json", {"../../../../../../dev/zero": "0"})  # never read
    assert damaged_files(tmp_path / "place") == ["../../../../../../dev/zero"]


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "", "{", "9" * 5000, "[1]"])
def test_a_file_without_a_json_object_is_an_error_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(UserError, match=r"file\.json (is not JSON|does not contain a JSON object)") as caught:
        read_json(tmp_path / "file.json")
    assert "\n" not in str(caught.value)


def test_printable_replaces_control_characters() -> None:
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x1b]0;title\x07\x9b2J\x7f\r\0ä今") == "\ufffd]0;title\ufffd\ufffd2J\ufffd\ufffd\ufffdä今"


# ---------------------------------------------------------------- tensors


def test_tensors_are_read_like_safetensors_reads_them(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 5).T,
        "rounded": torch.randn(4, 2).bfloat16(),
        "half": torch.randn(2, 2, 2).half(),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "double": torch.randn(2).double(),
    }
    layout = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    write_tensors(tmp_path / "file", layout, tensors.values())
    theirs, ours = load_file(tmp_path / "file"), stored_tensors(tmp_path / "file")
    assert theirs.keys() == ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for read in (theirs[name], ours[name].read()):
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read, tensor)
        assert ours[name].shape == tuple(tensor.shape)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_other_than_floating_point_numbers_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a\x1b[2J": torch.zeros(4).to(dtype)}, tmp_path / "file")
    with pytest.raises(UserError, match=r"file: a\ufffd\[2J is stored as \w+, not as floating-point numbers"):
        stored_tensors(tmp_path / "file")


def test_a_file_larger_than_memory_is_read(tmp_path: Path) -> None:
    """Of a model merged into one file, only the tensor at hand is in memory. (The file is sparse.)"""
    size = 2**40
    header = json.dumps({"a": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "file").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert stored_tensors(tmp_path / "file")["a"].shape == (size // 2,)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "file")
    stored = stored_tensors(tmp_path / "file")["a"]
    os.truncate(tmp_path / "file", stored.start + 8)
    with pytest.raises(UserError, match="file became shorter while it was read"):
        stored.read()


@pytest.mark.parametrize("content", [b"", b"x", (10**9).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"[]"])
def test_a_damaged_header_is_an_error_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match="file cannot be read") as caught:
        stored_tensors(tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_the_header_is_aligned_and_names_the_format(tmp_path: Path) -> None:
    one_tensor(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    assert json.loads(content[8 : 8 + size])["__metadata__"] == {"format": "pt"}  # transformers asks for it
