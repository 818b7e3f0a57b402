"""The hot operations, each in the plain form of a textbook and in the fast form that every run uses, which the tests
compare forward and backward. To understand the model, the plain forms are enough. Processors differ in TUNING only.

Shapes: N tokens of all documents, H heads, E routed experts, K of them chosen for a token, R = N K rows for the
experts, V entries of the vocabulary, M target tokens.

>>> hidden, head, targets = torch.eye(2, 4), torch.ones(6, 4).triu(), torch.tensor([0, 5])  # M = 2, V = 6
>>> plain_cross_entropy(hidden, head, targets), sum_cross_entropy(hidden, head, targets)
(tensor(3.2882), tensor(3.2882))
"""

import contextlib
import functools
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.profiler import record_function
from torch.utils._triton import has_triton

from documents import Documents


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products take: autocast's where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Tuning(NamedTuple):
    """Sizes that suit a kind of processor; by default they suit any. Results differ by rounding only."""

    flash: int = 0  # widest heads for FlashAttention's kernel, in bf16
    longest_plain: int = 0  # longest document that is attended to by plain matrix products
    run: int = 1  # row counts are rounded up to multiples of it, for which the host must know them
    block: int = 512  # rows of logits at a time
    few: int = 0  # row counts in generation up to which memory, not arithmetic, sets the pace
    unpacked: int = 2**20  # experts whose quantised weights exist in full precision at a time; a GPU never waits: all
    chunk: int = 2**24  # numbers at a time whose intermediate results fit into the processor's cache
    targets: int = 512  # target tokens whose logits exist at a time
    fused: "Compiler | None" = None  # compiles elementwise chains into one kernel; products also add to fp32 sums


def tuning(x: Tensor) -> Tuning:
    return TUNING.get(x.device.type, Tuning())


@contextlib.contextmanager
def tuned_as(device_type: str, compiler: "Compiler | None" = None) -> Iterator[None]:
    """Within the block, handle tensors on the CPU like those on another kind of device: for dry runs and tests.
    compiler: takes the place of that device's."""
    saved, other = TUNING["cpu"], TUNING.get(device_type, Tuning())
    TUNING["cpu"] = other._replace(run=1, fused=other.fused and (compiler or other.fused))
    try:
        yield
    finally:
        TUNING["cpu"] = saved


# ---------------------------------------------------------------- elementwise chains as one kernel

Compiler = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function compiled by Triton, forward and backward, or unchanged if that cannot be done here. The
    environment variable TORCH_COMPILE_DISABLE=1 leaves it unchanged, too."""
    if has_triton() and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return torch.compile(function)
    if torch.cuda.is_available():
        warnings.warn("steps are slower: torch.compile needs Triton and a C compiler (CC, gcc or clang)", stacklevel=2)
    return function


TUNING = {
    "cpu": Tuning(longest_plain=1024, run=64, block=16, few=32, unpacked=1, chunk=2**18),
    "cuda": Tuning(flash=256, targets=4096, fused=compiled),
}


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a function of elementwise operations and sums over rows, which `Tuning.fused` compiles into one kernel,
    and its gradients into another.

    Run one by one, such operations read and write each number several times, and a GPU's memory is slower than its
    arithmetic. Not in generation, which would compile for every length, and not under --compile, which fuses more.
    """

    @functools.wraps(function)
    def wrapper(x: Tensor, *others: Any) -> Tensor:
        compiler = tuning(x).fused
        if compiler is None or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return function(x, *others)
        return compiler(function)(x, *others)

    return wrapper


# ---------------------------------------------------------------- attention within documents


def plain_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """Apply one causal softmax per document. q, k (N, H, qk_head_dim), v (N, H, v_head_dim) -> (N, H, v_head_dim)."""
    outputs = []
    for start, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v[start:end]))
    return torch.cat(outputs)


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """`plain_attention`, fast. No mask over all N tokens exists.

    FlashAttention's kernel, where there is one, takes all documents at once by their offsets and never writes the
    weights to memory. Elsewhere each document is one call, which compiled code leaves to Python: it would be compiled
    anew for every number of them.
    """
    if q.dtype == torch.bfloat16 and max(q.shape[-1], v.shape[-1]) <= tuning(q).flash:
        offsets, longest = documents.offsets, documents.longest
        q, k, wide_v = equally_wide(q, k, v, multiple=8)
        # a view of v may begin at any address, but the kernel reads 16 bytes at a time
        output = varlen_attn(
            q, k, wide_v.contiguous(), offsets, offsets, longest, longest, scale=scale, window_size=(-1, 0)
        )
        assert isinstance(output, Tensor)
        return output[..., : v.shape[-1]]
    return attention_one_by_one(q, k, v, documents, scale)


@torch.compiler.disable
def attention_one_by_one(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    queries, keys, values = (x.transpose(0, 1).split(documents.lengths.values, dim=1) for x in (q, k, v))
    parts = zip(queries, keys, values, strict=True)
    return torch.cat([causal_attention(*part, scale) for part in parts], dim=1).transpose(0, 1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend within one document, heads first: q, k (H, T, qk_head_dim), v (H, T, v_head_dim) -> like v."""
    if q.shape[1] <= tuning(q).longest_plain:
        return causal_attention_in_blocks(q, k, v, scale)
    q, k, wide_v = (x[None] for x in equally_wide(q, k, v))
    return F.scaled_dot_product_attention(q, k, wide_v, is_causal=True, scale=scale)[0, ..., : v.shape[-1]]


def equally_wide(*tensors: Tensor, multiple: int = 1) -> list[Tensor]:
    """The fused kernels want q, k and v so: zeros are added, which changes no product, and cut from the output. On CPU
    they are 2.2 times (bf16: 2.7 times) as fast as what torch falls back to otherwise."""
    width = max(x.shape[-1] for x in tensors)
    width += -width % multiple
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors]


QUERIES = 256  # query rows at a time


def causal_attention_in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`causal_attention` by plain products: QUERIES rows at a time against the keys up to them.

    On CPU twice as fast as the fused kernel for documents of a conversation's length, a tenth of a whole training step.
    They keep T^2 / 2 weights for the backward pass, so that longer ones are left to the kernel. Lengths are rounded up,
    since oneDNN generates code for each new shape of matrix, which takes longer than the product itself.
    """
    length, run = q.shape[1], tuning(q).run
    outputs = []
    q, k, v = (F.pad(x, (0, 0, 0, -length % run)) for x in (q, k, v))  # what is added lies in the others' future
    with torch.autocast(q.device.type, enabled=False):  # it would hold the weights in fp32, as softmax computes anyway
        for start in range(0, length, QUERIES):
            end = min(start + QUERIES, q.shape[1])
            future = q.new_full((end - start, end), -torch.inf).triu(start + 1)
            scores = torch.baddbmm(future, q[:, start:end], k[:, :end].mT, alpha=scale)  # (H, end - start, end)
            outputs.append(scores.softmax(dim=-1) @ v[:, :end])
    return torch.cat(outputs, dim=1)[:, :length]


# ---------------------------------------------------------------- tokens to experts and back


def plain_experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """A loop over experts: each takes the tokens sent to it through its SwiGLU network (equation 20's routed part).

    x (N, hidden_size), weights and experts (N, K), gate_up_proj (E, 2 moe_intermediate_size, hidden_size) with gate
    above up, down_proj (E, hidden_size, moe_intermediate_size) -> (N, hidden_size).
    """
    output = torch.zeros_like(x)
    for expert in range(len(down_proj)):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up_proj[expert].T).chunk(2, dim=-1)
        answer = (F.silu(gate) * up) @ down_proj[expert].T
        output = output.index_add(0, token, answer * weights[token, choice, None])
    return output


class GroupedProduct(NamedTuple):
    """Rows sorted by expert, and the experts' stacked matrices (E, out, in) -> each row times its own expert's."""

    ends: Tensor  # (E,) int32, where each expert's run of rows ends

    def __call__(self, x: Tensor, matrices: Tensor) -> Tensor:
        return F.grouped_mm(x, matrices.mT, offs=self.ends)

    def parts(self, size: int) -> "Iterator[tuple[slice, slice, Product]]":
        """The same for `size` experts at a time: which rows, which experts, and their product. Experts without rows are
        left out. The host has to know the runs' ends, unless it is all experts at once."""
        if size >= len(self.ends):
            yield slice(None), slice(None), self
            return
        start = 0
        for first, ends in zip(range(0, len(self.ends), size), self.ends.split(size), strict=True):
            end = int(ends[-1])
            if end > start:
                yield slice(start, end), slice(first, first + size), GroupedProduct(ends - start)
            start = end


class RowProduct(NamedTuple):
    """The same for a few rows that stay where they are."""

    experts: list[int]  # of each row

    def __call__(self, x: Tensor, matrices: Tensor) -> Tensor:
        rows = zip(x.split(1), self.experts, strict=True)
        return torch.cat([linear(row, matrices[expert]) for row, expert in rows])

    def parts(self, size: int) -> "Iterator[tuple[slice, slice, Product]]":
        """The same for one row at a time; the size is ignored."""
        for row, expert in enumerate(self.experts):
            yield slice(row, row + 1), slice(expert, expert + 1), RowProduct([0])


Product = GroupedProduct | RowProduct


class Exchange(torch.autograd.Function):
    """Rows in another order, each `size` of them added up. The gradient is gathered in the same way, not scattered.

    there, size: of the output; back, back_size: of the gradient, its transpose.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Tensor, size: int, back: Tensor, back_size: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.size = back_size
        return sum_of_rows(rows, there, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (back,) = ctx.saved_tensors
        return sum_of_rows(grad, back, ctx.size), None, None, None, None


def sum_of_rows(rows: Tensor, indices: Tensor, size: int) -> Tensor:
    """Return rows[indices], each `size` of them added up: (len(indices) / size, ...)."""
    rows = rows.index_select(0, indices)
    return rows if size == 1 else rows.unflatten(0, (-1, size)).sum(dim=1)


class Routes(NamedTuple):
    """The way of R rows, K for each token, to their experts and back, and the product that serves all experts."""

    places: Tensor | None  # (R,) place of each row among those sorted by expert; None: rows keep their places
    order: Tensor | None  # (R,) the row at each place; None: some places are empty
    num_places: int  # R, and on CPU what rounding up adds
    product: Product

    def to_experts(self, tokens: Tensor, copies: int = 1) -> Tensor:
        """Return `copies` rows of each token, (R / copies, ...), sorted by expert: (num_places, ...)."""
        if self.places is not None and self.order is not None:
            return Exchange.apply(tokens, self.order // copies, 1, self.places, copies)
        rows = tokens.repeat_interleave(copies, dim=0)
        if self.places is None:
            return rows
        return rows.new_zeros(self.num_places, *rows.shape[1:]).index_copy(0, self.places, rows)

    def to_tokens(self, rows: Tensor, copies: int) -> Tensor:
        """Return the sum over each token's `copies` rows, which are sorted by expert: (R / copies, ...)."""
        if self.places is not None and self.order is not None:
            return Exchange.apply(rows, self.places, copies, self.order // copies, 1)
        rows = rows if self.places is None else rows.index_select(0, self.places)
        return rows.unflatten(0, (-1, copies)).sum(dim=1)


def find_routes(experts: Tensor, num_experts: int) -> Routes:
    """Return the routes of rows to `experts` (R,), the expert of each row.

    Sorted by expert, all rows go through one grouped product: no loop, and the host does not need to know the counts.
    In bf16 on two cores it makes 204 GFLOP/s where a loop over 16 experts makes 146. A handful of rows in generation
    on CPU is multiplied by its own experts' matrices instead.
    """
    if is_few(experts):
        return Routes(None, None, len(experts), RowProduct(experts.tolist()))
    if tuning(experts).run > 1:
        return routes_in_runs(experts, num_experts)
    places, ends = sort_by_expert(experts, num_experts)
    order = torch.empty_like(places).index_copy(0, places, torch.arange(len(places), device=places.device))
    return Routes(places, order, len(experts), GroupedProduct(ends))


@torch.compiler.disable  # the host reads a number, at which a graph would break with a long warning
def routes_in_runs(experts: Tensor, num_experts: int) -> Routes:
    places, ends = sort_by_expert(experts, num_experts, tuning(experts).run)
    return Routes(places, None, int(ends[-1]), GroupedProduct(ends))


def sort_by_expert(experts: Tensor, num_experts: int, run: int = 1) -> tuple[Tensor, Tensor]:
    """experts (R,) of each row -> the place of each row (R,), and where each expert's run of rows ends (E,).

    Six rows for three experts; rows keep their order within a run:

        row              0  1  2  3  4  5
        experts          2  0  2  0  0  2      counts 3, 0, 3
        places           3  0  4  1  2  5      ends   3, 3, 6
        by place     0: row 1, 1: row 3, 2: row 4 | 3: row 0, 4: row 2, 5: row 5

    Runs are filled up to multiples of `run`, for oneDNN's sake (see `causal_attention_in_blocks`): with a run of 4,
    places 4 0 5 1 2 6 and ends 4, 4, 8.
    """
    counts = experts.new_zeros(num_experts).index_add(0, experts, torch.ones_like(experts))
    runs = (counts + run - 1) // run * run
    ends = runs.cumsum(0)
    order = experts.argsort(stable=True)  # a row's place in its run: as many as earlier rows go to its expert
    first = (ends - runs - (counts.cumsum(0) - counts))[experts[order]]
    places = torch.empty_like(order).index_copy(0, order, first + torch.arange(len(order), device=order.device))
    return places, ends.to(torch.int32)


# ---------------------------------------------------------------- the loss, without ever holding all logits


def plain_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits, log-softmax, the target's entry, summed. hidden (M, hidden_size), weight (V, hidden_size), targets (M,)
    -> ()."""
    log_probabilities = (hidden @ weight.T).float().log_softmax(dim=-1)  # (M, V)
    return -log_probabilities.gather(1, targets[:, None]).sum()


def sum_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Fast `plain_cross_entropy`, in fp32; products are computed in `compute_dtype`."""
    if not torch.is_grad_enabled():  # an autograd function sees requires_grad of a parameter all the same
        hidden, weight = hidden.detach(), weight.detach()
    return ChunkedCrossEntropy.apply(hidden, weight, targets, compute_dtype(hidden))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy without ever holding all logits, which at 100,000 entries are by far the largest tensor of a step.

    They exist for `Tuning.targets` tokens at a time, in one buffer, and their gradient is computed at once, in place.
    On CPU, work on them proceeds by `Tuning.block` rows or ENTRIES columns at a time, which stay in cache: a training
    step with 58 million parameters was a sixth faster for it and took 1.8 GB instead of 3.2. On CUDA it is fused.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        needs_grad = any(ctx.needs_input_grad[:2])
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        size = min(tuning(hidden).targets, len(targets))
        block, compiler = min(tuning(hidden).block, size), tuning(hidden).fused
        with record_function("loss"), torch.autocast(hidden.device.type, enabled=False):
            weight = weight.to(dtype)
            all_logits = weight.new_empty(size, len(weight))
            buffer = weight.new_empty(0 if compiler else block, len(weight), dtype=torch.float32)
            for start in range(0, len(targets), size or 1):
                chunk = slice(start, start + size)
                h = hidden[chunk].to(dtype)
                logits = torch.mm(h, weight.T, out=all_logits[: len(h)])  # (size, V)
                if compiler:
                    loss += softmax_minus_one_hot_(logits, targets[chunk, None]).sum()
                else:
                    for z, y in zip(logits.split(block), targets[chunk, None].split(block), strict=True):
                        loss += cross_entropy_and_gradient_(z, y, buffer[: len(z)]).sum()
                if grad_hidden is not None:
                    grad_hidden[chunk] = logits @ weight
                if grad_weight is not None:
                    add_product_(grad_weight, logits.T, h)
        ctx.gradients = grad_hidden, grad_weight
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradients, ctx.gradients = ctx.gradients, None  # no other reference: parameters take them over without a copy
        with record_function("loss"):
            grad_hidden, grad_weight = (None if x is None else x.mul_(grad) for x in gradients)
        return grad_hidden, grad_weight, None, None


def cross_entropy_and_gradient_(logits: Tensor, targets: Tensor, buffer: Tensor) -> Tensor:
    """-log softmax(logits)[target] (n,); logits (n, V) become the sum's gradient, softmax minus one-hot, in place.

    targets (n, 1); buffer (n, V) in fp32 is overwritten: a new one for each call would cost more than the arithmetic.
    """
    target_logits = logits.gather(1, targets).float()
    largest = buffer.copy_(logits).amax(dim=-1, keepdim=True)
    softmax = torch.softmax(buffer, dim=-1, out=buffer)
    # the largest probability is 1 / sum(exp(logits - largest)): log-sum-exp without taking exponentials again
    log_sum = largest - softmax.amax(dim=-1, keepdim=True).log()
    logits.copy_(softmax.scatter_add_(1, targets, softmax.new_full(targets.shape, -1.0)))
    return (log_sum - target_logits).squeeze(1)


@fused
def softmax_minus_one_hot_(logits: Tensor, targets: Tensor) -> Tensor:
    """`cross_entropy_and_gradient_` for a compiler, which needs no buffer."""
    z = logits.float()
    log_sum = z.logsumexp(dim=-1, keepdim=True)
    losses = log_sum - z.gather(1, targets)
    one_hot = torch.arange(z.shape[1], device=z.device) == targets
    logits.copy_((z - log_sum).exp() - one_hot.float())
    return losses.squeeze(1)


ENTRIES = 8192  # rows of a sum at a time


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute total += a @ b for a sum in fp32, which the product itself adds to where it can."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    if tuning(a).fused:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    for start in range(0, len(total), ENTRIES):
        rows = slice(start, start + ENTRIES)
        total[rows] += a[rows] @ b


# ---------------------------------------------------------------- a few rows, as in generation


def is_few(rows: Tensor) -> bool:
    """Whether this is generation on CPU, a few tokens at a time, where memory sets the pace."""
    if torch.compiler.is_compiling():  # blocks are compiled for training only
        return False
    return torch.is_inference_mode_enabled() and len(rows) <= tuning(rows).few


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, in), weight (out, in) -> x @ weight.T (N, out).

    For a handful of rows MKL reads the matrix on one thread. Two halves of it are read on two, which makes a token of
    generation up to three times as fast.
    """
    if not is_few(x) or len(weight) % 2:
        return F.linear(x, weight)
    halves = torch.bmm(weight.view(2, -1, weight.shape[1]), x.T.expand(2, -1, -1))  # (2, out / 2, N)
    return halves.permute(2, 0, 1).flatten(1)


class Linear(nn.Linear):
    """A layer without bias that multiplies by `linear`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
