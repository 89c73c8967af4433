"""The tokenizer's part of a GGUF file, from a tokenizer as the `tokenizers` library describes it (tokenizer.json).

model "gpt2": byte-level BPE, tokens in the byte alphabet, merges, and the name ("pre") of the pattern that splits text
before merging. model "llama": BPE on characters with bytes to fall back on (SentencePiece); llama.cpp merges the pair
whose token has the highest score, so that the scores are the ranks of the merges. Everything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gguf import GGUFWriter, TokenType

from auto_round.errors import FormatError

# Patterns of the Split pre-tokenizer in front of the byte level, by (pattern, whether whole words skip the merges).
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS: Mapping[tuple[str, bool], str] = MappingProxyType(
    {
        (_LLAMA3, True): "llama-bpe",
        (_LLAMA3, False): "smaug-bpe",
        (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST, False): "qwen2",
        (
            _CONTRACTIONS
            + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            False,
        ): "qwen35",
        (f"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*|\\p{{N}}{_REST_SLASH}", True): "tekken",
        (
            f"{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\\p{{N}}{{1,3}}{_REST_SLASH}",
            False,
        ): "gpt-4o",
    }
)

SPACE = "\u2581"  # what stands for a space within the tokens of SentencePiece


@dataclass(frozen=True)
class Vocabulary:
    """What the file holds of a tokenizer; tokens, types and scores have an entry for each row of the embedding."""

    model: str
    pre: str | None
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...]
    add_space_prefix: bool
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None

    def describe(self, writer: GGUFWriter) -> None:
        """Write the tokenizer's keys."""
        writer.add_tokenizer_model(self.model)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.scores is not None:
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.merges:
            writer.add_token_merges(list(self.merges))
        for role, add in {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "unk": writer.add_unk_token_id,
            "pad": writer.add_pad_token_id,
        }.items():
            if role in self.special:
                add(self.special[role])
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: Any | None, rows: int) -> Vocabulary:
    """Describe a tokenizer of transformers for a model whose embedding has `rows` rows.

    Raises FormatError when llama.cpp has no tokenizer that splits text as this one does.
    """
    # backend_tokenizer: the `tokenizers` object of transformers' fast tokenizers; slow ones have none.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is None or backend is None:
        raise FormatError(
            "GGUF: a file for llama.cpp needs the model's tokenizer, as a tokenizer.json beside the weights"
        )
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise FormatError(f"GGUF: a tokenizer of the kind {model['type']} is not written here, only BPE")
    by_characters = bool(model.get("byte_fallback"))
    tokens, types = _tokens(parts, rows, by_characters)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    special = {
        role: int(token)
        for role, token in (
            ("bos", tokenizer.bos_token_id),
            ("eos", tokenizer.eos_token_id),
            ("unk", tokenizer.unk_token_id),
            ("pad", tokenizer.pad_token_id),
        )
        if token is not None and token < rows
    }
    template = tokenizer.chat_template
    return Vocabulary(
        model="llama" if by_characters else "gpt2",
        pre=None if by_characters else _pre(parts),
        tokens=tokens,
        types=_byte_types(tokens, types, special) if by_characters else types,
        scores=_scores(tokens, types, merges) if by_characters else None,
        merges=() if by_characters else tuple(merges),
        add_space_prefix=by_characters and _prepends_space(parts),
        special=special,
        add_bos=bool(ids) and ids[0] == special.get("bos"),
        add_eos=bool(ids) and ids[-1] == special.get("eos"),
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def _tokens(parts: Mapping[str, Any], rows: int, by_characters: bool) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Text and type of every row; rows without a token are fillers, tokens beyond the last row cannot occur.

    llama.cpp looks for user-defined tokens in the text as it comes, in which a space is not yet U+2581.
    """
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for text, i in parts["model"]["vocab"].items():
        if i < rows:
            tokens[i], types[i] = text, int(TokenType.NORMAL)
    for added in parts["added_tokens"]:
        if added["id"] < rows:
            kind, text = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED, added["content"]
            if by_characters and kind == TokenType.USER_DEFINED:
                text = text.replace(SPACE, " ")
            tokens[added["id"]], types[added["id"]] = text, int(kind)
    return tuple(tokens), tuple(types)


def _byte_types(tokens: tuple[str, ...], types: tuple[int, ...], special: Mapping[str, int]) -> tuple[int, ...]:
    """Mark the 256 tokens <0x00> .. <0xFF> as bytes, and the unknown token."""
    marked = [
        int(TokenType.BYTE) if len(t) == 6 and t.startswith("<0x") else k for t, k in zip(tokens, types, strict=True)
    ]
    if "unk" in special:
        marked[special["unk"]] = int(TokenType.UNKNOWN)
    return tuple(marked)


def _scores(tokens: tuple[str, ...], types: tuple[int, ...], merges: list[str]) -> tuple[float, ...]:
    """Minus the rank of the first merge that gives a token; the others are never made by merging."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        # A space within a piece is written as U+2581, so the only space is the one between the two pieces.
        ranks.setdefault(merge.replace(" ", ""), rank)
    last = len(merges)
    return tuple(
        -float(ranks.get(t, last)) if k == int(TokenType.NORMAL) else -1000.0
        for t, k in zip(tokens, types, strict=True)
    )


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, a sequence or a single one."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _prepends_space(parts: Mapping[str, Any]) -> bool:
    """Whether text is tokenised as if a space stood in front of it."""
    if any(step["type"] == "Prepend" for step in _steps(parts["normalizer"], "normalizers")):
        return True
    splits = _steps(parts["pre_tokenizer"], "pretokenizers")
    return any(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in splits)


def _pre(parts: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way in which text is split before merging."""
    steps = _steps(parts["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        pattern = steps[0]["pattern"].get("Regex", "")
        name = PATTERNS.get((pattern, bool(parts["model"].get("ignore_merges"))))
        if name is not None:
            return name
    raise FormatError(f"GGUF: llama.cpp splits no text the way this tokenizer does: {json.dumps(steps)[:300]}")
