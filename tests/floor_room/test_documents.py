"""What the documents say is there: files, links, pages, imports of examples, messages that are explained."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
import subprocess
import textwrap
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "slurm/README.md", *PAGES)
FILE = re.compile(r"[\w/.-]*\w\.(?:py|json|csv|md|png|sbatch|sh)(?!\w)")
LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)")
# by a run, by a tool, or by the reader
WRITTEN = {
    *("run", "events", "summary", "tokenizer", "tokenizer_config", "config", "sweep", "start", "manifest"),
    *("comparison", "curves", "passed_over", "end", "meta", "vocab", "mine"),
}
LONGEST_README = 160


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@functools.cache
def repository_files() -> tuple[str, ...]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(listed.stdout.splitlines())


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


# ------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    text = without_code(read(document))
    named = {name for block in re.findall(r"`([^`\n]+)`", text) for name in FILE.findall(block)}
    paths = {name for name in named if "/" in name and not name.startswith((".", "/"))}
    unknown = {
        name for name in paths if not any(("/" + file).endswith("/" + name) for file in repository_files())
    }
    assert not {name for name in unknown if Path(name).stem not in WRITTEN}


def test_the_reading_finds_files() -> None:
    assert FILE.findall("tools/bench.py and docs/kernels.md, a.jsonl") == [
        "tools/bench.py",
        "docs/kernels.md",
    ]


def test_the_readme_is_short() -> None:
    lines = len(read("README.md").splitlines())
    assert lines <= LONGEST_README, f"README.md has {lines} lines: what is more belongs into docs/"


def test_every_page_is_listed() -> None:
    contents, site = read("docs/README.md"), read("mkdocs.yml")
    for page in PAGES:
        name = Path(page).name
        assert name == "README.md" or f"]({name})" in contents, f"{name}: not in the list of docs/README.md"
        assert name in site, f"{name}: not in mkdocs.yml"


# ------------------------------------------------------------------------------------------------------ links


def headings(document: str) -> list[str]:
    found = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", read(document), flags=re.S | re.M), re.M)
    return [heading.replace("`", "") for heading in found]


def github_anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def site_anchor(heading: str) -> str:
    """As Python-Markdown makes it."""
    ascii_text = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_text).strip().lower())


def broken_links(document: str) -> list[str]:
    """Relative links of a document to a file that is not there, or to a heading that it does not have."""
    broken, known = [], set(repository_files())
    for target in LINK.findall(without_code(read(document))):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        name = file.resolve().relative_to(ROOT).as_posix()
        if name not in known and not file.is_dir():
            broken.append(f"{target}: no such file")
        elif anchor:
            anchors = [(github_anchor(heading), site_anchor(heading)) for heading in headings(name)]
            if (anchor, anchor) not in anchors:
                broken.append(f"{target}: no such heading, on GitHub and on the site alike")
    return broken


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    assert broken_links(document) == []


def test_anchors_are_those_of_github_and_of_the_site() -> None:
    assert github_anchor("`run.dir` (exit code 2)".replace("`", "")) == "rundir-exit-code-2"
    assert site_anchor("What it says") == github_anchor("What it says") == "what-it-says"
    assert site_anchor("a — b") != github_anchor("a — b")


# --------------------------------------------------------------------------------------------------- examples


def imports_of(source: str) -> list[tuple[str, str]]:
    """(module, name) of what an example imports of ours."""
    return [
        (node.module or "", alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sffn_")
        for alias in node.names
    ]


def examples() -> list[str]:
    docstring = ast.get_docstring(ast.parse(read("sffn_dist/parallel/layer_spec.py")))
    assert docstring
    blocks = [block for page in DOCUMENTS for block in re.findall(r"```python\n(.*?)```", read(page), re.S)]
    assert blocks
    return [*blocks, textwrap.dedent(re.findall(r"::\n\n(    .*?)\n\n\S", docstring, re.S)[0])]


@pytest.mark.parametrize("source", examples(), ids=lambda source: source.splitlines()[0])
def test_examples_import_what_there_is(source: str) -> None:
    for module, name in imports_of(source):
        imported = importlib.import_module(module)
        assert hasattr(imported, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module}.{name}"
        for used in re.findall(rf"\b{name}\.(\w+)", source):
            owner = getattr(imported, name, None) or importlib.import_module(f"{module}.{name}")
            assert hasattr(owner, used), f"{name}.{used}"


# --------------------------------------------------------------------------------------------------- messages


@functools.cache
def texts_of_the_sources() -> str:
    """Every text in the code, with a gap where a value is put in."""
    found = []
    for top in ("sffn_dist", "tools", "kernels/sffn_kernels"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    found.append("".join(map(str, parts)))
    return "\n".join(found)


def explained_messages(text: str) -> list[str]:
    """What stands as code in the first column of the tables of messages."""
    cells = re.findall(r"^\| (`[^|]+) \|", text, re.M)
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def unknown_parts(message: str) -> list[str]:
    """Parts of a message, between its gaps, that the sources do not hold."""
    parts = [part.strip(" ;:,") for part in message.split("…")]
    return [part for part in parts if len(part) > 3 and part not in texts_of_the_sources()]


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    messages = explained_messages(read("docs/troubleshooting.md"))
    assert len(messages) > 150
    assert {message: wrong for message in messages if (wrong := unknown_parts(message))} == {}


def test_the_reading_of_messages_finds_another_wording() -> None:
    assert unknown_parts("run.dir = …: is a file; must be a folder") == []
    assert unknown_parts("run.dir = …: is a file, and should be a folder") != []
