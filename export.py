"""A model for elsewhere.

python export.py merge ADAPTER OUT    # a LoRA adapter and its base model as a plain model directory
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, Suppress, arg

from engine.cli import one_line_errors, parse_flags


@dataclass
class Merge:
    """Add an adapter to the weights that it was trained on: a model directory like any other."""

    # The adapter's directory, or its run's.
    adapter: Annotated[Positional[str], arg(metavar="ADAPTER")]
    # The directory to write.
    out: Annotated[Positional[str], arg(metavar="OUT")]

    def export(self) -> None:
        from checkpoint import merge_adapter  # torch takes a while to import

        merge_adapter(self.adapter, self.out)
        print(f"wrote {self.out}")


COMMANDS: Any = Merge | Annotated[None, Suppress]  # tyro makes commands of several types only


def main() -> None:
    with one_line_errors():
        parse_flags(COMMANDS, sys.argv[1:], "export.py", __doc__).export()


if __name__ == "__main__":
    main()
