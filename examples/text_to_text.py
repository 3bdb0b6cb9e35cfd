"""From a folder of your own text to generated text, on a CPU or one GPU.

    python examples/text_to_text.py my_text
    python examples/text_to_text.py my_text --out runs/mine --steps 500 --prompt "It was" ffn.kind=dense

The script prints each command before it runs it: a plan, some steps of training, the export to a folder that
transformers loads. Then it generates. The model is small (about a million parameters), for some minutes of a
CPU. ``key.path=value`` overrides keys of its config.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "model": {"layers": 4, "width": 128, "heads": 4, "sequence": 128, "vocab": 1024},
    "ffn": {"kind": "low_rank", "rank": 32},
    "train": {"global_batch_size": 16, "micro_batch_size": 16, "learning_rate": 2e-3},
    "checkpoint": {"interval": 100, "keep": 1},
    "evaluation": {"sequences": 32},
}


def run(*command: str | Path) -> None:
    """Print a command, and run it; end where it fails."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(['python', *words])}", flush=True)
    code = subprocess.run([sys.executable, *words], check=False).returncode
    if code:
        sys.exit(code)


def generate(folder: Path, prompt: str, tokens: int) -> str:
    """Text from an exported folder, as any user of transformers makes it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=tokens, do_sample=True, temperature=0.8)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="a file or folder; docs/getting-started.md says of what")
    parser.add_argument("--out", type=Path, default=Path("runs/text_to_text"), help="default %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="default %(default)s")
    parser.add_argument("--prompt", default="The ", help="what the generated text begins with")
    parser.add_argument("--tokens", type=int, default=64, help="to generate (default %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """All of it, one step after the other."""
    options = arguments().parse_intermixed_args(argv)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    config = out / "config.json"
    config.write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    pretrain = [
        ROOT / "sffn_dist/pretrain.py",
        *("--config", config, f"train.steps={options.steps}", f"run.dir={out / 'run'}"),
        *(f"data.dir={out / 'data'}", f"data.source={options.text}", *options.overrides),
    ]
    run(*pretrain, "--plan")
    run(*pretrain)
    exported = out / "exported"
    if not exported.exists():  # an export overwrites nothing
        run(ROOT / "tools/convert.py", "to-hf", out / "run", exported, "--ffn", "merged")
    print(f"\n{generate(exported, options.prompt, options.tokens)}")


if __name__ == "__main__":
    main()
