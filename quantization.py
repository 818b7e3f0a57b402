"""NF4 from scratch (QLoRA, https://arxiv.org/abs/2305.14314, section 3): a frozen weight in 4.13 bits per number.

Trained weights are distributed like normal numbers, and NF4's 16 levels are quantiles of that distribution. 64
neighbours in a row, a block, share a scale, their largest magnitude (absmax); the magnitudes are stored in 8 bits each,
and 256 of them share a scale again (double quantisation). A layer unpacks its weight for each product, forward and
backward, and keeps nothing.

>>> [round(level, 2) for level in LEVELS[::5]]
[-1.0, -0.18, 0.25, 1.0]
>>> codes, absmax = quantize(torch.linspace(-2, 2, 64))  # one block: two codes per byte, one scale
>>> codes[:4].tolist(), absmax.tolist()
([0, 0, 1, 17], [2.0])
>>> dequantize(codes, absmax, pairs_of_levels(), torch.float32)[:4].tolist()
[-2.0, -2.0, -2.0, -2.0]
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from config import UserError
from files import printable
from kernels import GroupedProduct, Product, compute_dtype, fused, linear, tuning
from model import Experts

BLOCK = 64  # numbers in a row that share an absmax
GROUP = 256  # absmaxes that share a scale

# The quantiles, scaled to [-1, 1], with an exact zero (the paper's appendix E).
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def dynamic_levels() -> Tensor:
    """Return the 256 levels of an absmax (https://arxiv.org/abs/1511.04561): seven decades, finer and finer."""
    levels = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2)
        levels += [middles, -middles]
    return torch.cat(levels).sort().values


ABSMAX_LEVELS = dynamic_levels().tolist()


# ---------------------------------------------------------------- numbers to codes and back


def quantize(x: Tensor, name: str = "a weight") -> tuple[Tensor, Tensor]:
    """Map x (..., a multiple of 64) to codes (n / 2,) uint8, the first of two in the high half, and absmax (n / 64,)
    fp32. Raises UserError with the name if x is not finite. A block whose absmax is below 1e-38 may differ from
    bitsandbytes, which divides by it: here it is divided by 1e-38, and all its numbers become about zero.

    A code is the number of midpoints between levels, of 15, that lie below the scaled number. It is looked up, not
    searched: [-1, 1] is divided into 32 cells, so narrow that none has more than one midpoint.
    """
    levels = torch.tensor(LEVELS, device=x.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    cells = cell_of(midpoints)
    below = (cells[:, None] < torch.arange(33, device=x.device)).sum(dim=0).to(torch.uint8)  # midpoints in lower cells
    inside = torch.full((33,), torch.inf, device=x.device).index_copy(0, cells.long(), midpoints)
    codes = torch.empty(x.numel() // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(x.numel() // BLOCK, device=x.device)
    size = tuning(x).chunk
    chunks = zip(x.flatten().split(size), codes.split(size // 2), absmax.split(size // BLOCK), strict=True)
    for chunk, chunk_codes, largest in chunks:
        blocks = chunk.view(-1, BLOCK).float()
        torch.amax(blocks.abs(), dim=1, out=largest)
        if not largest.isfinite().all():
            raise UserError(f"quantize: {printable(name)} holds infinity or NaN")
        scaled = (blocks * (1 / largest.clamp(min=1e-38))[:, None]).flatten()
        cell = cell_of(scaled)
        code = below.index_select(0, cell).add_(scaled > inside.index_select(0, cell))
        chunk_codes.copy_((code[::2] << 4).bitwise_or_(code[1::2]))
    return codes, absmax


def cell_of(scaled: Tensor) -> Tensor:
    """Return which of 32 cells a number in [-1, 1] is in; 1 itself has a cell of its own. Rounding keeps the order."""
    return ((scaled + 1) * 16).int()


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Map absmax (blocks,) to codes (blocks,) uint8, scale (groups,) and offset (): level * scale + offset is about
    absmax.

    It is rounded to 65,536 steps first, as in bitsandbytes on CPU; a table has the nearest level of each.
    """
    offset = absmax.mean()
    padding = -len(absmax) % GROUP
    groups = nn.functional.pad(absmax - offset, (0, padding)).view(-1, GROUP)
    scale = groups.abs().amax(dim=1)
    levels = torch.tensor(ABSMAX_LEVELS, device=absmax.device)
    steps = torch.arange(65536, device=absmax.device) / 65535 * 2 - 1
    table = torch.bucketize(steps, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    scaled = (groups * (1 / scale)[:, None]).flatten()[: len(absmax)].nan_to_num(nan=-1.0)  # 0 / 0
    step = ((scaled + 1) * 0.5 * 65535 + 0.5).int().clamp(0, 65535)
    return table.index_select(0, step), scale, offset


def pairs_of_levels() -> Tensor:
    """Return the two levels that each byte of codes stands for, as one 64-bit integer (256,): they are only moved, and
    every device has integers."""
    levels = torch.tensor(LEVELS)
    return torch.cartesian_prod(levels, levels).view(torch.int64).flatten()


def dequantize(codes: Tensor, absmax: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """Map codes (n / 2,) and absmax (n / 64,) fp32 to n numbers in `dtype`, rounded once. pairs: `pairs_of_levels`."""
    if tuning(codes).fused:
        return unpack(codes, absmax, pairs.view(torch.float32).view(256, 2), dtype)
    output = torch.empty(2 * len(codes), dtype=dtype, device=codes.device)
    size = tuning(codes).chunk
    chunks = zip(codes.split(size // 2), absmax.split(size // BLOCK), output.split(size), strict=True)
    for chunk, scale, numbers in chunks:
        values = pairs.index_select(0, chunk.int()).view(torch.float32)
        numbers.copy_(values.view(-1, BLOCK).mul_(scale[:, None]).view(-1))
    return output


@fused
def unpack(codes: Tensor, absmax: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantize` for a compiler: 2.6 bytes are moved per number instead of 22.5. levels (256, 2): of each byte."""
    return (levels[codes.int()].view(-1, BLOCK) * absmax[:, None]).to(dtype).flatten()


class NF4(nn.Module):
    """A quantised weight (..., out, in), for a matrix or a stack of them, in place of the parameter.

    It is created without values; `quantized` computes them from the parameter's.
    """

    codes: Tensor  # (..., out, in / 2) uint8
    absmax: Tensor  # (..., out, in / 64) uint8
    scale: Tensor  # (blocks / 256, rounded up,) fp32
    offset: Tensor  # () fp32
    # Tables, the same for all weights, on the device of the codes: copying them would wait for it.
    levels: Tensor  # (256,) fp32, an absmax's
    pairs: Tensor  # (256,) int64, see pairs_of_levels

    def __init__(self, name: str, parameter: Tensor) -> None:
        super().__init__()
        shape, device = parameter.shape, parameter.device
        *rows, width = shape
        if width % BLOCK:
            raise UserError(f"quantize: {name} has rows of {width} numbers; NF4 takes whole blocks of {BLOCK}")
        self.name, self.shape, blocks = name, shape, shape.numel() // BLOCK
        self.register_buffer("codes", torch.empty(*rows, width // 2, dtype=torch.uint8, device=device))
        self.register_buffer("absmax", torch.empty(*rows, width // BLOCK, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(-(-blocks // GROUP), device=device))
        self.register_buffer("offset", torch.empty((), device=device))
        self.register_buffer("levels", torch.empty(256, device=device), persistent=False)
        self.register_buffer("pairs", torch.empty(256, dtype=torch.int64, device=device), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def quantized(self, parts: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return values for the buffers. parts: the weight's values, one part after the other, in any dtype."""
        codes, largest = zip(*(quantize(part, self.name) for part in parts), strict=True)
        absmax, scale, offset = quantize_absmax(torch.cat(largest))
        values = {"codes": torch.cat(codes).view(self.codes.shape), "absmax": absmax.view(self.absmax.shape)}
        tables = {"levels": torch.tensor(ABSMAX_LEVELS), "pairs": pairs_of_levels()}
        return values | {"scale": scale, "offset": offset} | tables

    def dequantize(self, dtype: torch.dtype, part: slice | Tensor = slice(None)) -> Tensor:
        """Return the weight in `dtype`, or a part of it along its first dimension: a slice, or indices."""
        codes, absmax, blocks = self.codes[part], self.absmax[part].flatten(), self.absmax[0].numel()
        if isinstance(part, Tensor):
            indices = part[:, None] * blocks + torch.arange(blocks, device=part.device)
            scale = self.scale.index_select(0, indices.flatten() // GROUP)
        else:
            first = (part.start or 0) * blocks
            groups = slice(first // GROUP, -(-(first + len(absmax)) // GROUP))
            scale = self.scale[groups].repeat_interleave(GROUP)[first % GROUP :][: len(absmax)]
        largest = self.levels.index_select(0, absmax.int()).mul_(scale).add_(self.offset)
        return dequantize(codes.flatten(), largest, self.pairs, dtype).view(-1, *self.shape[1:])


# ---------------------------------------------------------------- layers

# Some rows, part of a weight, and their product.
PartialProduct = tuple[slice, slice | Tensor, Callable[[Tensor, Tensor], Tensor]]


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class FrozenProduct(torch.autograd.Function):
    """Rows times a quantised weight, part by part. The gradient of a product with a frozen weight needs only the
    weight, so nothing is kept: it is dequantised again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4, parts: list[PartialProduct]) -> Tensor:
        ctx.weight, ctx.parts = weight, parts
        return joined([product(x[rows], weight.dequantize(x.dtype, part)) for rows, part, product in parts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, parts = ctx.weight, ctx.parts
        grads = [product(grad[rows], weight.dequantize(grad.dtype, part).mT) for rows, part, product in parts]
        return joined(grads), None, None


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is quantised."""

    def __init__(self, base: nn.Linear, weight: NF4) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = weight  # type: ignore[assignment]
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x.to(compute_dtype(x)), self.weight, [(slice(None), slice(None), linear)])


class QuantizedExperts(Experts):
    """Stacked routed experts whose weights are quantised; on CPU they are dequantised one expert at a time."""

    def __init__(self, base: Experts, gate_up_proj: NF4, down_proj: NF4) -> None:
        nn.Module.__init__(self)
        self.num_experts = base.num_experts
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj  # type: ignore[assignment]

    def project(self, name: str, x: Tensor, product: Product) -> Tensor:
        parts: list[Any] = list(product.parts(tuning(x).unpacked))
        in_generation = torch.is_inference_mode_enabled() and len(x) < self.num_experts
        if in_generation and isinstance(product, GroupedProduct) and tuning(x).fused:  # unpack the chosen experts only
            chosen = torch.searchsorted(product.ends, torch.arange(len(x), device=x.device), right=True)
            parts = [(slice(None), chosen, one_matrix_per_row)]
        return FrozenProduct.apply(x, getattr(self, name), parts)


def one_matrix_per_row(x: Tensor, matrices: Tensor) -> Tensor:
    """x (R, in), matrices (R, out, in) -> (R, out)."""
    return torch.bmm(matrices, x[:, :, None]).squeeze(2)


# ---------------------------------------------------------------- a quantised model


def plan(model: nn.Module) -> None:
    """Replace every matrix of the blocks (linear layers and routed experts; not the router) by a quantised one without
    values. The model may be on the meta device. Raises UserError for a width that is not a multiple of 64."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            model.set_submodule(name, QuantizedLinear(module, NF4(f"{name}.weight", module.weight)))
        elif isinstance(module, Experts):
            gate_up_proj = NF4(f"{name}.gate_up_proj", module.gate_up_proj)
            down_proj = NF4(f"{name}.down_proj", module.down_proj)
            model.set_submodule(name, QuantizedExperts(module, gate_up_proj, down_proj))


def quantized_weights(model: nn.Module) -> dict[str, NF4]:
    """Return the quantised weights by the names that their parameters had before adapters."""
    modules = model.named_modules()
    return {name.replace(".base_layer", ""): module for name, module in modules if isinstance(module, NF4)}
