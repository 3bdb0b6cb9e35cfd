"""What `make docs` adds to the pages: those that lie elsewhere in the repository, and the API reference.

A link from a page to a file outside docs/ works in the repository. Here it becomes a link to that file's
page, to a copy of the picture, or plain text where the file is source code.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "slurm/README.md": "slurm.md",
}
PICTURES = {"benchmarks/results/compare_cpu.png": "drawings/compare_cpu.png"}
PACKAGES = {"sffn_dist": ROOT / "sffn_dist", "sffn_kernels": ROOT / "kernels/sffn_kernels"}
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures from elsewhere, and a page for each package of the reference."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for source, target in PICTURES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    index = [
        "# API reference\n",
        "From the docstrings. A package a page; names without a docstring are left out.\n",
    ]
    for package, modules in packages().items():
        lines = [f"# {package}\n", *(f"::: {module}\n" for module in modules)]
        files.append(File.generated(config, f"reference/{package}.md", content="\n".join(lines)))
        index.append(f"* [{package}]({package}.md): {summary(package)}")
    files.append(File.generated(config, "reference/index.md", content="\n".join(index) + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links that leave docs/."""
    own = page.file.src_uri
    source = next((name for name, target in ELSEWHERE.items() if target == own), f"docs/{own}")

    def rewritten(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if target.startswith(("http:", "https:")):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        found = {**ELSEWHERE, **PICTURES}.get(path)
        if found is None and path.startswith("docs/"):
            found = path.removeprefix("docs/")
        if path.rstrip("/") == "slurm":
            found = "slurm.md"
        if found is None:
            return text.strip("[]")
        return f"{text}({posixpath.relpath(found, posixpath.dirname(own) or '.')}{anchor})"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.S | re.M)
    return "".join(part if place % 2 else LINK.sub(rewritten, part) for place, part in enumerate(parts))


def packages() -> dict[str, list[str]]:
    """Every package -> its modules, by dotted names."""
    found: dict[str, list[str]] = {}
    for name, top in PACKAGES.items():
        for path in sorted(top.rglob("*.py")):
            relative = path.relative_to(top).with_suffix("")
            if relative.name.startswith("_") or relative.name.endswith("_triton"):
                continue
            parts = [name, *relative.parts]
            found.setdefault(".".join(parts[:-1]), []).append(".".join(parts))
    return dict(sorted(found.items()))


def summary(package: str) -> str:
    """The first line of a package's docstring."""
    top, _, rest = package.partition(".")
    path = PACKAGES[top].joinpath(*filter(None, rest.split(".")), "__init__.py")
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else None
    return (docstring or "").split("\n")[0]
