"""Each step's batches, made while the step before computes."""

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from config import BatchConfig
from datacollator import IGNORE, Counts, RowStream
from documents import MicroBatch, make_micro_batch
from parallel import World


class Step(NamedTuple):
    """What a rank needs for a step."""

    micro_batches: list[MicroBatch]  # its own
    counts: Counts  # of all ranks' rows: a function of the data, so that nobody has to be asked


class StepLoader:
    """A rank's micro-batches of each step: of the rows that the step takes, every rank reads its share."""

    def __init__(self, rows: RowStream, config: BatchConfig, world: World, fixed_shapes: bool) -> None:
        """fixed_shapes: packed batches get the same shapes whatever they hold, which costs the passage of padding and
        is for devices and compilers that prepare for shapes."""
        self.rows, self.batch_size, self.world = rows, config.batch_size, world
        self.rows_per_step = config.batch_size * config.gradient_accumulation_steps * world.size
        fixed = fixed_shapes and rows.collator.packing
        self.slots = config.batch_size * rows.most_conversations if fixed else None

    def steps(self, first_row: int, number: int) -> Generator[Step, None, None]:
        """So many steps from a row on; a thread prepares the next one during this one."""
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(self.load, first_row)
            for step in range(1, number + 1):
                loaded = following.result()
                following = pool.submit(self.load, first_row + step * self.rows_per_step)
                yield loaded

    def load(self, first_row: int) -> Step:
        """The step that begins with this row."""
        size, end = self.batch_size, first_row + self.rows_per_step
        starts = range(first_row + self.world.rank * size, end, size * self.world.size)
        micro_batches = [self.micro_batch(range(start, start + size)) for start in starts]
        return Step(micro_batches, self.rows.counts(range(first_row, end)))

    def micro_batch(self, rows: Iterable[int], counted: bool = True) -> MicroBatch:
        """Of these rows; not counted: it has no targets."""
        batch = self.rows.batch(rows)
        if not counted:
            batch["labels"] = torch.full_like(batch["labels"], IGNORE)
        return make_micro_batch(batch, self.slots, self.world.device)
