"""Opening a model: a folder, a hub id, a loaded model or a GGUF file, all ending as a folder of safetensors."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from auto_round.errors import SourceError
from auto_round.source.checkpoint import Checkpoint
from auto_round.source.foreign import foreign

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
# Files the output writes itself, or that describe weights it does not have.
NOT_COPIED = (
    "config.json",
    "quantization_config.json",
    "quantize_config.json",
    "quant_config.json",
    "model.safetensors.index.json",
    "auto_round.json",
)
# Weights of a repository that transformers does not read: other formats' and variants', beside its own.
HUB_OTHERS = ("*/*.safetensors", "consolidated*.safetensors", "*.fp16.safetensors", "adapter_model*.safetensors")
QUANTISED = "is quantised already; start from the original model in 16 or 32-bit floats"
# Files of a tokenizer, of which none may stay beside those of another.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.jinja"),
    *("*.model", "*.tiktoken"),
)
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "LICENSE*", "README*")

SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # how llama.cpp names the files of one model


@dataclass(frozen=True)
class Source:
    """A model on disk: what the user called it, its folder, tensors, config and tokenizer (None if it has none).

    given: a folder with the files of the tokenizer or processor that the user gave, which go before the model's own.
    """

    title: str
    folder: Path
    checkpoint: Checkpoint
    config: PretrainedConfig
    tokenizer: Any | None
    given: Path | None = None

    @property
    def raw_config(self) -> dict[str, Any]:
        """config.json as it is in the folder."""
        parsed: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return parsed

    @property
    def extra_files(self) -> tuple[Path, ...]:
        """The folder's other files, see `extra_files`, with those that were given."""
        files = {file.name: file for file in extra_files(self.folder)}
        if self.given is not None:
            given = {file.name: file for file in extra_files(self.given)}
            if "tokenizer_config.json" in given:
                files = {n: f for n, f in files.items() if not any(fnmatchcase(n, own) for own in TOKENIZER_FILES)}
            if "processor_config.json" in given:
                files.pop("chat_template.json", None)  # a processor's of old, which would go before the given one's
            files |= given
        return tuple(files[name] for name in sorted(files))


def extra_files(folder: Path) -> tuple[Path, ...]:
    """Return what lies beside config and weights: tokenizer, chat template, generation config, licence."""
    return tuple(
        sorted(
            file
            for file in folder.iterdir()
            if file.is_file()
            and not file.name.startswith(".")
            and not file.name.endswith((*WEIGHT_SUFFIXES, ".index.json"))
            and file.name not in NOT_COPIED
        )
    )


def open_source(
    model: str | Path | PreTrainedModel,
    tokenizer: Any | None,
    scratch: Path,
    *,
    processor: Any | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """Open `model`, unpacking it below `scratch` when it is not a folder of safetensors already.

    tokenizer, processor: found in the folder when None, else saved with the result; the processor of a vision-language
    model brings its tokenizer.
    Raises SourceError naming what is missing or damaged, or when the model is quantised already.
    """
    title = title_of(model)
    given = _save_given([processor, tokenizer], scratch / "given")
    if isinstance(model, PreTrainedModel):
        folder = _save_loaded(model, scratch / "source")
    else:
        folder = _folder_of(Path(model).expanduser(), title, scratch)
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder}: no config.json; this is not a Hugging Face model folder")
    with foreign(f"{folder}/config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise SourceError(f"{title}: {QUANTISED}")
    checkpoint = Checkpoint(folder)
    _check_sizes(config, checkpoint)
    if tokenizer is None:
        # A processor keeps its tokenizer there; image processors have none.
        tokenizer = getattr(processor, "tokenizer", None) or tokenizer_of(folder, trust_remote_code=trust_remote_code)
    return Source(title, folder, checkpoint, config, tokenizer, given)


def title_of(model: str | Path | PreTrainedModel) -> str:
    """What the user called the model; of a loaded one, what it was loaded from, or else its class."""
    if isinstance(model, PreTrainedModel):
        return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return str(model)


def _check_sizes(config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """Refuse counts and sizes far beyond any tensor's, on which building the model would take all memory or time."""
    dimensions = [size for entry in checkpoint.entries.values() for size in entry.shape]
    largest = 64 * max([1024, len(checkpoint.entries), *dimensions])
    for name, value in config.get_text_config().to_dict().items():
        counts = name.startswith("num_") or name.endswith(("_size", "_dim", "_heads", "_layers"))
        if counts and isinstance(value, int) and not -largest < value < largest:
            raise SourceError(f"config.json: {name} is {value}, far beyond the size of any tensor of the checkpoint")


def _folder_of(path: Path, title: str, scratch: Path) -> Path:
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SourceError(f"{path}: no such file")
        return _unpack_gguf(path, scratch / "source")
    if path.is_absolute() or title.startswith((".", "~")) or title.count("/") != 1:
        raise SourceError(f"{title}: no such folder, and not a hub id of the form organisation/model")
    try:
        described = Path(snapshot_download(title, allow_patterns=["config.json"]))
        if _quantised(described):
            raise SourceError(f"{title}: {QUANTISED}")  # before gigabytes come
        return Path(snapshot_download(title, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_OTHERS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SourceError(f"{title}: no such folder, and the model hub does not give it either: {reason}") from None


def _quantised(folder: Path) -> bool:
    """True when config.json, should there be one, tells of quantised weights."""
    file = folder / "config.json"
    with foreign(f"{file}"):
        return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("quantization_config"))


def _save_loaded(model: PreTrainedModel, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed, whose model may have been another
    model.save_pretrained(folder)
    return folder


def _save_given(things: Sequence[Any], folder: Path) -> Path | None:
    """Save a processor and a tokenizer, where they are given, with the processor's chat template; None for neither."""
    shutil.rmtree(folder, ignore_errors=True)
    # A function may stand for a processor.
    for thing in [copy.deepcopy(thing) for thing in things if hasattr(thing, "save_pretrained")]:
        for part in (thing, getattr(thing, "tokenizer", None)):
            backend = getattr(part, "backend_tokenizer", None)
            if backend is not None:  # what calls leave in it would be saved, and the same job not be known again
                backend.no_truncation()
                backend.no_padding()
        thing.save_pretrained(folder)
    template = getattr(things[0], "chat_template", None)
    if isinstance(template, str) and folder.is_dir():
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")  # not that of its tokenizer
    return folder if folder.is_dir() else None


def not_read(value: Callable[[str], Any], tensors: Collection[str]) -> str | None:
    """What transformers leaves out when it reads a model from such a GGUF file, without a word; None for nothing.

    value: of a key, None when it is not there. tensors: all names. Facts: transformers 5.24.
    """
    kind = value("general.architecture")
    if value(f"{kind}.rope.scaling.type") not in (None, "none") or any(name.startswith("rope_f") for name in tensors):
        return "the scaling of its positions"
    if kind == "llama" and value(f"{kind}.expert_count"):
        return "its experts"
    if kind == "llama" and any(name.endswith("attn_q.bias") for name in tensors):
        return "the biases of its attention"
    return None


def _unpack_gguf(file: Path, folder: Path) -> Path:
    """Turn a GGUF file into a folder through transformers, which holds the whole model in memory once."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SourceError(f'{file}: reading GGUF needs the gguf package: pip install "auto-round[gguf]"') from None
    if (part := SHARD.search(file.name)) and int(part[2]) > 1:
        raise SourceError(
            f"{file}: is a part of a model in several files, which transformers cannot read; put them into one with "
            "llama.cpp's llama-gguf-split --merge, or start from the original model's folder"
        )
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: not a GGUF file, or damaged: {error}") from None

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    lost = not_read(value, [tensor.name for tensor in reader.tensors])
    if lost is not None:
        raise SourceError(
            f"{file}: transformers {transformers.__version__} does not read {lost}, so that another model would come "
            "of it; start from the original model's folder"
        )
    # Newer transformers keep GGUF weights packed unless told otherwise; older ones have no such class.
    keep_floats = {}
    if hasattr(transformers, "GgufConfig"):
        keep_floats["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype="bfloat16", output_loading_info=True, **keep_floats
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        raise SourceError(f"{file}: transformers {transformers.__version__} cannot read it: {error}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise SourceError(
            f"{file}: transformers {transformers.__version__} finds no values in it for {len(missing)} parameters of "
            f"{type(model).__name__}, such as {missing[0]!r}; start from the original model's folder"
        )
    _save_loaded(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer_of(folder: Path, *, trust_remote_code: bool) -> Any | None:
    """The tokenizer beside a model's weights; None when there is none. Raises SourceError when it cannot be loaded."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    if not any((folder / name).is_file() for name in names):
        return None
    with foreign(f"{folder}: its tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def processor_of(folder: Path, *, trust_remote_code: bool) -> Any | None:
    """The processor beside a vision-language model's weights; None when there is none that can be opened."""
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError):
        return None
