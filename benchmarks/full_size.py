"""DeepSeek-V2-Lite at full size on this machine: train 15.7 billion parameters in 4 bits, chat, and merge.

    python benchmarks/full_size.py [--layers 27] [--directory DIR]

Writes a checkpoint of V2-Lite's shape in the Hub's layout with random weights (31.4 GB), runs the README's commands
on it, each in a separate process, prints their seconds and peak memory, and deletes everything. The merged model needs
as much disk space again. Random weights learn nothing, but time and memory are those of the real ones. --layers makes
a smaller model, for a trial.
"""

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import write_model
from config import V2_LITE, UserError
from launch.run_directory import read_metrics
from model import DeepSeekV2
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Options:
    # Number of layers; the first is dense, the others have 585 million parameters each.
    layers: int = 27
    # Directory for the files, 63 GB at full size; "": the system's temporary directory.
    directory: str = ""
    max_seq_len: int = 512
    lora_rank: int = 16
    # Also adapt the routed experts.
    experts: bool = False
    # Use float32 if the processor has no bf16.
    dtype: str = "auto"


def random_weights(weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield bf16 values for weights: windows into 128 million normal numbers (drawing all takes minutes)."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(2**27, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    for weight in weights.values():
        if weight.dim() == 1:
            yield torch.ones(weight.shape, dtype=torch.bfloat16)
            continue
        tensor = torch.empty(weight.numel(), dtype=torch.bfloat16)
        start = int(torch.randint(len(pool), (), generator=generator))
        for window in tensor.split(len(pool)):
            window.copy_(pool.roll(-start) if len(window) == len(pool) else window_of(pool, start, len(window)))
        yield tensor.view(weight.shape)


def window_of(pool: Tensor, start: int, length: int) -> Tensor:
    start %= len(pool) - length
    return pool[start : start + length]


def make(directory: str, layers: int) -> None:
    """Write the checkpoint."""
    config = replace(V2_LITE.model, num_hidden_layers=layers)
    with torch.device("meta"):
        weights = dict(DeepSeekV2(config).to(torch.bfloat16).named_parameters())
    write_model(Path(directory), config, Tokenizer(chat_template="deepseek"), weights, random_weights(weights))


MAKE = """
import sys
from benchmarks.full_size import make
make(sys.argv[1], int(sys.argv[2]))
"""
LOAD = """
import sys, time, torch
from checkpoint import load_pretrained
began = time.perf_counter()
model = load_pretrained(sys.argv[1], quantize="nf4")
seconds = time.perf_counter() - began
size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
print(f"{int(sys.argv[2]) / 2e6 / seconds:.0f} million parameters per second; {size / 1e9:.2f} GB of tensors")
"""


def run(what: str, *command: str) -> str:
    """Run a command in a child process, print its seconds and its peak memory, and return its output."""
    began, before, peak = time.perf_counter(), processor_seconds(), 0
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            peak = peak_of(child.pid) or peak
            time.sleep(0.05)
        output.seek(0)
        printed = output.read()
    if child.returncode != 0:
        raise UserError(f"{what} failed: {printed[-2000:]}")
    seconds, processor = time.perf_counter() - began, processor_seconds() - before
    print(f"{what:24}{seconds:8.1f} s ({processor:.1f} of a processor), peak {peak / 1e9:.2f} GB", flush=True)
    return printed


def processor_seconds() -> float:
    """Return the processor time of all finished children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def peak_of(process: int) -> int:
    """Return a process's peak memory so far in bytes, including the parts of mapped files that it has read."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def main(options: Options) -> None:
    directory = Path(tempfile.mkdtemp(prefix="full_size-", dir=options.directory or None))
    base, run_directory, merged = directory / "base", directory / "run", directory / "merged"
    try:
        run("make a checkpoint", "-c", MAKE, str(base), str(options.layers))
        size = (base / "model.safetensors").stat().st_size
        print(f"    {size / 1e9:.1f} GB")
        print("    " + run("load in NF4", "-c", LOAD, str(base), str(size)).strip())
        flags = {
            "init-from": base,
            "quantize": "nf4",
            "lora-rank": options.lora_rank,
            "dataset": "chitchat",
            "train-split": "train",
            "max-seq-len": options.max_seq_len,
            "gradient-accumulation-steps": 1,
            "eval-steps": 0,
            "output-dir": run_directory,
            "dtype": options.dtype,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        if options.experts:
            stacks = ("experts.gate_up_proj", "experts.down_proj")
            words += ["--lora-target-modules", *V2_LITE.lora.lora_target_modules, *stacks]
        train = ("train_sft.py", "v2_lite", *words, "--sample-prompts")
        run("train two steps, save", *train, "--max-steps", "2")
        run("resume for one more", *train, "--max-steps", "3", "--resume")
        for line in read_metrics(run_directory):
            tokens = line["num_tokens"] / line["step"]
            print(f"    step {line['step']}: {tokens / line['tokens_per_second']:.1f} s, loss {line['loss']:.3f}")
        chat = ("--prompt", "Hello!", "--max-new-tokens", "8", "--quantize", "nf4")
        run("chat.py, 8 new tokens", "chat.py", str(run_directory), *chat)
        run("merge", "export.py", "merge", str(run_directory), str(merged))
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
