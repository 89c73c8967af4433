"""The module that stands where a Linear stood: packed codes, and a backend to multiply with them.

buffers    those of the file, for example qweight int32, qzeros int32 and scales float16 (see `Packing.specs`)
order      the inputs' order that the buffers are in, int64 (in,), for act-order GPTQ files; None: as they come
bias       parameter of the Linear it replaces, in the model's dtype, or None

It is for inference: gradients flow to its input (adapters beside it can be trained), but it has no weight to train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import BackendError, FormatError
from auto_round.inference.base import ROW_MULTIPLE, Backend, Packing, Prepared, Stored
from auto_round.inference.differentiable import differentiable_linear
from auto_round.inference.select import choose
from auto_round.qtensor import QTensor
from auto_round.spec.scheme import Scheme


class QLinear(nn.Module):
    """y = x @ W^T + bias with W quantised.

    in_features, out_features: shape of the weight, (out, in). scheme, layout: how its codes mean and lie.
    name: the layer's full name in its model, for messages. asked: the user's spelling, for a backend on another device.
    """

    bias: nn.Parameter | None
    order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scheme: Scheme,
        layout: Packing,
        backend: Backend[Any],
        bias: nn.Parameter | None = None,
        name: str = "",
        asked: str = "auto",
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.layout = layout
        self.backend = backend
        self.name = name
        self.asked = asked
        self.prepared: Prepared | None = None
        self._home = torch.device(device)
        self._dtype: torch.dtype | None = None  # of the inputs; None before `prepare`
        self._saved_as: Packing = layout
        self._stored_names: tuple[str, ...] = ()
        self.register_buffer("order", None, persistent=False)
        for tensor, (dtype, shape) in layout.specs(scheme, out_features, in_features).items():
            self.register_buffer(tensor, torch.empty(shape, dtype=dtype, device=device))
            self._stored_names += (tensor,)
        self.register_parameter("bias", bias)
        self._loaded: frozenset[str] = frozenset()

    @classmethod
    def from_qtensor(
        cls,
        tensor: QTensor,
        layout: Packing,
        backend: Backend[Any],
        bias: nn.Parameter | None = None,
        name: str = "",
        *,
        asked: str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> QLinear:
        """Make a layer that is ready to run, without a file; dtype: of its inputs where it has no bias that says so."""
        module = cls(
            tensor.in_features,
            tensor.out_features,
            scheme=tensor.scheme,
            layout=layout,
            backend=backend,
            bias=bias,
            name=name,
            asked=asked,
            device=tensor.codes.device,
        )
        for key, value in layout.encode(tensor).items():
            setattr(module, key, value)
        module.prepare(dtype if bias is None else bias.dtype)
        return module

    def __setattr__(self, name: str, value: Any) -> None:
        """Note which tensors come from a checkpoint.

        transformers (5.0 to 5.23) assigns what it read with the mark `_is_hf_initialized`, then fills what was missing
        by assigning uninitialised memory without it. The mark is lost when a buffer is moved, so it is noted here.
        """
        # _is_hf_initialized is transformers' own mark; plain tensors do not have it.
        if isinstance(value, Tensor) and getattr(value, "_is_hf_initialized", False):
            self.__dict__["_loaded"] = self._loaded | {name}
        super().__setattr__(name, value)

    def missing(self) -> list[str]:
        """Names of the tensors that no checkpoint gave, or gave in another shape (transformers 5.0 takes any).

        What is still on the meta device was given, but offloaded.
        """
        specs = self.layout.specs(self.scheme, self.out_features, self.in_features)
        shapes = {name: shape for name, (_, shape) in specs.items()} | {"bias": (self.out_features,)}
        tensors = {name: self._buffers[name] for name in self._stored_names} | self._parameters
        present = {name: t for name, t in tensors.items() if t is not None and not t.is_meta}
        return [name for name, t in present.items() if name not in self._loaded or tuple(t.shape) != shapes[name]]

    def arrange(self, tensors: Mapping[str, Tensor], layout: Packing, order: Tensor | None, saved_as: Packing) -> None:
        """Go on with `tensors` of `layout` in place of those that were loaded; call before `prepare`.

        order: (in,) int64, how the inputs go before they are multiplied, see `QTensor.in_order`; None: as they come.
        saved_as: the layout in which the layer is saved, with its inputs as they come.
        """
        for name in self._stored_names:
            del self._buffers[name]
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._stored_names = tuple(tensors)
        self.layout, self.order, self._saved_as = layout, order, saved_as

    @property
    def offloaded(self) -> bool:
        """True when its tensors are still on a disk or elsewhere, and come with each call."""
        return any(t is not None and t.is_meta for t in (self._buffers[name] for name in self._stored_names))

    def prepare(self, dtype: torch.dtype) -> None:
        """Check the loaded tensors and let the backend turn them into what it computes from; frees what it replaces.

        Raises FormatError when scales are not finite or do not fit the layout's dtype exactly, or when a symmetric
        layer's zero points are not constant.
        """
        if self.offloaded and self.backend.repacks:
            raise BackendError(f"layer {self.name!r} is offloaded, so backend {self.backend.name!r} cannot repack it")
        if self.offloaded:
            return
        _check(self.name, self.stored())
        self._narrow()
        stored = self.stored()
        self._home, self._dtype = stored.tensors[self._stored_names[0]].device, dtype
        if not self.backend.repacks:
            return
        self.prepared = self.backend.prepare(stored, dtype)
        for name in self._stored_names:
            self._buffers[name] = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLinear:
        """Move or cast the layer (torch's extension point for both); on another device prepare it again.

        Raises BackendError when no backend that was asked for runs there.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._dtype is not None:
            like = fn(torch.empty(0, dtype=self._dtype, device=self._home))
            self._dtype = like.dtype
            if like.device != self._home:
                self._move(like.device)
        return self

    def _move(self, device: torch.device) -> None:
        assert self._dtype is not None
        if device.type == "meta":
            raise BackendError(f"layer {self.name!r} cannot go to the meta device, where nothing holds its codes")
        shape = (self.out_features, self.in_features)
        backend = choose(self.asked, self.name, self.scheme, shape, self._dtype, device)
        if self.prepared is not None:
            self._buffers.update(Stored.of(self.prepared.qtensor().to(device), self.layout).tensors)
        self.backend, self.prepared = backend, None
        self.prepare(self._dtype)

    def _narrow(self) -> None:
        """Bring tensors back to the dtypes of the layout.

        transformers widens what a model class names as kept in float32, by patterns that may match scales.
        """
        for name, (dtype, _) in self.layout.specs(self.scheme, self.out_features, self.in_features).items():
            wide = self._buffers[name]
            if wide is None or wide.dtype is dtype:
                continue
            narrow = wide.to(dtype)
            if not torch.equal(narrow.to(wide.dtype), wide):
                raise FormatError(
                    f"layer {self.name!r}: its {name} in {wide.dtype} do not fit {dtype} exactly; quantise the model "
                    "again or keep this layer"
                )
            self._buffers[name] = narrow

    @property
    def device(self) -> torch.device:
        """Where its codes are."""
        return self._home

    def stored(self) -> Stored:
        """The layer's tensors as its file holds them, inputs in `order`.

        Raises BackendError when they were cast after loading.
        """
        if self.prepared is not None:
            return Stored.of(self.prepared.qtensor(), self.layout)
        tensors = {name: self._buffers[name] for name in self._stored_names}
        if any(t is not None and t.dtype is torch.bfloat16 for t in tensors.values()):
            raise BackendError(
                f"layer {self.name!r}: its float16 scales were cast to bfloat16, which loses digits. Do not cast the "
                "loaded model; pass dtype=torch.bfloat16 to from_pretrained"
            )
        found = {name: t for name, t in tensors.items() if t is not None}
        return Stored(self.layout, self.scheme, self.out_features, self.in_features, found)

    def qtensor(self) -> QTensor:
        """The layer's codes, scales and zero points, inputs as they come."""
        tensor = self.prepared.qtensor() if self.prepared is not None else self.stored().qtensor()
        return tensor if self.order is None else tensor.out_of_order(self.order.to(tensor.codes.device))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply inputs (..., in) to outputs (..., out) of the same dtype."""
        if self.prepared is not None and x.device != self._home:
            raise BackendError(
                f"layer {self.name!r} is on {self._home} and its input on {x.device}; move one of them with "
                f".to({str(x.device)!r}), or load the model with device_map={str(x.device)!r}"
            )
        prepared = self.prepared if self.prepared is not None else self.stored()
        x = x if self.order is None else x.index_select(-1, self.order)
        return differentiable_linear(x, self.backend, prepared, self.bias)

    def extra_repr(self) -> str:
        """Shape, scheme and backend for printing."""
        bias = "" if self.bias is None else ", bias"
        return f"{self.in_features} -> {self.out_features}, {self.scheme.name}{bias}, {self.backend.name}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save the file's tensors also when they were replaced (torch's extension point for this)."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.prepared is not None or self._saved_as is not self.layout:
            for name, tensor in self._saved_as.encode(self.qtensor()).items():
                destination[prefix + name] = tensor


def _check(name: str, stored: Stored) -> None:
    if not bool(torch.isfinite(stored.tensors["scales"]).all()):
        raise FormatError(
            f"layer {name!r}: its scales hold infinity or NaN, perhaps because they did not fit float16; "
            "quantise the model again or keep this layer"
        )
    try:
        stored.rows(0, min(ROW_MULTIPLE, stored.out_features))
    except FormatError as error:
        raise FormatError(f"layer {name!r}: {error}") from None
