"""compressed-tensors folders in format pack-quantized: ``quant_method: "compressed-tensors"``, int4 and int8.

One config group a scheme. A layer belongs to the first group that has its full name among its targets; else to the
first with ``re:`` and a regular expression that matches its name from the start; else to the first with its class
("Linear"). Unless ``ignore`` names it in one of these ways. Facts: compressed-tensors 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.errors import FormatError, SpecError
from auto_round.formats.base import CodedModel, Export, other_names, takes_the_users
from auto_round.formats.folder import folder_sizes, method_of, open_folder, prove_codes, read_settings, write_folder
from auto_round.formats.layouts import COMPRESSED
from auto_round.spec.blocks import not_integer
from auto_round.spec.plan import LinearShape, Plan
from auto_round.spec.scheme import Scheme

PACKED = "pack-quantized"
WRITTEN_BITS = (4, 8)
HEAD = "lm_head"


@dataclass(frozen=True)
class CompressedConfig:
    """A parsed quantization_config. groups: (targets, scheme); ignore: names kept."""

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...]

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> CompressedConfig:
        """Read the dict of a config.json; raise FormatError naming the group that cannot be read."""
        groups = []
        for name, group in (settings.get("config_groups") or {}).items():
            where = f"config_groups[{name!r}]"
            if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
                raise FormatError(f"quantization_config: {where} does not say how weights are quantised")
            packing = group.get("format") or settings.get("format")
            if packing != PACKED:
                raise FormatError(f"quantization_config: {where} has format {packing!r}; this version reads {PACKED}")
            if group.get("input_activations"):
                raise FormatError(f"quantization_config: {where} quantises activations, which is not supported")
            groups.append((tuple(group.get("targets") or ()), _scheme(group["weights"], where)))
        if not groups:
            raise FormatError("quantization_config: config_groups is empty, so nothing is quantised")
        return cls(tuple(groups), tuple(settings.get("ignore") or ()))

    def resolve(self, names: Sequence[str]) -> Mapping[str, Scheme | None]:
        """Return for each layer its scheme, or None to keep it."""
        return {name: self._scheme_of(name) for name in names}

    def _scheme_of(self, name: str) -> Scheme | None:
        if any(fits(name, target) for fits in _FITS for target in self.ignore):
            return None
        fitting = (s for fits in _FITS for targets, s in self.groups if any(fits(name, t) for t in targets))
        return next(fitting, None)


def _by_name(name: str, target: str) -> bool:
    return target == name


def _by_pattern(name: str, target: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], name) is not None


def _by_class(_: str, target: str) -> bool:
    return target == "Linear"


_FITS = (_by_name, _by_pattern, _by_class)  # what counts first, first


def _scheme(weights: Mapping[str, Any], where: str) -> Scheme:
    kind, strategy, size = weights.get("type") or "int", weights.get("strategy"), weights.get("group_size") or -1
    if strategy is None:
        strategy = "group" if size > 0 else "channel"
    if kind != "int" or strategy not in ("group", "channel"):
        raise FormatError(
            f"quantization_config: {where} has {kind} weights by {strategy}, which this version cannot read"
        )
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise FormatError(f"quantization_config: {where} has actorder={weights['actorder']!r}, which needs a g_idx")
    try:
        return Scheme(int(weights["num_bits"]), -1 if strategy == "channel" else int(size), bool(weights["symmetric"]))
    except (KeyError, TypeError, SpecError) as error:
        raise FormatError(f"quantization_config: {where}: {error}") from None


class CompressedFormat:
    """Writer and reader of the format; neither needs the package compressed-tensors."""

    name = "llm_compressor"
    holds_act_order = False
    holds_conv1d = False
    holds_tokenizer = False
    prescribe = takes_the_users

    def refuse(self, shape: LinearShape, scheme: Scheme) -> str | None:
        """4 or 8 bits, and groups that divide the inputs."""
        if scheme.bits not in WRITTEN_BITS:
            return f"llm_compressor is written with 4 or 8 bits, not {scheme.bits}"
        return not_integer(scheme) or COMPRESSED.refuse(scheme, shape.out_features, shape.in_features)

    def check(self, plan: Plan) -> None:
        """Every mix of schemes, and the head, can be said."""

    def sizes(self, export: Export, largest_shard: int | None) -> Mapping[str, int]:
        """The shards and their index."""
        return folder_sizes(export, largest_shard, COMPRESSED)

    def write(self, export: Export, folder: Path, largest_shard: int | None) -> None:
        """Write weights, config.json and the source's other files into `folder`."""
        settings, others = self.settings(export.plan), other_names(export)
        for group in settings["config_groups"].values():
            group["targets"] += [others[name] for name in group["targets"] if name in others]
        write_folder(export, folder, largest_shard, COMPRESSED, {**settings, **export.provenance})

    def settings(self, plan: Plan) -> dict[str, Any]:
        """The quantization_config of a plan, without provenance."""
        members: dict[Scheme, list[str]] = {}
        for layer in plan.quantised.values():
            assert layer.scheme is not None
            members.setdefault(layer.scheme, []).append(layer.name)
        quantised = plan.quantised
        groups = {
            f"group_{i}": {
                "targets": ["Linear"] if len(members) == 1 else names,
                "weights": _weights(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": PACKED,
            }
            for i, (scheme, names) in enumerate(members.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "format": PACKED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(dict.fromkeys([*([] if HEAD in quantised else [HEAD]), *plan.kept, *plan.routers])),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def prove(self, export: Export, folder: Path) -> None:
        """Every layer must read back bit for bit."""
        prove_codes(export, self._open(folder))

    def open(self, path: Path, scratch: Path) -> CodedModel | None:
        """Open pack-quantized folders of any writer."""
        return self._open(path) if method_of(path) == "compressed-tensors" else None

    def _open(self, folder: Path) -> CodedModel:
        config = CompressedConfig.parse(read_settings(folder)[1])
        return open_folder(folder, format=self.name, detail=PACKED, layout=COMPRESSED, rules=config)


def _weights(scheme: Scheme) -> dict[str, Any]:
    channel = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
    }


FORMAT = CompressedFormat()
