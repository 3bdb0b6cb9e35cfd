"""Config files and overrides -> the config tree, or one error that lists *all* problems.

A run is described by one JSON file (which may name a ``base`` and hold only what differs) plus overrides
``key.path=value``. Each problem is reported with its dotted key, its value and the rule it broke. Nothing
here imports torch: a refusal takes well under a second.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sffn_dist.spec import unique_keys, validation
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.config_keys import key_fields
from sffn_dist.spec.key_aliases import ALIASES
from sffn_dist.spec.renamed_keys import RENAMED, SHORT_FORMS, translate

# written beside imported weights, perhaps by an earlier version: a record, not a user's file
START = "start.json"
# keys that name a file or folder; relative ones are relative to the folder that the run is started in
PATHS = ("run.dir", "data.dir", "data.source", "data.tokenizer", "init_from.path")


def load(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read ``path`` (and the files its ``base`` names), apply ``key.path=value`` overrides, validate.

    Raises:
        ConfigError: with every problem found, in the overrides and in the config that the others make.
    """
    tree = read_tree(Path(path))
    problems = _apply_overrides(tree, overrides)
    problems += [f"{key}: is recorded by a run, and not to be set" for key in _recorded_only(tree)]
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run["dir"] = run.get("dir") or f"runs/{Path(path).stem}"
    _expand_home(tree)
    try:
        config = from_tree(tree)
    except ConfigError as error:
        subjects = {problem.partition(": ")[0] for problem in problems}
        config_problems = [
            problem for problem in error.problems if problem.partition(": ")[0] not in subjects
        ]
        raise ConfigError([*problems, *config_problems]) from None
    if problems:
        raise ConfigError(problems)
    return config


def _expand_home(tree: dict[str, Any]) -> None:
    """``~`` is the home folder in every path, not a folder of that name."""
    for key in PATHS:
        section, _, leaf = key.partition(".")
        node = tree.get(section)
        if key == "init_from.path" and isinstance(node, str):
            tree[section] = os.path.expanduser(node)
        elif isinstance(node, dict) and isinstance(node.get(leaf), str):
            node[leaf] = os.path.expanduser(node[leaf])


def _recorded_only(tree: Mapping[str, Any]) -> Iterable[str]:
    if tree.get("changes"):
        yield "changes"
    init_from = tree.get("init_from")
    if isinstance(init_from, dict) and init_from.get("first_sample"):
        yield "init_from.first_sample"


def override(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    """Apply ``key.path=value`` overrides to a tree; raises ConfigError with every one that cannot be."""
    if problems := _apply_overrides(tree, overrides):
        raise ConfigError(problems)


def merge_overrides(*groups: Iterable[str]) -> tuple[str, ...]:
    """Overrides of several hands as one list: a key that a later group names is left out of earlier ones."""
    kept: list[str] = []
    for group in groups:
        texts = list(group)
        keys = {text.partition("=")[0] for text in texts}
        kept = [text for text in kept if text.partition("=")[0] not in keys] + texts
    return tuple(kept)


def _apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Apply what can be applied; returns the problems of the others."""
    problems: list[str] = []
    given: dict[str, str] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        if key in given:
            problems.append(f"{key} = {value}: was given before, as {given[key]}; give it once")
            continue
        given[key] = value
        try:
            _apply_override(tree, text)
        except ConfigError as error:
            problems.extend(error.problems)
    return problems


def from_tree(tree: Mapping[str, Any]) -> Config:
    """Validate a nested mapping.

    Raises ConfigError with every problem, of single keys and of keys together.
    """
    try:
        config = _parsed(tree)
    except ValidationError as error:
        problems = [_message(problem, tree) for problem in error.errors()]
        raise ConfigError([*problems, *_problems_of_the_rest(tree, error)]) from None
    if problems := list(validation.problems(config)):
        raise ConfigError(problems)
    return config


def _parsed(tree: Mapping[str, Any]) -> Config:
    # JSON mode: lists stand for tuples, all else is strict
    return Config.model_validate_json(json.dumps(tree))


def _problems_of_the_rest(tree: Mapping[str, Any], error: ValidationError) -> list[str]:
    """Rules between keys that are broken whatever the refused keys will be set to.

    The refused keys take their defaults; a rule that mentions one of them is left for the next try, as all
    are where one has no default.
    """
    rest: dict[str, Any] = json.loads(json.dumps(tree))
    refused = []
    for problem in error.errors():
        section, *leaf = (str(part) for part in problem["loc"][:2])
        refused.append(".".join([section, *leaf]))
        holder = rest.get(section) if leaf else rest
        if isinstance(holder, dict):
            holder.pop(leaf[0] if leaf else section, None)
    try:
        config = _parsed(rest)
    except ValidationError:
        return []
    return [text for text in validation.problems(config) if not any(key in text for key in refused)]


def read_tree(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The merged JSON tree of a config file and its bases, unvalidated."""
    try:
        resolved = path.resolve()
        if resolved in _seen:
            raise ConfigError([f"base = {str(path)!r}: the files name each other as base in a circle"])
        tree = unique_keys.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        named_by = f" (named as base by {_seen[-1]})" if _seen else ""
        raise ConfigError([f"config file {str(path)!r}{named_by}: no such file"]) from None
    except ConfigError:
        raise
    except (OSError, UnicodeError, RuntimeError) as error:  # RuntimeError: a link to itself
        if isinstance(error, RecursionError):
            raise ConfigError([f"config file {str(path)!r}: not valid JSON: {error}"]) from None
        raise ConfigError([f"config file {str(path)!r}: cannot be read: {error}"]) from None
    except unique_keys.RepeatedKeyError as error:
        raise ConfigError([f"config file {str(path)!r}: {error}"]) from None
    except ValueError as error:  # also a number of more digits than Python reads
        raise ConfigError([f"config file {str(path)!r}: not valid JSON: {error}"]) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"config file {str(path)!r}: holds a {type(tree).__name__}, must hold an object"])
    if path.name == START:
        tree = translate(tree)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError([f"base = {base!r} in {str(path)!r}: must be the path of a config file"])
    return _merge(read_tree(path.parent / base, (*_seen, resolved)), tree)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(dict(merged[key]), value)
        else:
            merged[key] = value
    return merged


def _apply_override(tree: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError([f"override {text!r}: must read key.path=value"])
    fields = key_fields()
    key = SHORT_FORMS.get(key, key)
    if key not in fields:
        raise ConfigError([_unknown_key(key)])
    value: Any
    try:
        value = json.loads(raw, parse_constant=str)
    except (ValueError, RecursionError):
        value = raw
    # run.dir=2024 names a folder: a text field takes what is not already quoted as it stands
    is_list = str(fields[key]).startswith("tuple")
    if (
        "str" in str(fields[key])
        and not is_list
        and not isinstance(value, str)
        and not (value is None and "None" in str(fields[key]))
    ):
        value = raw
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if SHORT_FORMS.get(section) and not isinstance(child, dict):
            child = node[section] = {"path": child}
        if not isinstance(child, dict):
            raise ConfigError([f"{section} = {child!r}: must be an object of settings"])
        node = child
    node[leaf] = value


def _unknown_key(key: str) -> str:
    if key in RENAMED:
        return f"{key}: was renamed to {RENAMED[key]}; use that name"
    section = Config.model_fields.get(key)
    if section is not None:
        leaves = [name for name in key_fields() if name.startswith(f"{key}.")]
        return f"{key}: names a section, not a setting; set one of {', '.join(leaves)}"
    valid_keys = [*key_fields(), *Config.model_fields]
    leaf = key.rsplit(".", 1)[-1]
    alias = ALIASES.get(leaf.lower().replace("-", "_"))
    if alias:
        return f"{key}: unknown key; the nearest known one is {alias}"
    same = [name for name in valid_keys if name.rsplit(".", 1)[-1] == leaf]
    near = (
        same[:1]
        or difflib.get_close_matches(key, valid_keys, n=1, cutoff=0.5)
        or difflib.get_close_matches(leaf, [name.rsplit(".", 1)[-1] for name in valid_keys], n=1, cutoff=0.6)
    )
    full = next(
        (name for name in valid_keys if near and (name == near[0] or name.endswith("." + near[0]))), None
    )
    return f"{key}: unknown key" + (f"; the nearest known one is {full}" if full else "")


def _message(problem: Any, tree: Mapping[str, Any]) -> str:
    """One pydantic problem as 'key = value: rule'."""
    location = [str(part) for part in problem["loc"]]
    valid_keys = set(key_fields()) | set(Config.model_fields)
    while len(location) > 1 and ".".join(location) not in valid_keys and problem["type"] != "extra_forbidden":
        if location[-1].isdigit() and ".".join(location[:-1]) in valid_keys:
            break
        location = location[:-1]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return _unknown_key(key)
    if problem["type"] == "missing":
        return f"{key}: missing; the config must set it"
    node: Any = tree
    for part in location:
        if isinstance(node, Mapping):
            node = node.get(part)
        elif isinstance(node, (list, tuple)) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
    rule = str(problem["msg"])
    rule = (
        rule.replace("Input should be", "must be")
        .replace("a valid ", "a ")
        .replace("a integer", "an integer")
    )
    return f"{key} = {json.dumps(node, default=str)}: {rule}{_spelling(key, node)}"


def _spelling(key: str, value: Any) -> str:
    """How a value that was meant is written, where that is clear."""
    annotation = str(key_fields().get(key))
    if "bool" in annotation and str(value).lower() in ("true", "false", "yes", "no", "on", "off", "1", "0"):
        return f"; write {'true' if str(value).lower() in ('true', 'yes', 'on', '1') else 'false'}"
    if isinstance(value, str) and value.lower() in ("none", "~", "nil") and "None" in annotation:
        return "; write null"
    if "int" not in annotation:
        return ""
    try:
        number = float(value) if isinstance(value, (float, str)) else math.nan
    except ValueError:
        return ""
    return f"; write {int(number)}" if number.is_integer() and abs(number) < 2**53 else ""
