"""Each step's batches, made while the step before computes."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

from config import BatchConfig
from datacollator import Batch, RowStream
from parallel import World


class StepLoader:
    """A rank's micro-batches of each step: of the rows that the step takes, every rank reads its share."""

    def __init__(self, rows: RowStream, config: BatchConfig, world: World) -> None:
        self.rows, self.batch_size, self.world = rows, config.batch_size, world
        self.rows_per_step = config.batch_size * config.gradient_accumulation_steps * world.size

    def steps(self, first_row: int, number: int) -> Generator[list[Batch], None, None]:
        """Of so many steps from a row on; a thread prepares the next one's during this one."""
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(self.load, first_row)
            for step in range(1, number + 1):
                batches = following.result()
                following = pool.submit(self.load, first_row + step * self.rows_per_step)
                yield batches

    def load(self, first_row: int) -> list[Batch]:
        """The step that begins with this row."""
        size, ranks = self.batch_size, self.world.size
        starts = range(first_row + self.world.rank * size, first_row + self.rows_per_step, size * ranks)
        batches = [self.rows.batch(range(start, start + size)) for start in starts]
        if self.world.device.type == "cuda":  # page-locked memory, from which a copy runs beside the computation
            batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
        return batches
