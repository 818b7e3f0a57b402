"""Every hyperparameter, its default and the reason for it; and the presets.

The model's fields have the names of DeepSeek-V2's `config.json` on Hugging Face, the training fields those of
`transformers.TrainingArguments` and TRL's `SFTConfig`. Edit a value here, or override it on the command line:
`python train_sft.py tiny --learning-rate 1e-3 --model.num-hidden-layers 6`.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Dtype = Literal["auto", "float32", "bfloat16"]


class UserError(ValueError):
    """Something the user can mend. The entry points print it as one line, without a traceback (cli.py)."""


@dataclass
class RopeScaling:
    """YaRN (https://arxiv.org/abs/2309.00071): stretches the context of a model that was trained on a shorter one."""

    # "yarn" is the only type DeepSeek-V2 uses.
    type: str = "yarn"
    # New context length over the original one.
    factor: float = 40.0
    # Context length of the pre-training.
    original_max_position_embeddings: int = 4096
    # Dimensions that rotate more than this many times over the original context keep their frequency.
    beta_fast: float = 32.0
    # Dimensions that rotate fewer than this many times are slowed down by the whole factor.
    beta_slow: float = 1.0
    # cos and sin are multiplied by m(mscale) / m(mscale_all_dim), with m(s) = 0.1 s ln(factor) + 1 ...
    mscale: float = 1.0
    # ... and the softmax scale by m(mscale_all_dim) squared.
    mscale_all_dim: float = 0.0


@dataclass
class ModelConfig:
    """The shape of a DeepSeek-V2 (https://arxiv.org/abs/2405.04434)."""

    # Entries of the embedding and of the output head; set from the tokenizer when a run starts from scratch.
    vocab_size: int = 100_280
    # Width of the residual stream (the paper's d).
    hidden_size: int = 1024
    # Number of transformer blocks.
    num_hidden_layers: int = 4
    # Attention heads (n_h).
    num_attention_heads: int = 16
    # Rank of the latent that queries are compressed to (d_c'); None: queries are not compressed, as in V2-Lite.
    q_lora_rank: int | None = None
    # Rank of the latent that keys and values share (d_c): with the rotary key, all that the cache has to hold.
    kv_lora_rank: int = 512
    # Width of a head's query and key without position.
    qk_nope_head_dim: int = 128
    # Width of the rotary part; its key is shared by all heads (d_h^R).
    qk_rope_head_dim: int = 64
    # Width of a head's value.
    v_head_dim: int = 128
    # Width of the dense feed-forward network in the first layers.
    intermediate_size: int = 4096
    # That many first layers have a dense feed-forward network instead of experts.
    first_k_dense_replace: int = 1
    # Width of one expert.
    moe_intermediate_size: int = 1024
    # Experts that a router chooses from (N_r).
    n_routed_experts: int = 64
    # Experts that every token passes (N_s).
    n_shared_experts: int = 2
    # Experts chosen for a token (K_r).
    num_experts_per_tok: int = 6
    # "greedy": the best K_r of all; "group_limited_greedy": only from the best `topk_group` groups (section 2.2.2).
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    # Groups of experts: the paper's devices (D), for group-limited routing and two of the balance losses.
    n_group: int = 1
    # Groups that a token's experts may come from (M).
    topk_group: int = 1
    # Multiplies the weights of the chosen experts.
    routed_scaling_factor: float = 1.0
    # Make the weights of the chosen experts sum to one.
    norm_topk_prob: bool = False
    # Factor of the expert-level balance loss (alpha_1, equation 23), averaged over conversations, summed over layers.
    aux_loss_alpha: float = 0.003
    # Factor of the device-level balance loss (alpha_2, equation 26).
    device_aux_loss_alpha: float = 0.0
    # Factor of the communication balance loss (alpha_3, equation 29).
    communication_aux_loss_alpha: float = 0.0
    # Longest sequence the model is made for.
    max_position_embeddings: int = 4096
    # Base of the rotary frequencies.
    rope_theta: float = 10_000.0
    # YaRN; None: plain RoPE. It extends a context that was already trained, so no run from scratch needs it. On the
    # command line any of its fields turns it on: --model.rope-scaling.factor 4.
    rope_scaling: RopeScaling | None = None
    # Added to the variance in RMSNorm.
    rms_norm_eps: float = 1e-6
    # Standard deviation of the initial weights (the paper's 0.006 is for a width of 5,120).
    initializer_range: float = 0.02
    # One matrix for embedding and head: worth it where the vocabulary is most of the model.
    tie_word_embeddings: bool = False

    def validate(self) -> None:
        """Refuse a shape that cannot be built. Raises UserError."""
        balance = ("aux_loss_alpha", "device_aux_loss_alpha", "communication_aux_loss_alpha")
        check_numbers(self, ("first_k_dense_replace", *balance), "model.")
        if self.rope_scaling is not None:
            check_numbers(self.rope_scaling, ("mscale", "mscale_all_dim"), "model.rope_scaling.")
        chosen, routed, groups = self.num_experts_per_tok, self.n_routed_experts, self.n_group
        check(self.qk_rope_head_dim % 2 == 0, "model.qk_rope_head_dim must be even: RoPE rotates pairs")
        check(chosen <= routed, f"model.num_experts_per_tok is {chosen}, but there are {routed} routed experts")
        check(routed % groups == 0, f"model.n_group ({groups}) must divide model.n_routed_experts ({routed})")
        check(self.topk_group <= groups, f"model.topk_group ({self.topk_group}) is above model.n_group ({groups})")
        check(
            self.hidden_size % self.num_attention_heads == 0,
            f"model.num_attention_heads ({self.num_attention_heads}) must divide model.hidden_size "
            f"({self.hidden_size}): transformers refuses such a checkpoint",
        )
        reach = self.topk_group * routed // groups if self.topk_method == "group_limited_greedy" else routed
        check(chosen <= reach, f"model.num_experts_per_tok is {chosen}, but topk_group leaves {reach} experts")


@dataclass
class DataConfig:
    """What is learned from."""

    # Hub names, dataset directories, .jsonl/.json/.parquet files, `chitchat`, `chitchat_text` or `chatterbot`; each
    # may end in :N, and is then passed N times an epoch.
    dataset: tuple[str, ...] = ("HuggingFaceH4/ultrachat_200k",)
    # Split to train on.
    train_split: str = "train_sft"
    # Split to evaluate on; only read where eval_steps is not 0.
    eval_split: str = "test_sft"
    # Tokens a row; longer conversations are cut.
    max_seq_len: int = 4096
    # Fill rows with several conversations (best fit) instead of padding one a row. The loss is the same either way.
    packing: bool = True
    # New data order every epoch.
    shuffle: bool = True
    # Drop and count malformed rows instead of stopping at the first.
    skip_bad_rows: bool = False
    # Processes that tokenise.
    num_proc: int = 2


@dataclass
class TokenizerConfig:
    """How conversations become tokens."""

    # `cl100k_base`, or a directory with a tokenizer.json. With init_from, that directory's own is taken.
    tokenizer: str = "cl100k_base"
    # Chat template: chatml, llama3 or deepseek (tables in tokenizer.py); None: the tokenizer's own, else chatml.
    chat_template: str | None = None


@dataclass
class BatchConfig:
    """How many rows a step takes, and how many steps a run."""

    # Rows a micro-batch and process: as many as memory holds.
    batch_size: int = 4
    # Micro-batches a step: global batch = batch_size * gradient_accumulation_steps * processes.
    gradient_accumulation_steps: int = 4
    # Passes over the data; max_steps wins if it is set.
    num_train_epochs: float = 1.0
    # Optimizer steps; 0: as many as num_train_epochs takes.
    max_steps: int = 0


@dataclass
class OptimizerConfig:
    """How the weights move."""

    # adamw, or muon for the blocks' matrices, adapters' too (adamw stays for the rest): it learns faster from scratch.
    optimizer: Literal["adamw", "muon"] = "adamw"
    # Peak learning rate, the same for AdamW and Muon.
    learning_rate: float = 2e-5
    # The rate that the cosine ends at.
    min_learning_rate: float = 2e-6
    # Steps of linear warm-up, while Adam's second moments are still rough.
    warmup_steps: int = 50
    # Decoupled decay; on matrices only, since norms have nothing to be pulled to.
    weight_decay: float = 0.1
    # Decay of the mean of gradients.
    adam_beta1: float = 0.9
    # Decay of the mean of squared gradients; 0.95 forgets a spike sooner than Adam's 0.999.
    adam_beta2: float = 0.95
    # Gradients with a larger norm are scaled down to it.
    max_grad_norm: float = 1.0


@dataclass
class ComputeConfig:
    """Where and how it is computed."""

    # bfloat16: matrix products in bf16 (autocast); weights and optimizer stay fp32. "auto": where the hardware has it.
    dtype: Dtype = "auto"
    # cuda, cpu, ...; "auto": CUDA where there is one.
    device: str = "auto"
    # Seeds weights, data order and dropout.
    seed: int = 42
    # torch.compile every block: slow first steps, faster ones after; needs a C++ compiler.
    compile: bool = False
    # Recompute a block's activations in the backward pass: a third more compute, much less memory.
    gradient_checkpointing: bool = False
    # Engine under torchrun: ddp keeps a copy of everything per process, fsdp shards it.
    parallel: Literal["ddp", "fsdp"] = "ddp"


@dataclass
class CheckpointConfig:
    """Where a run begins, and what it leaves."""

    # Start from a checkpoint directory in Hugging Face layout (or a run directory, meaning its newest checkpoint).
    init_from: str | None = None
    # Where the run is written; "": runs/<preset>.
    output_dir: str = ""
    # Continue the newest checkpoint in output_dir, exactly.
    resume: bool = False
    # Steps between checkpoints; 0: only at the end.
    save_steps: int = 500
    # Checkpoints kept; older ones go once a new one stands.
    save_total_limit: int = 2


@dataclass
class LoraConfig:
    """Adapters instead of all weights (lora.py)."""

    # Rank of the adapters; 0: full fine-tuning.
    lora_rank: int = 0
    # The adapters' output is scaled by alpha / rank.
    lora_alpha: float = 16.0
    # Dropout on the adapters' input.
    lora_dropout: float = 0.0
    # Names of the modules that get an adapter; add experts.gate_up_proj and experts.down_proj for the routed experts.
    lora_target_modules: tuple[str, ...] = (
        "q_proj",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


@dataclass
class WatchConfig:
    """How to see what goes on."""

    # Steps between evaluations; 0: none.
    eval_steps: int = 250
    # Rows of the held-out split used at an evaluation; 0: all. The last evaluation always takes all.
    eval_max_rows: int = 0
    # Steps between lines in metrics.jsonl.
    logging_steps: int = 1
    # Prompts answered at each evaluation, so that one sees the model learn.
    sample_prompts: tuple[str, ...] = ("Hello! How are you?", "What did you do today?", "Do you like music?")
    # Tracker that gets the metrics too, if it is installed.
    report_to: Literal["none", "wandb", "trackio", "tensorboard"] = "none"
    # Show Python's traceback with an error.
    debug: bool = False


@dataclass
class TrainConfig(
    WatchConfig,
    LoraConfig,
    CheckpointConfig,
    ComputeConfig,
    OptimizerConfig,
    BatchConfig,
    TokenizerConfig,
    DataConfig,
):
    """One run of supervised fine-tuning: the fields of all groups above, and the model's. (The bases stand in reverse,
    since a dataclass takes the last one's fields first.)"""

    # The model's shape, for runs that start from scratch.
    model: ModelConfig = field(default_factory=ModelConfig)

    def validate(self) -> None:
        """Refuse values that no run can have. Raises UserError."""
        self.model.validate()
        below_one = ("adam_beta1", "adam_beta2", "lora_dropout")
        switches = ("max_steps", "warmup_steps", "save_steps", "eval_steps", "eval_max_rows", "lora_rank")
        check_numbers(self, (*below_one, *switches, "min_learning_rate", "weight_decay", "lora_alpha", "seed"))
        for name in below_one:
            check(getattr(self, name) < 1, f"{name} is {getattr(self, name)}; it must be below 1")
        widths = self.model.hidden_size % 8 == 0 and self.model.moe_intermediate_size % 8 == 0
        check(
            self.dtype == "float32" or widths,
            "in bfloat16 the grouped product needs model.hidden_size and model.moe_intermediate_size in multiples of 8",
        )
        bf16_only = "compile needs dtype bfloat16: torch cannot trace the grouped product in float32"
        check(not self.compile or self.dtype != "float32", bf16_only)
        check(self.seed < 2**63, f"seed is {self.seed}; it must be below 2**63")
        check(self.max_seq_len >= 2, "max_seq_len is 1; a row needs a token to learn from and one to learn")
        check(
            self.max_seq_len <= self.model.max_position_embeddings,
            f"max_seq_len ({self.max_seq_len}) is above model.max_position_embeddings "
            f"({self.model.max_position_embeddings})",
        )


def check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check_numbers(config: Any, may_be_zero: Collection[str], prefix: str = "") -> None:
    """Every number is finite and positive, or zero where that has a meaning."""
    for name, value in vars(config).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            if name in may_be_zero:
                check(0 <= value < math.inf, f"{prefix}{name} is {value}; it must not be negative")
            else:
                check(0 < value < math.inf, f"{prefix}{name} is {value}; it must be positive")


# One GPU: the shape this project began with.
MINI = TrainConfig()

# Any CPU, no network, under five minutes: the same parts, but two layers and a vocabulary of 8,192 entries. How it came
# to this shape, rate and optimizer: benchmarks/README.md.
TINY = TrainConfig(
    dataset=("chitchat",),
    train_split="train",
    eval_split="test",
    max_seq_len=512,
    batch_size=4,
    gradient_accumulation_steps=1,
    max_steps=1000,
    optimizer="muon",
    learning_rate=4e-3,
    min_learning_rate=3e-5,
    warmup_steps=15,
    adam_beta2=0.99,  # gradients of small batches are noisy: a tenth fewer steps to the same loss than with 0.95
    eval_steps=200,
    save_steps=200,
    model=ModelConfig(
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
    ),
)

# Pre-training a model of tiny's kind on text: python train_sft.py base --dataset FILE. Half an hour and more on a CPU.
BASE = replace(
    TINY,
    dataset=("chitchat_text",),
    batch_size=8,
    max_steps=6000,
    warmup_steps=100,
    eval_steps=0,
    save_steps=500,
    sample_prompts=(),
)

# DeepSeek-V2-Lite as published (15.7 B parameters), for init_from.
V2_LITE = TrainConfig(
    batch_size=1,
    gradient_accumulation_steps=16,
    gradient_checkpointing=True,
    chat_template="deepseek",
    model=ModelConfig(
        vocab_size=102_400,
        hidden_size=2048,
        num_hidden_layers=27,
        intermediate_size=10_944,
        moe_intermediate_size=1408,
        aux_loss_alpha=0.001,
        max_position_embeddings=163_840,
        rope_scaling=RopeScaling(mscale=0.707, mscale_all_dim=0.707),
    ),
)

PRESETS = {"tiny": TINY, "base": BASE, "mini": MINI, "v2_lite": V2_LITE}
