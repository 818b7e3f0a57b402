"""train_sft.py with a rank that fails: torchrun ... faulty_rank.py FAULTS train_sft.py's arguments

FAULTS is begin:0,raise:4,kill:6, say: what befalls the last rank in which step, each time that torchrun starts it; with
"begin" it fails before it has begun.
"""

import os
import signal
import sys
from typing import Any

import train_sft
import trainer
from config import UserError
from launch import start


def fail(*_: object) -> Any:
    raise UserError("out of bread")


def main() -> None:
    faults = sys.argv.pop(1).split(",")
    kind, step = faults[int(os.environ["TORCHELASTIC_RESTART_COUNT"])].split(":")
    if kind == "begin":
        start.find_start = fail
    forward = trainer.Trainer.forward

    def faulty(self: trainer.Trainer, *arguments: Any) -> Any:
        if self.step + 1 == int(step) and self.world.rank == self.world.size - 1:
            (self.output_dir / "failed").touch()
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("out of cheese")
        return forward(self, *arguments)

    trainer.Trainer.forward = faulty  # type: ignore[method-assign]
    trainer.measure_peak = lambda *_: 1.0
    train_sft.main()


if __name__ == "__main__":
    main()
