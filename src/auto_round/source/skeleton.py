"""The model without its weights: a module tree on the meta device into which parts are loaded and freed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from auto_round.errors import SourceError
from auto_round.source.checkpoint import Checkpoint
from auto_round.source.foreign import foreign
from auto_round.source.fused import Slice, find_fused, open_fused
from auto_round.source.naming import Naming, Origin


class Skeleton:
    """A model whose parameters are on the meta device, and the checkpoint they come from.

    Buffers that are computed and not stored (rotary frequencies) are real from the start. Parameters that are Linears
    in all but name are Linears here (see fused.py).
    """

    def __init__(self, config: PretrainedConfig, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> None:
        """Build the tree; raise SourceError when transformers has no language model for the config."""
        self.checkpoint = checkpoint
        self.auto_class = auto_class(config)
        building = foreign(f"{checkpoint.folder}: the model of its config cannot be built")
        with building, init_empty_weights(include_buffers=False), no_init_weights():
            self.model: PreTrainedModel = self.auto_class.from_config(config, trust_remote_code=trust_remote_code)
        self.model.eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.use_cache = False
        state = {**dict(self.model.named_parameters(remove_duplicate=False)), **dict(self.model.named_buffers())}
        self.naming = Naming(self.model, state, checkpoint)
        self._shapes = {name: tensor.shape for name, tensor in state.items()}
        self._ties = {name: source for name, source in _tied(self.model).items() if source in state}
        self.slices: dict[str, Slice] = {}
        fused = find_fused(self.model, self.naming.converters)
        for item in fused:
            self.slices.update({f"{name}.weight": view for name, view in item.slices.items()})
        open_fused(self.model, fused, lambda module: module.weight)  # type: ignore[arg-type, return-value]
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._stack: tuple[str, Tensor] = ("", torch.empty(0))

    def origin(self, name: str) -> Origin | None:
        """Where the parameter `name` of transformers' model comes from; a tied one has one tensor for all its names."""
        found = (self.naming.origins.get(candidate) for candidate in self._aliases(name))
        return next((origin for origin in found if origin is not None), None)

    def _aliases(self, name: str) -> list[str]:
        source = self._ties.get(name, name)
        return [name, source, *(target for target, other in self._ties.items() if other == source)]

    def stored_name(self, name: str) -> str | None:
        """Return the tensor of the checkpoint that is the parameter `name` as it stands, or None.

        It is None also for what transformers computes from other tensors. A Conv1D's tensor is the transposed weight.
        """
        if name in self.naming.merged:
            return self.naming.merged[name]
        view = self.slices.get(name)
        if view is not None and view.expert is not None:
            return None
        origin = self.origin(name)
        return origin.keys[0][0] if origin is not None and origin.converter is None else None

    def is_stacked(self, layer: str) -> bool:
        """True when `layer` is one expert of a stack that the checkpoint holds as one tensor."""
        view = self.slices.get(f"{layer}.weight")
        return view is not None and view.expert is not None and f"{layer}.weight" not in self.naming.merged

    def is_conv1d(self, layer: str) -> bool:
        """True when `layer` is a Conv1D of the model, whose tensor is the transposed weight."""
        view = self.slices.get(f"{layer}.weight")
        return view is not None and view.transposed and view.expert is None

    def sources(self, name: str) -> list[str]:
        """All tensors of the checkpoint from which the parameter `name` is read."""
        if name in self.naming.merged:
            return [self.naming.merged[name]]
        origin = self.origin(self.slices[name].parameter if name in self.slices else name)
        return [key for key, _ in origin.keys] if origin is not None else []

    def is_tied(self, name: str) -> bool:
        """True when parameter `name` is another parameter's weight under a second name."""
        return name in self._ties or name in self._ties.values()

    def missing(self) -> list[str]:
        """Names of parameters that the checkpoint does not hold."""
        return [name for name in self.parameters if not self.sources(name)]

    def weight(self, name: str) -> Tensor:
        """Read the parameter `name` in its stored dtype; raise SourceError when missing or of another shape."""
        if name in self.naming.merged and name in self.parameters:
            tensor = self.checkpoint.tensor(self.naming.merged[name])
            self._check(name, self.naming.merged[name], tensor, self.parameters[name].shape)
            return tensor
        view = self.slices.get(name)
        if view is None:
            return self._whole(name)
        if self._stack[0] != view.parameter:  # to be asked for in the order of `stack_of`
            self._stack = view.parameter, self._whole(view.parameter)
        return view.of(self._stack[1]).contiguous()

    def weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """`weight` of all `names`, in their order; every stack of experts is read once."""
        found = {name: self.weight(name) for name in sorted(names, key=self.stack_of)}
        self._stack = ("", torch.empty(0))
        return {name: found[name] for name in names}

    def stack_of(self, name: str) -> str:
        """The parameter that `name` is a part of; "" when it is none. Sorted by it, names of one stack are together."""
        return self.slices[name].parameter if name in self.slices else ""

    def _whole(self, name: str) -> Tensor:
        """Read a parameter of transformers' model, in the shape it has there."""
        origin = self.origin(name)
        if origin is None:
            raise SourceError(f"{self.checkpoint.folder}: the checkpoint holds no tensor for {name!r}")
        if origin.converter is None:
            stored = origin.keys[0][0]
            tensor = self.checkpoint.tensor(stored)
        else:
            stored, made = name, self.naming.convert(origin, self.checkpoint.tensor)
            tensor = next(made[alias] for alias in self._aliases(name) if alias in made)
        self._check(name, stored, tensor, self._shapes[name])
        return tensor

    def _check(self, name: str, stored: str, tensor: Tensor, shape: torch.Size) -> None:
        if tensor.shape != shape:
            found, expected = list(tensor.shape), list(shape)
            raise SourceError(f"tensor {stored!r} has shape {found}, the model's config says {expected}")

    def load(
        self,
        module: nn.Module,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        weight: Callable[[str], Tensor] | None = None,
        *,
        alone: bool = False,
    ) -> None:
        """Give every parameter of `module` (called `name` in the model) its weights, in `dtype` on `device`.

        weight: where they come from, by full name; the checkpoint when None. alone: not those of modules below it.
        """
        read = weight or self.weight
        for path, owner, key in sorted(_slots(module, name, alone), key=lambda slot: self.stack_of(slot[0])):
            if owner._parameters.get(key) is not None:
                value = read(path)
                value = value.to(device, dtype) if value.is_floating_point() else value.to(device)
                owner._parameters[key] = nn.Parameter(value, requires_grad=False)
            elif owner._buffers.get(key) is not None:
                buffer = owner._buffers[key] if self.origin(path) is None else self._whole(path)
                owner._buffers[key] = buffer.to(device)  # type: ignore[union-attr]
        self._stack = ("", torch.empty(0))

    def free(self, module: nn.Module, name: str, *, alone: bool = False) -> None:
        """Put every parameter of `module` back on the meta device; alone: not those of modules below it."""
        for _, owner, key in _slots(module, name, alone):
            parameter = owner._parameters.get(key)
            if parameter is not None:
                owner._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def auto_class(config: PretrainedConfig) -> Any:
    """The Auto class that opens the model: by the class named in its config, else the first that knows the config.

    Raises SourceError for encoders, which the first would take for decoders.
    """
    named = (getattr(config, "architectures", None) or [None])[0]
    known = []
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            known.append(auto)
            classes = auto._model_mapping[type(config)]
            if named in {c.__name__ for c in (classes if isinstance(classes, tuple) else (classes,))}:
                return auto
    if named and known and (getattr(config, "is_encoder_decoder", False) or named.endswith("ForMaskedLM")):
        raise SourceError(
            f"{named} does not go on with a text as it is; models that predict the next token can be quantised"
        )
    return known[0] if known else AutoModelForCausalLM


def _slots(module: nn.Module, prefix: str, alone: bool) -> list[tuple[str, nn.Module, str]]:
    """(full name, owning module, key in it) of all parameters and buffers of `module`, and below it unless alone."""
    found = []
    for path, owner in [("", module)] if alone else module.named_modules():
        full = ".".join(part for part in (prefix, path) if part)
        found += [(f"{full}.{key}" if full else key, owner, key) for key in [*owner._parameters, *owner._buffers]]
    return found


def _tied(model: Any) -> dict[str, str]:
    """Tied parameters, target name -> source name. transformers 5 keeps them in `all_tied_weights_keys`."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})
