"""The `AutoRound` class: the users' contract. It turns keywords into specs and calls the pipeline."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import auto_round
from auto_round.calibrate.dataset import Dataset
from auto_round.errors import FormatError, OutputError, SpecError
from auto_round.formats import FORMATS
from auto_round.formats.base import Format
from auto_round.formats.shards import parse_size
from auto_round.pipeline import Job, Quantised, quantise, save
from auto_round.report.record import KeptLayer, RunReport, SavedFolder
from auto_round.runtime.device import compute_dtype, peak_device_bytes, peak_resident_bytes, resolve_device
from auto_round.runtime.events import Listener, LogListener
from auto_round.spec.plan import Rule
from auto_round.spec.presets import recipe as recipe_named
from auto_round.spec.scheme import Scheme


class AutoRound:
    """Quantise one causal language model.

    model: a folder, a hub id, a ``.gguf`` file or a loaded ``PreTrainedModel``; tokenizer: its tokenizer, found beside
    the weights when None. scheme: a preset such as "W4A16" or "W2A16G64"; bits, group_size and sym override it.
    layer_config: pattern (name, glob or regular expression) -> {"bits": ...}, preset or "keep"; later rules win.
    recipe: "default", "best", "light" or "rtn", each of whose fields (see `Recipe`) can be given as a keyword.
    dataset: calibration text: "auto", "builtin", "self", a hub id, a file, or a list; see the README.
    device: "auto", "cpu", "cuda:0", "xpu"; compute_dtype: what blocks run in, measured when "auto".

    Raises SpecError at once for a value that is not valid.

    >>> from auto_round import AutoRound
    >>> tuner = AutoRound("org/model", bits=4, group_size=128)                              # doctest: +SKIP
    >>> report = tuner.quantize_and_save("./tmp_autoround", format="auto_round")            # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any | None = None,
        *,
        scheme: str | Scheme = "W4A16",
        bits: int | None = None,
        group_size: int | None = None,
        sym: bool | None = None,
        layer_config: Mapping[str, Rule] | None = None,
        recipe: str = "default",
        iters: int | None = None,
        lr: float | None = None,
        minmax_lr: float | None = None,
        nsamples: int | None = None,
        seqlen: int | None = None,
        batch_size: int | None = None,
        gradient_accumulate_steps: int | None = None,
        seed: int | None = None,
        enable_minmax_tuning: bool | None = None,
        enable_quanted_input: bool | None = None,
        low_gpu_mem_usage: bool | None = None,
        enable_torch_compile: bool | None = None,
        start: str | None = None,
        heldout: float | None = None,
        dataset: Dataset = "auto",
        device: str | int | torch.device = "auto",
        compute_dtype: str = "auto",
        quant_lm_head: bool = False,
        trust_remote_code: bool = False,
        listener: Listener | None = None,
    ) -> None:
        base = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
        chosen = {
            key: value for key, value in (("bits", bits), ("group_size", group_size), ("sym", sym)) if value is not None
        }
        tuning = recipe_named(recipe).updated(
            iters=iters,
            lr=lr,
            minmax_lr=minmax_lr,
            nsamples=nsamples,
            seqlen=seqlen,
            batch_size=batch_size,
            gradient_accumulate_steps=gradient_accumulate_steps,
            seed=seed,
            enable_minmax_tuning=enable_minmax_tuning,
            enable_quanted_input=enable_quanted_input,
            low_gpu_mem_usage=low_gpu_mem_usage,
            enable_torch_compile=enable_torch_compile,
            start=start,
            heldout=heldout,
        )
        place = resolve_device(device)
        self._job = Job(
            model=model,
            tokenizer=tokenizer,
            scheme=base.updated(chosen),
            layer_config=dict(layer_config or {}),
            recipe=tuning,
            dataset=dataset,
            device=place,
            dtype=_compute_dtype(compute_dtype, place),
            quant_lm_head=quant_lm_head,
            trust_remote_code=trust_remote_code,
        )
        self._listener: Listener = listener or LogListener()
        self._result: Quantised | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def quantize(self, format: str | Sequence[str] = "auto_round") -> Quantised:
        """Tune the model and keep its codes in a temporary folder, ready for `save_quantized`.

        format: what it will be saved as, so that layers the format cannot hold are kept. Returns the result, whose
        `tensor(name)` gives the codes of a layer as a `QTensor`.
        """
        self._scratch = tempfile.TemporaryDirectory(prefix="auto-round-")
        self._result = quantise(self._job, _formats(format), Path(self._scratch.name), self._listener)
        return self._result

    def save_quantized(
        self,
        output_dir: str | Path,
        format: str | Sequence[str] = "auto_round",
        *,
        max_shard_size: str | int = "5GB",
        overwrite: bool = False,
    ) -> RunReport:
        """Write what `quantize` made; one format into `output_dir` itself, several into a subfolder each.

        Raises OutputError when `quantize` was not called, or when the folder is not empty and `overwrite` is not set.
        """
        if self._result is None:
            raise OutputError("nothing to save yet: call quantize() first, or quantize_and_save()")
        formats, target = _formats(format), check_output(output_dir, overwrite)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            return self._publish(self._result, formats, Path(scratch), target, max_shard_size)

    def quantize_and_save(
        self,
        output_dir: str | Path = "tmp_autoround",
        format: str | Sequence[str] = "auto_round",
        *,
        max_shard_size: str | int = "5GB",
        overwrite: bool = False,
    ) -> RunReport:
        """Tune the model and write it; see `quantize` and `save_quantized`. The folder appears whole or not at all."""
        formats, target = _formats(format), check_output(output_dir, overwrite)
        parse_size(max_shard_size)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            result = quantise(self._job, formats, Path(scratch), self._listener)
            return self._publish(result, formats, Path(scratch), target, max_shard_size)

    def _publish(
        self, result: Quantised, formats: Sequence[Format], scratch: Path, target: Path, max_shard_size: str | int
    ) -> RunReport:
        staging = scratch / "output"
        folders = []
        for output in formats:
            folder = staging if len(formats) == 1 else staging / output.name.replace(":", "-")
            folder.mkdir(parents=True)
            save(result, output, folder, parse_size(max_shard_size))
            final = target / folder.relative_to(staging)
            folders.append(SavedFolder(output.name, str(final), _bytes_in(folder)))
        report = _report(result, tuple(folders))
        for output, saved in zip(formats, folders, strict=True):
            folder = staging if len(formats) == 1 else staging / output.name.replace(":", "-")
            (folder / "auto_round.json").write_text(report.to_json(measured=False), encoding="utf-8")
            self._listener.note(f"{saved.format}: every layer read back from the folder as it was tuned")
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
        return report


def check_output(output_dir: str | Path, overwrite: bool) -> Path:
    """Return the output folder as an absolute path whose parent exists; raise OutputError when it cannot be used."""
    target = Path(output_dir).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; choose another output_dir")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputError(f"{target}: is not empty; choose another output_dir, or pass overwrite (--overwrite)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target.parent}: cannot be created: {error.strerror}") from None
    return target


def _formats(format: str | Sequence[str]) -> list[Format]:
    names = [n.strip() for n in (format.split(",") if isinstance(format, str) else format) if n.strip()]
    if not names:
        raise FormatError(f"no output format given; known: {', '.join(FORMATS)}")
    if len(set(names)) < len(names):
        raise FormatError(f"a format is named twice in {', '.join(names)}")
    return [FORMATS[name] for name in names]


def _compute_dtype(name: str, device: torch.device) -> torch.dtype:
    if not isinstance(name, str):
        raise SpecError(f"compute_dtype={name!r} must be a name such as auto, bfloat16 or float32")
    return compute_dtype(name, device)


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _report(result: Quantised, folders: tuple[SavedFolder, ...]) -> RunReport:
    job, data = result.job, result.calibration
    return RunReport(
        model=result.source.title,
        folders=folders,
        scheme=job.scheme.name,
        bits_per_weight=result.plan.bits_per_weight(),
        recipe=asdict(job.recipe),
        layers_quantised=len(result.plan.quantised),
        layers_kept=tuple(KeptLayer(layer.name, layer.reason) for layer in result.plan.kept.values()),
        calibration=data.summary() if data else None,
        blocks=result.blocks,
        seconds=result.seconds,
        peak_rss_bytes=peak_resident_bytes(),
        peak_device_bytes=peak_device_bytes(job.device),
        bytes_before=_weights_in(result.source.folder),
        bytes_after=folders[0].bytes,
        device=str(job.device),
        compute_dtype=str(job.dtype).removeprefix("torch."),
        versions={
            "auto_round": auto_round.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        seed=job.recipe.seed,
    )


def _weights_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
