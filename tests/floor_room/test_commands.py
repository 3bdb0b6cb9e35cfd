"""Every command line in the documents is one that its program takes."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.launch import cli, run_changes
from sffn_dist.spec import loading, plan
from sffn_dist.spec.config import Config, ConfigError

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "slurm/README.md", *PAGES)
# programs of others, whose arguments nobody here knows better
OTHERS = {
    *("cd", "git", "grep", "kill", "lm_eval", "pip", "pip3", "scancel", "squeue", "tail", "touch", "."),
    *("sacct", "scontrol", "apt-get", "docker", "pre-commit", "ssh", "mkdir"),
}
LAUNCHERS = ("deepspeed", "torchrun", "srun")
# as the reader writes them, or a tool does: what they are like
STAND_IN = {"imported/start.json": "configs/demo.json", "configs/mine.json": "configs/demo.json"}
INLINE = ("deepspeed ", "torchrun ", "srun ", "python ", "make ", "sbatch --", "pytest ")


def commands(document: str) -> list[str]:
    """Command lines of a document: of code blocks without a language, and of code in the text."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
        found += command_lines(block) if language in ("", "bash", "sh") else []
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    found += [code for code in re.findall(r"`([^`]+)`", prose) if code.startswith(INLINE)]
    return [" ".join(code.split("\n")) if "python -c" not in code else code for code in found]


def command_lines(block: str) -> list[str]:
    """Those of a code block; what a program printed, trees and formulas are no commands."""
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    found: list[str] = []
    for line in lines:
        if found and found[-1].count('"') % 2:  # a quoted text of several lines
            found[-1] += f"\n{line}"
        elif is_command(line):
            found.append(line)
    return [part.strip() for line in found for part in line.split("&&")]


def is_command(line: str) -> bool:
    word = line.split(" ")[0]
    return (
        word in (*OTHERS, *LAUNCHERS, "make", "sbatch", "pytest")
        or word.rpartition("/")[2] in ("python", "python3", "pip")
    ) and not line.startswith("  ")


def words_of(command: str) -> list[str]:
    """Its words; ``[...]`` around what may be left out, and ``…`` for more of the kind, are no words."""
    command = re.sub(r"\[(?:--|key\.path)[^\]]*\]", "", command)
    return [word for word in shlex.split(command, comments=True) if word != "…"]


# ----------------------------------------------------------------------------------------- what programs take


def load_config(path: str, overrides: list[str]) -> Config:
    return loading.load(ROOT / STAND_IN.get(path, path), overrides)


def check_pretrain(arguments: list[str]) -> None:
    """The config file is there, the overrides fit, and the run has a plan."""
    options = cli.arguments(arguments)
    config = load_config(options.config, [*options.overrides, *run_changes.overrides(options.change)])
    if config.train.steps and config.train.micro_batch_size != "auto":
        assert plan.plan(config, config.parallel.tensor)


def load_tool(path: str) -> Any:
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(f"documented_{name}", ROOT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check_tool(path: str, arguments: list[str]) -> None:
    """The parser of a tool takes the arguments; configs that they name fit."""
    tool = load_tool(path)
    name = Path(path).stem
    if name == "convert":
        tool.arguments(arguments)
        return
    if name == "bench":
        options = tool.arguments.parser(None).parse_args(arguments)
        tool.arguments.settle(options, cuda=True)
        # the device and the folder of tables are the reader's
        theirs = ("no such folder", "--device cuda")
        assert [text for text in tool.misfits(options) if not any(word in text for word in theirs)] == []
        return
    if name == "config_reference":
        assert set(arguments) <= {"--check"}
        return
    options = tool.arguments().parse_intermixed_args(arguments)
    if name == "submit":
        tool.options_of(options)
        if options.sweep:
            assert tool.sweep.read(ROOT / options.sweep).name
    if getattr(options, "config", None):
        load_config(options.config, options.overrides)
        if name == "compare":
            assert tool.variants.parse(options.variants)


def check_script(path: str, arguments: list[str]) -> None:
    """A script without a parser of its own to ask: it names each option."""
    source = (ROOT / path).read_text(encoding="utf-8")
    for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        assert f'"{option}"' in source, f"{path} has no {option}"


def check_python_file(path: str, arguments: list[str]) -> None:
    assert (ROOT / path).is_file(), f"{path}: no such file"
    if path == "sffn_dist/pretrain.py":
        check_pretrain(arguments)
    elif path.startswith("tools/"):
        check_tool(path, arguments)
    else:
        check_script(path, arguments)


def check_statements(source: str) -> None:
    """``python -c``: what it imports is there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sffn_"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(name), name


def check_make(arguments: list[str]) -> None:
    """Targets and variables are those of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in arguments:
        name, equals, _ = word.partition("=")
        rule = rf"^{re.escape(name)} \?=|\$\({re.escape(name)}\)" if equals else rf"^{re.escape(name)}:"
        assert re.search(rule, text, re.M), f"make {word}: not in the Makefile"


def check_python(words: list[str]) -> None:
    if words[:1] == ["-c"]:
        check_statements(words[1])
    elif words[:1] == ["-m"]:
        assert importlib.util.find_spec(words[1]) or words[1] in ("venv", "pip"), words[1]
    else:
        check_python_file(words[0], words[1:])


def check_launcher(words: list[str]) -> None:
    """What a launcher starts; its own options are its own."""
    if all(word.startswith("-") for word in words):  # an option that the text names
        return
    script = next(place for place, word in enumerate(words) if word.endswith(".py"))
    check_python_file(words[script], words[script + 1 :])


def check_sbatch(words: list[str]) -> None:
    script = next(place for place, word in enumerate(words) if word.endswith(".sbatch"))
    assert (ROOT / words[script]).is_file()
    check_pretrain(words[script + 1 :])


def check_pytest(words: list[str]) -> None:
    for word in words:
        assert word.startswith("-") or (ROOT / word).exists() or word in ("faults", "sweeps"), word


def check(command: str) -> None:
    """Raises where a program would refuse the command, or does not exist."""
    program, *words = words_of(command)
    program = program.rpartition("/")[2]
    checks: dict[str, Callable[[list[str]], None]] = {
        "make": check_make,
        "sbatch": check_sbatch,
        "pytest": check_pytest,
        **dict.fromkeys(("python", "python3"), check_python),
        **dict.fromkeys(LAUNCHERS, check_launcher),
    }
    if program in checks:
        checks[program](words)
    else:
        assert program in OTHERS or not program, f"{program}: unknown program"


def refusal(command: str) -> str | None:
    """Why a command is none; None where it is one."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            check(command)
    except (AssertionError, ConfigError, StopIteration, ValueError, SystemExit) as error:
        return f"{str(error) or type(error).__name__} {said.getvalue()}".strip()
    return None


# ------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_what_their_programs_take(document: str) -> None:
    refused = {command: why for command in commands(document) if (why := refusal(command))}
    assert refused == {}


def test_the_reading_finds_the_commands() -> None:
    readme, slurm = commands("README.md"), commands("slurm/README.md")
    assert any(command.startswith("make demo  ") for command in readme)
    assert any(command.startswith("deepspeed --num_gpus 8") for command in readme)
    assert any(command.startswith("sbatch --nodes 2") for command in slurm)
    assert any("prepare(loading.load(" in command for command in slurm)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("deepspeed sffn_dist/pretrain.py --config configs/none.json", "no such file"),
        ("python sffn_dist/pretrain.py --config configs/demo.json train.step=1", "unknown key"),
        ("python sffn_dist/pretrain.py --config configs/demo.json --plans", "unrecognized arguments"),
        ("python sffn_dist/pretrain.py --config configs/demo.json ffn.blocks=3", "must divide"),
        ("python tools/convert.py to-hf a b --ffn dense", "invalid choice"),
        ("python tools/bench.py tp --sequences", "unrecognized arguments"),
        ("python tools/submit.py --config configs/demo.json --nodes 2", "required"),
        ("python tools/none.py", "no such file"),
        ("torchrun --nnodes 2", "StopIteration"),
        ("make tests", "not in the Makefile"),
        ("make gpu WHEEL=a", "not in the Makefile"),
        ('python -c "from sffn_dist.spec import readings"', "sffn_dist.spec.readings"),
        (
            "sbatch --nodes 2 slurm/pretrain.sbatch --config configs/demo.json train.steps=a",
            "must be an integer",
        ),
        ("python benchmarks/sffn_bench/plots.py a.csv --output b", "has no --output"),
    ],
)
def test_a_wrong_command_is_seen(command: str, why: str) -> None:
    assert why in (refusal(command) or "")
