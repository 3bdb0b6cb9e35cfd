"""What an exported folder does under the transformers that is first on the path; run as a script.

versions_cases.py VERSION record|check FOLDER...
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

TOKENS = torch.tensor([[1, 5, 2, 3, 6, 4, 0, 2], [3, 3, 1, 2, 5, 5, 6, 1]])


def main(version: str, act: str, *folders: str) -> None:
    """Record the logits of each folder, or check it."""
    assert transformers.__version__ == version, transformers.__version__
    transformers.logging.set_verbosity_error()
    for folder in map(Path, folders):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            logits = model(TOKENS).logits
            if act == "record":
                torch.save(logits, folder / "logits.pt")
                continue
            check(folder, model, logits)


def check(folder: Path, model: torch.nn.Module, logits: torch.Tensor) -> None:
    """One line of JSON."""
    difference = float((logits - torch.load(folder / "logits.pt")).abs().max())
    assert difference < 1e-4, difference
    changed = TOKENS.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 7
    moved = (model(changed).logits - logits).abs()
    assert moved[:, :5].max() < 1e-5, "a token sees what comes after it"
    assert moved[:, 5:].max() > 1e-2
    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    hidden = base(TOKENS).last_hidden_state
    again = float((model.lm_head(hidden) - logits).abs().max())
    assert again < 1e-4, again
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer("ab c", return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert snippet
    os.chdir(folder.parent)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet[1], {})
    row = {
        "transformers": transformers.__version__,
        "folder": folder.name,
        "model": type(model).__name__,
        "logits": difference,
        "generated": generated[0].tolist(),
        "inputs": sorted(inputs),
        "card": printed.getvalue().strip(),
    }
    print(json.dumps(row))


main(*sys.argv[1:])
