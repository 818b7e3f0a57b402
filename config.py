"""Every hyperparameter with its default and its reason, and the presets.

Model fields are named as in DeepSeek-V2's `config.json` on Hugging Face, training fields as in
`transformers.TrainingArguments` and TRL's `SFTConfig`. Three ways to set one: edit a value here, add a preset, or pass
a flag: `python train_sft.py tiny --learning-rate 1e-3 --model.aux-loss-alpha 0.01`.

A run's model is that of the checkpoint it starts from (`init_from`), with the model fields that the preset and the
flags set. If they contradict the shape of its weights, the run is refused. The defaults of `ModelConfig` are for runs
from scratch.

>>> mine = TINY.changed(learning_rate=1e-3, aux_loss_alpha=0.01)
>>> mine.optimizer.learning_rate, mine.model.aux_loss_alpha, sorted(mine.model_changes)
(0.001, 0.01, ['aux_loss_alpha'])
>>> mine.changed(warmup_steps=-1).validate()
Traceback (most recent call last):
config.UserError: warmup_steps is -1; it must not be negative
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes, Suppress

Dtype = Literal["auto", "float32", "bfloat16"]
Quantization = Literal["nf4"]
GpuName = Literal["h100", "h200", "b200", "a100", "l40s", "4090", "3090"]


class UserError(ValueError):
    """An error that the user can fix. The commands print it as one line, without a traceback."""


@dataclass
class RopeScaling:
    """YaRN (https://arxiv.org/abs/2309.00071): stretches the context of a model that was trained on a shorter one."""

    type: Literal["yarn"] = "yarn"  # the only type DeepSeek-V2 uses
    factor: float = 40.0  # new context length over the original one
    original_max_position_embeddings: int = 4096  # context length of the pre-training
    beta_fast: float = 32.0  # dimensions that rotate more often than this over the original context are unchanged
    beta_slow: float = 1.0  # dimensions that rotate less often than this are slowed down by the whole factor
    mscale: float = 1.0  # cos and sin are scaled by m(mscale) / m(mscale_all_dim), m(s) = 0.1 s ln(factor) + 1 ...
    mscale_all_dim: float = 0.0  # ... and the softmax scale by m(mscale_all_dim) squared


@dataclass
class ModelConfig:
    """The shape of a DeepSeek-V2 (https://arxiv.org/abs/2405.04434). Defaults are for runs from scratch."""

    vocab_size: int = 100_280  # entries of embedding and output head; from scratch, the tokenizer's size
    hidden_size: int = 1024  # width of the residual stream (the paper's d)
    num_hidden_layers: int = 4  # transformer blocks
    num_attention_heads: int = 16  # attention heads (n_h)
    q_lora_rank: int | None = None  # rank of the queries' latent (d_c'); None: not compressed, as in V2-Lite
    kv_lora_rank: int = 512  # rank of the latent of keys and values (d_c): cached, together with the rotary key
    qk_nope_head_dim: int = 128  # width of a head's query and key without position
    qk_rope_head_dim: int = 64  # width of the rotary part; its key is shared by all heads (d_h^R)
    v_head_dim: int = 128  # width of a head's value
    intermediate_size: int = 4096  # width of the feed-forward network in dense layers
    first_k_dense_replace: int = 1  # number of leading layers with a dense feed-forward network instead of experts
    moe_intermediate_size: int = 1024  # width of one expert
    n_routed_experts: int = 64  # experts that a router chooses from (N_r)
    n_shared_experts: int = 2  # experts that process every token (N_s)
    num_experts_per_tok: int = 6  # experts chosen per token (K_r)
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"  # best K_r of all, or of the best groups (2.2.2)
    n_group: int = 1  # groups of experts: the paper's devices (D), for group-limited routing and two balance losses
    topk_group: int = 1  # groups that a token's experts may come from (M)
    routed_scaling_factor: float = 1.0  # multiplies the weights of the chosen experts
    norm_topk_prob: bool = False  # normalise the weights of the chosen experts to a sum of one
    # Factor of the expert-level balance loss (alpha_1, equation 23), averaged over conversations, summed over layers.
    aux_loss_alpha: float = 0.003
    device_aux_loss_alpha: float = 0.0  # factor of the device-level balance loss (alpha_2, equation 26)
    communication_aux_loss_alpha: float = 0.0  # factor of the communication balance loss (alpha_3, equation 29)
    max_position_embeddings: int = 4096  # longest sequence the model is made for
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    # YaRN; None: plain RoPE. It extends a context that was already trained, so no run from scratch needs it. Any of its
    # fields turns it on: --model.rope-scaling.factor 4.
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6  # added to the variance in RMSNorm
    initializer_range: float = 0.02  # deviation of the initial weights (the paper's 0.006 is for a width of 5,120)
    tie_word_embeddings: bool = False  # one matrix for embedding and head: saves parameters with a large vocabulary

    def validate(self) -> None:
        """Raise UserError for a shape that cannot be built."""
        check_ranges(self, "model.")
        if self.rope_scaling is not None:
            check_ranges(self.rope_scaling, "model.rope_scaling.")
            if self.rope_scaling.beta_fast < self.rope_scaling.beta_slow:
                raise UserError("model.rope_scaling.beta_fast is below beta_slow")
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank"):
            if getattr(self, name) % 2:
                raise UserError(f"model.{name} must be even: RoPE rotates pairs, and transformers expects it")
        chosen, routed, groups = self.num_experts_per_tok, self.n_routed_experts, self.n_group
        width, heads = self.hidden_size, self.num_attention_heads
        if routed % groups:
            raise UserError(f"model.n_group ({groups}) must divide model.n_routed_experts ({routed})")
        if self.topk_group > groups:
            raise UserError(f"model.topk_group ({self.topk_group}) is above model.n_group ({groups})")
        if width % heads:
            raise UserError(f"model.num_attention_heads ({heads}) must divide model.hidden_size ({width})")
        reachable = self.topk_group * routed // groups if self.topk_method == "group_limited_greedy" else routed
        if chosen > reachable:
            raise UserError(f"model.num_experts_per_tok is {chosen}, but a token can reach {reachable} routed experts")


@dataclass
class DataConfig:
    """Datasets, and how they become tokens."""

    # Hub names, directories, .jsonl/.json/.csv/.tsv/.txt (or .gz of them) and .parquet files, `chitchat`,
    # `chitchat_text` or `chatterbot`. With :N at its end, a dataset is used N times per epoch.
    dataset: tuple[str, ...] = ("HuggingFaceH4/ultrachat_200k",)
    # Which column plays which part, for rows in no known format: "prompt=Frage" "completion=Antwort". The parts are
    # messages, prompt, completion, text, system, tools and history.
    columns: tuple[str, ...] = ()
    train_split: str = "train_sft"  # split to train on
    eval_split: str = "test_sft"  # split to evaluate on; not read if eval_steps is 0
    eval_fraction: float = 0.05  # share of the training split to evaluate on if there is no eval_split; 0: none
    max_seq_len: int = 4096  # tokens per row
    # split: a conversation longer than a row becomes several, cut between turns; truncate: only its beginning is kept.
    long_conversations: Literal["split", "truncate"] = "split"
    packing: bool = True  # fill rows with several conversations (best fit) instead of padding; the loss is the same
    shuffle: bool = True  # new data order every epoch
    skip_bad_rows: bool = False  # write malformed rows to OUTPUT_DIR/skipped.jsonl instead of stopping the run
    num_proc: int = 2  # processes that tokenise
    tokenizer: str = "cl100k_base"  # or a directory with a tokenizer.json; with init_from, the checkpoint's is used
    add_control_tokens: bool = False  # add the chat template's control tokens that init_from's model lacks
    chat_template: str | None = None  # chatml, llama3, deepseek (tokenizer.py); None: the tokenizer's own, else chatml


@dataclass
class BatchConfig:
    """Rows per step and steps per run."""

    batch_size: int = 4  # rows per micro-batch and process: as many as fit into memory
    gradient_accumulation_steps: int = 4  # micro-batches per step: global batch = this * batch_size * processes
    num_train_epochs: float = 1.0  # passes over the data if max_steps is 0 or --dataset is given without --max-steps
    max_steps: int = 0  # optimizer steps; 0: as many as num_train_epochs needs
    early_stopping_patience: int = 0  # stop after this many evaluations without a new lowest eval_loss; 0: never

    def rows_per_step(self, processes: int) -> int:
        return self.batch_size * self.gradient_accumulation_steps * processes

    def remaining_steps(self, rows_per_epoch: int, processes: int, rows_seen: int = 0) -> int:
        """Return how many steps complete the epochs of a run after `rows_seen` rows; `max_steps` plays no part."""
        rows = self.num_train_epochs * rows_per_epoch - rows_seen
        return math.ceil(rows / self.rows_per_step(processes))


@dataclass
class OptimizerConfig:
    """How the weights move."""

    # adamw, or muon for the matrices of blocks and adapters (adamw for the rest): muon learns faster from scratch.
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-5  # peak learning rate, the same for AdamW and Muon
    min_learning_rate_ratio: float = 0.1  # the cosine ends at this share of the peak
    warmup_steps: int = 50  # steps of linear warm-up, while Adam's second moments are still rough
    weight_decay: float = 0.1  # decoupled decay, on matrices only: there is no reason to pull norms to zero
    adam_beta1: float = 0.9  # decay of the mean of gradients
    adam_beta2: float = 0.95  # decay of the mean of squared gradients; 0.95 forgets a spike sooner than Adam's 0.999
    max_grad_norm: float = 1.0  # gradients with a larger norm are scaled down to it


@dataclass
class ComputeConfig:
    """Device, precision and parallelism."""

    dtype: Dtype = "auto"  # bfloat16: products in it (autocast), weights and optimizer fp32; auto: if hardware has it
    device: str = "auto"  # cuda, cpu, ...; "auto": CUDA if available
    seed: int = 42  # seeds weights, data order and dropout
    # Runs on one CPU repeat bit for bit; on CUDA, FlashAttention's backward pass and index_add sum in random order.
    # This selects torch's deterministic algorithms, which are slower and need more memory.
    deterministic: bool = False
    # torch.compile every block: slow first steps, faster ones after; needs a C++ compiler. With FlashAttention (CUDA,
    # heads up to 256), packed rows need at most two graphs: one of a dense block and one of a block with experts.
    compile: bool = False
    # Recompute blocks in the backward pass: 1/3 more compute, much less memory. A GPU with room for all activations
    # does not, unless the flag is given.
    gradient_checkpointing: bool = False
    # Under torchrun: ddp has a full copy per process, fsdp a shard per process, hsdp a copy per node in shards.
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"


@dataclass
class CheckpointConfig:
    """Start and output of a run."""

    # Start from a directory in Hugging Face layout or a run's newest checkpoint; none: from random weights.
    init_from: str | None = None
    output_dir: str = ""  # where the run is written; "": runs/<preset>
    # --resume: continue the newest checkpoint in output_dir, with its configuration and the flags that are given.
    # --resume auto: do so if output_dir holds a run that this command can continue, otherwise start a new one.
    resume: bool | Literal["auto"] = False
    save_steps: int = 500  # steps between checkpoints; 0: only at the end
    save_total_limit: int = 2  # checkpoints kept; older ones are deleted once a new one is complete
    save_best: bool = False  # also save at every new lowest eval_loss, and keep that checkpoint next to the newest


@dataclass
class LoraConfig:
    """Adapters instead of all weights (lora.py)."""

    lora_rank: int = 0  # rank of the adapters; 0: full fine-tuning
    lora_alpha: float = 16.0  # the adapters' output is scaled by alpha / rank
    lora_dropout: float = 0.0  # dropout on the adapters' input
    # Names of the modules that get an adapter; add experts.gate_up_proj and experts.down_proj for the routed experts.
    lora_target_modules: tuple[str, ...] = (
        "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj",
        "down_proj",
    )  # fmt: skip
    quantize: Quantization | None = None  # nf4: hold the blocks' matrices in 4 bits (quantization.py)


@dataclass
class WatchConfig:
    """Reports of a run: evaluations, metrics, dry run."""

    eval_steps: int = 250  # steps between evaluations; 0: none
    eval_max_rows: int = 0  # held-out rows per evaluation; 0: all
    logging_steps: int = 1  # steps between lines in metrics.jsonl
    # Prompts answered at each evaluation, to see the model learn. Under fsdp and hsdp, where no process has the whole
    # model, there are no samples.
    sample_prompts: tuple[str, ...] = ("Hello! How are you?", "What did you do today?", "Do you like music?")
    report_to: Literal["none", "wandb", "trackio", "tensorboard"] = "none"  # tracker that gets the metrics too
    evaluate_only: bool = False  # print eval_loss and eval_bpb of init_from on the dataset; train and write nothing
    dry_run: bool = False  # train nothing: print what the run would read, and its memory, network traffic and time
    dry_run_ranks: int = 1  # plan for this many processes, eight per node
    dry_run_gpu: GpuName = "h100"  # GPU whose time and memory are predicted
    debug: bool = False  # show Python's traceback with an error


@dataclass
class TrainConfig:
    """Supervised fine-tuning: train_sft.py [tiny|base|mini|v2_lite] [--field value ...]. The preset is mini by default
    if CUDA is available, otherwise tiny. On the command line, only the model's fields need their group's name."""

    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    batch: OmitArgPrefixes[BatchConfig] = field(default_factory=BatchConfig)
    optimizer: OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    compute: OmitArgPrefixes[ComputeConfig] = field(default_factory=ComputeConfig)
    checkpoint: OmitArgPrefixes[CheckpointConfig] = field(default_factory=CheckpointConfig)
    lora: OmitArgPrefixes[LoraConfig] = field(default_factory=LoraConfig)
    watch: OmitArgPrefixes[WatchConfig] = field(default_factory=WatchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    changed_fields: Suppress[frozenset[str]] = frozenset()  # names that `changed` was called with

    @property
    def groups(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in vars(self) if name != "changed_fields"}

    @property
    def model_changes(self) -> set[str]:
        """Names of the model's fields that this configuration sets: by `changed` or a flag (as rope_scaling.factor),
        or to another value than the default. `init_from` decides the others."""
        default = vars(ModelConfig())
        named = {name for name in self.changed_fields if name.split(".")[0] in default}
        parts = {name.split(".")[0] for name in named if "." in name}
        return named | {name for name, value in vars(self.model).items() if value != default[name]} - parts

    def validate(self) -> None:
        """Raise UserError for values that no run can have."""
        self.model.validate()
        for group in self.groups.values():
            check_ranges(group)
        compute, model, lora = self.compute, self.model, self.lora
        length, context = self.data.max_seq_len, model.max_position_embeddings
        if length < 2:
            raise UserError("max_seq_len is 1; a row needs a token to learn from and one to learn")
        if length > context:
            raise UserError(f"max_seq_len ({length}) is above model.max_position_embeddings ({context})")
        if self.optimizer.min_learning_rate_ratio > 1:
            raise UserError("min_learning_rate_ratio must be at most 1: the rate falls from its peak")
        if compute.compile and compute.dtype == "float32":
            raise UserError("compile needs dtype bfloat16: torch cannot trace the grouped product in float32")
        if compute.compile and compute.parallel != "ddp":
            raise UserError("compile works only with parallel ddp: FSDP gathers norms in the middle of each block")
        aligned = 4 if compute.dtype == "float32" else 8  # the grouped product takes rows of whole 16 bytes
        if model.hidden_size % aligned or model.moe_intermediate_size % aligned:
            words = f"model.hidden_size and model.moe_intermediate_size must be multiples of {aligned}"
            raise UserError(f"{words} in {compute.dtype}, for the grouped product")
        if (self.checkpoint.save_best or self.batch.early_stopping_patience) and not self.watch.eval_steps:
            raise UserError("save_best and early_stopping_patience need evaluations: set eval_steps")
        for name in ("lora_rank", "add_control_tokens", "evaluate_only"):
            if self.flat()[name] and self.checkpoint.init_from is None:
                raise UserError(f"{name} needs init_from, a trained model")
        if lora.quantize and not lora.lora_rank:
            raise UserError("quantize needs lora_rank: with 4-bit weights only adapters can be trained")
        if lora.quantize and (compute.parallel != "ddp" or compute.compile):
            raise UserError("quantize works only with parallel ddp and without compile")
        if self.data.add_control_tokens and lora.lora_rank:
            raise UserError("add_control_tokens adds rows to embedding and head, which adapters do not train")

    def too_few_rows(self, rows: int, processes: int) -> str:
        """Return why a run with this number of rows per epoch is refused, "" if it has a step."""
        if rows >= self.batch.rows_per_step(processes):
            return ""
        too_few = f"{', '.join(self.data.dataset)}: {rows} rows do not fill one step of"
        return f"{too_few} {self.batch.rows_per_step(processes)}; lower batch_size or gradient_accumulation_steps"

    def flat(self) -> dict[str, Any]:
        """Return what a run's config.json holds: all fields by their own unique names, and the dict `model`."""
        groups = {name: asdict(group) for name, group in self.groups.items()}
        model = groups.pop("model")
        return {name: value for group in groups.values() for name, value in group.items()} | {"model": model}

    def changed(self, **values: Any) -> "TrainConfig":
        """Return a copy with other values of some fields, which are named without their group."""
        groups, names = {}, self.changed_fields.union(values)
        for key, group in self.groups.items():
            groups[key] = replace(group, **{name: values.pop(name) for name in vars(group) if name in values})
        return replace(self, **groups | values, changed_fields=names)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn {"model": {"hidden_size": 64}} into {"model.hidden_size": 64}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


# Numbers must be positive, except for these, and below these limits.
MAY_BE_ZERO = {
    "first_k_dense_replace", "aux_loss_alpha", "device_aux_loss_alpha", "communication_aux_loss_alpha", "mscale",
    "mscale_all_dim", "eval_fraction", "max_steps", "early_stopping_patience", "min_learning_rate_ratio",
    "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "seed", "save_steps", "lora_rank", "lora_alpha",
    "lora_dropout", "eval_steps", "eval_max_rows",
}  # fmt: skip
LIMITS = {"eval_fraction": 1, "adam_beta1": 1, "adam_beta2": 1, "lora_dropout": 1, "seed": 2**63}
# A config.json can come from anyone: no size may overflow or exhaust memory before the weight files are looked at.
LIMITS |= {field.name: 10**6 for field in fields(ModelConfig) if field.type in (int, int | None)}
LIMITS |= {"num_hidden_layers": 1000, "max_position_embeddings": 2**63}


def check_ranges(group: Any, prefix: str = "") -> None:
    """Raise UserError if a number of the group is out of range."""
    for name, value in vars(group).items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not (value > 0 or (value == 0 and name in MAY_BE_ZERO)):
            rule = "not be negative" if name in MAY_BE_ZERO else "be positive"
            raise UserError(f"{prefix}{name} is {value}; it must {rule}")
        if value >= LIMITS.get(name, math.inf):
            raise UserError(f"{prefix}{name} is {value}; it must be below {LIMITS.get(name, math.inf)}")


# One GPU: the shape this project began with.
MINI = TrainConfig()

# Any CPU, no network, under five minutes: fine-tunes base/, the small model next to this file, whose shape it takes.
# How learning rate and optimizer were chosen: benchmarks/README.md.
TINY = MINI.changed(
    dataset=("chitchat", "chatterbot:120"), train_split="train", eval_split="test", max_seq_len=512,
    batch_size=4, gradient_accumulation_steps=1, max_steps=1000, num_train_epochs=3.0,
    # Gradients of small batches are noisy: adam_beta2 0.99 needs a tenth fewer steps to the same loss than 0.95. At the
    # rate that learns fastest from scratch, 4e-3, the base would forget more than it learns.
    optimizer="muon", learning_rate=1.5e-3, min_learning_rate_ratio=0.01, warmup_steps=15, adam_beta2=0.99,
    init_from=str(Path(__file__).parent / "base"), save_steps=200, eval_steps=200,
)  # fmt: skip

# Pre-trains a model of base/'s shape on text: python train_sft.py base --dataset FILE. Over an hour on one core.
BASE = TINY.changed(
    dataset=("chitchat_text",), init_from=None, batch_size=8, max_steps=11_000, learning_rate=4e-3, warmup_steps=100,
    eval_steps=0, save_steps=500, sample_prompts=(),
    vocab_size=8192, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=512, moe_intermediate_size=128,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, max_position_embeddings=1024,
)  # fmt: skip

# DeepSeek-V2-Lite as published (15.7 B parameters), for init_from.
V2_LITE = MINI.changed(
    batch_size=1, gradient_accumulation_steps=16, gradient_checkpointing=True, chat_template="deepseek",
    vocab_size=102_400, hidden_size=2048, num_hidden_layers=27, intermediate_size=10_944, moe_intermediate_size=1408,
    aux_loss_alpha=0.001, max_position_embeddings=163_840,
    rope_scaling=RopeScaling(mscale=0.707, mscale_all_dim=0.707),
)  # fmt: skip

PRESETS = {"tiny": TINY, "base": BASE, "mini": MINI, "v2_lite": V2_LITE}
