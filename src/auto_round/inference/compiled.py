"""Decoding through torch.compile: every step of one token is one graph, over a cache whose size does not change."""

from __future__ import annotations

import functools
from typing import Any

import torch


def compile_decoding(model: Any, **options: Any) -> None:
    """Let the one-token steps of ``model.generate(..., cache_implementation="static")`` run compiled.

    All else runs as before: prompts, whose every length would be compiled anew, and other caches. The first step is
    compiled when it is made, which takes a minute or so, and again, then for all, when the cache has another size.
    torch needs a C++ compiler on a CPU. options: of torch.compile.
    """
    eager = model.forward
    compiled = torch.compile(eager, **options)

    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # the name before transformers 5.23
        step = ids is not None and ids.shape[1] == 1 and cache is not None and cache.is_compileable
        return (compiled if step else eager)(*args, **kwargs)

    model.forward = forward
