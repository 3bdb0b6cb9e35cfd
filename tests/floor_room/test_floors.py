"""The house's floors, read from the imports: who may import whom, what stays light, what carries a
docstring.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, KERNELS, TOOLS = ROOT / "sffn_dist", ROOT / "kernels" / "sffn_kernels", ROOT / "tools"
BENCH = ROOT / "benchmarks" / "sffn_bench"
# A name with a dot is one file, which stands elsewhere than its room.
FLOORS = (
    ("atomic_io", "strict_json"),
    ("sffn_kernels",),
    ("structured",),
    ("spec",),
    ("launch",),
    ("parallel",),
    ("model",),
    ("data", "checkpoint", "telemetry"),
    ("inference", "conversion", "comparison", "launch.run_changes"),
    ("launch.run_identity",),
    ("health",),
    ("training",),
    ("launch.checks",),
    ("launch.cli",),
    ("cluster",),
    ("pretrain",),
    ("sffn_bench",),
    ("tools",),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
KINDS = ("dense", "low_rank", "block_dense", "block_shuffle")
HEAVY = {
    "torch",
    "numpy",
    "megatron",
    "deepspeed",
    "datasets",
    "tokenizers",
    "triton",
    "transformers",
    "wandb",
    "matplotlib",
}
BY_NAME = {"importlib.import_module", "import_module", "__import__"}
NO_TORCH = tuple(f"structured.{file}" for file in ("cut", "structure", *KINDS, "registry"))
LOWEST = (
    "atomic_io",
    "strict_json",
    *NO_TORCH,
    *(f"spec.{path.stem}" for path in sorted((PACKAGE / "spec").glob("[!_]*.py"))),
)
LIGHT = (
    *LOWEST,
    *(f"launch.{path.stem}" for path in sorted((PACKAGE / "launch").glob("[!_]*.py"))),
    *("checkpoint.manifest", "data.metadata", "data.meta_file", "pretrain"),
    "conversion.formats",
    *("telemetry.trackers", "telemetry.metrics", "telemetry.progress"),
    *("cluster.runs", "cluster.job", "cluster.sweep", "cluster.requeue"),
    *("comparison.variants", "comparison.summary", "comparison.curves"),
)

# ------------------------------------------------------------------------------------------------ the reading


def module_name(path: Path) -> str:
    """The dotted name that a source file is imported by."""
    top = next((top.parent for top in (KERNELS, BENCH) if path.is_relative_to(top)), ROOT)
    relative = path.relative_to(top).with_suffix("")
    return ".".join(relative.parts[:-1] if relative.name == "__init__" else relative.parts)


def room_of(module: str) -> str | None:
    """The room that a dotted name lies in; None for what is not ours, or for the bare top package."""
    parts = module.split(".")
    if parts[0] in ("sffn_kernels", "sffn_bench", "tools"):
        return parts[0]
    if parts[0] != "sffn_dist" or len(parts) == 1:
        return None
    file = ".".join(parts[1:3])
    return file if file in FLOOR else parts[1]


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Dotted names of everything imported anywhere in the source; ``from a import b`` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = len(parts) - node.level + (1 if is_package else 0)
                base = ".".join([*parts[:kept], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            yield from (
                str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)
            )


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """A sentence for every import that does not come from a lower floor or the module's own room."""
    room, found = room_of(module), []
    for name in imports(source, module, is_package):
        other = room_of(name)
        if other is None or other == room:
            continue
        if room is None or other not in FLOOR:
            found.append(f"{module} imports {name}, which stands on no floor")
        elif FLOOR[other] >= FLOOR[room]:
            found.append(f"{module} (floor {FLOOR[room]}) imports {name} (floor {FLOOR[other]})")
    return found


def sources() -> list[Path]:
    found = [path for top in (PACKAGE, KERNELS, BENCH, TOOLS) for path in sorted(top.rglob("*.py"))]
    assert len(found) > 30, "the package's sources were not found"
    return found


SOURCES = sources()


def for_every(paths: Sequence[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """A test of one path as one test of all of them, which names every one that fails."""

    def decorate(test: Callable[[Path], None]) -> Callable[[], None]:
        def test_all() -> None:
            problems = []
            for path in paths:
                try:
                    test(path)
                except AssertionError as error:
                    problems.append(f"{module_name(path)}: {error}")
            assert not problems, "\n".join(problems)

        test_all.__name__, test_all.__doc__ = test.__name__, test.__doc__
        return test_all

    return decorate


by_module = for_every(SOURCES)


# ----------------------------------------------------------------------------------------------------- floors


@by_module
def test_imports_come_from_lower_floors(path: Path) -> None:
    assert not violations(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")


@for_every([p for p in SOURCES if room_of(module_name(p))])
def test_every_module_stands_on_a_floor(path: Path) -> None:
    assert room_of(module_name(path)) in FLOOR


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sffn_dist.spec.split_table", "from sffn_dist import model"),
        ("sffn_dist.structured.functional", "import sffn_dist.parallel.split"),
        ("sffn_dist.data.metadata", "def f():\n    from sffn_dist.checkpoint import manifest"),
        ("sffn_dist.spec.plan", "from ..inference.generation import sample"),
        ("sffn_dist.spec.plan", "if TYPE_CHECKING:\n    from sffn_dist.training.loop import Run"),
        ("sffn_kernels.block_diagonal", "from sffn_dist.structured import functional"),
        ("sffn_dist.model", "import importlib\nimportlib.import_module('sffn_dist.training.engine')"),
        ("sffn_dist.launch.signals", "from sffn_dist.launch import run_identity"),
        ("sffn_dist.training.loop", "from sffn_dist import pretrain"),
        ("sffn_dist.pretrain", "import tools.report"),
        ("sffn_dist.model", "from sffn_dist.extras import x"),
    ],
)
def test_the_reading_sees_a_wrong_import_in_every_form(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


def test_the_reading_lets_right_imports_pass() -> None:
    source = (
        "from sffn_dist import spec\nfrom . import identity\n"
        "from ..spec.config import Config\nimport torch, json"
    )
    assert not violations(source, "sffn_dist.training.loop")
    assert not violations("from . import identity", "sffn_dist.training", is_package=True)


@pytest.mark.parametrize(
    "room", ["split_table", "machine", "counts", "traffic", "schedule", "validation", "memory", "plan"]
)
def test_lowest_floors_are_standard_library_and_our_own(room: str) -> None:
    source = (PACKAGE / "spec" / f"{room}.py").read_text(encoding="utf-8")
    for name in imports(source, f"sffn_dist.spec.{room}"):
        assert name.split(".")[0] in sys.stdlib_module_names or name.startswith("sffn_dist."), name


@by_module
def test_modules_that_say_standard_library_only_mean_it(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    if "Standard library only" in (ast.get_docstring(ast.parse(source)) or ""):
        foreign = {
            name.split(".")[0] for name in imports(source, module_name(path))
        } - sys.stdlib_module_names
        assert foreign <= {"sffn_dist", "sffn_bench"}


@by_module
def test_deepspeed_is_imported_by_the_engine_alone(path: Path) -> None:
    names = {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"), module_name(path))}
    assert ("deepspeed" in names) == (module_name(path) == "sffn_dist.training.engine")


def imported_files(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it."""
    ours = {module_name(path) for path in SOURCES}
    names = imports(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")
    return {found for name in names for found in (name, name.rpartition(".")[0]) if found in ours} - {
        module_name(path)
    }


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Groups of modules that import each other, directly or through others."""

    def reached(start: str) -> set[str]:
        seen, pending = set(), [start]
        while pending:
            new = graph.get(pending.pop(), set()) - seen
            seen |= new
            pending += new
        return seen

    closure = {name: reached(name) for name in graph}
    return sorted(
        {tuple(sorted(b for b in closure[a] if a in closure.get(b, set()))) for a in graph if a in closure[a]}
    )


def test_no_modules_import_each_other() -> None:
    """Inside a room too."""
    assert circles({module_name(path): imported_files(path) for path in SOURCES}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [("a", "b", "c")]


@by_module
def test_no_drawer_for_everything(path: Path) -> None:
    assert not {"utils", "common", "helpers", "misc"} & set(module_name(path).split("."))


def test_kernels_and_test_folders_shadow_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    folders = [path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert folders
    for folder in folders:
        assert not (folder / "__init__.py").exists(), folder
        assert importlib.util.find_spec(folder.name) is None, f"{folder} bears a package's name"


# ------------------------------------------------------------------------------------------------- structures

# a structure's own files (whose ops take its kind from there), the exported modeling file, the sizes that
# benchmarks run
NAME_KINDS = {
    *(f"sffn_dist.structured.{kind}" for kind in KINDS),
    "sffn_dist.conversion.hf.modeling_sffn",
    "sffn_bench.sizes",
}


def named_kinds(source: str) -> list[str]:
    """Kinds of structures that a source names in a string of its own, and comparisons with the dense one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in KINDS[1:]:
            found.append(f"line {node.lineno}: {node.value}")
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(
                isinstance(side, ast.Constant) and side.value == "dense" for side in sides
            ) and "kind" in ast.unparse(node):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@for_every([p for p in SOURCES if room_of(module_name(p)) != "sffn_kernels"])
def test_a_structure_is_named_in_its_own_files_alone(path: Path) -> None:
    if module_name(path) not in NAME_KINDS:
        assert named_kinds(path.read_text(encoding="utf-8")) == []


def test_the_reading_of_kinds_finds_them() -> None:
    assert (
        len(named_kinds("a = x == 'low_rank'\nb = {'block_shuffle': 1}\nc = structure.kind != 'dense'")) == 3
    )
    assert not named_kinds("'low_rank and block_dense'\nlabel = 'dense'")


# ------------------------------------------------------------------------------------------------------ light


def test_light_modules_import_nothing_heavy() -> None:
    """In one process, which says after which import something heavy was there first."""
    script = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(f'sffn_dist.{name}')\n"
        f"    heavy = {HEAVY!r} & {{loaded.split('.')[0] for loaded in sys.modules}}\n"
        "    if heavy:\n"
        "        sys.exit(f'{name} imports {sorted(heavy)}')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments", [["--plan"], ["--plan", "--json"], ["parallel.tensor=3"], ["--help"]], ids=" ".join
)
def test_plan_help_and_refusals_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        str(PACKAGE / "pretrain.py"),
        "--config",
        str(ROOT / "configs/demo.json"),
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == (2 if "parallel.tensor=3" in arguments else 0), done.stderr
    imported = {
        line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")
    }
    assert "sffn_dist.spec.config" in imported, "the report of imports was not understood"
    assert not HEAVY & {name.split(".")[0] for name in imported}
    assert not list(tmp_path.iterdir()), "nothing is written"


# ------------------------------------------------------------------------------------------------------ words

# names that the field has another word for
RETIRED_MODULES = {
    *(
        "setbacks",
        "roll_call",
        "watch",
        "exercise",
        "alike",
        "reading",
        "rules",
        "durable",
        "standalone",
        "host",
    ),
    *("ending", "finish", "replicas", "guards", "shapes", "spikes", "agreement", "bottleneck"),
}
RETIRED_NAMES = {
    *(
        "Setbacks",
        "Line",
        "Watch",
        "Half",
        "Wanted",
        "Widened",
        "Begun",
        "Carried",
        "Losses",
        "Run",
        "Agreed",
        "Entry",
    ),
    *(
        "told",
        "everyone",
        "survivors",
        "_spoil_partitions",
        "turn",
        "turned",
        "_turned_back",
        "calm",
        "too_many",
        "streak",
    ),
    *(
        "turn_back",
        "objection",
        "standings",
        "see_off",
        "hear_all",
        "go_back",
        "owes_save",
        "setbacks",
        "ticking",
    ),
    *(
        "equal_flops_share",
        "alpha_form",
        "lacks_triton",
        "draw_alike",
        "fill",
        "carry",
        "arrived",
        "_complete",
    ),
}


def defined_names(path: Path) -> Iterator[str]:
    """Classes with their methods and fields, and functions, of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            yield from (target.id for target in fields if isinstance(target, ast.Name))


@for_every([p for p in SOURCES if p.is_relative_to(PACKAGE)])
def test_retired_names_are_gone(path: Path) -> None:
    assert path.stem not in RETIRED_MODULES
    assert not RETIRED_NAMES & set(defined_names(path))


def test_no_two_classes_share_a_name() -> None:
    """A reader who looks one up finds one."""
    places: dict[str, set[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, set()).add(module_name(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def private_names_used(source: str) -> list[str]:
    """Names with a leading underscore that a source takes from another module of ours."""
    tree, used, modules = ast.parse(source), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("sffn_", "tools")):
            modules |= {alias.asname or alias.name for alias in node.names}
            used += [alias.name for alias in node.names if alias.name.startswith("_")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            own = node.attr.startswith("_") and not node.attr.startswith("__")
            used += [f"{node.value.id}.{node.attr}"] if own and node.value.id.islower() else []
    return used


@by_module
def test_private_names_stay_in_their_module(path: Path) -> None:
    assert private_names_used(path.read_text(encoding="utf-8")) == []


def test_the_reading_of_private_names_finds_them() -> None:
    source = "from sffn_dist.spec import plan\nfrom sffn_dist.model import _draw\nplan._phases()\nself._own()"
    assert private_names_used(source) == ["_draw", "plan._phases"]


def test_retired_keys_are_in_the_table_alone() -> None:
    from sffn_dist.spec import config_keys, renamed_keys

    assert not set(renamed_keys.RENAMED) & set(config_keys.key_fields())
    assert set(renamed_keys.RENAMED.values()) <= set(config_keys.key_fields())


@by_module
def test_no_conditional_expression_holds_another(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.IfExp):
            inner = [part for part in (node.test, node.body, node.orelse) if isinstance(part, ast.IfExp)]
            assert not inner, f"line {node.lineno}"


@by_module
def test_files_are_no_longer_than_350_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


# ------------------------------------------------------------------------------------------------- docstrings

OVERRIDES = {
    "forward",
    "backward",
    "extra_repr",
    "reset_parameters",
    "due",
}  # documented by torch's classes, and by Hook
# a class's methods are documented in its base: base -> file
DOCUMENTED_BASES = {
    "Structure": "structured/structure.py",
    "StructureOps": "structured/structure_ops.py",
    "Source": "data/sources/base.py",
}


def inherited(node: ast.ClassDef) -> set[str]:
    """Names of a class whose docstring stands in its base."""
    files = [DOCUMENTED_BASES[base] for base in map(ast.unparse, node.bases) if base in DOCUMENTED_BASES]
    return {name for file in files for name in defined_names(PACKAGE / file)}


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public definitions without a docstring.

    A function whose body is one statement, or a property of two, may go without.
    """
    if ast.get_docstring(tree) is None:
        yield "the module"
    pending: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    while pending:
        prefix, parent = pending.pop()
        for node in parent.body:
            if not isinstance(
                node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ) or node.name.startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                pending.append((f"{prefix}{node.name}.", node))
                tiny = False
            else:
                is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
                own = inherited(parent) if isinstance(parent, ast.ClassDef) else set()
                tiny = len(node.body) <= (2 if is_property else 1) or node.name in OVERRIDES | own
            if not tiny and ast.get_docstring(node) is None:
                yield f"{prefix}{node.name} (line {node.lineno})"


@by_module
def test_public_names_have_docstrings(path: Path) -> None:
    assert list(undocumented(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_the_reading_of_docstrings_finds_what_is_missing() -> None:
    source = '''
    class A:
        def f(self, x):
            y = x
            return y
        def g(self): return 1
        def _h(self):
            y = 2
            return y
        def forward(self, x):
            y = x
            return y
        @property
        def p(self):
            assert self
            return 1
    def top(x):
        """Documented."""
        y = x
        return y
    '''
    found = [text.split(" (")[0] for text in undocumented(ast.parse(textwrap.dedent(source)))]
    assert sorted(found) == ["A", "A.f", "the module"]
