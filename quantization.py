"""NF4 from scratch (QLoRA, https://arxiv.org/abs/2305.14314, section 3): a frozen weight in 4.13 bits a number.

A trained weight's numbers are spread like a normal distribution. NF4's 16 levels are that distribution's quantiles:
they lie close where there are many numbers, as `show.py nf4` draws it. 64 neighbours in a row, a block, share a scale,
their largest magnitude (absmax); the magnitudes themselves are stored in 8 bits each, 256 of them sharing a scale again
(double quantisation).

A layer with such a weight turns it back for each product, and once more in the backward pass: nothing is kept.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from config import check
from kernels import Product, compute_dtype, linear, tuning
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
    """The 256 levels of an absmax (https://arxiv.org/abs/1511.04561): seven decades, each finer than the one below."""
    levels = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2)
        levels += [middles, -middles]
    return torch.cat(levels).sort().values


ABSMAX_LEVELS = dynamic_levels().tolist()


# ---------------------------------------------------------------- numbers to codes and back


def quantize(x: Tensor, name: str = "a weight") -> tuple[Tensor, Tensor]:
    """x (..., a multiple of 64) -> codes (n / 2,) uint8, the first of two in the high half, and absmax (n / 64,) fp32.
    Raises UserError, naming x, where it isn't finite.

    A number's code is how many of the 15 midpoints between levels lie below it. Looked up, not searched: [-1, 1] is cut
    into 32 cells, so narrow that none has more than one midpoint.
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
        check(bool(largest.isfinite().all()), f"quantize: {name} holds infinity or NaN")
        scaled = (blocks * (1 / largest.clamp(min=1e-38))[:, None]).flatten()
        cell = cell_of(scaled)
        code = below.index_select(0, cell).add_(scaled > inside.index_select(0, cell))
        chunk_codes.copy_((code[::2] << 4).bitwise_or_(code[1::2]))
    return codes, absmax


def cell_of(scaled: Tensor) -> Tensor:
    """Which of 32 cells a number in [-1, 1] lies in; 1 itself has one more. Rounding keeps the order."""
    return ((scaled + 1) * 16).int()


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax (blocks,) -> codes (blocks,) uint8, scale (groups,), offset (): level * scale + offset is about absmax.

    Rounded to 65,536 steps first, as bitsandbytes does on CPU, for which a table gives the nearest level.
    """
    offset = absmax.mean()
    padding = -len(absmax) % GROUP
    groups = nn.functional.pad(absmax - offset, (0, padding)).view(-1, GROUP)
    scale = groups.abs().amax(dim=1)
    levels = torch.tensor(ABSMAX_LEVELS, device=absmax.device)
    steps = torch.arange(65536, device=absmax.device) / 65535 * 2 - 1
    table = torch.bucketize(steps, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    scaled = (groups * (1 / scale)[:, None]).flatten()[: len(absmax)].nan_to_num(nan=-1.0)  # 0 / 0 has its lowest, too
    step = ((scaled + 1) * 0.5 * 65535 + 0.5).int().clamp(0, 65535)
    return table.index_select(0, step), scale, offset


def pairs_of_levels() -> Tensor:
    """(256,) the two levels that a byte of codes stands for, as one 64-bit number: it is only moved, and an integer is
    what every device has."""
    levels = torch.tensor(LEVELS)
    return torch.cartesian_prod(levels, levels).view(torch.int64).flatten()


def dequantize(codes: Tensor, absmax: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """codes (n / 2,), absmax (n / 64,) fp32 -> (n,) in `dtype`, rounded once. pairs: those of `pairs_of_levels`."""
    output = torch.empty(2 * len(codes), dtype=dtype, device=codes.device)
    size = min(tuning(codes).chunk, output.numel())
    index = torch.empty(size // 2, dtype=torch.int32, device=codes.device)
    found = torch.empty(size // 2, dtype=torch.int64, device=codes.device)
    chunks = zip(codes.split(size // 2), absmax.split(size // BLOCK), output.split(size), strict=True)
    for chunk, scale, numbers in chunks:
        i, values = index[: len(chunk)].copy_(chunk), found[: len(chunk)]
        torch.index_select(pairs, 0, i, out=values)
        numbers.copy_(values.view(torch.float32).view(-1, BLOCK).mul_(scale[:, None]).view(-1))
    return output


class NF4(nn.Module):
    """A quantised weight (..., out, in), for a matrix or a stack of them; it stands where the parameter stood.

    Made without values, like a parameter on the meta device; `quantized` makes them from the parameter's.
    """

    codes: Tensor  # (..., out, in / 2) uint8
    absmax: Tensor  # (..., out, in / 64) uint8
    scale: Tensor  # (blocks / 256, rounded up,) fp32
    offset: Tensor  # () fp32
    # Tables, the same for all weights. They live where the codes do, so that no step has to take them there.
    levels: Tensor  # (256,) fp32, an absmax's
    pairs: Tensor  # (256,) int64, see pairs_of_levels

    def __init__(self, name: str, shape: torch.Size, device: torch.device) -> None:
        super().__init__()
        *rows, width = shape
        check(width % BLOCK == 0, f"quantize: {name} has rows of {width} numbers; NF4 takes whole blocks of {BLOCK}")
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

    def numel(self) -> int:
        return self.shape.numel()

    def quantized(self, parts: Iterable[Tensor]) -> dict[str, Tensor]:
        """Values for the buffers from the weight's, which come in parts, one after the other, in any dtype."""
        codes = torch.empty(self.codes.shape, dtype=torch.uint8)
        absmax = torch.empty(self.absmax.shape)
        start = 0
        for part in parts:
            end = start + part.numel()
            part_codes, part_absmax = quantize(part, self.name)
            codes.view(-1)[start // 2 : end // 2] = part_codes
            absmax.view(-1)[start // BLOCK : end // BLOCK] = part_absmax
            start = end
        small, scale, offset = quantize_absmax(absmax.flatten())
        values = {"codes": codes, "absmax": small.view(absmax.shape), "scale": scale, "offset": offset}
        return values | {"levels": torch.tensor(ABSMAX_LEVELS), "pairs": pairs_of_levels()}

    def dequantize(self, dtype: torch.dtype, part: slice = slice(None)) -> Tensor:
        """The weight, or a part of it along its first dimension, in `dtype`."""
        codes, absmax = self.codes[part], self.absmax[part].flatten()
        first = (part.start or 0) * (self.absmax[0].numel())
        last = first + len(absmax)
        scale = self.scale[first // GROUP : -(-last // GROUP)].repeat_interleave(GROUP)[first % GROUP :][: len(absmax)]
        largest = self.levels.index_select(0, absmax.int()).mul_(scale).add_(self.offset)
        return dequantize(codes.flatten(), largest, self.pairs, dtype).view(-1, *self.shape[1:])


# ---------------------------------------------------------------- layers

Part = tuple[slice, slice, Callable[[Tensor, Tensor], Tensor]]  # of the rows, of the weight, and their product


class FrozenProduct(torch.autograd.Function):
    """Rows times a quantised weight, part by part. The gradient of a product by a weight that isn't trained needs the
    weight alone, so nothing is kept: it is dequantised again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4, parts: list[Part]) -> Tensor:
        ctx.weight, ctx.parts = weight, parts
        return torch.cat([product(x[rows], weight.dequantize(x.dtype, part)) for rows, part, product in parts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, parts = ctx.weight, ctx.parts
        grads = [product(grad[rows], weight.dequantize(grad.dtype, part).mT) for rows, part, product in parts]
        return torch.cat(grads), None, None


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
    """Stacked routed experts whose weights are quantised, dequantised a few experts at a time."""

    def __init__(self, base: Experts, gate_up_proj: NF4, down_proj: NF4) -> None:
        nn.Module.__init__(self)
        self.num_experts = base.num_experts
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj  # type: ignore[assignment]

    def project(self, name: str, x: Tensor, product: Product) -> Tensor:
        return FrozenProduct.apply(x, getattr(self, name), list(product.parts(tuning(x).unpacked)))


# ---------------------------------------------------------------- a quantised model


def plan(model: nn.Module) -> None:
    """Replace every matrix of the blocks (linear layers and routed experts; not the router) by a quantised one without
    values. The model may be on the meta device. Raises UserError for a width that is no multiple of 64."""

    def planned(name: str) -> NF4:
        parameter = model.get_parameter(name)
        return NF4(name, parameter.shape, parameter.device)

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            model.set_submodule(name, QuantizedLinear(module, planned(f"{name}.weight")))
        elif isinstance(module, Experts):
            weights = (planned(f"{name}.{weight}") for weight in ("gate_up_proj", "down_proj"))
            model.set_submodule(name, QuantizedExperts(module, *weights))


def quantized_weights(model: nn.Module) -> dict[str, NF4]:
    """By the names that their parameters had."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4)}
