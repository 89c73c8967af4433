"""The model without its weights: a module tree on the meta device into which parts are loaded and freed again."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from auto_round.errors import SourceError
from auto_round.source.checkpoint import Checkpoint
from auto_round.source.foreign import foreign


class Skeleton:
    """A model whose parameters are on the meta device, and the checkpoint they come from.

    Buffers that are computed and not stored (rotary frequencies) are real from the start.
    """

    def __init__(self, config: PretrainedConfig, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> None:
        """Build the tree; raise SourceError when transformers has no causal language model for the config."""
        self.checkpoint = checkpoint
        building = foreign(f"{checkpoint.folder}: the model of its config cannot be built")
        with building, init_empty_weights(include_buffers=False), no_init_weights():
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        self.model.eval().requires_grad_(False)
        self.model.config.use_cache = False
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._buffers = dict(self.model.named_buffers())
        self._ties = {name: source for name, source in _tied(self.model).items() if source in self._parameters}
        self._prefix = self.model.base_model_prefix + "."

    def stored_name(self, name: str) -> str | None:
        """Return what the checkpoint calls the parameter `name`, or None if it holds no such tensor.

        Checkpoints of the bare base model lack its prefix; tied parameters are stored under one of their names.
        """
        candidates = [name, self._ties.get(name, name)]
        candidates += [c.removeprefix(self._prefix) for c in candidates] + [self._prefix + c for c in candidates]
        return next((c for c in candidates if c in self.checkpoint), None)

    def is_tied(self, name: str) -> bool:
        """True when parameter `name` is another parameter's weight under a second name."""
        return name in self._ties or name in self._ties.values()

    def missing(self) -> list[str]:
        """Names of parameters that the checkpoint does not hold."""
        return [name for name in self._parameters if self.stored_name(name) is None]

    def weight(self, name: str) -> Tensor:
        """Read the tensor of parameter `name` as it is stored; raise SourceError when missing or of another shape."""
        stored = self.stored_name(name)
        if stored is None:
            raise SourceError(f"{self.checkpoint.folder}: the checkpoint holds no tensor for {name!r}")
        tensor = self.checkpoint.tensor(stored)
        if tensor.shape != self._parameters[name].shape:
            expected = list(self._parameters[name].shape)
            raise SourceError(f"tensor {stored!r} has shape {list(tensor.shape)}, the model's config says {expected}")
        return tensor

    def load(self, module: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> None:
        """Give every parameter of `module` (called `name` in the model) its weights, in `dtype` on `device`."""
        for path, owner, key in _slots(module, name):
            if owner._parameters.get(key) is not None:
                value = self.weight(path)
                value = value.to(device, dtype) if value.is_floating_point() else value.to(device)
                owner._parameters[key] = nn.Parameter(value, requires_grad=False)
            elif owner._buffers.get(key) is not None:
                stored = self.stored_name(path)
                buffer = owner._buffers[key] if stored is None else self.checkpoint.tensor(stored)
                owner._buffers[key] = buffer.to(device)  # type: ignore[union-attr]

    def free(self, module: nn.Module, name: str) -> None:
        """Put every parameter of `module` back on the meta device."""
        for _, owner, key in _slots(module, name):
            parameter = owner._parameters.get(key)
            if parameter is not None:
                owner._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _slots(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module, str]]:
    """(full name, owning module, key in it) of every parameter and buffer below `module`."""
    found = []
    for path, owner in module.named_modules():
        full = ".".join(part for part in (prefix, path) if part)
        found += [(f"{full}.{key}" if full else key, owner, key) for key in [*owner._parameters, *owner._buffers]]
    return found


def _tied(model: Any) -> dict[str, str]:
    """Tied parameters, target name -> source name. transformers 5 keeps them in `all_tied_weights_keys`."""
    tied = getattr(model, "all_tied_weights_keys", None)
    return dict(tied) if tied and model.config.tie_word_embeddings else {}
