#!/usr/bin/env bash
# How the files in v1/ were made, in an empty folder: bash make.sh SFFN_DIST_CHECKOUT
set -euo pipefail
checkout=$1
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= PYTHONSAFEPATH=1
pretrain="$checkout/sffn_dist/pretrain.py" convert="python $checkout/tools/convert.py"

mkdir text
python - <<'PY'
import os
words = "a structured feed forward layer has two factors and a narrow bottleneck between them".split()
with open("text/corpus.jsonl", "w") as file:
    for index in range(24):
        text = " ".join(words[(index * 7 + place * place) % len(words)] for place in range(180 + 5 * index))
        file.write('{"text": "' + text + '"}\n')
os.utime("text/corpus.jsonl", (1767225600, 1767225600))  # part of the prepared corpus's name; the test sets it again
PY

cat > guided.json <<'JSON'
{
  "run": {"dir": "guided"},
  "model": {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "sequence": 16, "vocab": 320},
  "ffn": {"kind": "block_shuffle", "width": 32, "blocks": 2},
  "guide": {"mode": "fixed_step", "share": 0.75, "alpha": "linear", "stochastic": true},
  "data": {"dir": "data", "source": "text", "heldout_share": 0.1},
  "train": {"steps": 12, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.01, "warmup_share": 0.2},
  "parallel": {"tensor": 2, "sequence": true},
  "precision": "fp32",
  "checkpoint": {"interval": 3, "keep": 9},
  "evaluation": {"interval": 6, "sequences": 8},
  "guards": {"lost_seconds": 40.0, "replicas_interval": 5, "rollback_after": 2, "rollbacks": 2},
  "sample": {"tokens": 4},
  "logging": {"progress": false}
}
JSON
cat > plain.json <<'JSON'
{
  "run": {"dir": "plain"},
  "model": {"layers": 2, "width": 16, "heads": 2, "sequence": 16, "vocab": 320, "norm": "rmsnorm", "activation": "swiglu",
            "bias": false, "tie_embeddings": false},
  "ffn": {"kind": "block_dense", "width": 32, "rank": 8, "blocks": 2},
  "data": {"dir": "data", "source": "text", "heldout_share": 0.1},
  "train": {"steps": 12, "global_batch_size": 4, "micro_batch_size": 4, "learning_rate": 0.01},
  "zero": {"stage": 0},
  "precision": "fp32",
  "checkpoint": {"interval": 6, "keep": 9},
  "evaluation": {"interval": 6, "sequences": 8},
  "sample": {"tokens": 4},
  "logging": {"progress": false}
}
JSON
torchrun --standalone --nproc_per_node 2 "$pretrain" --config guided.json
python "$pretrain" --config plain.json
$convert to-hf plain structured --ffn structured
$convert to-hf plain merged --ffn merged
$convert from-hf merged imported --ffn low_rank --rank 8 --guide
cp imported/start.json start.json
sed -i "s#$PWD/##" start.json  # an import writes absolute paths
# what a run writes that left bad steps out; step 2 lies behind the checkpoints that are kept
python - <<'PY'
from pathlib import Path
from sffn_dist.config import Guards
from sffn_dist.training.setbacks import Setbacks
setbacks = Setbacks(Guards(rollback_after=1), Path("guided"))
setbacks.note(2, "loss nan", float("nan"))
setbacks.turn_back()
setbacks.returned(0)
setbacks.write()
PY
# the metrics go on to step 12: what a run that is resumed from the checkpoint must write again
rm -rf imported guided/lock plain/lock data/.*.lock guided/checkpoints/*03 guided/checkpoints/*09 guided/checkpoints/*12 plain/checkpoints/*12
rm guided/summary.json plain/summary.json
# what the exports compute for a fixed prompt
python - <<'PY'
import json, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
with torch.no_grad():
    logits = model(torch.tensor([[5, 70, 12, 200, 33, 7, 90, 41]])).logits[0, -1, :8].tolist()
json.dump({"logits": logits}, open("expected.json", "w"))
PY
