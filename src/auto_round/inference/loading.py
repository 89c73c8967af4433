"""`AutoRoundConfig` of transformers with the choices of this package."""

from __future__ import annotations

from typing import Any

import transformers


class AutoRoundConfig(transformers.AutoRoundConfig):  # type: ignore[misc]  # transformers is not typed
    """How to run a quantised folder: ``from_pretrained(folder, quantization_config=AutoRoundConfig(...))``.

    backend: "auto", or a name that ``auto-round backends`` lists. lm_head_bits: round an output head that the folder
    keeps in 16 bits to 8 or 4 while loading (symmetric, groups of 128): the head is the largest weight of a small
    model, and every token reads all of it. All else comes from the folder.

    >>> AutoRoundConfig(lm_head_bits=8).get_loading_attributes()
    {'asked_backend': 'auto', 'lm_head_bits': 8}
    """

    def __init__(self, *args: Any, lm_head_bits: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lm_head_bits = lm_head_bits

    def get_loading_attributes(self) -> dict[str, Any]:
        """What of this config goes into the folder's (transformers asks).

        Old folders name their packing in `backend`, so the one that is asked for goes beside it.
        """
        return {"asked_backend": self.backend, "lm_head_bits": self.lm_head_bits}
