"""A tokenizer's folder: which files hold its tokens, what the others say. Standard library only.

    tokens      tokenizer.json, or tokenizer.model, *.tiktoken, vocab.json with merges.txt
    settings    tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja,
                config.json, generation_config.json

Settings are carried as two of these files, tokenizer_config.json and generation_config.json, into which the
others are folded: with tokenizer.json they lie in a prepared corpus, a checkpoint and an export.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sffn_dist import strict_json
from sffn_dist.atomic_io import hash_file
from sffn_dist.data.sources.base import digest
from sffn_dist.spec.config import ConfigError, Data

TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)
FORMS = "a folder, or a file, of tokenizer.json, tokenizer.model, *.tiktoken, or vocab.json with merges.txt"
# what versions before tokenizer_config.json was carried put after each document: the first that is a token
EARLIER_SEPARATORS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class TokenizerFiles:
    """``tokens``: the files that hold the tokens, one, or vocab.json and merges.txt."""

    folder: Path
    tokens: tuple[Path, ...]

    @property
    def is_json(self) -> bool:
        """Whether the tokens lie in a tokenizer.json."""
        return self.tokens[0].suffix == ".json" and len(self.tokens) == 1


def find(path: Path) -> TokenizerFiles | None:
    """The tokenizer in a folder, or of a file; None if there is none. The settings are those beside it."""
    if path.is_dir():
        for names in ((TOKENIZER,), ("tokenizer.model",), ("vocab.json", "merges.txt")):
            if all((path / name).is_file() for name in names):
                return TokenizerFiles(path, tuple(path / name for name in names))
        tiktoken = sorted(path.glob("*.tiktoken"))
        return TokenizerFiles(path, (tiktoken[0],)) if len(tiktoken) == 1 else None
    if not path.is_file():
        return None
    if path.name in ("vocab.json", "merges.txt"):
        pair = (path.with_name("vocab.json"), path.with_name("merges.txt"))
        return TokenizerFiles(path.parent, pair) if all(file.is_file() for file in pair) else None
    return TokenizerFiles(path.parent, (path,))


def named(data: Data) -> TokenizerFiles:
    """What ``data.tokenizer`` names. Raises ConfigError."""
    assert data.tokenizer is not None
    files = find(Path(data.tokenizer).expanduser())
    if files is None:
        raise ConfigError([f"data.tokenizer = {json.dumps(data.tokenizer)}: must be {FORMS}"])
    return files


# --------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """What a folder says of its tokenizer: tokenizer_config.json, and generation_config.json if anything."""

    tokenizer: Mapping[str, Any]
    generation: Mapping[str, Any]
    # (file, what it says of the end-of-text token: texts and ids)
    ends: tuple[tuple[str, tuple[str | int, ...]], ...] = ()
    earlier: bool = False  # a checkpoint or corpus of a version that carried no settings

    def texts(self) -> dict[str, str]:
        """The two files' names and texts, for a corpus or a checkpoint."""
        # tokenizer_config.json even where nothing is said: its absence tells what an earlier version wrote
        trees = {TOKENIZER_CONFIG: self.tokenizer}
        if self.generation:
            trees[GENERATION_CONFIG] = self.generation
        return {name: strict_json.dumps(tree, indent=2) + "\n" for name, tree in trees.items()}


def settings(folder: Path) -> Settings:
    """What the files of a folder say. Raises ConfigError naming the file that cannot be read."""
    config, generation = _object(folder / TOKENIZER_CONFIG), _object(folder / GENERATION_CONFIG)
    special, model = _object(folder / "special_tokens_map.json"), _object(folder / "config.json")
    ends = tuple(
        (name, stated)
        for name, tree in (
            ("config.json", model),
            (GENERATION_CONFIG, generation),
            (TOKENIZER_CONFIG, config),
            ("special_tokens_map.json", special),
        )
        if (stated := tuple(_stated(tree)))
    )
    merged = {key: _plain(key, value) for key, value in {**special, **config}.items()}
    if templates := _chat_templates(folder):
        merged["chat_template"] = templates
    if added := _object(folder / "added_tokens.json"):
        decoder = {str(index): {"content": text} for text, index in added.items()}
        merged["added_tokens_decoder"] = {**decoder, **merged.get("added_tokens_decoder", {})}
    ids = {key: model[key] for key in IDS if model.get(key) is not None}
    ours = any((folder / name).is_file() for name in ("manifest.json", "meta.json"))
    earlier = ours and not (folder / TOKENIZER_CONFIG).exists()
    return Settings(merged, {**ids, **generation}, ends, earlier)


def _object(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is no such file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: must hold a JSON object"])
    return tree


def _stated(tree: Mapping[str, Any]) -> Iterator[str | int]:
    """Texts and ids that an object's eos_token and eos_token_id name."""
    if (text := token_text(tree.get("eos_token"))) is not None:
        yield text
    ids = tree.get("eos_token_id")
    for index in ids if isinstance(ids, list) else (ids,):
        if isinstance(index, int) and not isinstance(index, bool):
            yield index


def token_text(value: Any) -> str | None:
    """A token as tokenizer_config.json writes it, as text or as an object with ``content``."""
    content = value.get("content") if isinstance(value, Mapping) else value
    return content if isinstance(content, str) else None


def _plain(key: str, value: Any) -> Any:
    """Special tokens as texts, which every version of transformers reads; tokenizer.json has their flags."""
    if key.endswith("_token"):
        return token_text(value) if isinstance(value, Mapping) else value
    if key.endswith("_special_tokens") and isinstance(value, list):
        return [token_text(entry) if isinstance(entry, Mapping) else entry for entry in value]
    return value


def _chat_templates(folder: Path) -> str | list[dict[str, str]] | None:
    """chat_template.jinja and additional_chat_templates/, as tokenizer_config.json writes them."""
    main = folder / "chat_template.jinja"
    try:
        default = main.read_text(encoding="utf-8") if main.is_file() else None
        others = {
            path.stem: path.read_text(encoding="utf-8")
            for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
        }
    except (OSError, UnicodeError) as error:
        raise ConfigError([f"{folder}: chat template cannot be read: {error}"]) from None
    if not others:
        return default
    named_templates = {**({} if default is None else {"default": default}), **others}
    return [{"name": name, "template": text} for name, text in named_templates.items()]


# ----------------------------------------------------------------------------------------------------- tokens


def vocabulary(text: str) -> dict[str, int]:
    """Token -> id of a tokenizer.json's text, added tokens included.

    Raises ValueError, KeyError, TypeError or AttributeError where it is no such thing.
    """
    tree = json.loads(text)
    vocab = tree["model"].get("vocab") or {}
    # Unigram models keep a list of (text, score), whose place is the id
    ids = {entry[0]: i for i, entry in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    ids |= {entry["content"]: entry["id"] for entry in tree.get("added_tokens") or ()}
    return {str(token): int(index) for token, index in ids.items()}


def with_added_tokens(text: str, config: Mapping[str, Any]) -> str:
    """tokenizer.json with the tokens that tokenizer_config.json adds to it; the same text if there are none.

    transformers adds them when it loads the folder. Raises as :func:`vocabulary`.
    """
    known = vocabulary(text)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    added = [
        {"id": int(index), "content": entry["content"], **{flag: bool(entry.get(flag)) for flag in flags}}
        for index, entry in (config.get("added_tokens_decoder") or {}).items()
        if entry["content"] not in known
    ]
    if not added:
        return text
    tree = json.loads(text)
    entries = [*(tree.get("added_tokens") or ()), *added]
    tree["added_tokens"] = sorted(entries, key=lambda entry: int(entry["id"]))
    return json.dumps(tree, ensure_ascii=False)


def end_of_text(data: Data, found: Settings, ids: Mapping[str, int]) -> str:
    """The token put after each document: ``data.end_of_text``, else the one that every file that names any
    names. ``ids``: token -> id of the tokenizer.

    Raises:
        ConfigError: it is no token, the files name none, or they disagree.
    """
    setting = f"data.tokenizer = {json.dumps(data.tokenizer)}"
    if data.end_of_text is not None:
        if data.end_of_text not in ids:
            problem = f"data.end_of_text = {json.dumps(data.end_of_text)}: must be a token of {setting}"
            raise ConfigError([problem])
        return data.end_of_text
    texts = {index: text for text, index in ids.items()}
    stated = [
        {token if isinstance(token, str) else texts.get(token) for token in tokens}
        for _, tokens in found.ends
    ]
    common = set.intersection(*stated) if stated else set()
    agreed = [text for text in common if text is not None and text in ids]
    if len(agreed) == 1:
        return agreed[0]
    if not found.ends and found.earlier:
        earlier = next((text for text in EARLIER_SEPARATORS if text in ids), None)
        if earlier is not None:
            return earlier
    said = "; ".join(f"{file} says {', '.join(map(repr, tokens))}" for file, tokens in found.ends)
    raise ConfigError(
        [
            f"data.end_of_text = null: must name the token of {setting} that ends a document; "
            + (f"no single token is what all files beside it say: {said}" if said else
               "no file beside it says eos_token")
        ]
    )  # fmt: skip


def beginning_of_text(data: Data, found: Settings, ids: Mapping[str, int]) -> str | None:
    """The token put before each document where ``data.bos`` asks for one, else None.

    Raises ConfigError where no file names one of the tokens.
    """
    if not data.bos:
        return None
    text = token_text(found.tokenizer.get("bos_token"))
    if text is None:
        index = found.generation.get("bos_token_id")
        text = next((token for token, own in ids.items() if own == index), None)
    if text is None or text not in ids:
        rule = "no file beside it says bos_token" if text is None else f"bos_token {text!r} is none of its"
        raise ConfigError([f"data.bos = true: data.tokenizer = {json.dumps(data.tokenizer)}: {rule}"])
    return text


# ------------------------------------------------------------------------------------ before reading any text


def problem(data: Data) -> str | None:
    """The cheap check: why ``data.tokenizer`` cannot be read; None if it seems that it can."""
    if data.tokenizer is None:
        return None
    setting = f"data.tokenizer = {json.dumps(data.tokenizer)}: must be {FORMS}"
    path = Path(data.tokenizer).expanduser()
    if not path.exists():
        return f"{setting}; there is no such file or folder"
    files = find(path)
    if files is None:
        return f"{setting}; this folder holds none, or several"
    if not all(os.access(file, os.R_OK) for file in files.tokens):
        return f"{setting}; it cannot be read (permissions)"
    return None


def tokens_hash(data: Data) -> str | None:
    """Of the file, or files, that hold the tokens of ``data.tokenizer``."""
    if data.tokenizer is None:
        return None
    hashes = [hash_file(file) for file in named(data).tokens]
    return hashes[0] if len(hashes) == 1 else digest(hashes)


def identity(data: Data) -> dict[str, Any]:
    """What decides ids and what is put around documents; raises ConfigError as end_of_text.

    A key is there only where its value is not what earlier versions did, whose folders keep their names.
    """
    tree: dict[str, Any] = {"tokenizer": tokens_hash(data)}
    if data.tokenizer is None:
        return tree | ({"end_of_text": data.end_of_text} if data.end_of_text else {})
    files = named(data)
    found = settings(files.folder)
    if not files.is_json:  # its tokens are known once it is converted
        added = found.tokenizer.get("added_tokens_decoder")
        return tree | {"end_of_text": [data.end_of_text, found.ends], "bos": data.bos, "added": added}
    try:
        text = files.tokens[0].read_text(encoding="utf-8")
        whole = with_added_tokens(text, found.tokenizer)
        ids = vocabulary(whole)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        setting = f"data.tokenizer = {json.dumps(data.tokenizer)}"
        kind = type(error).__name__
        raise ConfigError([f"{setting}: must be {FORMS}: {kind}: {error}"]) from None
    end = end_of_text(data, found, ids)
    if end != next((token for token in EARLIER_SEPARATORS if token in ids), None):
        tree["end_of_text"] = end
    if (begin := beginning_of_text(data, found, ids)) is not None:
        tree["bos"] = begin
    return tree | ({} if whole == text else {"added": found.tokenizer["added_tokens_decoder"]})
