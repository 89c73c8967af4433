"""Checkpoint formats: how codes, scales and zero points lie in files. One format a file, writer beside reader."""

from __future__ import annotations

from pathlib import Path

from auto_round.errors import FormatError, SourceError
from auto_round.formats.base import CodedModel, Format
from auto_round.formats.folder import read_settings
from auto_round.registry import Registry

GGUF_FILE_TYPES = (
    *("q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m"),
    *("q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "q8_0"),
)
FORMATS: Registry[Format] = Registry(
    "format",
    {
        "auto_round": "auto_round.formats.auto_round:FORMAT",
        "auto_gptq": "auto_round.formats.gptq:GPTQ",
        "gptq_v2": "auto_round.formats.gptq:GPTQ_V2",
        "auto_awq": "auto_round.formats.awq:FORMAT",
        "llm_compressor": "auto_round.formats.llm_compressor:FORMAT",
        "fake": "auto_round.formats.fake:FORMAT",
        **{f"gguf:{name}": f"auto_round.formats.gguf.writer:{name.upper()}" for name in GGUF_FILE_TYPES},
    },
    FormatError,
)


def open_coded(path: Path | str, scratch: Path) -> CodedModel:
    """Open a quantised folder or file of whichever format it is; `scratch` is there for what has to be unpacked.

    Raises SourceError when it cannot be read and FormatError when no format knows it or its parts disagree.
    """
    path = Path(path).expanduser()
    for name in FORMATS:
        if path.suffix != ".gguf" and not FORMATS.is_usable(name):
            continue
        model = FORMATS[name].open(path, scratch)
        if model is not None:
            return model
    if not path.is_dir():
        raise SourceError(f"{path}: no such folder")
    method = read_settings(path)[1].get("quant_method")
    raise FormatError(
        f"{path / 'config.json'}: quant_method {method!r} is not read here. Known: auto-round, gptq, awq and "
        "compressed-tensors"
    )
