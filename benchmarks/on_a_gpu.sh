#!/usr/bin/env bash
# What only a GPU can tell, in about ten minutes. Prints one page to paste into an issue.
#
#     bash benchmarks/on_a_gpu.sh 2>&1 | tee on_a_gpu.txt
set -uo pipefail
cd "$(dirname "$0")/.."
directory=$(mktemp -d); trap 'rm -rf "$directory"' EXIT

step() { echo; echo "## $1"; shift; timeout 300 "$@" 2>&1 | tail -"${LINES_SHOWN:-20}" || echo "FAILED: $*"; }

echo "# $(git rev-parse --short HEAD 2>/dev/null), $(date -u +%F)"
step "machine" python -c "
import torch
print('torch', torch.__version__, 'CUDA', torch.version.cuda, 'available', torch.cuda.is_available())
for i in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(i)
    print(f'{p.name}, {p.total_memory / 1e9:.1f} GB, compute capability {p.major}.{p.minor}')"
step "fused kernels equal the plain ones on the GPU (largest relative difference)" python - <<'PYTHON'
import torch
from torch.utils._pytree import tree_map_only
import kernels, quantization
from config import ModelConfig
from documents import find_documents
from model import DeepSeekV2
def difference(a, b): return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
torch.manual_seed(0)
hidden, weight, labels = (x.cuda() for x in (torch.randn(5000, 256), torch.randn(8192, 256), torch.randint(0, 8192, (5000,))))
pairs = []
for loss in (kernels.sum_cross_entropy, kernels.plain_cross_entropy):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        value = loss(h, w, labels)
    value.backward()
    pairs.append((value.detach(), h.grad, w.grad))
print("loss, its gradients", [f"{difference(a, b):.1e}" for a, b in zip(*pairs)])
codes, absmax = quantization.quantize(torch.randn(2**20).cuda())
table = quantization.pairs_of_levels().cuda()
ours = quantization.dequantize(codes, absmax, table, torch.float32)
plain = quantization.unpack.__wrapped__(codes, absmax, table.view(torch.float32).view(256, 2), torch.float32)
print("NF4", f"{difference(ours, plain):.1e}")
documents = tree_map_only(torch.Tensor, torch.Tensor.cuda, find_documents(torch.tensor([[1] * 300 + [2] * 200 + [0] * 12])))
q, k, v = (torch.randn(500, 4, d, device="cuda", dtype=torch.bfloat16) for d in (192, 192, 128))
fast, slow = (f(q, k, v, documents, 0.07) for f in (kernels.document_attention, kernels.plain_attention))
print("attention", f"{difference(fast, slow):.1e}")
model = DeepSeekV2(ModelConfig(vocab_size=8192, hidden_size=512, num_hidden_layers=2, n_routed_experts=8)).cuda()
ids, results = torch.randint(0, 8192, (2, 512)).cuda(), []
for tuning in (kernels.TUNING["cuda"], kernels.TUNING["cuda"]._replace(fused=None)):
    kernels.TUNING["cuda"] = tuning
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss_sum.backward()
    results.append((output.loss_sum.detach(), *(p.grad.clone() for p in model.model.layers[1].parameters())))
print("a model, its loss and gradients", [f"{difference(a, b):.1e}" for a, b in zip(*results)])
PYTHON
run=(python train_sft.py mini --dataset chitchat --train-split train --eval-steps 0 --save-steps 0 --sample-prompts --max-steps 20 --warmup-steps 1)
step "mini, 20 steps" "${run[@]}" --output-dir "$directory/mini"
step "mini, 20 steps, compiled" "${run[@]}" --compile --output-dir "$directory/compiled"
step "the same, predicted (chitchat is not all targets)" "${run[@]}" --dry-run
step "where the time goes" python - <<'PYTHON'
import torch
from torch.profiler import ProfilerActivity, profile
from config import PRESETS
from launch.build import build_model
from launch.dry_run import full_rows
from parallel import World
config, device = PRESETS["mini"].changed(dtype="bfloat16"), torch.device("cuda")
model = build_model(config, None, World(0, 1, device)).train()
batch = full_rows(config.batch.batch_size, config.data.max_seq_len)
def micro_batch():
    with torch.autocast("cuda", torch.bfloat16):
        output = model(**batch.arguments(device))
    (output.loss_sum / output.num_targets).backward()
micro_batch(); torch.cuda.synchronize()
with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
    micro_batch(); torch.cuda.synchronize()
print(profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=15, max_name_column_width=50))
print(f"peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
PYTHON
LINES_SHOWN=12 step "settings" python benchmarks/train_step.py --settings --batch-sizes 1 4 --rounds 5
