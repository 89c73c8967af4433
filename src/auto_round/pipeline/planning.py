"""What happens to every layer: which there are, which rules apply, and what the user should know of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from auto_round.errors import FormatError, SpecError
from auto_round.formats.base import Format
from auto_round.pipeline.job import Job, Prepared
from auto_round.registry import did_you_mean
from auto_round.runtime.events import Listener
from auto_round.source.blocks import find_block_lists, is_linear, kept_by_default, linears_in, routers_in, text_names
from auto_round.source.opening import Source
from auto_round.source.recast import output_name
from auto_round.source.skeleton import Skeleton
from auto_round.spec.blocks import BlockScheme
from auto_round.spec.fusions import broken_fusions
from auto_round.spec.plan import LayerPlan, LinearShape, Plan, Rule, make_plan
from auto_round.spec.scheme import Scheme

FUSIONS_TOLD = 4  # warnings about layers that runtimes merge; the rest are counted


def block_lists(job: Job, skeleton: Skeleton) -> list[str]:
    """The lists of blocks that the user names, or the one that is found."""
    if not job.to_quant_block_names:
        return find_block_lists(skeleton.model)
    lists = [name for name, module in skeleton.model.named_modules() if isinstance(module, nn.ModuleList)]
    unknown = [name for name in job.to_quant_block_names if name not in lists]
    if unknown:
        raise SpecError(f"to_quant_block_names: {unknown[0]!r} is no list of blocks. {did_you_mean(unknown[0], lists)}")
    return list(job.to_quant_block_names)


def plan_layers(
    job: Job, source: Source, skeleton: Skeleton, lists: list[str], blocks: list[str], formats: Sequence[Format]
) -> Plan:
    """Resolve all rules; lists: names of the block lists, blocks: of the blocks in them. Raises SpecError."""
    inside = _shapes({k: v for b in blocks for k, v in linears_in(skeleton.model.get_submodule(b), f"{b}.").items()})
    outside = _outside(job, skeleton, blocks)
    kept: dict[str, str] = {}
    for block in blocks:
        kept.update(kept_by_default(skeleton.model.get_submodule(block), f"{block}."))

    own = [*inside, *(shape for shape in outside if not skeleton.is_tied(f"{shape.name}.weight"))]
    prescribed = _prescribed(source, own, formats)

    def refuse(shape: LinearShape, scheme: Scheme) -> str | None:
        if isinstance(scheme, BlockScheme) and not prescribed:
            return f"{scheme.name} is a type of GGUF files: save as gguf alone to have it"
        return _refusal(skeleton, formats, shape, scheme)

    rules = _rules(job, skeleton, [shape.name for shape in outside], prescribed)
    plan = make_plan(inside, outside, lists, job.scheme, rules, refuse, prescribed, kept)
    # No rule asks for what sees or hears; readers that convert every Linear must be told to leave it alone.
    named = {layer.name for layer in plan.layers}
    others = [shape for shape in _shapes(linears_in(skeleton.model)) if shape.name not in named]
    left = [LayerPlan(s.name, s.out_features, s.in_features, None, "outside the blocks") for s in others]
    routers = [n for b in blocks for n in routers_in(skeleton.model.get_submodule(b), f"{b}.")]
    stored = [(skeleton.stored_name(f"{name}.weight") or name).removesuffix(".weight") for name in routers]
    plan = replace(plan, layers=(*plan.layers, *left), routers=tuple(dict.fromkeys([*routers, *stored])))
    for output in formats:
        output.check(plan)
    return plan


def _refusal(skeleton: Skeleton, formats: Sequence[Format], shape: LinearShape, scheme: Scheme) -> str | None:
    """Why one of the formats cannot hold a layer of this model in `scheme`, or None."""
    if output_name(skeleton, shape.name) is None:
        return "transformers renames this model's tensors in a way that packed ones cannot follow"
    if any(f.name == "fake" for f in formats) and skeleton.is_stacked(shape.name):
        return "its weight is stored in one stack with those of other experts, which this format does not write"
    narrow = next((f.name for f in formats if not f.holds_conv1d), None)
    if narrow is not None and skeleton.is_conv1d(shape.name):
        return f"it is a Conv1D, and readers of {narrow} look for Linears only"
    return next((reason for f in formats if (reason := f.refuse(shape, scheme))), None)


def check_formats(prepared: Prepared, formats: Sequence[Format]) -> None:
    """Raise FormatError when a format, which the plan may not have been made for, cannot hold a layer of it."""
    for name, layer in prepared.plan.quantised.items():
        assert layer.scheme is not None
        shape = LinearShape(name, layer.out_features, layer.in_features)
        reason = _refusal(prepared.skeleton, formats, shape, layer.scheme)
        if reason is not None:
            raise FormatError(f"layer {name!r}, {layer.scheme.name}: {reason}; name the format when calling quantize()")
    for output in formats:
        output.check(prepared.plan)


def _prescribed(
    source: Source, layers: Sequence[LinearShape], formats: Sequence[Format]
) -> Mapping[str, BlockScheme | None]:
    """What the format itself says of the layers' schemes. Several formats share one set of codes: then the job says."""
    found = [f.prescribe(layers, source.raw_config, source.tokenizer) for f in formats]
    return found[0] if len(formats) == 1 else {}


def _rules(job: Job, skeleton: Skeleton, outside: list[str], prescribed: Mapping[str, object]) -> dict[str, Rule]:
    """layer_config with the rules in front that flags stand for, and the layers to ignore behind."""
    head, text = head_name(skeleton), text_names(skeleton.model, outside)
    rules: dict[str, Rule] = {}
    if job.quant_nontext_module:
        rules.update({name: job.scheme for name in outside if name not in text and name != head})
    if job.quant_lm_head:
        if head is None:
            raise SpecError("quant_lm_head: this model has no output head that is a Linear; leave it out")
        if head not in prescribed:
            rules[head] = job.scheme
    for pattern, rule in (*job.layer_config.items(), *((name, "keep") for name in job.ignore_layers)):
        rules.pop(pattern, None)  # a pattern that comes again goes to the end: later rules win
        rules[pattern] = rule
    return rules


def head_name(skeleton: Skeleton) -> str | None:
    """Name of the output head when it is a Linear."""
    head = skeleton.model.get_output_embeddings()
    if head is None or not is_linear(head):
        return None
    name: str = next(n for n, m in skeleton.model.named_modules() if m is head)
    return name


def _outside(job: Job, skeleton: Skeleton, blocks: Sequence[str]) -> list[LinearShape]:
    """Linears that lie in no block: the head, others of the text model, those of vision and audio when asked for."""
    linears, prefixes = linears_in(skeleton.model), tuple(f"{name}." for name in blocks)
    wanted = {*text_names(skeleton.model, linears), head_name(skeleton)}
    return _shapes(
        {
            name: linear
            for name, linear in linears.items()
            if not name.startswith(prefixes) and (name in wanted or job.quant_nontext_module)
        }
    )


def _shapes(linears: dict[str, nn.Linear]) -> list[LinearShape]:
    return [LinearShape(name, *linear.weight.shape) for name, linear in linears.items()]


def tell_plan(plan: Plan, skeleton: Skeleton, listener: Listener) -> None:
    """Say what will be quantised, and warn of what the user may not expect."""
    widths = sorted({layer.scheme.name for layer in plan.quantised.values() if layer.scheme})
    listener.note(
        f"{len(plan.quantised)} layers to {', '.join(widths)} ({plan.bits_per_weight():.2f} bits per weight stored)"
    )
    for reason in sorted({layer.reason for layer in plan.kept.values()} - {"outside the blocks"}):
        kept = [layer.name for layer in plan.kept.values() if layer.reason == reason]
        listener.warn(f"{len(kept)} layers are kept as they are, {kept[0]} among them: {reason}")
    broken = broken_fusions(plan)
    for sentence in broken[:FUSIONS_TOLD]:
        listener.warn(sentence)
    if len(broken) > FUSIONS_TOLD:
        listener.warn(f"and {len(broken) - FUSIONS_TOLD} more sets of layers like these")
    for name in untied(plan, skeleton):
        layer = plan.quantised[name]
        assert layer.scheme is not None
        extra = layer.out_features * layer.in_features * layer.scheme.bits_per_weight(layer.in_features) / 8
        listener.warn(
            f"{name} shares its weight with the embedding; the output holds both, the embedding as it is and "
            f"{int(extra):,} bytes more for the head (tie_word_embeddings becomes false)"
        )


def untied(plan: Plan, skeleton: Skeleton) -> list[str]:
    """Quantised layers that share their weight with another in the original."""
    return [name for name in plan.quantised if skeleton.is_tied(f"{name}.weight")]
