"""Pieces of conversations to batches: pack or pad, then shift. The stream of rows, and its loader.

A row of a batch holds one piece and padding or, packed, as many pieces as fit (best fit decreasing). Packing changes no
result: `position_ids` restart and `sequence_ids` differ, so the model keeps pieces apart. It saves the padding.

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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from config import BatchConfig
from documents import IGNORE, Documents, find_documents
from parallel import World

if TYPE_CHECKING:
    import datasets

# input_ids, labels, position_ids, sequence_ids: each (B, T) int64.
Batch = dict[str, Tensor]
# Token ids and mask (1: trained on), of equal length.
Piece = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]

# ---------------------------------------------------------------- pieces to batches


def pack_best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Group indices of lengths into rows of at most `capacity` tokens: best fit decreasing.

    From the longest on, each goes into the row that it fills best. The number of rows depends on the lengths, not on
    their order. Raises ValueError for a length above capacity.
    """
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # the keys of rows_with_room that have rows, sorted
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
        if length > capacity:
            raise ValueError(f"piece {index} has {length} tokens, more than a row's {capacity}")
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
    """Makes a Batch of rows of pieces."""

    # Width of a packed row, and the largest width of a padded one.
    max_seq_len: int
    # Fills the rest of a row; never seen by attention, experts or loss.
    pad_token_id: int
    # Every row max_seq_len wide with any number of pieces; otherwise one piece per row, padded to the longest.
    packing: bool = True

    def __call__(self, rows: Sequence[Sequence[Piece]]) -> Batch:
        """Return the batch of these rows, each a list of pieces.

        labels[b, t] is the token after input_ids[b, t] in the same piece if that one is trained on, else -100.
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


def count_targets(offsets: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Count the targets of each piece that begins at these offsets: tokens that are trained on, except its first."""
    sums = np.concatenate(([0], np.cumsum(mask == 1)))
    return sums[offsets[1:]] - sums[np.minimum(offsets[:-1] + 1, offsets[1:])]


class RowStream:
    """An endless stream of rows, of which row i is a pure function of the data, the seed and i.

    So there are no partial batches, any process can read any rows, and a resumed run needs only its step. Row i is in
    epoch i // rows_per_epoch; every epoch is shuffled and packed anew, into the same number of rows. Without shuffling,
    rows follow the order of the data, as far as packing allows: by their first piece.
    """

    def __init__(self, dataset: "datasets.Dataset", collator: DataCollator, seed: int = 0, shuffle: bool = True):
        """dataset: columns input_ids and mask, as `dataset.load_data` returns them."""
        self.collator = collator
        self.seed = seed
        self.shuffle = shuffle
        # Arrow's own buffers, usually a memory map: for each chunk, where pieces begin, and their tokens.
        chunks = [dataset.data.column(name).chunks for name in ("input_ids", "mask")]
        self._ids, self._mask = ([(c.offsets.to_numpy(), c.values.to_numpy()) for c in column] for column in chunks)
        self._chunk_starts = np.cumsum([0] + [len(offsets) - 1 for offsets, _ in self._ids])
        lengths = np.concatenate([np.diff(offsets) for offsets, _ in self._ids])
        # If the dataset is a selection of rows, their places in the buffers; nothing is copied.
        chosen = dataset._indices
        self._places = np.arange(len(lengths)) if chosen is None else chosen.column(0).to_numpy().astype(np.int64)
        self.lengths = lengths[self._places]
        self.num_targets = np.concatenate([count_targets(*chunk) for chunk in self._mask])[self._places]
        # Changes with the data or its order.
        self.fingerprint = zlib.crc32(self.lengths.tobytes())
        self._epoch_rows = functools.lru_cache(maxsize=2)(self._arrange_epoch)
        self.rows_per_epoch = len(self._epoch_rows(0))

    def piece(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and mask of row `index` of the dataset."""
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
    """The model's arguments for some rows: a batch whose documents have been found."""

    input_ids: Tensor  # (B, T)
    position_ids: Tensor  # (B, T)
    documents: Documents

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """Return the model's arguments on the device. From pinned memory they are copied while it computes."""
        return tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), self)._asdict()


def make_micro_batch(batch: Batch, device: torch.device, fixed_length: bool = False) -> MicroBatch:
    """Find the documents of a batch. For CUDA its tensors are pinned. fixed_length: see `find_documents`."""
    documents = find_documents(batch["sequence_ids"], batch["labels"], fixed_length)
    micro_batch = MicroBatch(batch["input_ids"], batch["position_ids"], documents)
    return tree_map_only(Tensor, Tensor.pin_memory, micro_batch) if device.type == "cuda" else micro_batch


class Step(NamedTuple):
    """Data of one optimizer step, for one rank."""

    micro_batches: list[MicroBatch]  # this rank's
    counts: Counts  # of all ranks' rows: a function of the data, so no rank has to ask another


class StepLoader:
    """Loads a rank's share of the rows of each step."""

    def __init__(self, rows: RowStream, config: BatchConfig, world: World, fixed_length: bool) -> None:
        """fixed_length: pads packed batches to the same number of tokens, which avoids recompilation."""
        self.rows, self.batch_size, self.world = rows, config.batch_size, world
        self.rows_per_step = config.rows_per_step(world.size)
        self.fixed_length = fixed_length and rows.collator.packing

    def steps(self, first_row: int, number: int) -> Generator[Step, None, None]:
        """Yield `number` steps from a row on; a thread loads the next one during each."""
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(self.load, first_row)
            for step in range(1, number + 1):
                loaded = following.result()
                following = pool.submit(self.load, first_row + step * self.rows_per_step)
                yield loaded

    def load(self, first_row: int) -> Step:
        """Load the step that begins with this row."""
        size, end = self.batch_size, first_row + self.rows_per_step
        starts = range(first_row + self.world.rank * size, end, size * self.world.size)
        micro_batches = [self.micro_batch(range(start, start + size)) for start in starts]
        return Step(micro_batches, self.rows.counts(range(first_row, end)))

    def micro_batch(self, rows: Iterable[int], counted: bool = True) -> MicroBatch:
        """Load these rows. counted: False removes their targets."""
        batch = self.rows.batch(rows)
        if not counted:
            batch["labels"] = torch.full_like(batch["labels"], IGNORE)
        return make_micro_batch(batch, self.world.device, self.fixed_length)
