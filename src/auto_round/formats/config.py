"""What a checkpoint's ``quantization_config`` says, made exact: packing, and for every layer its scheme or "keep".

Rules for one layer, first hit wins:
1. extra_config names it exactly;
2. a key of extra_config that is no layer's name is found in it as a regular expression;
3. a key of dynamic (GPTQ) matches from its start: "-:" keeps it, "+:" or nothing changes the scheme;
4. it lies in the blocks, and neither modules_to_not_convert nor modules_in_block_to_quantize speak against it.

The configs of GPTQ and AWQ folders are read here too: their keys differ in name, their rules do not contradict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auto_round.errors import FormatError, SpecError
from auto_round.formats import layouts
from auto_round.formats.layouts import Layout
from auto_round.registry import did_you_mean
from auto_round.spec.scheme import ALLOWED_BITS, Scheme

GPTQ_V1, AWQ, RAW = "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round"

PACKINGS = {
    "auto": GPTQ_V1,
    "auto_round:auto_gptq": GPTQ_V1,
    "auto_round:gptq": GPTQ_V1,
    "auto_round:auto_awq": AWQ,
    "auto_round:awq": AWQ,
    "auto_round": RAW,
    "auto_round:gptqmodel": RAW,
}
LAYOUTS: dict[str, Layout] = {GPTQ_V1: layouts.GPTQ_V1, AWQ: layouts.AWQ, RAW: layouts.GPTQ_RAW}
INDEXED: dict[str, Layout] = {GPTQ_V1: layouts.GPTQ_V1_INDEXED, RAW: layouts.GPTQ_RAW_INDEXED}
MAY_HAVE_INDEX = ("auto_round:gptq", "auto_round:gptqmodel")  # packings of files that may hold a g_idx
UNSAID_PACKING = "auto_round:gptq"  # what transformers fills in when the file says nothing
BLOCK_KEYS = ("block_name_to_quantize", "to_quant_block_names", "quant_block_list")
SCHEME_KEYS = ("bits", "group_size", "sym")
ALIASES = {"w_bit": "bits", "wbits": "bits", "q_group_size": "group_size"}
UNQUANTISED_BITS = 16


@dataclass(frozen=True)
class CheckpointConfig:
    """A parsed ``quantization_config``.

    packing: one of GPTQ_V1, AWQ, RAW. indexed: its files may hold a g_idx; act_order: they must, and it matters.
    scheme: that of layers without a rule. backend: the user's spelling.
    blocks: names of block lists or blocks; empty when the file does not say. extra, dynamic: pattern -> scheme or keep.
    skipped: names never converted. only: if not empty, the names inside a block that are.
    lm_head_bits: width to which an output head that the file keeps is rounded at loading; None leaves it.
    """

    packing: str
    indexed: bool
    act_order: bool
    scheme: Scheme
    backend: str
    blocks: tuple[str, ...]
    extra: Mapping[str, Scheme | None]
    dynamic: Mapping[str, Scheme | None]
    skipped: tuple[str, ...]
    only: tuple[str, ...]
    lm_head_bits: int | None

    @classmethod
    def parse(cls, config: Any) -> CheckpointConfig:
        """Read transformers' AutoRoundConfig or the dict of a config.json.

        Raises FormatError naming the key or layer whose setting cannot be loaded.
        """
        given: dict[str, Any] = dict(config) if isinstance(config, Mapping) else config.to_dict()
        values = {**{ALIASES[key]: value for key, value in given.items() if key in ALIASES}, **given}
        _refuse_settings(values, "quantization_config")
        packing, indexed, backend = _packing_and_backend(values)
        act_order = bool(values.get("desc_act"))
        if act_order and packing == AWQ:
            raise FormatError("quantization_config: desc_act cannot be loaded with an AWQ packing, which has no g_idx")
        scheme = _scheme(values, Scheme(), "quantization_config")
        if scheme is None:
            raise FormatError(f"quantization_config has bits={values.get('bits')!r}: nothing in it is quantised")
        if "zero_point" in values and packing == AWQ:  # AWQ's own key; transformers fills in a sym beside it
            scheme = scheme.updated({"sym": not values["zero_point"]})
        return cls(
            packing=packing,
            indexed=indexed or act_order,
            act_order=act_order,
            scheme=scheme,
            backend=backend,
            blocks=next((names for key in BLOCK_KEYS if (names := tuple(_strings(values.get(key))))), ()),
            extra={
                k: _scheme(v, scheme, f"extra_config[{k!r}]") for k, v in (values.get("extra_config") or {}).items()
            },
            dynamic=dict(_dynamic(key, rule, scheme) for key, rule in (values.get("dynamic") or {}).items()),
            skipped=tuple(_strings(values.get("modules_to_not_convert"))),
            only=tuple(_strings(values.get("modules_in_block_to_quantize"))),
            lm_head_bits=_head_bits(values.get("lm_head_bits")),
        )

    @property
    def layout(self) -> Layout:
        """How the layers' tensors lie."""
        return INDEXED[self.packing] if self.indexed else LAYOUTS[self.packing]

    def resolve(self, names: Sequence[str], blocks: Sequence[str] = ("",)) -> dict[str, Scheme | None]:
        """Return for each layer its scheme, or None to keep it.

        names: all candidates, which may lack the first parts that blocks and the keys of extra_config have, as a bare
        base model does. blocks: names of block lists or blocks; "" is the whole model.
        """
        known, blocks = set(names), [_block_among(block, names) for block in blocks]
        exact = {tail: scheme for key, scheme in self.extra.items() if (tail := _known_tail(key, known)) is not None}
        patterns = {key: scheme for key, scheme in self.extra.items() if _known_tail(key, known) is None}
        return {name: exact[name] if name in exact else self._scheme_of(name, patterns, blocks) for name in names}

    def _scheme_of(self, name: str, patterns: Mapping[str, Scheme | None], blocks: Sequence[str]) -> Scheme | None:
        for key, scheme in patterns.items():
            if _expression(key).search(name):
                return scheme
        for key, scheme in self.dynamic.items():
            if _expression(key).match(name):
                return scheme
        return self.scheme if self._by_default(name, blocks) else None

    def _by_default(self, name: str, blocks: Sequence[str]) -> bool:
        dotted = f".{name}."
        if not any(block == "" or dotted.startswith(f".{block}.") for block in blocks):
            return False
        if any(f".{skipped}." in dotted for skipped in self.skipped):
            return False
        return not self.only or any(dotted.endswith(f".{inner}.") for inner in self.only)


def _known_tail(key: str, known: set[str]) -> str | None:
    """`key`, or the longest dotted end of it, that is in `known`."""
    parts = key.split(".")
    return next((tail for i in range(len(parts)) if (tail := ".".join(parts[i:])) in known), None)


def _block_among(block: str, names: Sequence[str]) -> str:
    """`block`, or the longest dotted end of it, in which some of `names` lie; `block` when there is none."""
    parts = block.split(".")
    tails = (".".join(parts[i:]) for i in range(len(parts)))
    return next((tail for tail in tails if any(name.startswith(f"{tail}.") for name in names)), block)


def _packing_and_backend(values: Mapping[str, Any]) -> tuple[str, bool, str]:
    """(packing, whether there may be a g_idx, backend).

    Old folders name the packing in `backend`; there it wins over the packing that transformers fills in.
    """
    method = str(values.get("quant_method") or "")
    packing = str(values.get("packing_format") or ("auto_round:awq" if method == "awq" else UNSAID_PACKING))
    backend = str(values.get("backend") or "auto")
    if backend != "auto" and backend in PACKINGS:
        packing, backend = (backend if packing == UNSAID_PACKING else packing), "auto"
    asked = values.get("asked_backend") or backend  # see `AutoRoundConfig`
    backend = "auto" if asked in PACKINGS else str(asked)
    if packing not in PACKINGS:
        raise FormatError(
            f"packing_format {packing!r} is not one this version reads. {did_you_mean(packing, list(PACKINGS))}"
        )
    name = PACKINGS[packing]
    version = str(values.get("version") or "gemm").lower()
    if name == AWQ and version != "gemm":
        raise FormatError(f"AWQ version {version!r} is not one this version reads; it reads gemm")
    if name == GPTQ_V1:
        return _gptq_packing(values), packing in MAY_HAVE_INDEX, backend
    return name, packing in MAY_HAVE_INDEX, backend


def _gptq_packing(values: Mapping[str, Any]) -> str:
    """GPTQ's own words for how zero points are stored; checkpoint_format overrides format, as in transformers."""
    named = str(values.get("format") or "")
    version = values.get("checkpoint_format") or (named if named.startswith("gptq") else "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise FormatError(f"checkpoint_format {version!r} is not one this version reads; it reads gptq and gptq_v2")
    return RAW if version == "gptq_v2" else GPTQ_V1


def _head_bits(bits: Any) -> int | None:
    if bits is None:
        return None
    if bits in ALLOWED_BITS:
        return int(bits)
    raise FormatError(f"lm_head_bits={bits!r} is not supported; use 8 or 4, or leave it out to keep the head as it is")


def _refuse_settings(values: Mapping[str, Any], where: str) -> None:
    """Refuse what would change the meaning of the codes and is not done here: better no model than a wrong one."""
    data_type = values.get("data_type") or "int"
    act_bits = values.get("act_bits") or UNQUANTISED_BITS
    if data_type != "int":
        raise FormatError(f"{where}: data_type {data_type!r} cannot be loaded; this version loads integer weights only")
    if int(act_bits) < UNQUANTISED_BITS:
        raise FormatError(f"{where}: act_bits={act_bits} cannot be loaded; quantised activations are not supported")
    for key in ("super_bits", "rotation_config"):
        if values.get(key):
            raise FormatError(
                f"{where}: {key}={values[key]!r} cannot be loaded by this version; use a checkpoint without it"
            )


def _scheme(values: Mapping[str, Any], base: Scheme, where: str) -> Scheme | None:
    """`base` with the keys of `values`; None when 16 bits or more mean that the layer is kept."""
    bits = values.get("bits", base.bits)
    if isinstance(bits, int) and bits >= UNQUANTISED_BITS:
        return None
    _refuse_settings(values, where)
    try:
        return base.updated({key: values[key] for key in SCHEME_KEYS if values.get(key) is not None})
    except SpecError as error:
        raise FormatError(f"{where}: {error}") from None


def _dynamic(key: str, rule: Mapping[str, Any], base: Scheme) -> tuple[str, Scheme | None]:
    if key.startswith("-:"):
        return key[2:], None
    return key.removeprefix("+:"), _scheme(rule, base, f"dynamic[{key!r}]")


def _strings(value: Any) -> Iterable[str]:
    """Flatten a comma-separated string or lists of lists of names."""
    if isinstance(value, str):
        yield from (part.strip() for part in value.split(",") if part.strip())
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


def _expression(key: str) -> re.Pattern[str]:
    try:
        return re.compile(key)
    except re.error as error:
        raise FormatError(
            f"quantization_config: {key!r} names no layer and is no regular expression: {error}"
        ) from None
