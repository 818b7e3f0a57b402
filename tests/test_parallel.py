"""DDP, FSDP and HSDP on this machine's CPU, against the same runs in one process.

Two groups of processes (of two and of four ranks) do most of the runs, one after the other, and the tests examine what
they wrote. ranks.py defines what is recorded.
"""

import functools
import gc
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import train_sft
from checkpoint import load_pretrained, newest_checkpoint
from files import read_json
from launch.run_directory import read_metrics
from ranks import WatchedTrainer, take_over, train_runs
from small_runs import (
    arguments,
    conversations,
    final_tensors,
    numbers,
    optimizer_tensors,
    run_ranks,
    train_here,
    write_jsonl,
)
from trainer import STATE

STEPS, SAVED = 4, 2
ADAPTED = ["--lora-target-modules", "kv_b_proj", "o_proj", "down_proj", "experts.gate_up_proj"]
LORA = {"lora_rank": 4, "init_from": "packed-1"}
# Multiples of 64, for NF4. Six experts split evenly over two ranks, but not over four.
WIDTH = 64
SHAPE = {"hidden_size": WIDTH, "kv_lora_rank": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
SHAPE |= {"v_head_dim": 32, "n_routed_experts": 6}
VARIANTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "packed": (["--packing"], {}),
    "padded": (["--no-packing", "--model.tie-word-embeddings", "--gradient-checkpointing"], {"save_steps": 0}),
    # All experts for every token: in bf16 a rounding error can send one that is near a tie to another expert.
    "bf16": ([], {"dtype": "bfloat16", "model_num_experts_per_tok": 6}),
    "muon": ([], {"optimizer": "muon"}),
    "lora": ([], LORA),
    "nf4": (ADAPTED, LORA | {"quantize": "nf4", "save_steps": 0}),
    "lora-bf16": (ADAPTED, LORA | {"dtype": "bfloat16", "save_steps": 0}),
}
# Other roundings of the same sums: in bf16 they grow with the steps, so that step 2 is held to 1e-5 in a test of its
# own. Muon's iteration makes them larger.
TOLERANCES = {"bf16": 5e-3, "muon": 1e-4}
OF_ENGINE = {
    "ddp-2": ["packed", "padded", "bf16", "nf4", "lora-bf16"],
    "fsdp-2": ["packed", "padded", "bf16", "muon", "lora-bf16"],
    "fsdp-4": ["packed", "lora"],
    "hsdp-4": ["packed", "bf16"],  # as two nodes of two ranks
}
RUNS = [(variant, engine) for engine, variants in OF_ENGINE.items() for variant in variants]
# A run, and the one whose checkpoint of step 2 it also continues.
RESUMED = {
    "packed-fsdp-2": "packed-ddp-2",
    "packed-fsdp-4": "packed-fsdp-2",
    "packed-hsdp-4": "packed-fsdp-4",
    "packed-1": "packed-hsdp-4",
    "muon-fsdp-2": "muon-1",
    "lora-fsdp-4": "lora-1",
    "lora-1": "lora-fsdp-4",
}
# Counted in epochs, with the same flags on one and two ranks.
EPOCHS = {"max_steps": 0, "num_train_epochs": 1, "gradient_accumulation_steps": 1, "eval_steps": 0}
EPOCHS |= {"save_total_limit": 100}


def command(folder: Path, variant: str, where: str, output_dir: Path, *more: str, **changes: Any) -> list[str]:
    """train_sft.py's arguments for a variant on "1" process, "ddp-2", ...: the same global batch of eight rows."""
    flags, settings = VARIANTS[variant]
    engine, _, ranks = where.rpartition("-")
    shape = {f"model_{name}": size for name, size in SHAPE.items()}
    settings = {"max_steps": STEPS, "save_steps": SAVED, "eval_steps": STEPS} | shape | settings
    if "init_from" in settings:
        settings |= {"init_from": folder / settings["init_from"]}
    settings |= {"gradient_accumulation_steps": 4 // int(ranks)}
    if engine == "hsdp" and variant == "packed":  # two micro-batches, of which the last is summed over nodes
        settings |= {"batch_size": 1, "gradient_accumulation_steps": 2}
    settings |= ({"parallel": engine} if engine else {}) | changes
    return arguments(folder / "data.jsonl", output_dir, *flags, *more, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which every variant has run in one process and in each engine, and resumed others' checkpoints.

    Runs are packed-1, packed-ddp-2, ...; the resumed ones are packed-fsdp-2-resumed, ...
    """
    folder = tmp_path_factory.mktemp("parallel")
    write_jsonl(folder / "data.jsonl", conversations(60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "Trainer", WatchedTrainer)
        for variant in VARIANTS:
            assert train_here(command(folder, variant, "1", folder / f"{variant}-1"), folder) == 0
    gc.unfreeze()
    assert train_here(command(folder, "packed", "1", folder / "epoch-1", **EPOCHS), folder) == 0
    for ranks in (2, 4):
        runs: list[tuple[list[str], Path, Path | None]] = []
        if ranks == 2:
            run = folder / "epoch-ddp-2"
            runs.append((command(folder, "packed", "ddp-2", run, "--resume", **EPOCHS), run, folder / "epoch-1"))
        for variant, engine in RUNS:
            name, run = f"{variant}-{engine}", folder / f"{variant}-{engine}"
            if not engine.endswith(str(ranks)):
                continue
            runs.append((command(folder, variant, engine, run), run, None))
            if name in RESUMED:
                run = folder / f"{name}-resumed"
                runs.append((command(folder, variant, engine, run, "--resume"), run, folder / RESUMED[name]))
        (folder / str(ranks)).mkdir()
        run_ranks(ranks, functools.partial(train_runs, runs, folder), folder / str(ranks))
    for variant in ("packed", "lora"):
        resumed_run = folder / f"{variant}-1-resumed"
        take_over(folder / RESUMED[f"{variant}-1"], resumed_run)
        assert train_here(command(folder, variant, "1", resumed_run, "--resume"), folder) == 0
    return folder


@functools.cache
def ranks_of(run: Path) -> list[dict[str, Any]]:
    """Return what each rank has recorded."""
    return [json.loads(path.read_text()) for path in sorted(run.glob("rank-*.json"))]


def whole_bytes(run: Path) -> int:
    """Return the size of all parameters."""
    (file,) = (run / f"checkpoints/step-{STEPS:06d}").glob("model.safetensors")
    return sum(tensor.nbytes for tensor in load_file(file).values())


def assert_same_run(run: Path, reference: Path, tolerance: float = 1e-5) -> None:
    """Compare metrics line by line, and weights and optimizer state tensor by tensor."""
    ours, theirs = numbers(run), numbers(reference)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=tolerance)
    tensors, expected_tensors = final_tensors(run), final_tensors(reference)
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        difference = (tensors[name].double() - tensor.double()).norm()
        assert difference <= tolerance * tensor.double().norm(), name


# ---------------------------------------------------------------- the same result


@pytest.mark.parametrize(("variant", "engine"), RUNS)
def test_ranks_train_the_same_model_as_one_process(folder: Path, variant: str, engine: str) -> None:
    assert_same_run(folder / f"{variant}-{engine}", folder / f"{variant}-1", TOLERANCES.get(variant, 1e-5))


@pytest.mark.parametrize("engine", ["ddp-2", "fsdp-2", "hsdp-4"])
def test_two_steps_in_bf16_are_exact(folder: Path, engine: str) -> None:
    """Weights that are gathered in bf16 are multiplied in bf16 anyway, and gradients are summed in fp32."""
    saved = [folder / f"bf16-{where}/checkpoints/step-{SAVED:06d}" for where in (engine, "1")]
    ours, theirs = map(optimizer_tensors, saved)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("run", RESUMED)
def test_any_number_of_ranks_resumes_a_checkpoint_of_any_other(folder: Path, run: str) -> None:
    variant = run.partition("-")[0]
    assert_same_run(folder / f"{run}-resumed", folder / f"{variant}-1", TOLERANCES.get(variant, 1e-5))


def test_more_ranks_with_the_same_flags_keep_their_place_in_data_and_schedule(folder: Path) -> None:
    """Two ranks take twice as many rows per step from step 2 on, like one process with twice the batch."""
    run, reference = folder / "epoch-ddp-2", folder / "epoch-reference"
    take_over(folder / "epoch-1", reference)
    assert train_here(command(folder, "packed", "1", reference, "--resume", **EPOCHS, batch_size=4), folder) == 0
    assert_same_run(run, reference)  # rates and num_tokens are in their metrics
    newest, expected = (newest_checkpoint(place) for place in (run, reference))
    assert newest and expected and newest.name == expected.name
    state, expected_state = (read_json(checkpoint / STATE) for checkpoint in (newest, expected))
    assert state["rows_seen"] == expected_state["rows_seen"] == 2 * 2 + (state["step"] - 2) * 4
    alone = read_json((newest_checkpoint(folder / "epoch-1") or run) / STATE)
    assert 0 <= state["rows_seen"] - alone["rows_seen"] < 4
    assert read_metrics(run)[-1]["num_tokens"] >= read_metrics(folder / "epoch-1")[-1]["num_tokens"]


@pytest.mark.parametrize("engine", OF_ENGINE)
def test_every_engine_writes_the_same_files(folder: Path, engine: str) -> None:
    ours, theirs = (folder / f"packed-{where}/checkpoints/step-{STEPS:06d}" for where in (engine, "1"))
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    load_pretrained(ours)


@pytest.mark.parametrize(
    ("variant", "engine"), [run for run in RUNS if run[0] in ("packed", "padded") and run[1] != "hsdp-4"]
)
def test_every_held_out_target_counts_once(folder: Path, variant: str, engine: str) -> None:
    """Five conversations with 115 targets, one in two pieces; at least one of four ranks gets no conversation."""
    ranks = ranks_of(folder / f"{variant}-{engine}")
    evaluated = [rank["evaluated"] for rank in ranks]
    assert sum(evaluated) == 115
    assert engine != "fsdp-4" or 0 in evaluated
    # each rank trains on another number of targets, so a mean of means could not have passed
    assert len({sum(rank["targets"]) for rank in ranks}) == len(ranks)


# ---------------------------------------------------------------- what is sent


def test_gradients_are_sent_only_when_necessary(folder: Path) -> None:
    """With the last micro-batch; between shards with each, since a rank would otherwise hold all gradients in full."""
    for rank in ranks_of(folder / "packed-ddp-2"):
        first, last = rank["sent"]
        assert first == {}
        assert last.keys() == {"allreduce_"}
    for rank in ranks_of(folder / "packed-fsdp-2"):
        first, last = rank["sent"]
        assert first.keys() == {"_allgather_base_", "_reduce_scatter_base_"}
        assert first["_reduce_scatter_base_"] == last["_reduce_scatter_base_"]
    for rank in ranks_of(folder / "packed-hsdp-4"):
        first, last = rank["sent"]
        assert "allreduce_" not in first
        assert last["allreduce_"] > whole_bytes(folder / "packed-1") / 2  # all of the shard


def test_bytes_sent_match_the_theory(folder: Path) -> None:
    size = whole_bytes(folder / "packed-1")
    root = 2 * 512 * WIDTH * 4 + WIDTH * 4  # embedding, head and last norm: not gathered again for the backward pass
    for rank in ranks_of(folder / "packed-ddp-2"):
        assert sum(rank["sent"][-1].values()) == pytest.approx(size, rel=0.01)  # 2 (N - 1) / N
    for rank in ranks_of(folder / "packed-fsdp-4"):
        (sent,) = rank["sent"]
        assert sent["_allgather_base_"] == pytest.approx(3 / 4 * (2 * size - root), rel=0.01)
        assert sent["_reduce_scatter_base_"] == pytest.approx(3 / 4 * size, rel=0.01)


def test_ranks_print_no_warning_about_broadcast_buffers(folder: Path) -> None:
    assert "broadcast_buffers" not in (folder / "2/log").read_text()


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(("variant", "engine"), [run for run in RUNS if run[1] != "ddp-2"])
def test_a_rank_holds_its_share(folder: Path, variant: str, engine: str) -> None:
    """Parameters, gradients and optimizer state, against those of one process. The peak of the gradients, between
    micro-batches, is the same."""
    (whole,), ranks = (ranks_of(folder / f"{variant}-{where}") for where in ("1", engine))
    assert len(ranks) == int(engine[-1])
    shards = 2 if engine == "hsdp-4" else len(ranks)
    for rank in ranks:
        for part in ("parameters", "gradients", "optimizer"):
            assert rank[part] == pytest.approx(whole[part] / shards, rel=0.1), part
        assert rank["held"] <= 1.1 * whole["gradients"] / shards


def test_bf16_halves_what_is_gathered(folder: Path) -> None:
    """Embedding, head and sums of gradients stay fp32; the blocks' matrices are halved."""
    exact, rounded = (ranks_of(folder / f"{variant}-fsdp-2")[0]["sent"][0] for variant in ("packed", "bf16"))
    assert rounded["_reduce_scatter_base_"] == exact["_reduce_scatter_base_"]
    root = 4 * (2 * 512 * WIDTH + WIDTH) / 2
    small = (exact["_allgather_base_"] - root) / 2
    assert rounded["_allgather_base_"] - root == pytest.approx(small, rel=0.05)


def test_no_rank_holds_the_whole_model_while_building_or_saving(folder: Path) -> None:
    """A rank holds its share, the current tensor and the previous one."""
    size = whole_bytes(folder / "packed-1")
    for rank in ranks_of(folder / "packed-fsdp-4"):
        assert rank["peak"] <= 1.1 * size / 4 + 2 * rank["largest"] < size
        assert 0 < rank["saving"] <= 2 * rank["gathered"] < size
