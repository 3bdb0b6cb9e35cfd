"""Tokenizers of other forms -> the text of a tokenizer.json, by transformers, which must be installed for it.

* SentencePiece: the model's own normalization, pieces and byte fallback. Compared with sentencepiece itself,
  where that is installed, on :data:`SAMPLES`: what it would encode otherwise is refused.
* tiktoken: the file holds no rule by which text is split; transformers takes Llama 3's (cl100k_base).
* vocab.json and merges.txt: config.json or tokenizer_config.json must say which tokenizer they are of.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from sffn_dist.data import tokenizer_files
from sffn_dist.data.tokenizer_files import TokenizerFiles, token_text
from sffn_dist.spec.config import ConfigError

log = logging.getLogger(__name__)

SAMPLES = (
    "The quick brown fox.",
    " leading, trailing ",
    "two  spaces,\ttabs\n\nand \n lines\n",
    "naïve café ﬁne ½ \uff21\uff22 e\u0301",
    "東京タワー 你好 мир 🙂👩\u200d💻",
    "x1 = f(y_2) ** 3.14;  # 100,000",
    "",
)
_CONTROL, _USER_DEFINED = 3, 4  # sentencepiece_model.proto: ModelProto.SentencePiece.Type
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType


class MissingPackage(RuntimeError):
    """A package that a conversion needs is not installed."""


def read_text(files: TokenizerFiles) -> str:
    """The tokenizer.json of ``files``, with the tokens that the folder adds to it.

    Raises:
        ConfigError: naming the file that cannot be read, and why.
        MissingPackage: it is of another form, and a package that reads it is missing.
    """
    path = files.tokens[0]
    config = tokenizer_files.settings(files.folder).tokenizer
    try:
        text = path.read_text(encoding="utf-8") if files.is_json else _converted(files, config)
        text = tokenizer_files.with_added_tokens(text, config)
        _check_ids(path, text)
        return text
    except ImportError as error:
        raise MissingPackage(f"{path}: is read by a package that is missing: {_line(error)}") from None
    except (ConfigError, MissingPackage):
        raise
    except Exception as error:  # tokenizers and transformers raise bare Exceptions
        raise ConfigError([f"{path}: cannot be read: {_line(error)}"]) from None


def _check_ids(path: Path, text: str) -> None:
    """Refuse added tokens that the tokenizers library would give other ids: it takes the next ones."""
    own = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    for token, index in tokenizer_files.vocabulary(text).items():
        if own.get(token) != index:
            rule = f"token {token!r} must have id {index}, the tokenizers library gives it {own.get(token)}"
            raise ConfigError([f"{path}: {rule}: ids of added tokens must follow the others without a hole"])


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _converted(files: TokenizerFiles, config: Mapping[str, Any]) -> str:
    path = files.tokens[0]
    if len(files.tokens) == 2:
        return _by_its_class(files, config)
    ranks = _tiktoken_ranks(path)
    return _sentencepiece(path, config) if ranks is None else _tiktoken(path, ranks, config)


# ---------------------------------------------------------------------------------------------- SentencePiece


def _sentencepiece(path: Path, config: Mapping[str, Any]) -> str:
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, pieces = proto.trainer_spec, [(piece.piece, piece.score) for piece in proto.pieces]
    if not pieces or trainer.model_type not in (_UNIGRAM, _BPE):
        raise ConfigError([f"{path}: must be a SentencePiece model, unigram or BPE"])
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    if trainer.model_type == _UNIGRAM:
        model: Any = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        skipped = [piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _USER_DEFINED)]
        model = models.BPE(
            ids,
            generate_merges(ids, dict(pieces), skipped),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    strip = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    _compare(path, tokenizer)
    _add_template(tokenizer, config)
    return tokenizer.to_str()


def _normalizer(spec: Any) -> Any:
    """NormalizerSpec, step by step as sentencepiece's normalizer.cc."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # spaces alone: line breaks and tabs stay
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _compare(path: Path, tokenizer: Tokenizer) -> None:
    """Refuse a conversion that encodes a sample otherwise than sentencepiece."""
    try:
        sentencepiece: Any = importlib.import_module("sentencepiece")
    except ImportError:
        log.warning(
            "%s: converted, and not compared with sentencepiece, which is not installed: "
            "pip install sentencepiece to have that done",
            path,
        )
        return
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for sample in SAMPLES:
        expected, got = reference.encode(sample), tokenizer.encode(sample, add_special_tokens=False).ids
        if expected != got:
            raise ConfigError(
                [
                    f"{path}: must be converted without a difference; {sample!r} became {got}, "
                    f"sentencepiece encodes {expected}; name a tokenizer.json"
                ]
            )


def _add_template(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """What ``add_bos_token`` and ``add_eos_token`` of tokenizer_config.json put around a text."""
    begin, end = (
        token_text(config.get(f"{name}_token")) if config.get(f"add_{name}_token") else None
        for name in ("bos", "eos")
    )
    special = [
        (text, index)
        for text in dict.fromkeys((begin, end))
        if text and (index := tokenizer.token_to_id(text)) is not None
    ]
    if special:
        known = dict(special)
        order = [text for text in (begin, "$A", end) if text == "$A" or text in known]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(order), special_tokens=special
        )


# --------------------------------------------------------------------------------------------------- tiktoken


def _tiktoken_ranks(path: Path) -> dict[bytes, int] | None:
    """The lines ``<base64 of a token> <rank>`` of a tiktoken file; None if it is no such file."""
    try:
        lines = path.read_bytes().splitlines()
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in map(bytes.split, lines)}
    except (ValueError, binascii.Error):
        return None


def _tiktoken(path: Path, ranks: dict[bytes, int], config: Mapping[str, Any]) -> str:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks  # so that the tiktoken package is not needed

    log.warning(
        "%s: a tiktoken file does not say how text is split into words; taken is the rule of Llama 3 "
        "(cl100k_base); name a tokenizer.json if the model's is another",
        path,
    )
    return str(Converter(vocab_file=str(path)).converted().to_str())


# ---------------------------------------------------------------------------------- vocab.json and merges.txt


def _by_its_class(files: TokenizerFiles, config: Mapping[str, Any]) -> str:
    from transformers import AutoTokenizer

    stated = config.get("tokenizer_class")
    model = files.folder / "config.json"
    if not stated and model.is_file():
        stated = json.loads(model.read_text(encoding="utf-8")).get("model_type")
    if not stated:
        raise ConfigError(
            [
                f"{files.tokens[0]}: how text is split is said by tokenizer_class of tokenizer_config.json, "
                f"or model_type of config.json; neither is there"
            ]
        )
    # no code of the folder is run, nothing is asked of the network
    loaded = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False, local_files_only=True)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError([f"{files.tokens[0]}: tokenizer_class = {stated!r} has no tokenizer.json form"])
    return str(backend.to_str())
