"""Which learns faster in wall-clock time: `tiny`, or a plain loop around transformers' DeepSeek-V2?

    python benchmarks/time_to_quality.py [--seconds 180] [--plot docs/time_to_quality.png]

Both start from random weights and use the same training and held-out conversations, in bf16 where the hardware has it.
The loop (hidden size 192, 4 layers, 8 experts, top 2, vocabulary of 8,192, AdamW, 8 rows of 512 tokens) runs first,
`train_sft.py tiny` second. Only training steps are timed, not evaluations. Bits per byte are the trainer's: the loss of
all target tokens, the end of the turn included, over the bytes of the assistant's text.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rivals import autocast, transformers_loss, transformers_model  # first: sets the environment

from config import DataConfig, ModelConfig
from datacollator import IGNORE, DataCollator, RowStream
from dataset import load_data
from launch.run_directory import read_metrics
from parallel import choose_dtype
from tokenizer import Tokenizer

ROWS, WIDTH = 8, 512
DTYPE = choose_dtype("auto", torch.device("cpu"))
Curve = list[tuple[float, float]]  # seconds of training, bits per byte
LOOP_MODEL = ModelConfig(
    vocab_size=8192,
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    intermediate_size=512,
    moe_intermediate_size=128,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    max_position_embeddings=1024,
)


def rows(split: str, tokenizer: Tokenizer, shuffle: bool) -> RowStream:
    options = DataConfig(("chitchat",), train_split=split, max_seq_len=WIDTH, long_conversations="truncate")
    data = load_data(options, tokenizer, seed=0, want_eval=False).train
    return RowStream(data, DataCollator(WIDTH, tokenizer.pad_token_id, packing=False), seed=0, shuffle=shuffle)


@torch.no_grad()
def evaluate(model: torch.nn.Module, held_out: RowStream, num_bytes: torch.Tensor) -> float:
    model.eval()
    nats, total_bytes = 0.0, 0
    for start in range(0, held_out.rows_per_epoch, ROWS):
        batch = held_out.batch(range(start, min(start + ROWS, held_out.rows_per_epoch)))
        with autocast(DTYPE):
            nats += transformers_loss(model, batch).item()
        total_bytes += int(num_bytes[batch["labels"][batch["labels"] != IGNORE]].sum())
    model.train()
    return nats / math.log(2) / total_bytes


def run_loop(seconds: float, peak_rate: float) -> Curve:
    """Train with a plain loop for that many seconds, over which its schedule extends."""
    tokenizer = Tokenizer(vocab_size=LOOP_MODEL.vocab_size)
    train, held_out = rows("train", tokenizer, shuffle=True), rows("test", tokenizer, shuffle=False)
    num_bytes = torch.tensor(tokenizer.token_num_bytes)
    model = transformers_model(LOOP_MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), peak_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    curve: Curve = []
    clock, tokens, step = 0.0, 0, 0
    while clock < seconds:
        began = time.perf_counter()
        batch = train.batch(range(step * ROWS, (step + 1) * ROWS))
        progress = clock / seconds
        optimizer.param_groups[0]["lr"] = peak_rate * min((step + 1) / 20, 0.505 + 0.495 * math.cos(math.pi * progress))
        with autocast(DTYPE):
            loss = transformers_loss(model, batch) / (batch["labels"] != IGNORE).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock += time.perf_counter() - began
        step += 1
        tokens += int((batch["sequence_ids"] > 0).sum())
        if clock > seconds * (len(curve) + 1) / 6 or clock >= seconds:
            curve.append((clock, evaluate(model, held_out, num_bytes)))
            print(f"loop: {clock:5.0f} s, {tokens / clock:,.0f} tokens/s, {curve[-1][1]:.3f} bits per byte", flush=True)
    return curve


def run_tiny(arguments: list[str]) -> Curve:
    """Run `train_sft.py tiny` from random weights. Its time is the sum of its steps' durations."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "train_sft.py", "tiny", "--output-dir", directory, "--sample-prompts"]
        command += ["--init-from", "none", "--dataset", "chitchat", "--long-conversations", "truncate"]
        command += ["--learning-rate", "4e-3", *arguments]
        subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1])
        lines = read_metrics(directory)
    curve: Curve = []
    clock, tokens = 0.0, 0
    for line in lines:
        if "eval_bpb" in line:
            curve.append((clock, line["eval_bpb"]))
            print(f"tiny: {clock:5.0f} s, {tokens / clock:,.0f} tokens/s, {curve[-1][1]:.3f} bits per byte")
        else:
            clock += (line["num_tokens"] - tokens) / line["tokens_per_second"]
            tokens = line["num_tokens"]
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180, help="training time of the loop")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate of the loop")
    parser.add_argument("--plot", metavar="PATH", help="picture to write")
    options, for_tiny = parser.parse_known_args()
    curves = {"loop around transformers": run_loop(options.seconds, options.learning_rate), "tiny": run_tiny(for_tiny)}
    goal = curves["loop around transformers"][-1][1]
    reached = next((seconds for seconds, bits in curves["tiny"] if bits <= goal), math.inf)
    print(f"the loop's {goal:.3f} bits per byte: loop {options.seconds:.0f} s, tiny at most {reached:.0f} s")
    if options.plot:
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
        for name, curve in curves.items():
            axis.plot(*zip(*curve, strict=True), "o-", label=name)
        axis.set(xlabel="seconds of training", ylabel="held-out bits per byte", ylim=(None, 3))
        axis.grid(alpha=0.3)
        axis.legend()
        figure.savefig(options.plot, dpi=120)


if __name__ == "__main__":
    main()
