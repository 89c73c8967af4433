"""``auto-round [MODEL] [flags]``: quantise one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console

import auto_round
from auto_round.cli import options as o
from auto_round.cli.layers import read_layer_config
from auto_round.cli.screen import exit_codes, quiet_transformers
from auto_round.cli.teach import Lesson, in_words
from auto_round.report.forecast import Forecast, forecast_table
from auto_round.report.live import LiveListener
from auto_round.report.record import RunReport
from auto_round.report.tables import closing_table
from auto_round.spec.presets import RECIPES
from auto_round.spec.scheme import Scheme

SAVING = ("output_dir", "format", "max_shard_size", "overwrite", "enable_check", "max_kl")
FORESEEING = ("output_dir", "format", "max_shard_size", "enable_check", "max_kl")
SHOWING = ("model_alone", "dry_run", "json", "quiet", "version")

# The defaults of the API's own keywords, so that --help need not import torch; a test holds them to its signatures.
STATED = {
    "scheme": "W4A16",
    "dataset": "auto",
    "device": "auto",
    "compute_dtype": "auto",
    "format": "auto_round",
    "output_dir": "tmp_autoround",
}

ENTRY_POINTS = {
    "auto-round": ("default", "the usual balance"),
    "auto-round-best": ("best", "more text and steps, then all scales together, for about four times the work"),
    "auto-round-light": ("light", "fewer and larger steps, for a first look"),
    "auto-round-rtn": ("rtn", "plain rounding without calibration, in seconds"),
}

EXAMPLES = (
    (
        "auto-round --model facebook/opt-125m --bits 4 --group_size 128 --output_dir ./tmp_autoround",
        "Four bits in groups of 128, in the auto_round format.",
    ),
    (
        "auto-round ./my-model --scheme W2A16G64 --asym --iters 1000 --dataset my_texts.jsonl",
        "Two bits, for which steps and fitting text matter most.",
    ),
    (
        """auto-round ./my-model --layer_config '{"*.down_proj": {"bits": 8}, "*.0.*": "keep"}'""",
        "Eight bits for the layers that suffer most, and the first block as it is.",
    ),
    (
        "auto-round-light ./my-model --device cpu --seqlen 512 --nsamples 64",
        "A quick result on a machine without an accelerator.",
    ),
)


def quantise(
    ctx: typer.Context,
    model_alone: o.ModelAlone = None,
    model: o.Model = None,
    trust_remote_code: o.TrustRemoteCode = None,
    scheme: o.Scheme = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    sym: o.Sym = None,
    layer_config: o.LayerConfig = None,
    ignore_layers: o.IgnoreLayers = None,
    to_quant_block_names: o.BlockNames = None,
    quant_lm_head: o.QuantLmHead = None,
    quant_nontext_module: o.QuantNontext = None,
    iters: o.Iters = None,
    lr: o.Lr = None,
    minmax_lr: o.MinmaxLr = None,
    batch_size: o.BatchSize = None,
    gradient_accumulate_steps: o.GradientAccumulateSteps = None,
    start: o.Start = None,
    heldout: o.Heldout = None,
    finish_iters: o.FinishIters = None,
    finish_lr: o.FinishLr = None,
    finish_nsamples: o.FinishNsamples = None,
    enable_minmax_tuning: o.MinmaxTuning = None,
    enable_quanted_input: o.QuantedInput = None,
    dataset: o.Dataset = None,
    nsamples: o.Nsamples = None,
    self_nsamples: o.SelfNsamples = None,
    seqlen: o.Seqlen = None,
    seed: o.Seed = None,
    format: o.Format = None,
    output_dir: o.OutputDir = None,
    max_shard_size: o.MaxShardSize = None,
    overwrite: o.Overwrite = None,
    enable_check: o.EnableCheck = None,
    max_kl: o.MaxKl = None,
    dry_run: o.DryRun = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    device: o.Device = None,
    compute_dtype: o.ComputeDtype = None,
    low_gpu_mem_usage: o.LowGpuMemUsage = None,
    enable_torch_compile: o.TorchCompile = None,
    max_memory: o.MaxMemory = None,
    activations_on_disk: o.ActivationsOnDisk = None,
    version: o.Version = None,
) -> None:
    """Quantise one model and show what came out."""
    if model and model_alone:
        raise typer.BadParameter(f"the model is named twice: {model_alone!r} and --model {model!r}")
    if not (model or model_alone):
        raise typer.BadParameter(
            "no model: give a folder, a hub id or a .gguf file, as in: auto-round --model org/model"
        )
    with exit_codes():
        quiet_transformers()
        if dry_run:
            show_forecast(foresee(ctx.params, ctx.obj.recipe, auto_round.AutoRound), as_json=bool(json))
            return
        report = run(ctx.params, ctx.obj.recipe, auto_round.AutoRound)
    show(report, as_json=bool(json), quiet=bool(quiet))


def foresee(params: Mapping[str, Any], recipe: str, tuner: Callable[..., Any]) -> Forecast:
    """The forecast of what `run` would do with the same flags."""
    making, saving = _given(params, recipe)
    forecast: Forecast = tuner(**making).plan(**{name: value for name, value in saving.items() if name in FORESEEING})
    return forecast


def run(params: Mapping[str, Any], recipe: str, tuner: Callable[..., Any]) -> RunReport:
    """Hand the flags that were given to the API: `tuner` is `AutoRound`, whose defaults stand for all the others."""
    making, saving = _given(params, recipe)
    report: RunReport = tuner(**making).quantize_and_save(**saving)
    return report


def _given(params: Mapping[str, Any], recipe: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags that were given, as keywords of `AutoRound` and of its method."""
    given = {name: value for name, value in params.items() if value is not None and name not in SHOWING}
    given["model"] = given.get("model") or params["model_alone"]
    saving = {name: given.pop(name) for name in SAVING if name in given}
    if "layer_config" in given:
        given["layer_config"] = read_layer_config(given["layer_config"])
    return {**given, "recipe": recipe, "listener": LiveListener(quiet=bool(params["quiet"]))}, saving


def show_forecast(forecast: Forecast, *, as_json: bool) -> None:
    """Print a forecast to standard output: JSON, or tables."""
    if as_json:
        typer.echo(forecast.to_json(), nl=False)
    else:
        Console(highlight=False).print(forecast_table(forecast), crop=False)


def show(report: RunReport, *, as_json: bool, quiet: bool) -> None:
    """Print the result to standard output: JSON, the folders alone, or a table."""
    if as_json:
        typer.echo(report.to_json(), nl=False)
    elif quiet:
        for folder in report.folders:
            typer.echo(folder.path)
    else:
        Console(highlight=False).print(closing_table(report), crop=False)


def lesson_for(recipe: str, commands: Mapping[str, str]) -> Lesson:
    """The help of the entry point with this recipe; commands: what else can be typed -> what it does."""
    scheme = Scheme.parse(STATED["scheme"])
    words = {"bits": f"{scheme.bits}", "group_size": f"{scheme.group_size}", "sym": "--sym" if scheme.sym else "--asym"}
    return Lesson(
        usage="[MODEL] [FLAGS]",
        summary="Turns a language model into one of 2, 3, 4 or 8 bits per weight. It learns, block by block, how each "
        "weight should be rounded, and writes a folder that transformers loads like any other. In flags, underscores "
        "and dashes are the same.",
        defaults={**STATED, **words, **in_words(RECIPES[recipe])},
        sections={
            "Examples": EXAMPLES,
            "Recipes": tuple((f"{name} MODEL", _recipe_row(*facts)) for name, facts in ENTRY_POINTS.items()),
            "Other commands": tuple(commands.items()),
        },
    )


def _recipe_row(recipe: str, purpose: str) -> str:
    usual, mine = asdict(RECIPES["default"]), asdict(RECIPES[recipe])
    shown = {name: value for name, value in mine.items() if value != usual[name]}
    shown = shown or {name: usual[name] for name in ("iters", "nsamples", "seqlen")}
    return f"{', '.join(f'--{name} {value}' for name, value in shown.items())}: {purpose}."
