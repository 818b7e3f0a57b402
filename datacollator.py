"""Conversations to batches: pack or pad, then shift.

A row of a batch holds one conversation and padding, or, packed, as many conversations as fit. Packing changes no
result: `position_ids` restart and `sequence_ids` differ, so the model keeps conversations apart. It saves the padding.
"""

import functools
import zlib
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    import datasets

# input_ids, labels, position_ids, sequence_ids: each (B, T) int64.
Batch = dict[str, torch.Tensor]
# Token ids and mask (1: trained on), of equal length.
Conversation = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]

IGNORE = -100  # a label that the loss ignores


def pack_best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of lengths, grouped into rows of at most `capacity`: best fit decreasing.

    From the longest on, each goes into the row that it fills best. The number of rows depends on the lengths, not on
    their order. Raises ValueError for a length above capacity.
    """
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # the keys of rows_with_room that have rows, sorted
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
        if length > capacity:
            raise ValueError(f"conversation {index} has {length} tokens, more than a row's {capacity}")
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rooms[at]
        rows[row].append(index)
        left = room - length
        if not rows_with_room[left]:
            insort(rooms, left)
        rows_with_room[left].append(row)
    return rows


@dataclass(frozen=True)
class DataCollator:
    """Rows of conversations to a Batch."""

    # Width of a packed row, and the most that a padded one can have.
    max_seq_len: int
    # Fills what is left; never seen by attention, experts or loss.
    pad_token_id: int
    # Every row max_seq_len wide with any number of conversations; otherwise one each, padded to the longest.
    packing: bool = True

    def __call__(self, rows: Sequence[Sequence[Conversation]]) -> Batch:
        """Each row is a list of conversations (ids, mask).

        labels[b, t] is the token after input_ids[b, t] in the same conversation if that one is trained on, else -100.
        position_ids count from 0 and sequence_ids are 1, 2, 3 ... for the conversations of a row, both 0 in padding.
        """
        width = self.max_seq_len if self.packing else max(len(ids) for row in rows for ids, _ in row)
        input_ids = np.full((len(rows), width), self.pad_token_id)
        labels = np.full((len(rows), width), IGNORE)
        position_ids = np.zeros((len(rows), width), dtype=np.int64)
        sequence_ids = np.zeros((len(rows), width), dtype=np.int64)
        for b, row in enumerate(rows):
            start = 0
            for number, (ids, mask) in enumerate(row, start=1):
                end = start + len(ids)
                input_ids[b, start:end] = ids
                labels[b, start : end - 1] = np.where(np.asarray(mask[1:]) == 1, ids[1:], IGNORE)
                position_ids[b, start:end] = np.arange(len(ids))
                sequence_ids[b, start:end] = number
                start = end
        batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "sequence_ids": sequence_ids}
        return {name: torch.from_numpy(array) for name, array in batch.items()}


class Counts(NamedTuple):
    """What some rows hold."""

    targets: int
    documents: int
    tokens: int


def count_targets(offsets: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Of conversations that begin at these offsets: tokens that are trained on, but for the first of each."""
    sums = np.concatenate(([0], np.cumsum(mask == 1)))
    return sums[offsets[1:]] - sums[np.minimum(offsets[:-1] + 1, offsets[1:])]


class RowStream:
    """An endless stream of rows, of which row i is a pure function of the data, the seed and i.

    So there are no partial batches, any process can take any rows, and all that a resumed run needs is its step.
    Row i is in epoch i // rows_per_epoch; every epoch is shuffled and packed anew, into the same number of rows.
    Without shuffling rows come in the order of the data, as far as packing allows: by their first conversation.
    """

    def __init__(self, dataset: "datasets.Dataset", collator: DataCollator, seed: int = 0, shuffle: bool = True):
        """dataset: columns input_ids and mask, as `dataset.load_data` gives them."""
        self.collator = collator
        self.seed = seed
        self.shuffle = shuffle
        # Arrow's own buffers, usually a memory map: for each chunk, where conversations begin, and their tokens.
        chunks = [dataset.data.column(name).chunks for name in ("input_ids", "mask")]
        self._ids, self._mask = ([(c.offsets.to_numpy(), c.values.to_numpy()) for c in column] for column in chunks)
        self._chunk_starts = np.cumsum([0] + [len(offsets) - 1 for offsets, _ in self._ids])
        lengths = np.concatenate([np.diff(offsets) for offsets, _ in self._ids])
        # Where the dataset is a choice of rows, their places in the buffers: it's looked up there, nothing is copied.
        chosen = dataset._indices
        self._places = np.arange(len(lengths)) if chosen is None else chosen.column(0).to_numpy().astype(np.int64)
        self.lengths = lengths[self._places]
        self.num_targets = np.concatenate([count_targets(*chunk) for chunk in self._mask])[self._places]
        # Of other data, or of the same in another order, it's another number.
        self.fingerprint = zlib.crc32(self.lengths.tobytes())
        self._epoch_rows = functools.lru_cache(maxsize=2)(self._arrange_epoch)
        self.rows_per_epoch = len(self._epoch_rows(0))

    def conversation(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """ids and mask of conversation number `index` of the dataset."""
        place = int(self._places[index])
        chunk = int(np.searchsorted(self._chunk_starts, place, side="right")) - 1
        at = place - self._chunk_starts[chunk]
        pieces = (self._ids[chunk], self._mask[chunk])
        ids, mask = (values[offsets[at] : offsets[at + 1]] for offsets, values in pieces)
        return ids, mask

    def row_indices(self, i: int) -> list[int]:
        """Which conversations of the dataset row i holds."""
        epoch, at = divmod(i, self.rows_per_epoch)
        return self._epoch_rows(epoch)[at]

    def counts(self, rows: Iterable[int]) -> "Counts":
        """What these rows hold, for which no token has to be read."""
        indices = [index for i in rows for index in self.row_indices(i)]
        return Counts(int(self.num_targets[indices].sum()), len(indices), int(self.lengths[indices].sum()))

    @property
    def most_conversations(self) -> int:
        """No row of any epoch holds more: as many of the shortest ones as fit into a row."""
        if not self.collator.packing:
            return 1
        return int(np.searchsorted(np.sort(self.lengths).cumsum(), self.collator.max_seq_len, side="right"))

    def row(self, i: int) -> list[Conversation]:
        return [self.conversation(index) for index in self.row_indices(i)]

    def batch(self, rows: Iterable[int]) -> Batch:
        return self.collator([self.row(i) for i in rows])

    def _arrange_epoch(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch])
        order = np.arange(len(self.lengths))
        if self.shuffle:
            rng.shuffle(order)
        if not self.collator.packing:
            return [[index] for index in order.tolist()]
        rows = [order[row].tolist() for row in pack_best_fit(self.lengths[order], self.collator.max_seq_len)]
        return [rows[i] for i in rng.permutation(len(rows))] if self.shuffle else sorted(rows, key=min)
