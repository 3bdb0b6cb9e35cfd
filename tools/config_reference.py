"""docs/configuration.md from the code: every config key with its type, default, rule and description.

config_reference.py            write the page anew
config_reference.py --check    exit code 1 where the page is not what the code says

What a key is stands in spec/config.py and the files of its sections; refusals are those that a run prints.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import AfterValidator, PlainValidator, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from sffn_dist.spec import loading
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.config_types import Section

ROOT = Path(__file__).resolve().parents[1]
PAGE, EXAMPLE = ROOT / "docs/configuration.md", "configs/demo.json"
COMMAND = "python tools/config_reference.py"
TYPES: dict[Any, str] = {
    int: "integer",
    float: "number",
    bool: "true, false",
    str: "text",
    types.NoneType: "null",
}
# overrides of the example that break a rule between keys
REFUSED = (
    ("train.steps=0",),
    ("train.epochs=1",),
    ("model.heads=5",),
    ("model.kv_heads=3",),
    ("model.vocab_unpadded=5000",),
    ("ffn.rank=300",),
    ("ffn.rank=null",),
    ("ffn.blocks=3",),
    ("ffn.dense_layers=[4]",),
    ("ffn.kind=block_shuffle", "ffn.blocks=128", "parallel.tensor=2"),
    ("guide.mode=window", "guide.begin=200"),
    ("guide.mode=fixed_flop", "ffn.rank=256", "ffn.blocks=1"),
    ("ffn.kind=dense", "recompute=bottleneck"),
    ("parallel.tensor=3",),
    ("train.micro_batch_size=5",),
    ("data.bos=true",),
)


def _annotated(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and what is annotated to it."""
    if hasattr(annotation, "__metadata__"):
        return annotation.__origin__, annotation.__metadata__
    return annotation, ()


def type_text(annotation: Any) -> str:
    """A type in words."""
    plain, _ = _annotated(annotation)
    origin, parts = get_origin(plain), get_args(plain)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(part) for part in parts)
    if origin is tuple:
        return f"list of {type_text(parts[0])}"
    return TYPES.get(plain, "object")


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
        elif isinstance(item, annotated_types.Gt):
            yield f"> {item.gt}"
        elif isinstance(item, annotated_types.Ge):
            yield f"≥ {item.ge}"
        elif isinstance(item, annotated_types.Le):
            yield f"≤ {item.le:,}" if isinstance(item.le, int) else f"≤ {item.le}"
        elif isinstance(item, annotated_types.Lt) and item.lt < 2**53:
            yield f"< {item.lt}"
        elif isinstance(item, annotated_types.MinLen):
            yield "not empty"


def _own_rule(annotation: Any, metadata: Sequence[Any]) -> Iterator[str]:
    """What a check of the key's own says of a value that cannot be right."""
    if any(isinstance(item, AfterValidator | PlainValidator) for item in metadata):
        try:
            TypeAdapter(annotation).validate_python("?")
        except ValidationError as error:
            yield error.errors()[0]["msg"]


def rule_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The rule that a key keeps by itself, in words."""
    plain, inner = _annotated(annotation)
    rules = [*_own_rule(annotation, inner), *_bounds((*metadata, *inner))]
    if get_origin(plain) in (Union, types.UnionType, tuple):
        rules += [rule_text(part) for part in get_args(plain) if part is not Ellipsis]
    return ", ".join(dict.fromkeys(filter(None, rules)))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**must be set**"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{json.dumps(value)}`"


def row(key: str, field: FieldInfo) -> str:
    """A key's line of the table."""
    own: list[Any] = [item for item in field.metadata if isinstance(item, AfterValidator | PlainValidator)]
    annotation: Any = field.annotation
    if own:  # pydantic takes a field's own validators out of its annotation
        annotation = Annotated[(annotation, *own)]
    rule = rule_text(annotation, field.metadata)
    cells = (type_text(annotation), _default(field), _cell(rule), _cell(field.description or ""))
    return f"| `{key}` | {' | '.join(cells)} |"


def keys() -> dict[str, FieldInfo]:
    """Every dotted key and its field."""
    found: dict[str, FieldInfo] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found.update({f"{name}.{leaf}": item for leaf, item in section.model_fields.items()})
        else:
            found[name] = field
    return found


def _tables() -> Iterator[str]:
    head = "| key | type | default | rule | description |\n|---|---|---|---|---|"
    loose = [row(key, field) for key, field in keys().items() if "." not in key]
    yield "\n".join(["## Keys without a section\n", head, *loose])
    for name, field in Config.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, Section)):
            continue
        says = " ".join((section.__doc__ or "").split()).replace("``", "`")
        rows = [row(f"{name}.{leaf}", item) for leaf, item in section.model_fields.items()]
        yield "\n".join([f"## {name}\n", f"{says}\n", head, *rows])


def _refusals() -> Iterator[str]:
    for overrides in REFUSED:
        try:
            loading.load(ROOT / EXAMPLE, overrides)
        except ConfigError as error:
            problems = "<br>".join(f"`{problem}`" for problem in error.problems)
            yield f"| {' '.join(f'`{text}`' for text in overrides)} | {problems} |"


def page() -> str:
    """The whole of docs/configuration.md."""
    refusals = "\n".join(["| overrides | refusal |", "|---|---|", *_refusals()])
    text = f"""# Configuration

<!-- Written by `{COMMAND}`; change sffn_dist/spec/config.py and run it again. -->

A run is described by one JSON file. It may name another as its `base`, and then says only what differs.
`key.path=value` on the command line overrides a key. A value is read as JSON, and as a text where it is none:
`train.steps=100`, `data.ignore='["*.csv"]'`, `ffn.rank=null`, `run.dir=runs/a`.

`{COMMAND}` writes this page from the code. Each key is declared in one place:
`sffn_dist/spec/config.py` and the files of its sections. Relative paths are relative to the folder that the
run is started in, and `~` is the home folder.

Types are strict: `"4"` is no integer and `1` is not `true`. All problems of a config are reported at once,
each with its key, its value and its rule. [Troubleshooting](troubleshooting.md) explains the messages.

""" + "\n\n".join(_tables())
    return f"""{text}

## Rules between keys

Each line of the table is an override of `{EXAMPLE}` and what the refusal says.

{refusals}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 where ``--check`` finds another page."""
    parser = argparse.ArgumentParser(
        prog="config_reference.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(argv)
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE}: is not what the code says; write it anew: {COMMAND}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
