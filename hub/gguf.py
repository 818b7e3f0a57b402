"""Models as GGUF files, which llama.cpp, Ollama and LM Studio run; written with llama.cpp's own `gguf` package.

llama.cpp calls the architecture deepseek2. It always attends in the latent space (`model.Attention.attend_absorbed`),
so kv_b_proj is stored as two tensors. Configurations that llama.cpp would compute differently are refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from config import ModelConfig, UserError
from hub.tokenizer_json import jinja_template
from model import DeepSeekV2
from tokenizer import Tokenizer
from vocabulary import BYTE_TO_CHAR, CL100K_PATTERN

DTYPES = {torch.bfloat16: Type.BF16, torch.float16: Type.F16}


def write_gguf(path: Path, model: DeepSeekV2, tokenizer: Tokenizer, name: str) -> None:
    """Write a model to a GGUF file. Weights keep their dtype; vectors and routers are fp32.

    Raises UserError for a model that llama.cpp cannot run.
    """
    check_runnable(model.config, tokenizer)
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_name(name)
    add_config(writer, model.config)
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    for tensor_name, tensor in gguf_tensors(model):
        is_small = tensor.dim() == 1 or ".ffn_gate_inp." in tensor_name
        dtype = Type.F32 if is_small else DTYPES.get(tensor.dtype, Type.F32)
        data = gguf.quants.quantize(tensor.detach().float().cpu().numpy(), dtype)
        writer.add_tensor(tensor_name, data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_runnable(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError if llama.cpp would compute something else than `model.py`, or cannot read the vocabulary."""
    rope = config.rope_scaling
    if config.topk_method != "greedy":
        raise UserError(f"llama.cpp lacks DeepSeek-V2's group-limited routing: topk_method is {config.topk_method}")
    if rope and rope.mscale != rope.mscale_all_dim:
        raise UserError(f"llama.cpp needs mscale ({rope.mscale}) equal to mscale_all_dim ({rope.mscale_all_dim})")
    if config.rms_norm_eps != 1e-6:
        raise UserError(f"llama.cpp has one rms_norm_eps for all norms, 1e-6, not {config.rms_norm_eps}")
    if json.dumps(CL100K_PATTERN) not in tokenizer.to_json():
        raise UserError("the vocabulary is not cl100k_base's: use llama.cpp's convert_hf_to_gguf.py")


def add_config(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """Write the model's configuration under llama.cpp's keys."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    # attention: in the latent space all heads share one key and value
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_q_lora_rank(config.q_lora_rank or 0)  # without it, llama.cpp accepts the published sizes only
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if rope := config.rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope.mscale_all_dim)
    # experts
    normalised = config.norm_topk_prob and config.num_experts_per_tok > 1
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_expert_weights_norm(normalised)
    writer.add_expert_weights_scale(1.0 if normalised else config.routed_scaling_factor)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Write the vocabulary in GPT-2's characters. Unused ids get names, since all names must differ."""
    control = {i: token for token, i in tokenizer.control_ids.items()}
    tokens, types = [], []
    for i in range(vocab_size):
        token = tokenizer.tokens[i] if i < tokenizer.vocab_size else b""
        tokens.append(control.get(i) or "".join(BYTE_TO_CHAR[byte] for byte in token) or f"[unused {i}]")
        kind = gguf.TokenType.NORMAL if token else gguf.TokenType.UNUSED
        types.append(gguf.TokenType.CONTROL if i in control else kind)
    merges = json.loads(tokenizer.to_json())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("dbrx")  # llama.cpp's name for cl100k_base's pattern
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)  # the chat template writes it
    if tokenizer.template.start:
        writer.add_bos_token_id(tokenizer.control_ids[tokenizer.template.start])
    writer.add_chat_template(jinja_template(tokenizer.template, mark_trained=False))


def gguf_tensors(model: DeepSeekV2) -> Iterator[tuple[str, Tensor]]:
    """Yield our tensors under GGUF's names. The experts' are stacks (E, out, in). kv_b_proj (H (nope + v), rank) is
    split into keys (H, rank, qk_nope_head_dim) and values (H, v_head_dim, rank)."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config.num_hidden_layers)
    for name, tensor in (model.state_dict() | {"lm_head.weight": model.output_weight}).items():
        name = name.removesuffix(".weight")
        parts = {name: tensor}
        if name.endswith("kv_b_proj"):
            heads = tensor.unflatten(0, (config.num_attention_heads, -1))
            keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            parts = {name.replace("kv_b", "k_b"): keys.mT, name.replace("kv_b", "v_b"): values}
        elif name.endswith("gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            parts = {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        for hub_name, part in parts.items():
            yield f"{names.get_name(hub_name)}.weight", part.contiguous()
