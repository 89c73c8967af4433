"""Converting a quantised model from one format to another: read and write, exact or refused.

Codes, scales and zero points are carried over as they are. Where the target cannot hold them, the reason and the
nearest format that can are named; with `requantize` those layers are dequantised and rounded again, and the loss told.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from auto_round.errors import FormatError, SourceError
from auto_round.formats import FORMATS, open_coded
from auto_round.formats.base import CodedModel, Export, Format
from auto_round.formats.planning import plan_of, provenance_of
from auto_round.formats.shards import parse_size
from auto_round.qtensor import from_blocks
from auto_round.runtime.durable import disk_errors
from auto_round.runtime.journal import Journal
from auto_round.runtime.workspace import check_free, check_output, workspace
from auto_round.source.blocks import find_block_lists, linears_in, text_names
from auto_round.source.foreign import foreign
from auto_round.source.opening import tokenizer_of
from auto_round.source.skeleton import auto_class
from auto_round.spec.plan import LayerPlan, LinearShape, Plan
from auto_round.spec.scheme import ALLOWED_BITS, Scheme
from auto_round.tune.alone import quantise_alone

GROUP_SIZES = (128, 64, 32, -1)  # tried for a layer that is rounded again, after its own


@dataclass(frozen=True)
class Loss:
    """One layer that was rounded again: its kinds before and after, and |W' - W| / |W| in Frobenius norms."""

    layer: str
    before: str
    after: str
    error: float


@dataclass(frozen=True)
class Conversion:
    """What a conversion did. layers: how many were carried over exactly or rounded again; losses: the latter."""

    source: str
    source_format: str
    folder: str
    format: str
    layers: int
    losses: tuple[Loss, ...]

    @property
    def error(self) -> float:
        """Root mean square of the losses over all layers; 0 for an exact conversion."""
        return (sum(loss.error**2 for loss in self.losses) / self.layers) ** 0.5 if self.layers else 0.0


def convert(
    source: str | Path,
    output_dir: str | Path,
    format: str,
    *,
    requantize: bool = False,
    scheme: str | Scheme | None = None,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Conversion:
    """Write the quantised model `source` (a folder or a file of any format that is read here) as `format`.

    requantize: round layers again that the format cannot hold as they are; scheme: to what, by default to the nearest
    scheme of at least as many bits that it holds. max_shard_size: see `AutoRound.plan`. The folder appears whole or not
    at all, every layer read back from it. Raises SourceError when the source cannot be read, FormatError when the
    conversion would not be exact, and OutputError when the folder is not empty and `overwrite` is not set, or when an
    unfinished run has the same output.

    >>> from auto_round.conversion import convert
    >>> convert("./tmp_autoround", "./tmp_gptq", "auto_gptq")  # doctest: +SKIP
    """
    target, folder = FORMATS[format], check_output(output_dir, source)
    check_free(folder, overwrite=overwrite)
    wanted = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    if wanted is not None and not requantize:
        raise FormatError(f"a scheme ({wanted.name}) is only for layers that are rounded again: pass --requantize too")
    size = None if max_shard_size is None else parse_size(max_shard_size)
    with (
        disk_errors(folder, "Nothing was converted."),
        workspace(folder) as work,
        tempfile.TemporaryDirectory(dir=work.folder) as scratch,
    ):
        work.claim({"convert": str(source), "format": format}, overwrite=overwrite)
        model = open_coded(source, Path(scratch))
        if model.not_in_config is not None:
            raise FormatError(
                f"{source}: transformers does not read {model.not_in_config} from GGUF, so that another model would "
                "come of it; convert the original model's folder instead"
            )
        tell(f"{source}: {model.format} ({model.detail}), {len(model.layers)} layers")
        described = _described(model)
        plan, turned = _as_described(described, plan_of(model)), conv1d_layers(described, model.layers)
        tokenizer = _tokenizer(model) if target.holds_tokenizer else None
        schemes = _schemes_to_round(model, plan, target, requantize, wanted, turned)
        shapes = [LinearShape(layer.name, layer.out_features, layer.in_features) for layer in plan.layers]
        target.prescribe(shapes, model.config, tokenizer)  # a model that it cannot hold at all is refused here
        rounded = Journal(Path(scratch) / "rounded")
        losses = tuple(_round(model, name, scheme, rounded) for name, scheme in schemes.items())
        export = _export(model, _replanned(plan, schemes), schemes, rounded, tokenizer, turned)
        shutil.rmtree(work.staging, ignore_errors=True)
        work.staging.mkdir()
        target.write(export, work.staging, size)
        tell("every layer is read back")
        target.prove(export, work.staging)
        work.publish()
    return Conversion(str(source), model.format, str(folder), format, len(model.layers), losses)


def _described(model: CodedModel) -> nn.Module:
    """The model of its config, without weights; an empty module where transformers does not know it."""
    try:
        config = AutoConfig.for_model(**model.config)
    except ValueError:  # code of its own
        return nn.Module()
    with foreign(f"{model.path}: the model of its config cannot be built"), init_empty_weights():
        described: nn.Module = auto_class(config).from_config(config)
    return described


def conv1d_layers(described: nn.Module, layers: Collection[str]) -> frozenset[str]:
    """Those of `layers` that stand for a Conv1D of the model, whose weight is (in, out)."""
    turned = tuple(f".{name}" for name, module in described.named_modules() if isinstance(module, Conv1D))
    # A file of the bare model lacks the first parts of the names.
    return frozenset(name for name in layers if any(full.endswith(f".{name}") for full in turned))


def _as_described(described: nn.Module, plan: Plan) -> Plan:
    """The plan with what readers know by the model's own names, which files may spell otherwise: the lists of blocks,
    and, as kept, the Linears of what sees or hears, since some convert every Linear that they are not told to leave."""
    linears = linears_in(described)
    lists: list[str] = []
    with suppress(SourceError):  # GPT-2's have no Linears, nor has a model that is not known
        lists = find_block_lists(described)
    text = text_names(described, linears)
    others = [name for name in linears if name not in text and not any(name.endswith(own) for own in plan.quantised)]
    sizes = {name: linears[name].weight.shape for name in others}
    kept = [LayerPlan(name, size[0], size[1], None, "outside the blocks") for name, size in sizes.items()]
    lists = list(dict.fromkeys([*plan.block_lists, *lists]))
    return dataclasses.replace(plan, layers=(*plan.layers, *kept), block_lists=tuple(lists))


def obstacles(model: CodedModel, plan: Plan, target: Format, turned: Collection[str]) -> dict[str, str]:
    """Layers that `target` cannot hold as they are, and why; turned: see `conv1d_layers`."""
    found = {}
    for layer in plan.quantised.values():
        assert layer.scheme is not None
        reason = target.refuse(LinearShape(layer.name, layer.out_features, layer.in_features), layer.scheme)
        if reason is None and model.layers[layer.name].act_order and not target.holds_act_order:
            reason = f"inputs of a group are not neighbours (act-order), and {target.name} has no g_idx"
        if reason is None and target.holds_tokenizer and FORMATS[model.format].holds_tokenizer:
            reason = f"blocks of {model.layers[layer.name].kind} are not carried from file to file"
        if reason is None and layer.name in turned and not target.holds_conv1d:
            reason = f"it is a Conv1D, and readers of {target.name} look for Linears only"
        if reason is not None:
            found[layer.name] = reason
    return found


def exact_targets(model: CodedModel, plan: Plan, turned: Collection[str]) -> list[str]:
    """Formats that hold the model as it is, in the registry's order, which begins with what most software reads."""
    return [name for name in FORMATS.usable() if _holds(model, plan, FORMATS[name], turned)]


def _holds(model: CodedModel, plan: Plan, target: Format, turned: Collection[str]) -> bool:
    return _holds_plan(plan, target) and not obstacles(model, plan, target, turned)


def _holds_plan(plan: Plan, target: Format) -> bool:
    try:
        target.check(plan)
    except FormatError:
        return False
    return True


def _schemes_to_round(
    model: CodedModel,
    plan: Plan,
    target: Format,
    requantize: bool,
    wanted: Scheme | None,
    turned: Collection[str],
) -> dict[str, Scheme]:
    """The layers to round again and their new schemes; raises FormatError when there are any and none may be."""
    found = obstacles(model, plan, target, turned)
    if not requantize:
        if not found:
            target.check(plan)
            return {}
        name, reason = next(iter(found.items()))
        nearest = next((n for n in exact_targets(model, plan, turned) if n != "fake"), None)
        way_out = f"--format {nearest} is exact" if nearest else "only --format fake (floats) is exact"
        raise FormatError(
            f"{model.path}: {target.name} cannot hold {len(found)} of {len(model.layers)} layers as they are, such as "
            f"{name!r}: {reason}. {way_out}; --requantize rounds those layers again and says how much is lost"
        )
    chosen = {name: wanted or _nearest(plan.quantised[name], target) for name in found}
    if wanted is None and _holds_plan(_replanned(plan, chosen), target):
        return chosen
    common = wanted or _replanned(plan, chosen).scheme
    chosen |= {name: common for name, layer in plan.quantised.items() if layer.scheme != common}
    for name, scheme in chosen.items():
        layer = plan.quantised[name]
        refusal = target.refuse(LinearShape(name, layer.out_features, layer.in_features), scheme)
        if refusal is not None:
            raise FormatError(f"{model.path}: layer {name!r} cannot be rounded again to {scheme.name}: {refusal}")
    target.check(_replanned(plan, chosen))
    return chosen


def _nearest(layer: LayerPlan, target: Format) -> Scheme:
    """The first scheme of at least the layer's bits, groups nearest in size, that the target holds."""
    own = layer.scheme
    assert own is not None
    shape = LinearShape(layer.name, layer.out_features, layer.in_features)
    for bits in (b for b in ALLOWED_BITS if b >= own.bits):
        for group_size in dict.fromkeys((own.group_size, *GROUP_SIZES)):
            candidate = Scheme(bits, group_size, own.sym)
            if target.refuse(shape, candidate) is None:
                return candidate
    raise FormatError(
        f"layer {layer.name!r} ({own.name}): {target.name} holds no scheme of {own.bits} or more bits for it; name one "
        "with --scheme"
    )


def _replanned(plan: Plan, schemes: Mapping[str, Scheme]) -> Plan:
    """The plan with the `schemes` of layers that are rounded again."""

    def changed(layer: LayerPlan) -> LayerPlan:
        own = schemes.get(layer.name)
        return layer if own is None else dataclasses.replace(layer, scheme=own, reason="rounded again")

    layers = tuple(changed(layer) for layer in plan.layers)
    counts = Counter(layer.scheme for layer in layers if layer.scheme is not None)
    return Plan(counts.most_common(1)[0][0], layers, plan.block_lists)


def _round(model: CodedModel, name: str, scheme: Scheme, rounded: Journal) -> Loss:
    """Round one layer again, keep its codes in `rounded` and measure the loss."""
    weight = model.weight(name)
    tensor = quantise_alone(weight, scheme, "search", None, torch.device("cpu"))
    rounded.put(name, {name: tensor})
    error = float((tensor.dequantize() - weight).norm() / weight.norm().clamp(min=1e-30))
    return Loss(name, model.layers[name].kind, scheme.name, error)


def _tokenizer(model: CodedModel) -> Any | None:
    """The tokenizer beside the weights; None when there is none."""
    folder = next((file.parent for file in model.extra), None)
    return None if folder is None else tokenizer_of(folder, trust_remote_code=False)


def _export(
    model: CodedModel,
    plan: Plan,
    again: Collection[str],
    rounded: Journal,
    tokenizer: Any | None,
    turned: frozenset[str],
) -> Export:
    """What the writer takes; the layers `again` come from `rounded`."""
    return Export(
        checkpoint=model.checkpoint,
        config=model.config,
        plan=plan,
        stored_names={name: f"{name}.weight" for name in plan.quantised},
        replaced={stored: layer.name for layer in model.layers.values() for stored in layer.tensors},
        tensor=lambda name: from_blocks(rounded.get(name)) if name in again else model.codes(name),
        weight=lambda name: rounded.get(name).dequantize() if name in again else model.weight(name),
        extra=model.extra,
        provenance={**provenance_of(model.settings), "converted_from": model.format},
        title=model.path.resolve().name,
        tokenizer=tokenizer,
        transposed=turned,
        act_order=any(layer.act_order for layer in model.layers.values() if layer.name not in again),
    )
