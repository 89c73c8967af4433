"""A tokenizer of words that can be read in an assertion, and a listener that remembers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from auto_round.runtime.events import LogListener

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"


class Heard(LogListener):
    """Remembers what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture(scope="session")
def words() -> Callable[..., PreTrainedTokenizerFast]:
    """words(bos=True): ids 0 <unk>, 1 <s>, 2 </s>, 3 blank line, 4 system, 5 user, 6 assistant, 10 + n for "w<n>"."""

    def build(*, bos: bool) -> PreTrainedTokenizerFast:
        special = ["<unk>", "<s>", "</s>", "\n\n", "system", "user", "assistant", "Be", "kind,", "please"]
        vocabulary = {word: number for number, word in enumerate([*special, *(f"w{n}" for n in range(1000))])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
        )
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
        )

    return build
