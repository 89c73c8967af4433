"""The `AutoRound` class: the users' contract. It turns keywords into specs and calls the pipeline."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from auto_round.calibrate.dataset import Dataset
from auto_round.errors import FormatError, OutputError, SpecError
from auto_round.formats import FORMATS
from auto_round.formats.base import Format
from auto_round.formats.shards import parse_size
from auto_round.pipeline import (
    Job,
    Quantised,
    Saving,
    check_formats,
    foresee,
    make_ready,
    publish,
    quantise,
    run,
    was_published,
)
from auto_round.report.forecast import Forecast
from auto_round.report.record import RunReport
from auto_round.runtime.device import compute_dtype, resolve_device
from auto_round.runtime.durable import GO_ON, disk_errors
from auto_round.runtime.events import Listener, LogListener
from auto_round.runtime.journal import Journal
from auto_round.runtime.workspace import check_free, check_output, check_place, workspace
from auto_round.spec.plan import Rule
from auto_round.spec.presets import recipe as recipe_named
from auto_round.spec.scheme import Scheme


class AutoRound:
    """Quantise one causal language model.

    model: a folder, a hub id, a ``.gguf`` file or a loaded ``PreTrainedModel``; tokenizer: its tokenizer; None finds
    the one beside the weights of a folder. scheme: a preset such as "W4A16" or "W2A16G64"; bits, group_size and sym
    override it.
    layer_config: pattern (name, glob or regular expression) -> {"bits": ...}, preset or "keep"; later rules win.
    ignore_layers: patterns of layers to keep, whatever layer_config says; to_quant_block_names: the lists of blocks to
    quantise, such as "model.layers", in place of the one that is found. Both a list or one string with commas.
    quant_lm_head: quantise the output head too, which a tied embedding then no longer shares its weight with;
    quant_nontext_module: quantise vision and audio parts too, from their weights alone.
    recipe: "default", "best", "light" or "rtn", each of whose fields (see `Recipe`) can be given as a keyword.
    processor: of a vision-language model, found beside the weights when None; saved with the result.
    dataset: calibration text: "auto", "builtin", "self", a hub id, a file, or a list; see the README.
    Mappings in a list are image-text pairs: arguments for the processor, or what it returned.
    device: "auto", "cpu", "cuda:0", "xpu"; compute_dtype: what blocks run in, measured when "auto".
    max_memory: resident memory to stay below, such as "6GB"; activations_on_disk: keep them in mapped files anyway.

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
        processor: Any | None = None,
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
        self_nsamples: int | None = None,
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
        finish_iters: int | None = None,
        finish_lr: float | None = None,
        finish_nsamples: int | None = None,
        dataset: Dataset = "auto",
        device: str | int | torch.device = "auto",
        compute_dtype: str = "auto",
        quant_lm_head: bool = False,
        quant_nontext_module: bool = False,
        ignore_layers: str | Sequence[str] = (),
        to_quant_block_names: str | Sequence[str] = (),
        trust_remote_code: bool = False,
        max_memory: str | int | None = None,
        activations_on_disk: bool = False,
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
            self_nsamples=self_nsamples,
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
            finish_iters=finish_iters,
            finish_lr=finish_lr,
            finish_nsamples=finish_nsamples,
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
            dtype_measured=compute_dtype == "auto",
            quant_lm_head=quant_lm_head,
            quant_nontext_module=quant_nontext_module,
            processor=processor,
            ignore_layers=_names(ignore_layers),
            to_quant_block_names=_names(to_quant_block_names),
            trust_remote_code=trust_remote_code,
            max_memory=None if max_memory is None else parse_size(max_memory, "max_memory"),
            activations_on_disk=activations_on_disk,
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
        scratch = Path(self._scratch.name)
        ready = make_ready(self._job, _formats(format), scratch, self._listener)
        self._result = quantise(ready, Journal(scratch / "blocks"), scratch, self._listener)
        return self._result

    def plan(
        self,
        output_dir: str | Path = "tmp_autoround",
        format: str | Sequence[str] = "auto_round",
        *,
        max_shard_size: str | int | None = None,
        enable_check: bool = True,
        max_kl: float = 2.0,
    ) -> Forecast:
        """Foresee what `quantize_and_save` would do, in seconds and without writing anything.

        Every layer's scheme and why, exact bytes of every format, memory, disk, time, who can open the result, and
        problems. max_shard_size: of a weight file, such as "500MB"; None is 5GB for safetensors and no limit for GGUF,
        whose readers mostly want one file. Raises what `quantize_and_save` would raise before its work begins,
        but for an output folder that is not empty.
        """
        saving = _saving(format, max_shard_size, False, max_kl if enable_check else None)
        return foresee(self._job, saving, check_place(output_dir, self._job.model_name))

    def save_quantized(
        self,
        output_dir: str | Path,
        format: str | Sequence[str] = "auto_round",
        *,
        max_shard_size: str | int | None = None,
        overwrite: bool = False,
        enable_check: bool = True,
        max_kl: float = 2.0,
    ) -> RunReport:
        """Write what `quantize` made; one format into `output_dir` itself, several into a subfolder each.

        Raises OutputError when `quantize` was not called, or when the folder is not empty and `overwrite` is not set,
        and FormatError when a format, not the one named there, cannot hold a layer as it was quantised.
        """
        if self._result is None:
            raise OutputError("nothing to save yet: call quantize() first, or quantize_and_save()")
        saving = _saving(format, max_shard_size, overwrite, max_kl if enable_check else None)
        check_formats(self._result.prepared, saving.formats)
        target = check_output(output_dir, self._job.model_name)
        with disk_errors(target, "Call save_quantized() again when that is solved."), workspace(target) as work:
            check_free(target, overwrite=overwrite)
            work.claim(self._result.ready.facts, overwrite=overwrite)
            return publish(self._result, saving, work, self._listener)

    def quantize_and_save(
        self,
        output_dir: str | Path = "tmp_autoround",
        format: str | Sequence[str] = "auto_round",
        *,
        max_shard_size: str | int | None = None,
        overwrite: bool = False,
        enable_check: bool = True,
        max_kl: float = 2.0,
    ) -> RunReport:
        """Tune the model and write it: one format into `output_dir` itself, several into a subfolder each.

        The folder appears whole or not at all. Killed at any moment, the same call goes on where it stopped, from the
        hidden folder beside `output_dir`; when all is done already, it returns the record of that. overwrite: replace
        an output, or unfinished work, of another job. Raises OutputError when either is there without it, when another
        process works on the same output, or when the disk is full; finished blocks are kept then.

        enable_check: run the result beside the original on a few samples at the end; max_kl: mean KL divergence, in
        nats, above which CheckError is raised, naming the blocks to blame. The folder stays.
        """
        saving = _saving(format, max_shard_size, overwrite, max_kl if enable_check else None)
        target = check_output(output_dir, self._job.model_name)
        if not overwrite and not was_published(target):
            check_free(target, overwrite=False)
        with disk_errors(target, GO_ON), workspace(target) as work:
            return run(self._job, saving, work, self._listener)


def _saving(
    format: str | Sequence[str], max_shard_size: str | int | None, overwrite: bool, max_kl: float | None
) -> Saving:
    if max_kl is not None and not max_kl > 0:
        raise SpecError(f"max_kl={max_kl!r} must be above 0, in nats; enable_check=False turns the comparison off")
    largest_shard = None if max_shard_size is None else parse_size(max_shard_size)
    return Saving(tuple(_formats(format)), largest_shard, overwrite, max_kl)


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


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    """Names from a list, or from one string that separates them by commas."""
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(part.strip() for part in parts if part.strip())
