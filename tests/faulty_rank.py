"""train_sft.py with a rank that fails: torchrun ... faulty_rank.py FAULTS train_sft.py's arguments

FAULTS, e.g. raise:4,kill:6, has a fault of the last rank and its step for each time that torchrun starts the ranks. The
fault "interrupt" sends torchrun what Ctrl-C sends, and waits until torchrun has passed it on.
"""

import os
import signal
import sys
import time
from typing import Any

import train_sft
import trainer
from config import UserError


def main() -> None:
    faults = sys.argv.pop(1).split(",")
    kind, step = faults[int(os.environ["TORCHELASTIC_RESTART_COUNT"])].split(":")
    forward = trainer.Trainer.forward

    def faulty(self: trainer.Trainer, *arguments: Any) -> Any:
        if self.step + 1 == int(step) and self.world.rank == self.world.size - 1 and not self.signal.number:
            if kind == "raise":
                raise UserError("out of cheese")
            os.kill(*((os.getpid(), signal.SIGKILL) if kind == "kill" else (os.getppid(), signal.SIGINT)))
            while not self.signal.number:
                time.sleep(0.01)
        return forward(self, *arguments)

    trainer.Trainer.forward = faulty  # type: ignore[method-assign]
    train_sft.main()


if __name__ == "__main__":
    main()
