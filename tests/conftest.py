"""Set-up that every test shares: one thread a worker (pytest-xdist gives one worker a core), no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import torch

torch.set_num_threads(1)
# In CI the same examples each time; whoever runs the tests by hand looks for new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "default")
