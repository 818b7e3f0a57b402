"""The documents of a batch: where each begins and ends, found once on the host, so that no layer has to look.

Shapes: B rows, T positions, N tokens of the stream that the layers work on, D documents, M targets.

>>> sequence_ids = torch.tensor([[1, 1, 2, 0], [1, 1, 1, 1]])  # three documents; 0 is padding
>>> documents = find_documents(sequence_ids)
>>> documents.ids.tolist(), documents.offsets.tolist()
([0, 0, 1, 2, 2, 2, 2], [0, 2, 3, 7])
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a label that the loss ignores


class Lengths:
    """Opaque list, so that torch.compile does not specialise on its length."""

    def __init__(self, values: list[int]) -> None:
        self.values = values


class Documents(NamedTuple):
    """The places of a batch's documents (pieces, as attention sees them), and its real tokens and targets.

    The host's values vary from batch to batch; compiled code must not depend on them, except for `longest`.
    """

    tokens: Tensor  # (N,) indices of the stream's tokens in the flattened batch
    ids: Tensor  # (N,) index of the document that each token of the stream belongs to
    real: Tensor  # (N, 1) fp32, 0 for padding, else 1
    offsets: Tensor  # (D + 1,) int32, where in the stream each document begins; the last is N
    targets: Tensor | None  # (M,) which tokens of the stream have a target; None without labels
    labels: Tensor | None  # (M,) the targets; None without labels
    longest: int  # upper bound of the documents' lengths
    lengths: Lengths  # of all documents that are not empty
    num_documents: int  # real ones


def find_documents(sequence_ids: Tensor, labels: Tensor | None = None, fixed_length: bool = False) -> Documents:
    """Find the documents of a batch, in order: a new one begins where the sequence id or the row changes.

    sequence_ids and labels (B, T), as datacollator.py makes them. They should be on the host: a GPU would have to wait.

    The stream holds real tokens only. With `fixed_length` it holds all B T tokens, so that a compiled model is not
    compiled for each N: the padding of each row follows at the end of the stream as one more document, which no other
    attends to. It has no targets and is counted nowhere, so all its gradients are exactly zero. The number of documents
    and `longest` are rounded up to powers of two.
    """
    flat, (num_rows, width) = sequence_ids.flatten(), sequence_ids.shape
    tokens = flat.nonzero().squeeze(1)
    rows = torch.arange(num_rows, device=flat.device)
    keys = (rows[:, None] * (width + 1) + sequence_ids).flatten()[tokens]
    _, ids, lengths = keys.unique_consecutive(return_inverse=True, return_counts=True)
    num_documents, longest = len(lengths), int(lengths.max()) if len(lengths) else 0
    real = torch.ones(len(tokens), 1, device=flat.device)
    targets = answers = None
    if labels is not None:
        own = labels.flatten()[tokens]
        targets = (own != IGNORE).nonzero().squeeze(1)
        answers = own[targets]
    if fixed_length:
        padding = (sequence_ids == 0).sum(dim=1)
        room = power_of_two(num_documents)
        tokens = torch.cat((tokens, (flat == 0).nonzero().squeeze(1)))
        ids = torch.cat((ids, room + rows.repeat_interleave(padding)))
        real = F.pad(real, (0, 0, 0, len(tokens) - len(real)))
        longest = power_of_two(max(longest, int(padding.max())))
        lengths = torch.cat((F.pad(lengths, (0, room - num_documents)), padding))
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    filled = Lengths([length for length in lengths.tolist() if length])
    return Documents(tokens, ids, real, offsets, targets, answers, longest, filled, num_documents)


def power_of_two(number: int) -> int:
    """Round up, 1 at least."""
    return 1 << max(number - 1, 0).bit_length()
