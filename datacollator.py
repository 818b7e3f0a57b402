"""Turn pieces of conversations into batches: pack or pad, shift the labels, load in the background.

A piece is the part of a conversation that fits a row. A row holds one piece and padding or, packed, as many as fit.
Packing saves padding and changes no result: `sequence_ids` keep pieces apart, and `position_ids` restart.

>>> pieces = [([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1]), ([6, 7], [0, 1])]  # token ids, mask
>>> rows = pack_best_fit([len(ids) for ids, _ in pieces], capacity=5)
>>> batch = DataCollator(max_seq_len=5, pad_token_id=0)([[pieces[i] for i in row] for row in rows])
>>> batch["labels"].tolist()
[[2, 3, -100, 5, -100], [7, -100, -100, -100, -100]]
>>> batch["position_ids"].tolist()
[[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
"""

import functools
import zlib
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from config import BatchConfig
from dataset import column
from documents import IGNORE, Documents, find_documents
from parallel import World

# input_ids, labels, position_ids, sequence_ids: each (B, T) int64.
Batch = dict[str, Tensor]
# Token ids and mask (1: trained on), of equal length.
Piece = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]

# ---------------------------------------------------------------- pieces to batches


def pack_best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Group indices of lengths, of at most `capacity` tokens each, into rows of that: best fit decreasing.

    Longest first, each goes to the fullest row with room for it. The number of rows depends on the lengths, not on
    their order, so every epoch has equally many.
    """
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # the keys of rows_with_room that have rows, sorted
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
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
    """Collates rows of pieces into a `Batch`."""

    # Width of a packed row; pieces are no longer than that.
    max_seq_len: int
    # Fills the rest of a row; never seen by attention, experts or loss.
    pad_token_id: int
    # True: many pieces per row of max_seq_len. False: one piece per row, padded to the longest of the batch.
    packing: bool = True

    def __call__(self, rows: Sequence[Sequence[Piece]]) -> Batch:
        """Return the batch of these rows, each a list of pieces.

        labels[b, t] is the next token of the same piece if its mask is 1, else -100 (also at a piece's end).
        position_ids count from 0 and sequence_ids are 1, 2, 3 ... for the pieces of a row, both 0 in padding.
        """
        width = self.max_seq_len if self.packing else max(len(ids) for row in rows for ids, _ in row)
        input_ids, labels, position_ids, sequence_ids = batch = np.zeros((4, len(rows), width), dtype=np.int64)
        input_ids[:], labels[:] = self.pad_token_id, IGNORE
        for b, row in enumerate(rows):
            start = 0
            for number, (ids, mask) in enumerate(row, start=1):
                end = start + len(ids)
                input_ids[b, start:end] = ids
                labels[b, start : end - 1] = np.where(np.asarray(mask[1:]) == 1, ids[1:], IGNORE)
                position_ids[b, start:end] = np.arange(len(ids))
                sequence_ids[b, start:end] = number
                start = end
        names = ("input_ids", "labels", "position_ids", "sequence_ids")
        return dict(zip(names, torch.from_numpy(batch), strict=True))


# ---------------------------------------------------------------- the stream of rows


class Counts(NamedTuple):
    """Totals over some rows."""

    targets: int
    documents: int
    tokens: int


class RowStream:
    """An endless stream of rows; row i is a pure function of the data, the seed and i.

    So any process can read any row, and a resumed run needs only the number of rows seen. Row i is in epoch
    i // rows_per_epoch; every epoch is shuffled and packed anew, into the same number of rows. Without shuffling, rows
    follow the order of the data, as far as packing allows: by their earliest piece.
    """

    def __init__(self, dataset: datasets.Dataset, collator: DataCollator, seed: int = 0, shuffle: bool = True):
        """dataset: columns input_ids, mask, length and targets, as `dataset.load_data` returns them."""
        self.collator = collator
        self.seed = seed
        self.shuffle = shuffle
        # Zero-copy Arrow buffers, usually memory-mapped; per chunk: offsets of the pieces, and values.
        chunks = [dataset.data.column(name).chunks for name in ("input_ids", "mask")]
        self._ids, self._mask = ([(c.offsets.to_numpy(), c.values.to_numpy()) for c in part] for part in chunks)
        self._chunk_starts = np.cumsum([0] + [len(offsets) - 1 for offsets, _ in self._ids])
        # Index of each example in the buffers: not 0, 1, 2 … if the dataset is a selection.
        chosen = dataset._indices
        self._places = np.arange(len(dataset)) if chosen is None else chosen.column(0).to_numpy().astype(np.int64)
        self.lengths, self.num_targets = column(dataset, "length"), column(dataset, "targets")
        # Changes with the tokens, the mask or their order.
        self.fingerprint = 0
        for values in (self._places, self.lengths, *(values for _, values in (*self._ids, *self._mask))):
            self.fingerprint = zlib.crc32(values, self.fingerprint)
        self._epoch_rows = functools.lru_cache(maxsize=2)(self._arrange_epoch)  # this epoch and the next
        self.rows_per_epoch = len(self._epoch_rows(0))

    def piece(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and mask of dataset[index]."""
        place = int(self._places[index])
        chunk = int(np.searchsorted(self._chunk_starts, place, side="right")) - 1
        at = place - self._chunk_starts[chunk]
        columns = (self._ids[chunk], self._mask[chunk])
        ids, mask = (values[offsets[at] : offsets[at + 1]] for offsets, values in columns)
        return ids, mask

    def row_indices(self, i: int) -> list[int]:
        """Return the indices of the pieces that row i holds."""
        epoch, at = divmod(i, self.rows_per_epoch)
        return self._epoch_rows(epoch)[at]

    def counts(self, rows: Iterable[int]) -> Counts:
        """Count what these rows hold, without reading their tokens."""
        indices = [index for i in rows for index in self.row_indices(i)]
        return Counts(int(self.num_targets[indices].sum()), len(indices), int(self.lengths[indices].sum()))

    def row(self, i: int) -> list[Piece]:
        return [self.piece(index) for index in self.row_indices(i)]

    def batch(self, rows: Iterable[int]) -> Batch:
        return self.collator([self.row(i) for i in rows])

    def _arrange_epoch(self, epoch: int) -> list[list[int]]:
        """Return the rows of an epoch, as lists of indices of pieces."""
        rng = np.random.default_rng([self.seed, epoch])
        order = np.arange(len(self.lengths))
        if self.shuffle:
            rng.shuffle(order)
        if not self.collator.packing:
            return [[index] for index in order.tolist()]
        rows = [order[row].tolist() for row in pack_best_fit(self.lengths[order], self.collator.max_seq_len)]
        return [rows[i] for i in rng.permutation(len(rows))] if self.shuffle else sorted(rows, key=min)


# ---------------------------------------------------------------- the loader of steps


class MicroBatch(NamedTuple):
    """A batch as the model's arguments, with documents in place of sequence_ids and labels."""

    input_ids: Tensor  # (B, T)
    position_ids: Tensor  # (B, T)
    documents: Documents

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """Return the model's arguments on the device. Copies from pinned memory overlap with its computation."""
        return tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), self)._asdict()


def make_micro_batch(batch: Batch, device: torch.device, fixed_length: bool = False) -> MicroBatch:
    """Return a batch as the model's arguments, pinned for CUDA. fixed_length: keep padding, so N is constant."""
    documents = find_documents(batch["sequence_ids"], batch["labels"], fixed_length)
    micro_batch = MicroBatch(batch["input_ids"], batch["position_ids"], documents)
    return tree_map_only(Tensor, Tensor.pin_memory, micro_batch) if device.type == "cuda" else micro_batch


class Step(NamedTuple):
    """Data of one optimizer step, for one rank."""

    micro_batches: list[MicroBatch]  # this rank's
    counts: Counts  # of all ranks' rows, known from the data without communication


class StepLoader:
    """Loads a rank's share of the rows of each step."""

    def __init__(self, rows: RowStream, config: BatchConfig, world: World, fixed_length: bool) -> None:
        """fixed_length: pads packed batches to the same number of tokens, which avoids recompilation."""
        self.rows, self.batch_size, self.world = rows, config.batch_size, world
        self.rows_per_step = config.rows_per_step(world.size)
        self.fixed_length = fixed_length and rows.collator.packing

    def steps(self, first_row: int, number: int) -> Generator[Step, None, None]:
        """Yield `number` steps from `first_row` on; a thread loads the next one meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            next_step = pool.submit(self.load, first_row)
            for step in range(1, number + 1):
                loaded = next_step.result()
                next_step = pool.submit(self.load, first_row + step * self.rows_per_step)
                yield loaded

    def load(self, first_row: int) -> Step:
        """Load the step that begins with this row."""
        size, end = self.batch_size, first_row + self.rows_per_step
        # ranks take micro-batches in turn
        starts = range(first_row + self.world.rank * size, end, size * self.world.size)
        micro_batches = [self.micro_batch(range(start, start + size)) for start in starts]
        return Step(micro_batches, self.rows.counts(range(first_row, end)))

    def micro_batch(self, rows: Iterable[int], with_labels: bool = True) -> MicroBatch:
        """Load these rows. with_labels: False removes their targets."""
        batch = self.rows.batch(rows)
        if not with_labels:
            batch["labels"] = torch.full_like(batch["labels"], IGNORE)
        return make_micro_batch(batch, self.world.device, self.fixed_length)
