"""How the weights move: the schedule of the learning rate, AdamW, and Muon from scratch."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from config import OptimizerConfig


def learning_rate(step: float, config: OptimizerConfig, total_steps: float) -> float:
    """Rate of a step counted from 0, or of a place between two: linear warm-up, then half a cosine down to
    a share of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * cosine)


def make_optimizers(model: nn.Module, config: OptimizerConfig, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """AdamW, whose decay pulls on matrices only, not on the norms' gains; with `optimizer` muon, Muon for the blocks'
    matrices. AdamW keeps router, embedding and head, whose rows stand for experts and words, each on its own, and the
    stacked experts, where Muon cost more time than it saved. dtype: that Muon multiplies in."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    in_blocks = [n for n, p in trained.items() if ".layers." in n and p.dim() == 2 and ".gate." not in n]
    blocks = [trained.pop(name) for name in (in_blocks if config.optimizer == "muon" else [])]
    groups = [
        {"params": [p for p in trained.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, betas=(config.adam_beta1, config.adam_beta2), fused=True))
    if blocks:
        optimizers.append(Muon(blocks, config.weight_decay, dtype))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (https://kellerjordan.github.io/posts/muon/): a matrix moves equally far in all of its
    directions, not mostly along the few that dominate its gradient.

    torch.optim.Muon does the same, but always multiplies in bf16, which takes ages where the hardware can't.
    """

    MOMENTUM = 0.95
    found_inf: Tensor | None = None  # (), 1 to leave everything as it is; torch's fused optimizers look at theirs, too

    def __init__(self, matrices: Iterable[nn.Parameter], weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(matrices, {"lr": 1e-3, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                gradient, state = matrix.grad, self.state[matrix]
                if gradient is None:
                    continue
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                mean = state["momentum_buffer"].lerp(gradient, 1 - self.MOMENTUM)
                update = orthogonalize(gradient.lerp(mean, self.MOMENTUM), self.dtype)  # Nesterov's: one step ahead
                # Brought to the size of AdamW's updates, so that both take the same learning rate
                # (https://arxiv.org/abs/2502.16982, equation 4).
                rate = group["lr"] * 0.2 * math.sqrt(max(matrix.shape))
                moved = matrix.mul(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
                for old, new in ((state["momentum_buffer"], mean), (matrix, moved)):
                    old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix U S V^T (out, in) to about U V^T in `dtype`, by five steps of Newton and Schulz's iteration.

    The coefficients push small singular values up fast; all end between 0.7 and 1.2.
    """
    tall = x.shape[0] > x.shape[1]
    y = (x.T if tall else x).to(dtype)
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        y = torch.addmm(y, polynomial, y, beta=3.4445)
    return y.T if tall else y
