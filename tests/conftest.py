"""Set-up that every test shares: one thread per worker (pytest-xdist gives each worker a core), no network."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch

from data.sources import read_chitchat
from tokenizer import Tokenizer

torch.set_num_threads(1)
# A shell's background processes ignore Ctrl-C, and those of nohup a closed terminal; the runs that tests start inherit
# it, and some of them are interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# An example's time has no limit: a busy machine may take ten times longer. In CI the examples are the same each time;
# a run by hand tries new ones.
checks = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
for name, derandomize in (("ci", True), ("by hand", False)):
    hypothesis.settings.register_profile(name, derandomize=derandomize, deadline=None, suppress_health_check=checks)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "by hand")


@pytest.fixture(scope="session")
def chitchat() -> dict[str, list[list[dict[str, str]]]]:
    """The built-in conversations of each split; reading them takes seconds."""
    return {split: [row["messages"] for row in read_chitchat(split, "")] for split in ("train", "test")}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(vocab_size=512)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random tensors do not depend on the tests that ran before."""
    torch.manual_seed(0)
