"""DeepSeek-V2 (https://arxiv.org/abs/2405.04434) from scratch, following section 2 of the paper.

Embedding -> layers of (attention, mixture of experts) -> norm -> head -> loss; the parts come before the whole.

Shapes in comments: N tokens of all documents in the batch, H heads, E routed experts, K of them chosen per token, V
entries of the vocabulary, B rows, T positions, S cached positions.

The batch comes as (B, T) tensors, but the layers work on a flat stream (N, hidden_size) with a list of documents.
Padding is removed first (for torch.compile, it becomes a document of its own), so packed and padded batches give the
same result. Module names match Hugging Face's. kernels.py has the hot operations, each in a plain and a fast form.

>>> config = ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=8,
...     intermediate_size=64, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2)
>>> model, ids = DeepSeekV2(config), torch.tensor([[3, 1, 4, 1, 5]])
>>> model(ids).shape  # (B, T, V)
torch.Size([1, 5, 50])
>>> output = model(ids, labels=torch.tensor([[1, 4, 1, 5, -100]]))
>>> output.num_targets, output.expert_counts.sum().item()  # one MoE layer: two experts for each of 5 tokens
(4, 10.0)
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import ModelConfig
from documents import Documents, find_documents
from kernels import (
    Linear,
    Product,
    compute_dtype,
    document_attention,
    find_routes,
    fused,
    linear,
    sum_cross_entropy,
)


class Routing(NamedTuple):
    """Statistics of one layer's router, as sums over tokens, so micro-batches and ranks add up."""

    expert_counts: Tensor  # (E,) tokens sent to each expert
    balance_loss: Tensor  # () balance losses, summed over documents


class LossOutput(NamedTuple):
    """Sums, not means: the trainer divides them by the counts of the whole step."""

    loss_sum: Tensor  # () cross entropy in nats, summed over target tokens
    num_targets: int
    balance_loss: Tensor  # () balance losses, summed over documents and layers
    num_documents: int
    expert_counts: Tensor  # (MoE layers, E)


@fused
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Root mean square normalisation, computed in fp32: x / sqrt(mean(x^2) + eps) * weight."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(dtype)


class RMSNorm(nn.RMSNorm):
    """`rms_norm` as a layer, whose output has the dtype that matrix products take."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, compute_dtype(x))


# ---------------------------------------------------------------- positions: RoPE and YaRN


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return YaRN's correction of the attention temperature for a context `factor` times longer."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_frequencies(config: ModelConfig, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Return (frequencies, scale): radians per position (qk_rope_head_dim / 2,), and a scale for cos and sin.

    YaRN (https://arxiv.org/abs/2309.00071, section 3.2): high frequencies are kept, low ones are divided by
    `scaling.factor`, and those in between are interpolated linearly.
    """
    dim, base, scaling = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if scaling is None:
        return frequencies, 1.0

    def dim_of_rotations(times: float) -> float:  # the dimension that turns this often within the original context
        return dim * math.log(scaling.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dim_of_rotations(scaling.beta_fast)), 0)
    high = min(math.ceil(dim_of_rotations(scaling.beta_slow)), dim - 1)
    slowed = ((torch.arange(dim // 2, device=device) - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = frequencies / scaling.factor * slowed + frequencies * (1 - slowed)
    scale = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return frequencies, scale


Rope = tuple[Tensor, Tensor]  # cos and sin of each token's angles (N, 1, qk_rope_head_dim / 2)


@fused
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of x (N, H, qk_rope_head_dim) by their token's angles."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2).to(x.dtype)


# ---------------------------------------------------------------- multi-head latent attention (section 2.1)


class LayerCache(NamedTuple):
    """Cache of one layer in generation, and where the current tokens go."""

    latents: Tensor  # (B, S, kv_lora_rank + qk_rope_head_dim), preallocated
    w_uk: Tensor  # (H, qk_nope_head_dim, kv_lora_rank) up-projection of keys
    w_uv: Tensor  # (H, kv_lora_rank, v_head_dim) up-projection of values
    rows: Tensor  # (B, 1) 0, 1, 2 ...
    positions: Tensor  # (B, T) of the current tokens
    future: Tensor  # (B, T, S) True: not to be attended to; here S is 1 + the largest position


class Attention(nn.Module):
    """Multi-head latent attention: keys and values are computed from one small latent per token (figure 3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, rank = config.num_attention_heads, config.kv_lora_rank
        self.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, heads * self.qk_head_dim)
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
            # the latents' norms keep 1e-6 regardless of rms_norm_eps, like DeepSeek's
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=1e-6)
            self.q_b_proj = Linear(config.q_lora_rank, heads * self.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(rank, eps=1e-6)
        self.kv_b_proj = Linear(rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, config.hidden_size)
        self.scale = self.qk_head_dim**-0.5
        if config.rope_scaling is not None:
            self.scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2

    def forward(self, x: Tensor, rope: Rope, context: Documents | LayerCache) -> Tensor:
        """x (N, hidden_size) -> (N, hidden_size)"""
        config = self.config
        # queries without and with RoPE (N, H, qk_nope_head_dim), (N, H, qk_rope_head_dim); equations 12 to 14
        q = self.q_proj(x) if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (config.num_attention_heads, self.qk_head_dim))
        q_nope, q_pe = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q_pe = rotate(q_pe, *rope)
        # cached: latent (N, kv_lora_rank), rotary key (N, qk_rope_head_dim); equations 9 and 15
        latent, k_pe = self.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        latent, k_pe = self.kv_a_layernorm(latent), rotate(k_pe[:, None], *rope)[:, 0]
        # attention
        if isinstance(context, Documents):
            output = self.attend_expanded(q_nope, q_pe, latent, k_pe, context)
        else:
            output = self.attend_absorbed(q_nope, q_pe, latent, k_pe, context)
        return self.o_proj(output.flatten(1))

    def attend_expanded(
        self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, documents: Documents
    ) -> Tensor:
        """Compute every head's keys and values (equations 10, 11, 16, 17), then ordinary attention: for training."""
        heads, nope, v_head_dim = q_nope.shape[1], self.config.qk_nope_head_dim, self.config.v_head_dim
        k_nope, v = self.kv_b_proj(latent).unflatten(-1, (heads, nope + v_head_dim)).split([nope, v_head_dim], dim=-1)
        q = torch.cat((q_nope, q_pe), dim=-1)  # (N, H, qk_head_dim)
        k = torch.cat((k_nope, k_pe[:, None].expand(-1, heads, -1)), dim=-1)
        return document_attention(q, k, v, documents, self.scale)

    def attend_absorbed(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, cache: LayerCache) -> Tensor:
        """Attend in the latent space, without per-head keys or values: for generation (section 2.1.2, appendix C).

        q . (W_uk c) = (W_uk^T q) . c, so queries move into the latent space, and all heads share one key per token.
        Likewise W_uv is applied after the weighted sum of latents.
        """
        (batch, length), heads, rank = cache.positions.shape, q_nope.shape[1], self.config.kv_lora_rank
        entries = torch.cat((latent, k_pe), dim=-1).to(cache.latents.dtype)
        cache.latents[cache.rows, cache.positions] = entries.view(batch, length, -1)
        keys = cache.latents[:, : cache.future.shape[-1]].to(q_pe.dtype)  # (B, S, rank + rope)
        q_latent = torch.bmm(q_nope.transpose(0, 1), cache.w_uk.to(q_nope.dtype)).transpose(0, 1)  # (B * T, H, rank)
        q = torch.cat((q_latent, q_pe), dim=-1).view(batch, length * heads, -1)
        scores = (q @ keys.mT).float().mul_(self.scale).view(batch, length, heads, -1)
        weights = scores.masked_fill_(cache.future[:, :, None], -torch.inf).softmax(dim=-1).to(keys.dtype)
        context = weights.view(batch, length * heads, -1) @ keys[..., :rank]  # (B, T * H, rank)
        context = context.view(-1, heads, rank).transpose(0, 1)
        return torch.bmm(context, cache.w_uv.to(keys.dtype)).transpose(0, 1)

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """Return W_uk (H, qk_nope_head_dim, rank) and W_uv (H, rank, v_head_dim): kv_b_proj applied to the
        identity, which includes an adapter."""
        like = self.kv_a_layernorm.weight
        unit = torch.eye(self.config.kv_lora_rank, dtype=like.dtype, device=like.device)
        columns = self.kv_b_proj(unit).unflatten(-1, (self.config.num_attention_heads, -1))  # (rank, H, nope + v)
        w_uk, w_uv = columns.split([self.config.qk_nope_head_dim, self.config.v_head_dim], dim=-1)
        return w_uk.permute(1, 2, 0).contiguous(), w_uv.transpose(0, 1).contiguous()


# ---------------------------------------------------------------- feed-forward networks, dense and sparse (section 2.2)


@fused
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gated activation between a feed-forward network's products."""
    return F.silu(gate) * up


@fused
def weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """`swiglu` for rows of experts, times the router's weights: gate_up (R, 2 moe_intermediate_size), weights (R,)
    -> (R, moe_intermediate_size)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * weights[:, None]


class MLP(nn.Module):
    """SwiGLU feed-forward network."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, intermediate_size)
        self.up_proj = Linear(config.hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Scores every expert for every token, in fp32, because a rounding error could send a token to another expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, hidden_size) -> scores (N, E), and weights and indices (N, K) of the chosen experts."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).softmax(dim=-1)  # equation 22
        candidates = scores
        if config.topk_method == "group_limited_greedy":  # section 2.2.2: at most topk_group devices per token
            grouped = scores.unflatten(-1, (config.n_group, -1))
            best_groups = grouped.amax(dim=-1).topk(config.topk_group, dim=-1).indices
            allowed = torch.zeros_like(grouped[..., 0]).scatter(1, best_groups, 1.0)
            candidates = (grouped * allowed[..., None]).flatten(1)
        weights, experts = candidates.topk(config.num_experts_per_tok, dim=-1)
        # as in DeepSeek's own code: weights are normalised or scaled, not both; a single expert's is never normalised
        if config.norm_topk_prob and config.num_experts_per_tok > 1:
            return scores, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20), experts
        return scores, weights * config.routed_scaling_factor, experts


class Experts(nn.Module):
    """The routed experts' SwiGLU networks, stacked: one grouped product runs them all."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, intermediate = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x (N, hidden_size), weights and experts (N, K) -> (N, hidden_size), the sum in equation 20."""
        x, chosen = x.to(compute_dtype(x)), experts.shape[1]
        routes = find_routes(experts.flatten(), self.num_experts)
        rows = routes.to_experts(x, copies=chosen)  # (N * K, hidden_size), sorted by expert
        scales = routes.to_experts(weights.flatten().to(x.dtype))
        hidden = weighted_swiglu(self.project("gate_up_proj", rows, routes.product), scales)
        return routes.to_tokens(self.project("down_proj", hidden, routes.product), copies=chosen)

    def project(self, name: str, x: Tensor, product: Product) -> Tensor:  # LoRA and NF4 override it
        return product(x, getattr(self, name).to(x.dtype))


class MoE(nn.Module):
    """DeepSeekMoE: every token goes through the shared experts and its K routed experts (equation 20)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x: Tensor, documents: Documents | None) -> tuple[Tensor, Routing | None]:
        """x (N, hidden_size) -> the same shape, and the router's statistics if documents are given."""
        scores, weights, experts = self.gate(x)
        output = self.shared_experts(x) + self.experts(x, weights, experts)
        if documents is None:
            return output, None
        # (N, E), 1 where a real token goes to the expert
        chosen = torch.zeros_like(scores).scatter(1, experts, documents.real.expand_as(experts))
        return output, Routing(chosen.sum(dim=0).detach(), balance_loss(self.config, scores, chosen, documents))


def balance_loss(config: ModelConfig, scores: Tensor, chosen: Tensor, documents: Documents) -> Tensor:
    """Return the sum of section 2.2.3's three balance losses, each computed per document and summed over documents.

    scores (N, E): the router's. chosen (N, E): 1 where a token goes to an expert; 0 for padding, whose documents
    therefore add nothing.
    """

    def document_mean(x: Tensor) -> Tensor:  # (N, ·) -> (documents, ·)
        lengths = documents.offsets.diff()[:, None]
        return x.new_zeros(len(lengths), x.shape[1]).index_add(0, documents.ids, x) / lengths.clamp(min=1)

    experts, devices, chosen_per_token = config.n_routed_experts, config.n_group, config.num_experts_per_tok
    load = document_mean(chosen) * experts / chosen_per_token  # f_i, equation 24
    affinity = document_mean(scores)  # P_i, equation 25
    loss = config.aux_loss_alpha * (load * affinity).sum()  # equation 23
    device_affinity = affinity.unflatten(-1, (devices, -1)).sum(dim=-1)  # P'_i, equations 28 and 31
    if config.device_aux_loss_alpha:
        device_load = load.unflatten(-1, (devices, -1)).mean(dim=-1)  # f'_i, equation 27
        loss = loss + config.device_aux_loss_alpha * (device_load * device_affinity).sum()  # equation 26
    if config.communication_aux_loss_alpha:
        sent = chosen.unflatten(-1, (devices, -1)).amax(dim=-1)  # (N, devices) 1: the token goes there
        received = document_mean(sent) * devices / config.topk_group  # f''_i, equation 30
        loss = loss + config.communication_aux_loss_alpha * (received * device_affinity).sum()  # equation 29
    return loss


# ---------------------------------------------------------------- the model


class Block(nn.Module):
    """A pre-norm layer: attention, then a feed-forward network, each with a residual connection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dense = layer < config.first_k_dense_replace
        self.self_attn = Attention(config)
        self.mlp: MLP | MoE = MLP(config, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, context: Documents | LayerCache) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), rope, context)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(normed), None
        output, routing = self.mlp(normed, context if isinstance(context, Documents) else None)
        return x + output, routing


class Decoder(nn.Module):
    """Embedding, blocks and final norm, on a flat stream of tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, contexts: list[Documents] | list[LayerCache]
    ) -> tuple[Tensor, list[Routing]]:
        """input_ids, position_ids (N,), a context for each layer -> hidden (N, hidden_size), routing per MoE layer."""
        x = self.embed_tokens(input_ids)
        frequencies, scale = rope_frequencies(self.config, x.device)
        angles = position_ids[:, None, None].float() * frequencies
        rope = (angles.cos() * scale, angles.sin() * scale)
        routings = []
        for layer, context in zip(self.layers, contexts, strict=True):
            if self.gradient_checkpointing and self.training:
                x, routing = checkpoint(layer, x, rope, context, use_reentrant=False)
            else:
                x, routing = layer(x, rope, context)
            if routing is not None:
                routings.append(routing)
        return self.norm(x), routings


class DeepSeekV2(nn.Module):
    """DeepSeek-V2 with its language modelling head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.model = Decoder(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size)
        with torch.no_grad():
            for parameter, (_, value) in zip(self.parameters(), self.initial_weights(), strict=True):
                parameter.copy_(value)

    @property
    def output_weight(self) -> Tensor:
        """(V, hidden_size): the head's own matrix, or the embedding's where they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, hidden_size) -> (N, V)"""
        return linear(hidden, self.output_weight)

    def initial_weights(self, generator: torch.Generator | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, value) per parameter: matrices N(0, initializer_range^2), norms 1 (section 3.1.2)."""
        for name, parameter in self.named_parameters():
            value = torch.ones(parameter.shape)
            if value.dim() > 1:
                value.normal_(0, self.config.initializer_range, generator=generator)
            yield name, value

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        labels: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor | LossOutput:
        """Return logits (B, T, V), zero at padding, or a `LossOutput` if there are labels.

        The first four arguments are (B, T) int64, as datacollator.py makes them: labels are already shifted, and -100
        is ignored. By default a row is one document. documents: from `find_documents`, in place of sequence_ids and
        labels.
        """
        if sequence_ids is None:
            sequence_ids = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if documents is None:
            documents = find_documents(sequence_ids, labels)
        tokens = documents.tokens
        # no targets: compiled layers would be recompiled for each number of them
        contexts = [documents._replace(targets=None, labels=None)] * self.config.num_hidden_layers
        hidden, routings = self.model(input_ids.flatten()[tokens], position_ids.flatten()[tokens], contexts)
        if documents.targets is None or documents.labels is None:
            logits = self.logits(hidden * documents.real.to(hidden.dtype))
            padded = logits.new_zeros(input_ids.numel(), self.config.vocab_size).index_copy(0, tokens, logits)
            return padded.view(*input_ids.shape, -1)
        loss_sum = sum_cross_entropy(hidden[documents.targets], self.output_weight, documents.labels)
        balance = [routing.balance_loss for routing in routings]
        counts = [routing.expert_counts for routing in routings]
        return LossOutput(
            loss_sum=loss_sum,
            num_targets=len(documents.labels),
            balance_loss=torch.stack(balance).sum() if balance else loss_sum.new_zeros(()),
            num_documents=documents.num_documents,
            expert_counts=torch.stack(counts) if counts else loss_sum.new_zeros(0, self.config.n_routed_experts),
        )
