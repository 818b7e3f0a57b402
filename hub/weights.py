"""Weights in the safetensors format, read and written one tensor at a time.

safetensors' own `save_file` needs all tensors of a file in memory, and pages of a file that it maps count as memory.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import UserError
from files import printable, replacing

# Weights are stored in no other dtype.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StoredTensor(NamedTuple):
    """A tensor in a .safetensors file, known from the file's header."""

    path: Path
    start: int  # its first byte in the file
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        with self.path.open("rb") as file:
            file.seek(self.start)
            if file.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
                raise UserError(f"{self.path} became shorter while it was read")
        return tensor


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a .safetensors file by name, from its header. Raises UserError for a damaged file and for
    tensors of other than floating-point numbers."""
    found: dict[str, StoredTensor] = {}
    try:
        with safe_open(path, "numpy") as opened, path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")  # after the header and its length
            for name in opened.offset_keys():
                header = opened.get_slice(name)
                kind, shape = header.get_dtype(), torch.Size(header.get_shape())
                if kind not in DTYPES:
                    raise UserError(f"{path}: {printable(name)} is stored as {kind}, not as floating-point numbers")
                found[name] = StoredTensor(path, start, shape, DTYPES[kind])
                start += shape.numel() * DTYPES[kind].itemsize
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {printable(str(error))}") from error
    return found


def check_fit(place: Path, stored: Mapping[str, StoredTensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise one UserError that lists stored tensors that are missing, have another shape, or are not expected."""
    wrong = [f"{name} is missing" for name in shapes if name not in stored]
    for name, tensor in stored.items():
        if name not in shapes:
            wrong.append(f"{printable(name)} is not part of the model")
        elif tensor.shape != shapes[name]:
            wrong.append(f"{name} has shape {tuple(tensor.shape)}, not {tuple(shapes[name])}")
    if wrong:
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise UserError(f"{place}: the weights do not fit the model: {'; '.join(wrong[:10])}{more}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], values: Iterable[Tensor] | None = None) -> None:
    """Write a .safetensors file, one tensor at a time. values: the tensors to write, if those of `tensors` only have
    their shapes and dtypes (on the meta device); they may be computed as they are written. Raises OSError."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, value in zip(tensors.values(), tensors.values() if values is None else values, strict=False):
            assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype)
            file.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
