"""What a run costs: parameters, FLOPs, bytes sent; and how long a GPU would take for recorded operations."""

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from config import GpuName, ModelConfig, UserError
from model import DeepSeekV2
from quantization import quantized_weights

# ---------------------------------------------------------------- what theory says


def parameter_counts(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the parameters of each part: all of them, and those that one token uses (active)."""
    with torch.device("meta"):
        model = DeepSeekV2(config)
    parts = {
        "embed_tokens": "embedding",
        "self_attn": "attention",
        "mlp.experts": "routed experts",
        "mlp.shared_experts": "shared experts",
        "mlp.gate.": "router",
        "mlp": "dense feed-forward",
        "lm_head": "head",
        "norm": "norms",
    }
    counts = dict.fromkeys(parts.values(), (0, 0))
    for name, parameter in model.named_parameters():
        part = next(part for key, part in parts.items() if key in name)
        share = config.num_experts_per_tok / config.n_routed_experts if part == "routed experts" else 1
        total, active = counts[part]
        counts[part] = total + parameter.numel(), active + int(parameter.numel() * share)
    return counts


def cache_entries(config: ModelConfig) -> tuple[int, int]:
    """Return the numbers cached per token in all layers: as latent and rotary key, and as keys and values of all heads
    (table 1 of the paper)."""
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    heads = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return latent * config.num_hidden_layers, heads * config.num_hidden_layers


class TrainingCost(NamedTuple):
    """FLOPs of the forward and backward pass, without attention's products of two activations."""

    token: int  # per token, without the head
    target: int  # of the head, per target token

    def flops(self, num_tokens: int, num_targets: int) -> int:
        return self.token * num_tokens + self.target * num_targets


def training_cost(model: nn.Module) -> TrainingCost:
    """Count 2 FLOPs per active parameter, 2 for the gradient of its input, and 2 for its own gradient unless frozen.
    The embedding is a lookup, unless it is the head too.

    model: a DeepSeekV2, with or without adapters, on any device, sharded or not; 4-bit weights are frozen.
    """
    config = model.config
    assert isinstance(config, ModelConfig)
    head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    token = target = 0
    weights = dict(model.named_parameters()) | quantized_weights(model)
    for name, weight in weights.items():
        active = config.num_experts_per_tok / config.n_routed_experts if "mlp.experts" in name else 1
        trained = isinstance(weight, nn.Parameter) and weight.requires_grad
        cost = int(weight.shape.numel() * active) * (6 if trained else 4)
        if head in name:
            target += cost
        elif "embed_tokens" not in name:
            token += cost
    return TrainingCost(token, target)


def attention_flops(config: ModelConfig, length: int) -> int:
    """Return the FLOPs of attention's products of two activations, forward and backward, for one document of `length`
    tokens, each of which attends to itself and all earlier ones."""
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return 6 * config.num_hidden_layers * config.num_attention_heads * widths * (length * (length + 1) // 2)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Within the block, or the function that it decorates, raise UserError if a GPU runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        words = re.search(r"[Tt]ried to allocate [\d.]+ \w+", str(error))
        raise UserError(
            f"the GPU is out of memory ({words[0] if words else 'no amount given'}): halve --batch-size and double "
            "--gradient-accumulation-steps, or use --gradient-checkpointing"
        ) from error


# ---------------------------------------------------------------- what is sent

# Bytes that a rank of N sends in a collective on a ring, divided by (N - 1) / N times those of the whole tensor.
ON_A_RING = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "broadcast_": 1}


class Traffic(TorchDispatchMode):
    """Adds up in `sent` the bytes that this rank sends, by kind of collective, DDP's and FSDP's included. While `times`
    is not 1, an operation counts as that many."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.times = Counter[str](), 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func._schema.name.removeprefix("c10d::")
        if kind in ON_A_RING:
            leaves = tree_leaves(args)
            whole = max(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
            (group,) = (leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf))
            ranks = dist.ProcessGroup.unbox(group).size()
            self.sent[kind] += self.times * ON_A_RING[kind] * (ranks - 1) * whole // ranks
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------- how long a GPU takes


class Gpu(NamedTuple):
    """Data sheet values, and the share of the peak that FlashAttention 2 reaches (it was written for the A100)."""

    bf16: float  # FLOP/s of products in bf16, dense, with sums in fp32
    fp32: float  # FLOP/s of products in fp32, without TF32
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes
    link: float  # bytes/s to the other GPUs of a node
    attention: float  # share of the peak


GPUS: dict[GpuName, Gpu] = {
    "h100": Gpu(989e12, 67e12, 3.35e12, 80e9, 350e9, 0.24),
    "h200": Gpu(989e12, 67e12, 4.8e12, 141e9, 350e9, 0.24),
    "b200": Gpu(2250e12, 80e12, 8e12, 180e9, 700e9, 0.12),
    "a100": Gpu(312e12, 19.5e12, 2.04e12, 80e9, 230e9, 0.5),
    "l40s": Gpu(362e12, 91e12, 0.86e12, 48e9, 25e9, 0.4),
    "4090": Gpu(165e12, 83e12, 1.01e12, 24e9, 25e9, 0.6),
    "3090": Gpu(71e12, 36e12, 0.94e12, 24e9, 25e9, 0.6),
}
BANDWIDTH_SHARE = 0.85  # of the data sheet's, that long copies reach
PRODUCT_SHARES = {"experts": 0.55, "other products": 0.67}  # of the peak, that cuBLAS and CUTLASS reach
LAUNCH = 5e-6  # seconds that the host takes for an operation, which a short one cannot hide

FUSED = "fused"  # record_function's name of a region that a GPU runs as one kernel

PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::_grouped_mm": 0, "aten::addmm": 1, "aten::baddbmm": 1}  # first factor


class Roofline(Traffic):
    """Predicts the seconds that a GPU takes for each operation, and adds them up by region.

        time = max(bytes / bandwidth, FLOPs / attainable rate, launch)

    Regions: attention, experts (grouped products), other products, elementwise (everything else); within
    `record_function("loss")` or "optimizer" all counts as that. Operations that only make views or memory are free.
    Within a FUSED region, elementwise operations are one kernel, and what is no longer alive after it was never in
    memory. merge: so are all that follow one another outside the optimizer. Tensors may be fake.
    """

    def __init__(self, gpu: Gpu, merge: bool = False) -> None:
        super().__init__()
        self.gpu, self.merge, self.seconds, self.within = gpu, merge, Counter[str](), list[str]()
        # bytes that the fused kernel reads, by place, and writes, by storage while it is alive
        self.read, self.made = dict[tuple[int, int, int], int](), WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # comes again with the local tensors
        name = func._schema.name
        if name.startswith("profiler::_record_function"):
            self.close_kernel()
            self.within.append(args[0]) if name.endswith("enter_new") else self.within.pop()
        if name == "aten::_grouped_mm" and args[0].dtype == torch.float32:  # torch cannot do that on fake tensors
            a, b, ends = args[:3]
            result = a.new_empty((len(a), b.shape[-1]) if b.dim() == 3 else (len(ends), len(a), b.shape[-1]))
        else:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        read, made = memory_of(func, args, kwargs or {}, result)
        if made:
            region, computing = self.compute(name, args)
            if region == "elementwise" and (FUSED in self.within or (self.merge and "optimizer" not in self.within)):
                for x in read:
                    if (storage := x.untyped_storage()) not in self.made:
                        self.read[storage._cdata, int(x.storage_offset()), x.nbytes] = x.nbytes
                for x in made:
                    storage = x.untyped_storage()
                    self.made[storage] = max(x.nbytes, self.made.get(storage, 0))
            else:
                self.close_kernel()
                self.add(region, sum(x.nbytes for x in read + made), computing)
        return result

    def close_kernel(self) -> None:
        """Count the elementwise operations since the last call as one kernel."""
        if self.made:
            self.add("elementwise", sum(self.read.values()) + sum(self.made.values()))
        self.read.clear()
        self.made.clear()

    def add(self, region: str, moved: int, computing: float = 0.0) -> None:
        """Count a kernel that moves so many bytes, and whose products take `computing` seconds."""
        seconds = max(moved / self.gpu.bandwidth / BANDWIDTH_SHARE, computing, LAUNCH)
        region = next((name for name in self.within if name in ("loss", "optimizer")), region)
        self.seconds[region] += self.times * seconds  # type: ignore[assignment]

    def compute(self, name: str, args: Any) -> tuple[str, float]:
        """Return the region of an operation, and the seconds that its matrix products take at the attainable rate."""
        if name in PRODUCTS:
            region = "experts" if name == "aten::_grouped_mm" else "other products"
            a, b = args[PRODUCTS[name] :][:2]
            flops, share = 2 * a.numel() * b.shape[-1], PRODUCT_SHARES[region]
        elif "attn" in name or "attention" in name:  # causal, on documents of equal length
            backward = "backward" in name
            region, a, v = "attention", args[backward], args[backward + 2]
            length = next((x for x in args if type(x) is int), a.shape[-2])
            flops = (2.5 if backward else 1) * a.numel() * length * (1 + v.shape[-1] / a.shape[-1])
            share = self.gpu.attention
        else:
            return "elementwise", 0.0
        return region, flops / share / (self.gpu.fp32 if a.dtype == torch.float32 else self.gpu.bf16)


def memory_of(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that an operation reads, and those that it makes or changes; there are none of these if it
    only makes views or reserves memory."""
    schema = func._schema
    if schema.name.startswith(("c10d::", "prim::", "profiler::")) or "empty" in schema.name:
        return [], []
    known = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
    made = [x for x in tensors(result) if x.untyped_storage()._cdata not in known]
    arguments = zip(schema.arguments, args, strict=False)
    changed = [value for argument, value in arguments if argument.alias_info and argument.alias_info.is_write]
    return tensors(args), made + tensors([*changed, kwargs.get("out")])


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class OneKernel(torch.autograd.Function):
    """A function as the compiler for GPUs runs it: one kernel forward, and one backward, which computes what it needs
    again from the function's arguments."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *args: Any) -> Tensor:
        ctx.function = function
        ctx.others = [None if isinstance(x, Tensor) else x for x in args]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in args))
        with record_function(FUSED):
            return function(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1:]

        def gradients() -> Iterator[Tensor]:
            inputs = [
                other if x is None else x.detach() for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)
            ]
            sources = [x.requires_grad_() for x, needs in zip(inputs, needed, strict=True) if needs]
            with torch.enable_grad():
                output = ctx.function(*inputs)
            return iter(torch.autograd.grad(output, sources, grad))

        with record_function(FUSED):
            found = gradients()
        return None, *(next(found) if needs else None for needs in needed)


def as_one_kernel(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Take the place of `kernels.compiled` in a dry run."""
    return functools.partial(OneKernel.apply, function)
