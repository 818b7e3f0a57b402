"""Set-up that every test shares: one thread a worker (pytest-xdist gives one worker a core), no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch

from data.sources import read_chitchat

torch.set_num_threads(1)
# In CI the same examples each time; whoever runs the tests by hand looks for new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "default")


@pytest.fixture(scope="session")
def chitchat() -> dict[str, list[list[dict[str, str]]]]:
    """The built-in conversations of each split; reading them takes seconds."""
    return {split: [row["messages"] for row in read_chitchat(split, "")] for split in ("train", "test")}
