"""Where the documents of a batch lie, found once on the host, so that no layer and no GPU has to look for them.

Shapes: B rows, T positions, N tokens of the stream that the layers work on, D documents, M targets.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a label that the loss ignores
CHUNK = 512  # targets whose logits exist at a time


class Lengths:
    """A list that compiled code only hands on: it notes how long a bare one is, and is compiled anew for each number of
    documents."""

    def __init__(self, values: list[int]) -> None:
        self.values = values


class Documents(NamedTuple):
    """Where the documents (conversations or texts) lie in a batch, and where their real tokens and targets are.

    The lengths and counts are the host's: they vary from batch to batch, and compiled code must not look at them.
    """

    tokens: Tensor  # (N,) where in the flattened batch the stream's tokens lie
    ids: Tensor  # (N,) number of the document that a token of the stream belongs to
    real: Tensor  # (N, 1) fp32, 0 for padding that is only there so that N stays the same, else 1
    offsets: Tensor  # (D + 1,) int32, where in the stream each document begins; the last is N
    targets: Tensor | None  # (M,) which tokens of the stream have a target; None where there were no labels
    labels: Tensor | None  # (M,) what they have to predict; -100 where M was rounded up
    longest: int  # no document is longer
    lengths: Lengths  # of all documents that aren't empty
    num_documents: int  # real ones
    num_targets: int  # real ones

    @property
    def real_labels(self) -> Tensor:
        """(num_targets,)"""
        assert self.labels is not None
        return self.labels[: self.num_targets]


def find_documents(sequence_ids: Tensor, labels: Tensor | None = None, slots: int | None = None) -> Documents:
    """Documents of a batch, in order: a new one begins where the sequence id or the row changes.

    sequence_ids and labels (B, T), as datacollator.py makes them. Tensors on a GPU would make the host wait.

    Without `slots` the stream holds real tokens only. With `slots`, a number that no batch has more documents than, all
    shapes follow from those of the batch, and a compiled model is compiled once: empty documents fill the slots, M is
    rounded up to a multiple of CHUNK, and the padding of each row comes at the end of the stream as one document more,
    which no other looks at. It has no target and is counted nowhere, so that all its gradients are exactly zero.
    """
    flat = sequence_ids.flatten()
    tokens = flat.nonzero().squeeze(1)
    rows = torch.arange(len(sequence_ids), device=flat.device)
    keys = (rows[:, None] * (sequence_ids.shape[1] + 1) + sequence_ids).flatten()[tokens]
    _, ids, lengths = keys.unique_consecutive(return_inverse=True, return_counts=True)
    num_documents, num_targets = len(lengths), 0
    real = torch.ones(len(tokens), 1, device=flat.device)
    targets = answers = None
    if labels is not None:
        own = labels.flatten()[tokens]
        targets = (own != IGNORE).nonzero().squeeze(1)
        answers, num_targets = own[targets], len(targets)
    if slots is not None:
        if num_documents > slots:
            raise ValueError(f"{num_documents} documents in a batch that has room for {slots}")
        empty = (sequence_ids == 0).sum(dim=1)
        tokens = torch.cat((tokens, (flat == 0).nonzero().squeeze(1)))
        ids = torch.cat((ids, slots + rows.repeat_interleave(empty)))
        real = F.pad(real, (0, 0, 0, len(tokens) - len(real)))
        lengths = torch.cat((F.pad(lengths, (0, slots - num_documents)), empty))
        if targets is not None and answers is not None:
            missing = -num_targets % CHUNK
            targets, answers = F.pad(targets, (0, missing)), F.pad(answers, (0, missing), value=IGNORE)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    filled = Lengths([length for length in lengths.tolist() if length])
    longest = sequence_ids.shape[1]
    return Documents(tokens, ids, real, offsets, targets, answers, longest, filled, num_documents, num_targets)


# ---------------------------------------------------------------- one copy to the device

ALIGNED = 16  # bytes: where a tensor of any dtype may begin


class MicroBatch(NamedTuple):
    """A batch with its documents, ready for its device."""

    input_ids: Tensor  # (B, T)
    position_ids: Tensor  # (B, T)
    documents: Documents
    piece: Tensor | None  # all tensors in one piece of memory, page-locked for CUDA; None for a CPU

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """The model's, on the device: one copy, beside whatever the device computes."""
        fields = self.fields()
        if self.piece is not None:
            names = [name for name, x in fields.items() if isinstance(x, Tensor)]
            moved = taken_apart(self.piece.to(device, non_blocking=True), [fields[name] for name in names])
            fields |= dict(zip(names, moved, strict=True))
        inputs = {name: fields.pop(name) for name in ("input_ids", "position_ids")}
        return inputs | {"documents": Documents(**fields)}

    def fields(self) -> dict[str, Any]:
        """Those of the documents, too, by name."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids} | self.documents._asdict()


def make_micro_batch(batch: Mapping[str, Tensor], slots: int | None, device: torch.device) -> MicroBatch:
    """Of a batch by datacollator.py; slots as for `find_documents`."""
    documents = find_documents(batch["sequence_ids"], batch["labels"], slots)
    made = MicroBatch(batch["input_ids"], batch["position_ids"], documents, None)
    if device.type == "cpu":
        return made
    piece = in_one_piece(x for x in made.fields().values() if isinstance(x, Tensor))
    return made._replace(piece=piece.pin_memory() if device.type == "cuda" else piece)


def in_one_piece(tensors: Iterable[Tensor]) -> Tensor:
    """All tensors' bytes, one after the other, in one tensor of bytes: one copy takes them to a GPU."""
    pieces = [tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors]
    return torch.cat([F.pad(piece, (0, -len(piece) % ALIGNED)) for piece in pieces])


def taken_apart(piece: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse: views of the piece, wherever it is by now, with the shapes and dtypes of `like`."""
    parts = piece.split([tensor.nbytes + -tensor.nbytes % ALIGNED for tensor in like])
    return [part[: x.nbytes].view(x.dtype).view(x.shape) for part, x in zip(parts, like, strict=True)]
