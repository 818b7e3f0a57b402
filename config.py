"""Every hyperparameter, its default and the reason for it; and the presets.

The model's fields have the names of DeepSeek-V2's `config.json` on Hugging Face, the training fields those of
`transformers.TrainingArguments` and TRL's `SFTConfig`. Edit a value here, or override it on the command line, which
needs a group's name for the model only: `python train_sft.py tiny --learning-rate 1e-3 --model.num-hidden-layers 6`.
"""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes

Dtype = Literal["auto", "float32", "bfloat16"]
Quantization = Literal["nf4"]


class UserError(ValueError):
    """An error that the user can fix. The commands print it as one line, without a traceback."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check_numbers(group: Any, may_be_zero: Collection[str], prefix: str = "") -> None:
    """Every number of a group is finite and positive, or zero where that has a meaning."""
    for name, value in vars(group).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            right, rule = (value >= 0, "not be negative") if name in may_be_zero else (value > 0, "be positive")
            check(right and value < math.inf, f"{prefix}{name} is {value}; it must {rule}")


@dataclass
class RopeScaling:
    """YaRN (https://arxiv.org/abs/2309.00071): stretches the context of a model that was trained on a shorter one."""

    type: Literal["yarn"] = "yarn"  # the only type DeepSeek-V2 uses
    factor: float = 40.0  # new context length over the original one
    original_max_position_embeddings: int = 4096  # context length of the pre-training
    beta_fast: float = 32.0  # dimensions that rotate more often than this over the original context keep their pace
    beta_slow: float = 1.0  # dimensions that rotate less often than this are slowed down by the whole factor
    mscale: float = 1.0  # cos and sin are times m(mscale) / m(mscale_all_dim), with m(s) = 0.1 s ln(factor) + 1 ...
    mscale_all_dim: float = 0.0  # ... and the softmax scale times m(mscale_all_dim) squared


@dataclass
class ModelConfig:
    """The shape of a DeepSeek-V2 (https://arxiv.org/abs/2405.04434), for runs that start from scratch."""

    vocab_size: int = 100_280  # entries of embedding and output head; the tokenizer's when a run starts from scratch
    hidden_size: int = 1024  # width of the residual stream (the paper's d)
    num_hidden_layers: int = 4  # transformer blocks
    num_attention_heads: int = 16  # attention heads (n_h)
    q_lora_rank: int | None = None  # rank of the queries' latent (d_c'); None: they are not compressed, as in V2-Lite
    kv_lora_rank: int = 512  # rank of keys' and values' latent (d_c): with the rotary key, all that the cache holds
    qk_nope_head_dim: int = 128  # width of a head's query and key without position
    qk_rope_head_dim: int = 64  # width of the rotary part; its key is shared by all heads (d_h^R)
    v_head_dim: int = 128  # width of a head's value
    intermediate_size: int = 4096  # width of the dense feed-forward network in the first layers
    first_k_dense_replace: int = 1  # that many first layers have a dense feed-forward network instead of experts
    moe_intermediate_size: int = 1024  # width of one expert
    n_routed_experts: int = 64  # experts that a router chooses from (N_r)
    n_shared_experts: int = 2  # experts that every token passes (N_s)
    num_experts_per_tok: int = 6  # experts chosen for a token (K_r)
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"  # K_r best of all, or of the best groups (2.2.2)
    n_group: int = 1  # groups of experts: the paper's devices (D), for group-limited routing and two balance losses
    topk_group: int = 1  # groups that a token's experts may come from (M)
    routed_scaling_factor: float = 1.0  # multiplies the weights of the chosen experts
    norm_topk_prob: bool = False  # make the weights of the chosen experts sum to one
    # Factor of the expert-level balance loss (alpha_1, equation 23), averaged over conversations, summed over layers.
    aux_loss_alpha: float = 0.003
    device_aux_loss_alpha: float = 0.0  # factor of the device-level balance loss (alpha_2, equation 26)
    communication_aux_loss_alpha: float = 0.0  # factor of the communication balance loss (alpha_3, equation 29)
    max_position_embeddings: int = 4096  # longest sequence the model is made for
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    # YaRN; None: plain RoPE. It extends a context that was already trained, so no run from scratch needs it. On the
    # command line any of its fields turns it on: --model.rope-scaling.factor 4.
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6  # added to the variance in RMSNorm
    initializer_range: float = 0.02  # deviation of the initial weights (the paper's 0.006 is for a width of 5,120)
    tie_word_embeddings: bool = False  # one matrix for embedding and head: where the vocabulary is most of the model

    def validate(self) -> None:
        """Refuse a shape that cannot be built. Raises UserError."""
        balance = ("aux_loss_alpha", "device_aux_loss_alpha", "communication_aux_loss_alpha")
        check_numbers(self, ("first_k_dense_replace", *balance), "model.")
        if self.rope_scaling is not None:
            check_numbers(self.rope_scaling, ("mscale", "mscale_all_dim"), "model.rope_scaling.")
        chosen, routed, groups = self.num_experts_per_tok, self.n_routed_experts, self.n_group
        width, heads = self.hidden_size, self.num_attention_heads
        check(self.qk_rope_head_dim % 2 == 0, "model.qk_rope_head_dim must be even: RoPE rotates pairs")
        check(chosen <= routed, f"model.num_experts_per_tok is {chosen}, but there are {routed} routed experts")
        check(routed % groups == 0, f"model.n_group ({groups}) must divide model.n_routed_experts ({routed})")
        check(self.topk_group <= groups, f"model.topk_group ({self.topk_group}) is above model.n_group ({groups})")
        divides = f"model.num_attention_heads ({heads}) must divide model.hidden_size ({width})"
        check(width % heads == 0, f"{divides}: transformers refuses such a checkpoint")
        reach = self.topk_group * routed // groups if self.topk_method == "group_limited_greedy" else routed
        check(chosen <= reach, f"model.num_experts_per_tok is {chosen}, but topk_group leaves {reach} experts")


@dataclass
class DataConfig:
    """What is learned from, and how it becomes tokens."""

    # Hub names, directories, .jsonl/.json/.csv/.tsv/.txt (or .gz of them) and .parquet files, `chitchat`,
    # `chitchat_text` or `chatterbot`; each may end in :N, and is then passed N times an epoch.
    dataset: tuple[str, ...] = ("HuggingFaceH4/ultrachat_200k",)
    # Which column plays which part, for rows in no known format: "prompt=Frage" "completion=Antwort". The parts are
    # messages, prompt, completion, text, system, tools and history.
    columns: tuple[str, ...] = ()
    train_split: str = "train_sft"  # split to train on
    eval_split: str = "test_sft"  # split to evaluate on; only read where eval_steps is not 0
    eval_fraction: float = 0.05  # share of the training split to evaluate on where there is no eval_split; 0: none
    max_seq_len: int = 4096  # tokens a row
    # split: a conversation longer than a row becomes several, cut at turns; truncate: only its beginning is learned.
    long_conversations: Literal["split", "truncate"] = "split"
    packing: bool = True  # fill rows with several conversations (best fit) instead of padding; the loss is the same
    shuffle: bool = True  # new data order every epoch
    skip_bad_rows: bool = False  # malformed rows go to OUTPUT_DIR/skipped.jsonl instead of stopping the run
    num_proc: int = 2  # processes that tokenise
    tokenizer: str = "cl100k_base"  # or a directory with a tokenizer.json; with init_from, that one's own is taken
    add_control_tokens: bool = False  # give init_from's model the tokens that it lacks for the chat template
    chat_template: str | None = None  # chatml, llama3, deepseek (tokenizer.py); None: the tokenizer's own, else chatml

    def validate(self) -> None:
        check_numbers(self, ("eval_fraction",))
        check(self.eval_fraction < 1, f"eval_fraction is {self.eval_fraction}; it must be below 1")
        check(self.max_seq_len >= 2, "max_seq_len is 1; a row needs a token to learn from and one to learn")


@dataclass
class BatchConfig:
    """How many rows a step takes, and how many steps a run."""

    batch_size: int = 4  # rows a micro-batch and process: as many as memory holds
    gradient_accumulation_steps: int = 4  # micro-batches a step: global batch = this * batch_size * processes
    num_train_epochs: float = 1.0  # passes over the data; on the command line it takes the place of max_steps
    max_steps: int = 0  # optimizer steps; 0: as many as num_train_epochs takes
    early_stopping_patience: int = 0  # end after so many evaluations in a row without a new lowest eval_loss; 0: never

    def validate(self) -> None:
        check_numbers(self, ("max_steps", "early_stopping_patience"))


@dataclass
class OptimizerConfig:
    """How the weights move."""

    # adamw, or muon for the blocks' matrices, adapters' too (adamw stays for the rest): it learns faster from scratch.
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-5  # peak learning rate, the same for AdamW and Muon
    min_learning_rate_ratio: float = 0.1  # the cosine ends at this share of the peak
    warmup_steps: int = 50  # steps of linear warm-up, while Adam's second moments are still rough
    weight_decay: float = 0.1  # decoupled decay; on matrices only, since norms have nothing to be pulled to
    adam_beta1: float = 0.9  # decay of the mean of gradients
    adam_beta2: float = 0.95  # decay of the mean of squared gradients; 0.95 forgets a spike sooner than Adam's 0.999
    max_grad_norm: float = 1.0  # gradients with a larger norm are scaled down to it

    def validate(self) -> None:
        check_numbers(self, ("min_learning_rate_ratio", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2"))
        ratio = self.min_learning_rate_ratio
        check(ratio <= 1, f"min_learning_rate_ratio is {ratio}; it must be at most 1: the rate falls from its peak")
        for name in ("adam_beta1", "adam_beta2"):
            check(getattr(self, name) < 1, f"{name} is {getattr(self, name)}; it must be below 1")


@dataclass
class ComputeConfig:
    """Where and how it is computed."""

    dtype: Dtype = "auto"  # bfloat16: products in it (autocast), weights and optimizer fp32; auto: if hardware has it
    device: str = "auto"  # cuda, cpu, ...; "auto": CUDA where there is one
    seed: int = 42  # seeds weights, data order and dropout
    # torch.compile every block: slow first steps, faster ones after; needs a C++ compiler. With FlashAttention (CUDA,
    # heads up to 256), packed rows are trained on in two graphs at most: of a dense block and of one with experts.
    compile: bool = False
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: 1/3 more compute, much less memory
    # Under torchrun: ddp has a copy of everything per process, fsdp a shard, hsdp a shard and every node a replica.
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"

    def validate(self) -> None:
        check_numbers(self, ("seed",))
        check(self.seed < 2**63, f"seed is {self.seed}; it must be below 2**63")
        traced = not self.compile or self.dtype != "float32"
        check(traced, "compile needs dtype bfloat16: torch cannot trace the grouped product in float32")


@dataclass
class CheckpointConfig:
    """Where a run begins, and what it leaves."""

    # Start from a directory in Hugging Face layout, or from a run's newest checkpoint; none: from random weights.
    init_from: str | None = None
    output_dir: str = ""  # where the run is written; "": runs/<preset>
    resume: bool = False  # continue the newest checkpoint in output_dir, with its configuration but for what is given
    save_steps: int = 500  # steps between checkpoints; 0: only at the end
    save_total_limit: int = 2  # checkpoints kept; older ones go once a new one stands
    save_best: bool = False  # save at every new lowest eval_loss too, and keep that checkpoint beside the newest

    def validate(self) -> None:
        check_numbers(self, ("save_steps",))


@dataclass
class LoraConfig:
    """Adapters instead of all weights (lora.py)."""

    lora_rank: int = 0  # rank of the adapters; 0: full fine-tuning
    lora_alpha: float = 16.0  # the adapters' output is scaled by alpha / rank
    lora_dropout: float = 0.0  # dropout on the adapters' input
    # Names of the modules that get an adapter; add experts.gate_up_proj and experts.down_proj for the routed experts.
    lora_target_modules: tuple[str, ...] = (
        *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )

    quantize: Quantization | None = None  # nf4: hold the blocks' matrices in 4 bits (quantization.py)

    def validate(self) -> None:
        check_numbers(self, ("lora_rank", "lora_alpha", "lora_dropout"))
        check(not self.quantize or self.lora_rank > 0, "quantize needs lora_rank: only adapters can be trained then")
        check(self.lora_dropout < 1, f"lora_dropout is {self.lora_dropout}; it must be below 1")


@dataclass
class WatchConfig:
    """How to see what goes on."""

    eval_steps: int = 250  # steps between evaluations; 0: none
    # Rows of the held-out split used at an evaluation; 0: all. The last one always takes all, and is compared with no
    # other by save_best and early_stopping_patience if those took fewer.
    eval_max_rows: int = 0
    logging_steps: int = 1  # steps between lines in metrics.jsonl
    # Prompts answered at each evaluation, so that one sees the model learn.
    sample_prompts: tuple[str, ...] = ("Hello! How are you?", "What did you do today?", "Do you like music?")
    report_to: Literal["none", "wandb", "trackio", "tensorboard"] = "none"  # tracker that gets the metrics too
    dry_run: bool = False  # train nothing: say what the run would see, and take of memory, network and time
    dry_run_ranks: int = 1  # on so many processes, eight a node
    dry_run_share: float = 0.4  # and at that share of an H100's peak, which a good run reaches
    debug: bool = False  # show Python's traceback with an error

    def validate(self) -> None:
        check_numbers(self, ("eval_steps", "eval_max_rows"))
        check(self.dry_run_share <= 1, f"dry_run_share is {self.dry_run_share}; it must be at most 1")


@dataclass
class TrainConfig:
    """One run of supervised fine-tuning. On the command line the groups' fields stand beside each other."""

    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    batch: OmitArgPrefixes[BatchConfig] = field(default_factory=BatchConfig)
    optimizer: OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    compute: OmitArgPrefixes[ComputeConfig] = field(default_factory=ComputeConfig)
    checkpoint: OmitArgPrefixes[CheckpointConfig] = field(default_factory=CheckpointConfig)
    lora: OmitArgPrefixes[LoraConfig] = field(default_factory=LoraConfig)
    watch: OmitArgPrefixes[WatchConfig] = field(default_factory=WatchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def validate(self) -> None:
        """Refuse values that no run can have. Raises UserError."""
        for group in vars(self).values():
            group.validate()
        length, context = self.data.max_seq_len, self.model.max_position_embeddings
        check(length <= context, f"max_seq_len ({length}) is above model.max_position_embeddings ({context})")
        widths = self.model.hidden_size % 8 == 0 and self.model.moe_intermediate_size % 8 == 0
        in_eights = "the grouped product needs model.hidden_size and model.moe_intermediate_size in multiples of 8"
        check(self.compute.dtype == "float32" or widths, f"in bfloat16 {in_eights}")
        plain = self.compute.parallel == "ddp" and not self.compute.compile
        check(not self.lora.quantize or plain, "quantize works with parallel ddp and without compile only")
        compares = self.checkpoint.save_best or self.batch.early_stopping_patience
        evaluates = self.watch.eval_steps > 0
        check(evaluates or not compares, "save_best and early_stopping_patience need evaluations: set eval_steps")
        from_scratch = self.checkpoint.init_from is None
        new_rows = "add_control_tokens adds rows to the embedding and the head"
        check(not (self.data.add_control_tokens and from_scratch), f"{new_rows} of init_from's model; there is none")
        check(not (self.data.add_control_tokens and self.lora.lora_rank), f"{new_rows}, which adapters do not train")
        check(not (self.lora.lora_rank and from_scratch), "lora_rank needs init_from: adapters adapt a trained model")

    def flat(self) -> dict[str, Any]:
        """What a run's config.json holds: the fields by their own names, of which no two are the same; and `model`."""
        groups = asdict(self)
        model = groups.pop("model")
        return {name: value for group in groups.values() for name, value in group.items()} | {"model": model}

    def changed(self, **values: Any) -> "TrainConfig":
        """A copy with other values of some fields, the model's too, given by their own names without their group's."""
        groups = {}
        for key, group in vars(self).items():
            groups[key] = replace(group, **{name: values.pop(name) for name in vars(group) if name in values})
        return replace(self, **groups | values)


# One GPU: the shape this project began with.
MINI = TrainConfig()

# Any CPU, no network, under five minutes: fine-tunes base/, the small model beside this file. The same parts, but two
# layers and a vocabulary of 8,192 entries; how it came to this shape, rate and optimizer: benchmarks/README.md.
TINY = TrainConfig(
    data=DataConfig(("chitchat", "chatterbot:120"), train_split="train", eval_split="test", max_seq_len=512),
    batch=BatchConfig(batch_size=4, gradient_accumulation_steps=1, max_steps=1000),
    # Gradients of small batches are noisy: with adam_beta2 0.99 a tenth fewer steps to the same loss than with 0.95. At
    # the rate that learns fastest from scratch, 4e-3, the base would forget more than it learns.
    optimizer=OptimizerConfig(
        "muon", learning_rate=1.5e-3, min_learning_rate_ratio=0.01, warmup_steps=15, adam_beta2=0.99
    ),
    checkpoint=CheckpointConfig(init_from=str(Path(__file__).parent / "base"), save_steps=200),
    watch=WatchConfig(eval_steps=200),
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

# Pre-training a model of tiny's kind on text: python train_sft.py base --dataset FILE. Over an hour on one core.
BASE = TINY.changed(
    dataset=("chitchat_text",),
    init_from=None,
    batch_size=8,
    max_steps=11_000,
    learning_rate=4e-3,
    warmup_steps=100,
    eval_steps=0,
    save_steps=500,
    sample_prompts=(),
)

# DeepSeek-V2-Lite as published (15.7 B parameters), for init_from.
V2_LITE = MINI.changed(
    batch_size=1,
    gradient_accumulation_steps=16,
    gradient_checkpointing=True,
    chat_template="deepseek",
    vocab_size=102_400,
    hidden_size=2048,
    num_hidden_layers=27,
    intermediate_size=10_944,
    moe_intermediate_size=1408,
    aux_loss_alpha=0.001,
    max_position_embeddings=163_840,
    rope_scaling=RopeScaling(mscale=0.707, mscale_all_dim=0.707),
)

PRESETS = {"tiny": TINY, "base": BASE, "mini": MINI, "v2_lite": V2_LITE}
