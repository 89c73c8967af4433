"""What a checkpoint calls a model's parameters: transformers renames, merges and splits tensors when it loads them.

The rules are transformers' own (`get_model_conversion_mapping`, the same that `from_pretrained` applies), asked about
names only. A parameter comes from one tensor under another name, or is computed from several by a `WeightConverter`:
experts stacked, q, k and v concatenated, rows permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

from auto_round.errors import SourceError


@dataclass(frozen=True)
class Origin:
    """Where a parameter comes from.

    keys: (tensor in the checkpoint, the converter's pattern that it matched) in the order in which they are merged.
    converter: how they become the parameter; None when there is one tensor and it is the parameter itself.
    target: the parameter under which transformers collects the tensors, the first that the converter makes.
    """

    target: str
    keys: tuple[tuple[str, str | None], ...]
    converter: Any | None


class Naming:
    """transformers' renaming rules for one model, and the origin of each of its parameters in a checkpoint."""

    def __init__(self, model: PreTrainedModel, parameters: Mapping[str, Tensor], stored: Iterable[str]) -> None:
        """parameters: the model's state by name, as transformers builds it; stored: names in the checkpoint."""
        self._model = model
        rules = get_model_conversion_mapping(model)
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in self.converters for pattern in rule.source_patterns}
        self._parameters = parameters
        self.origins: dict[str, Origin] = {}
        self.merged: dict[str, str] = {}  # name before a converter takes it (experts.0.w1.weight) -> tensor
        self._index(sorted(stored, key=dot_natural_key))

    def _index(self, stored: list[str]) -> None:
        collected: dict[str, list[tuple[str, str | None]]] = {}
        for key in stored:
            target, pattern = self.rename(key, self._parameters)
            if target not in self._parameters and key in self._parameters:
                target, pattern = key, None
            if target in self._parameters:
                collected.setdefault(target, []).append((key, pattern))
                if pattern is not None:
                    self.merged[self._before_converter(key, target, pattern)] = key
        for target, keys in collected.items():
            converter = None if keys[0][1] is None else self._by_pattern[keys[0][1]]
            origin = Origin(target, tuple(keys), converter)
            for name in self._targets(target, converter):
                self.origins[name] = origin

    def rename(self, key: str, parameters: Mapping[str, Any]) -> tuple[str, str | None]:
        """Return (the parameter that the tensor `key` goes to, the pattern of the converter that takes it or None)."""
        renamed: tuple[str, str | None] = rename_source_key(
            key, self._renamings, self.converters, self._model.base_model_prefix, parameters
        )
        return renamed

    def _before_converter(self, key: str, target: str, pattern: str) -> str:
        """`key` after the renamings, with the base model's prefix where `target` has it."""
        plain: str = rename_source_key(key, self._renamings, [])[0]
        prefix: str = self._model.base_model_prefix + "."
        renamed: str = rename_source_key(key, self._renamings, self.converters)[0]
        if target == prefix + renamed:
            return prefix + plain
        return plain.removeprefix(prefix) if renamed == prefix + target else plain

    def _targets(self, target: str, converter: Any | None) -> list[str]:
        """All parameters that a converter makes together with `target`."""
        if converter is None:
            return [target]
        first = converter.target_patterns[0]
        names = [target.replace(first, other, 1) for other in converter.target_patterns]
        return [name for name in names if name in self._parameters] or [target]

    def convert(self, origin: Origin, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Compute the parameters that come from `origin`; `read` gives a tensor of the checkpoint by name.

        Raises SourceError when the tensors do not fit the converter.
        """
        rule = deepcopy(origin.converter)
        assert rule is not None
        for key, pattern in origin.keys:
            rule.add_tensor(origin.target, key, pattern, lambda key=key: read(key))
        try:
            model = _AsBuilt(self._model, self._parameters)
            made = rule.convert(origin.target, model=model, config=self._model.config)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            names = ", ".join(key for key, _ in origin.keys[:3])
            raise SourceError(f"{origin.target!r} cannot be made from {names}: {error}") from None
        if isinstance(made, tuple):  # transformers 5.0 returns (tensors, errors)
            made = made[0]
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class _AsBuilt:
    """The model for converters, which ask for the shape of parameters that are several Linears by now."""

    def __init__(self, model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> None:
        self._model, self._parameters = model, parameters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, target: str) -> Tensor:
        """The parameter as transformers built it, on the meta device."""
        return self._parameters[target]
