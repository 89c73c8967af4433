"""Parameters that are Linears in all but name: GPT-2's Conv1D and the stacked weights of a layer's experts.

`find_fused` describes them, `open_fused` puts real Linears in their place, of which quantisation and backends know all:

    Conv1D, weight [in, out]                            a Linear, weight [out, in], under the same name
    experts.gate_up_proj [experts, 2 * ffn, hidden]     experts.0.gate_proj, experts.0.up_proj, experts.1.gate_proj ...
    experts.down_proj [experts, hidden, ffn]            experts.0.down_proj, experts.1.down_proj ...

An expert's Linears are called what the checkpoint calls them when it stores experts one by one (transformers' rules of
conversion say so), else ``experts.0.<parameter>``. The model's own code goes on indexing the stack: it gets an
`ExpertStack`, whose items stand in for weights in `linear` and matrix products and call the Linears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from auto_round.source.quirks import quirk

WeightOf = Callable[[nn.Module], Tensor]
MATRIX_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)


@dataclass(frozen=True)
class Slice:
    """Which part of a parameter is one Linear's weight: of its `expert` (None: of the whole) the rows begin .. end-1.

    transposed: the parameter is [..., in, out], and rows are its columns.
    """

    parameter: str
    expert: int | None
    begin: int
    end: int
    transposed: bool

    def of(self, parameter: Tensor) -> Tensor:
        """The weight (out, in) as a view of `parameter`."""
        whole = parameter if self.expert is None else parameter[self.expert]
        return (whole.t() if self.transposed else whole)[self.begin : self.end]


@dataclass(frozen=True)
class Fused:
    """One parameter that is several Linears: `parameter` of the module `owner`, and its slices by Linear name."""

    owner: str
    parameter: str
    slices: dict[str, Slice]
    in_features: int

    @property
    def full_name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.owner}.{self.parameter}"


def find_fused(model: nn.Module, converters: Sequence[Any]) -> list[Fused]:
    """Describe every parameter of `model` that `open_fused` can replace.

    converters: transformers' `WeightConverter`s for the model, which tell the names of single experts.
    """
    found = []
    for name, module in model.named_modules():
        if type(module) is Conv1D:
            rows = module.weight.shape[1]
            view = Slice(f"{name}.weight", None, 0, rows, True)
            found.append(Fused(name, "weight", {name: view}, module.weight.shape[0]))
        elif not type(module).__module__.startswith("torch."):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and "expert" in f"{name}.{key} {type(module).__name__}".lower():
                    found.append(_experts(name, module, key, parameter, converters))
    return found


def _experts(name: str, module: nn.Module, key: str, parameter: Tensor, converters: Sequence[Any]) -> Fused:
    # is_transposed: set by transformers' decorator of expert classes.
    transposed = bool(getattr(module, "is_transposed", type(module).__name__ in quirk("classes", "transposed_experts")))
    count, *rest = parameter.shape
    out_features, in_features = reversed(rest) if transposed else rest
    stored = _stored_parts(f"{name}.{key}", converters) if not transposed else None
    parts = stored if stored is not None and out_features % len(stored) == 0 else [f"{name}.{{}}.{key}"]
    step = out_features // len(parts)
    slices = {
        part.format(expert): Slice(f"{name}.{key}", expert, i * step, (i + 1) * step, transposed)
        for expert in range(count)
        for i, part in enumerate(parts)
    }
    return Fused(name, key, slices, in_features)


def _stored_parts(name: str, converters: Sequence[Any]) -> list[str] | None:
    """Names of an expert's Linears, {} for its number, when a converter stacks them from single tensors as they are."""
    for rule in converters:
        target = rule.target_patterns[0].replace("\\", "")
        kinds = [type(operation).__name__ for operation in rule.operations]
        if len(rule.target_patterns) > 1 or not name.endswith(target):
            continue
        if kinds not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            return None
        if len(kinds) == 2 and rule.operations[1].dim != 1:
            return None
        sources = [pattern.replace("\\", "").removeprefix("^") for pattern in rule.source_patterns]
        start = name.removesuffix(target)
        named = [start + s.replace("*", "{}", 1).removesuffix(".weight") for s in sources if s.endswith(".weight")]
        return named if len(named) == len(sources) and all("{}" in n for n in named) else None
    return None


def open_fused(model: nn.Module, fused: Iterable[Fused], weight_of: WeightOf) -> None:
    """Put Linears (on the meta device, without weights) in place of the parameters, in the tree of `model`.

    weight_of: gives the weight (out, in) of whatever stands in a Linear's place later.
    """
    stacked = False
    for item in fused:
        owner = model.get_submodule(item.owner)
        if isinstance(owner, Conv1D):
            linear = nn.Linear(item.in_features, owner.nf, bias=False, device="meta", dtype=owner.weight.dtype)
            linear.bias = owner.bias
            model.set_submodule(item.owner, linear.train(owner.training))
            continue
        parameter = owner._parameters.pop(item.parameter)
        assert parameter is not None
        for name, view in item.slices.items():
            linear = nn.Linear(
                item.in_features, view.end - view.begin, bias=False, device="meta", dtype=parameter.dtype
            )
            _add(model, name, linear.requires_grad_(parameter.requires_grad))
        # Not a module or parameter: it finds the Linears in the tree each time, also after they were replaced.
        owner.__dict__[item.parameter] = ExpertStack(model, item, tuple(parameter.shape), parameter.dtype, weight_of)
        stacked = True
    if stacked:
        _run_one_by_one(model)


def _add(model: nn.Module, name: str, module: nn.Module) -> None:
    parent_name, _, own = name.rpartition(".")
    parent = model
    for part in parent_name.split("."):
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(own, module)


def _run_one_by_one(model: nn.Module) -> None:
    """Have experts run by their class's own forward, not by grouped products of whole stacks."""
    for module in model.modules():
        config = getattr(module, "config", None)  # modules of transformers
        if config is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"


class ExpertStack:
    """Stands in for a parameter [experts, ...]: items are `ExpertWeight`s; in other tensor operations it is dense."""

    _is_hf_initialized = True  # transformers' mark of what its initialisers leave alone

    def __init__(
        self, model: nn.Module, item: Fused, shape: tuple[int, ...], dtype: torch.dtype, weight_of: WeightOf
    ) -> None:
        # Checkpoints may name experts beside their owner (block_sparse_moe.experts.0.w1 for mlp.experts).
        above = _common([item.owner, *item.slices])
        self._root = model.get_submodule(above)
        self.shape, self.ndim, self._dtype = torch.Size(shape), 3, dtype
        self._weight_of = weight_of
        by_expert: dict[int, list[str]] = {}
        for name, view in item.slices.items():
            by_expert.setdefault(view.expert or 0, []).append(name.removeprefix(above + "."))
        self._names = [by_expert[expert] for expert in range(shape[0])]
        self._transposed = next(iter(item.slices.values())).transposed

    def __getitem__(self, index: Any) -> Any:
        """The weight of one expert; any other index gives dense tensors."""
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point()):
            parts = [self._root.get_submodule(name) for name in self._names[int(index)]]
            return ExpertWeight(parts, self._weight_of, transposed=self._transposed)
        return self.dense()[index]

    def __len__(self) -> int:
        return len(self._names)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, or the one declared when none of them is a parameter any more."""
        first = self._root.get_submodule(self._names[0][0])
        return next((p.dtype for p in first.parameters() if p.is_floating_point()), self._dtype)

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        first = self._root.get_submodule(self._names[0][0])
        return next(t.device for t in (*first.parameters(), *first.buffers()))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def dense(self) -> Tensor:
        """The whole parameter."""
        return torch.stack([self[expert].dense() for expert in range(len(self))])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.bmm, torch.matmul, Tensor.bmm, Tensor.matmul, Tensor.__matmul__) and _is_batched(args):
            return torch.stack([x @ args[1][expert] for expert, x in enumerate(args[0])])
        return func(*_densified(args), **{k: _densified([v])[0] for k, v in (kwargs or {}).items()})


def _common(names: list[str]) -> str:
    """The longest path, in whole parts, with which all names begin."""
    columns = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


def _is_batched(args: Sequence[Any]) -> bool:
    """x [experts, tokens, in] times a stack."""
    return len(args) == 2 and isinstance(args[0], Tensor) and args[0].dim() == 3 and len(args[0]) == len(args[1])


class ExpertWeight:
    """Stands in for the weight of one expert, (out, in) or, transposed, (in, out), made of the rows of `parts`."""

    def __init__(self, parts: Sequence[nn.Module], weight_of: WeightOf, *, transposed: bool) -> None:
        self._parts, self._weight_of, self._transposed = parts, weight_of, transposed

    def t(self) -> ExpertWeight:
        """The transposed weight."""
        return ExpertWeight(self._parts, self._weight_of, transposed=not self._transposed)

    @property
    def T(self) -> ExpertWeight:  # noqa: N802
        """The transposed weight."""
        return self.t()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def dense(self) -> Tensor:
        """The weight as a tensor."""
        rows = torch.cat([self._weight_of(part) for part in self._parts])
        return rows.t() if self._transposed else rows

    def multiply(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        outputs = [part(x) for part in self._parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear and len(args) > 1 and isinstance(args[1], cls) and not args[1]._transposed:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            y = args[1].multiply(args[0])
            return y if bias is None else y + bias
        if func in MATRIX_PRODUCTS and len(args) == 2 and isinstance(args[1], cls) and args[1]._transposed:
            return args[1].multiply(args[0])
        return func(*_densified(args), **{k: _densified([v])[0] for k, v in kwargs.items()})


def _densified(values: Iterable[Any]) -> list[Any]:
    return [v.dense() if isinstance(v, (ExpertStack, ExpertWeight)) else v for v in values]
