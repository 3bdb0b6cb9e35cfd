"""What README, CONTRIBUTING and slurm/README name exists: files, modules, and what their examples import."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "slurm/README.md")
FILE = re.compile(r"[\w/.-]*\w\.(?:py|json|csv|sbatch|sh)(?!\w)")
WRITTEN = {
    "run",
    "events",
    "summary",
    "tokenizer",
    "config",
    "sweep",
    "start",
    "manifest",
}  # by a run, or by the reader


def repository_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    files = repository_files()
    text = (ROOT / document).read_text(encoding="utf-8")
    named = {name for block in re.findall(r"`([^`\n]+)`", text) for name in FILE.findall(block)}
    python = {name for name in named if name.endswith(".py") and "/" in name}
    assert python or document != "README.md", "the reading found no file"
    unknown = {
        name for name in python if not any(("/" + file).endswith("/" + name.lstrip("/")) for file in files)
    }
    assert not {name for name in unknown if Path(name).stem not in WRITTEN and not name.startswith(".")}


def imports_of(source: str) -> list[tuple[str, str]]:
    """(module, name) of what an example imports of ours."""
    return [
        (node.module or "", alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sffn_")
        for alias in node.names
    ]


def examples() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    docstring = ast.get_docstring(
        ast.parse((ROOT / "sffn_dist/parallel/layer_spec.py").read_text(encoding="utf-8"))
    )
    assert docstring
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    return [*blocks, textwrap.dedent(re.findall(r"::\n\n(    .*?)\n\n\S", docstring, re.S)[0])]


@pytest.mark.parametrize("source", examples(), ids=lambda source: source.splitlines()[0])
def test_examples_import_what_there_is(source: str) -> None:
    for module, name in imports_of(source):
        imported = importlib.import_module(module)
        assert hasattr(imported, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module}.{name}"
        for used in re.findall(rf"\b{name}\.(\w+)", source):
            owner = getattr(imported, name, None) or importlib.import_module(f"{module}.{name}")
            assert hasattr(owner, used), f"{name}.{used}"
