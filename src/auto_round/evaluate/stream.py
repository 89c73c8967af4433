"""Generating with a loaded model while the text is shown as it comes, with the time it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TextStreamer


@dataclass(frozen=True)
class Generated:
    """text: what came after the prompt. prompt_seconds: until the first token; seconds: from there to the last."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds: float

    def __str__(self) -> str:
        rate = (self.new_tokens - 1) / self.seconds if self.new_tokens > 1 else 0.0
        return (
            f"{self.prompt_tokens} tokens read at {self.prompt_tokens / self.prompt_seconds:.1f} tok/s, "
            f"{self.new_tokens} written at {rate:.1f} tok/s"
        )


class _Meter(TextStreamer):  # type: ignore[misc]  # transformers is not typed
    """Shows words as they are complete and notes when tokens come; transformers calls put and end."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.times = [time.perf_counter()]

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


def prompt_tokens(tokenizer: Any, messages: list[dict[str, str]] | str) -> Tensor:
    """(1, tokens): a text as it is, or the messages of a dialogue as the model's own template puts them."""
    if isinstance(messages, str):
        ids: Tensor = tokenizer(messages, return_tensors="pt")["input_ids"]
    elif tokenizer.chat_template is None:
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    return ids


def stream(
    model: Any, tokenizer: Any, ids: Tensor, max_new_tokens: int, *, sample: bool, show: Callable[[str], None]
) -> Generated:
    """Continue `ids` (1, tokens) and hand each piece of text to `show`.

    sample: draw tokens as the folder's generation config says; otherwise take the likeliest each time.
    """
    meter = _Meter(tokenizer, show)
    how = {"do_sample": True} if sample else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = ids.to(model.device)
    output = model.generate(
        ids,
        attention_mask=ids.new_ones(ids.shape),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        streamer=meter,
        **how,
    )
    new = output[0, ids.shape[1] :]
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    begin, first, last = meter.times[0], meter.times[1], meter.times[-1]
    return Generated(text, ids.shape[1], len(new), first - begin, last - first)
