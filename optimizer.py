"""The learning rate's schedule, and two optimizers: AdamW, and Muon from scratch.

The rate rises linearly for `warmup_steps`, then follows half a cosine down to a share of its peak. Muon
(https://kellerjordan.github.io/posts/muon/) orthogonalises each matrix's momentum before it steps.

>>> from config import OptimizerConfig
>>> config = OptimizerConfig(learning_rate=1.0, min_learning_rate_ratio=0.1, warmup_steps=2)
>>> [round(learning_rate(step, config, total_steps=10), 3) for step in (0, 1, 2, 6, 10)]
[0.5, 1.0, 1.0, 0.55, 0.1]
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, total_steps: float, progress: float | None = None) -> float:
    """Return the rate of the optimizer step that follows `step` others, at most `config.learning_rate`.

    progress: how much of `total_steps` has been seen, `step` by default. The two differ in a run that was resumed with
    another global batch: its cosine follows the data, but a warm-up that is over stays over.
    """
    progress = step if progress is None else progress
    decay_steps = max(total_steps - config.warmup_steps, 1)
    decayed = min(max((progress - config.warmup_steps) / decay_steps, 0.0), 1.0)
    floor = config.min_learning_rate_ratio
    share = min(floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * decayed)), 1.0)  # rounding could exceed 1
    warmed_up = min((step + 1) / max(config.warmup_steps, 1), 1.0)
    return config.learning_rate * share * warmed_up


def make_optimizers(model: nn.Module, config: OptimizerConfig, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Return AdamW for all trained parameters or, with `optimizer` muon, Muon for the blocks' matrices and AdamW for
    the rest: router, embedding and head, whose rows are separate experts and tokens, and the stacked experts, where
    Muon costs more time than it saves. Weight decay applies to matrices only. dtype: what Muon multiplies in."""
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
    """Orthogonalised momentum: a matrix moves equally far in all directions, not mostly along the few that dominate
    its gradient.

    torch.optim.Muon does the same, but always multiplies in bf16, which is very slow without hardware support.
    """

    MOMENTUM = 0.95
    found_inf: Tensor | None = None  # (), 1: skip this step; torch's fused optimizers read theirs in the same way

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
                update = orthogonalize(gradient.lerp(mean, self.MOMENTUM), self.dtype)  # Nesterov: one step ahead
                # Scaled to the size of AdamW's updates, so that both use the same learning rate
                # (https://arxiv.org/abs/2502.16982, equation 4).
                rate = group["lr"] * 0.2 * math.sqrt(max(matrix.shape))
                moved = matrix.mul(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
                for old, new in ((state["momentum_buffer"], mean), (matrix, moved)):
                    old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Map a matrix U S V^T (out, in) to approximately U V^T in `dtype`, by five Newton-Schulz iterations.

    The coefficients increase small singular values quickly; all end between 0.7 and 1.2.
    """
    tall = x.shape[0] > x.shape[1]
    y = (x.T if tall else x).to(dtype)
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        y = torch.addmm(y, polynomial, y, beta=3.4445)
    return y.T if tall else y
