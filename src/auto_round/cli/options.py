"""Every flag once: its spelling, group and one sentence. ``{name}`` in a sentence becomes that field's default.

Spellings use underscores; dashes and the aliases of dispatch.py are accepted for all of them. None is "not given".
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from auto_round import __version__


def _flag(group: str, spelling: str, sentence: str, metavar: str | None = None) -> Any:
    return typer.Option(spelling, help=sentence, rich_help_panel=group, metavar=metavar)


ModelAlone = Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False)]
Model = Annotated[
    str | None,
    _flag(
        "Model",
        "--model",
        "What to quantise: a folder, a model hub id or a .gguf file; it can also stand alone, without the flag. Also "
        "--model_name and --model_name_or_path.",
        "MODEL",
    ),
]
TrustRemoteCode = Annotated[
    bool | None,
    _flag(
        "Model",
        "--trust_remote_code/--disable_trust_remote_code",
        "Run Python code that comes with the model (default off); only for models whose code you have read.",
    ),
]

Scheme = Annotated[
    str | None,
    _flag(
        "Scheme",
        "--scheme",
        "Bits and group size in one word, such as W4A16, W2A16G64 or W3A16_asym (default {scheme}); the flags below "
        "change parts of it.",
        "NAME",
    ),
]
Bits = Annotated[
    int | None,
    _flag(
        "Scheme", "--bits", "Bits per weight: 2, 3, 4 or 8 (default {bits}); fewer are smaller and further off.", "N"
    ),
]
GroupSize = Annotated[
    int | None,
    _flag(
        "Scheme",
        "--group_size",
        "Inputs that share one scale, -1 for a whole row (default {group_size}); 32 or 64 is nearer to the original, "
        "at a fraction of a bit more per weight.",
        "N",
    ),
]
Sym = Annotated[
    bool | None,
    _flag(
        "Scheme",
        "--sym/--asym",
        "Symmetric codes, or a zero point in each group (default {sym}); --asym often helps at 2 and 3 bits, fewer "
        "kernels run it.",
    ),
]
LayerConfig = Annotated[
    str | None,
    _flag(
        "Scheme",
        "--layer_config",
        'Other settings for some layers, as JSON or the path of a JSON file: {{"*.down_proj": {{"bits": 8}}, '
        '"lm_head": "W8A16", "*.0.*": "keep"}}. Keys are names, globs or regular expressions; later ones win.',
        "JSON",
    ),
]
IgnoreLayers = Annotated[
    str | None,
    _flag(
        "Scheme",
        "--ignore_layers",
        "Layers to keep as they are, separated by commas; names, globs or regular expressions. Also --fp_layers.",
        "NAMES",
    ),
]
BlockNames = Annotated[
    str | None,
    _flag(
        "Scheme",
        "--to_quant_block_names",
        "The lists of blocks to quantise, such as model.layers, separated by commas; found when not given.",
        "NAMES",
    ),
]
QuantLmHead = Annotated[
    bool | None,
    _flag(
        "Scheme",
        "--quant_lm_head",
        "Quantise the output head too (default off); saves most on small models with a large vocabulary. A head that "
        "is the embedding is stored beside it then, which is said with its size.",
    ),
]
QuantNontext = Annotated[
    bool | None,
    _flag(
        "Scheme",
        "--quant_nontext_module",
        "Quantise vision and audio parts too (default off), from their weights alone.",
    ),
]

Iters = Annotated[
    int | None,
    _flag(
        "Tuning",
        "--iters",
        "Steps per block (default {iters}); time grows with it, the gain per step shrinks; 0 rounds without steps.",
        "N",
    ),
]
Lr = Annotated[
    float | None,
    _flag("Tuning", "--lr", "Size of the first step, in codes (default {lr}, at most 1/25).", "X"),
]
MinmaxLr = Annotated[
    float | None,
    _flag("Tuning", "--minmax_lr", "The same for the ranges of the groups (default {minmax_lr}).", "X"),
]
BatchSize = Annotated[
    int | None,
    _flag(
        "Tuning",
        "--batch_size",
        "Samples per forward pass (default {batch_size}; also --bs); lower it when memory runs out and raise the next "
        "flag to make up for it.",
        "N",
    ),
]
GradientAccumulateSteps = Annotated[
    int | None,
    _flag(
        "Tuning",
        "--gradient_accumulate_steps",
        "Forward passes per step (default {gradient_accumulate_steps}).",
        metavar="N",
    ),
]
Start = Annotated[
    str | None,
    _flag(
        "Tuning",
        "--start",
        "Where the steps begin: plain (rounding), search (of the ranges) or compensated (search, then rounding that "
        "makes up for its own errors) (default {start}); plain is the textbook method, for comparisons.",
        "NAME",
    ),
]
Heldout = Annotated[
    float | None,
    _flag(
        "Tuning",
        "--heldout",
        "Share of the samples that steps never see, on which each block's best step is chosen (default {heldout}); "
        "0 uses all of them for both.",
        "X",
    ),
]
FinishIters = Annotated[
    int | None,
    _flag(
        "Tuning",
        "--finish_iters",
        "Steps after all blocks in which the scales of all layers learn together, by the KL divergence of the next "
        "token from the original's (default {finish_iters}); pays most at 2 and 3 bits and with much text.",
        "N",
    ),
]
FinishLr = Annotated[
    float | None,
    _flag(
        "Tuning", "--finish_lr", "Size of the first of those steps, a share of each scale (default {finish_lr}).", "X"
    ),
]
FinishNsamples = Annotated[
    int | None,
    _flag(
        "Tuning",
        "--finish_nsamples",
        "Samples for those steps, the blocks' own among them (default {finish_nsamples}).",
        "N",
    ),
]
MinmaxTuning = Annotated[
    bool | None,
    _flag(
        "Tuning",
        "--enable_minmax_tuning/--disable_minmax_tuning",
        "Tune the ranges as well as the rounding (default {enable_minmax_tuning}); off only for comparisons.",
    ),
]
QuantedInput = Annotated[
    bool | None,
    _flag(
        "Tuning",
        "--enable_quanted_input/--disable_quanted_input",
        "Let each block make up for the errors of those before it (default {enable_quanted_input}); off only for "
        "comparisons.",
    ),
]

Dataset = Annotated[
    str | None,
    _flag(
        "Calibration",
        "--dataset",
        "Text to tune on (default {dataset}): a hub data set, a .json, .jsonl, .txt or .parquet file, builtin (needs "
        "no network), self (the model's own samples), or several by comma; text like that which the model will read "
        "is best.",
        "NAME",
    ),
]
Nsamples = Annotated[
    int | None,
    _flag(
        "Calibration",
        "--nsamples",
        "Samples to tune on (default {nsamples}); more are better and take more memory.",
        "N",
    ),
]
SelfNsamples = Annotated[
    int | None,
    _flag(
        "Calibration",
        "--self_nsamples",
        "Samples on top of those that the model writes itself, going on from pieces of them (default {self_nsamples}); "
        "for when there is little text; the whole model is in memory meanwhile.",
        "N",
    ),
]
Seqlen = Annotated[
    int | None,
    _flag("Calibration", "--seqlen", "Tokens in each sample (default {seqlen}); fewer take less time and memory.", "N"),
]
Seed = Annotated[
    int | None,
    _flag(
        "Calibration",
        "--seed",
        "Draws the samples and the batches (default {seed}); the same seed gives the same bytes.",
        "N",
    ),
]

Format = Annotated[
    str | None,
    _flag(
        "Output",
        "--format",
        "What to write (default {format}), several by comma, each in a subfolder of its own; all of them hold the "
        "same codes.",
        "NAME",
    ),
]
OutputDir = Annotated[
    str | None,
    _flag(
        "Output", "--output_dir", "Folder to write (default {output_dir}); it appears whole or not at all.", "FOLDER"
    ),
]
MaxShardSize = Annotated[
    str | None,
    _flag(
        "Output",
        "--max_shard_size",
        "Largest weight file, such as 500MB, above which a model is split (default 5GB, and none for GGUF).",
        "SIZE",
    ),
]
Overwrite = Annotated[
    bool | None,
    _flag(
        "Output",
        "--overwrite",
        "Replace the output folder, or unfinished work, of another job (default off: an error).",
    ),
]
EnableCheck = Annotated[
    bool | None,
    _flag(
        "Output",
        "--enable_check/--disable_check",
        "Run the result beside the original on a few samples at the end (default on); a bad one exits with 3, naming "
        "the blocks to blame.",
    ),
]
MaxKl = Annotated[
    float | None,
    _flag(
        "Output",
        "--max_kl",
        "KL divergence from the original, in nats per token, above which a result is bad (default 2.0).",
        "NATS",
    ),
]
Json = Annotated[
    bool | None,
    _flag("Output", "--json", "Print the report of the run as JSON instead of a table (default off); for scripts."),
]
Quiet = Annotated[
    bool | None,
    _flag(
        "Output", "--quiet", "No progress and no table, only warnings and the path of what was written (default off)."
    ),
]

DryRun = Annotated[
    bool | None,
    _flag(
        "Output",
        "--dry_run",
        "Foresee the run and write nothing (default off; the same as auto-round plan): every layer's scheme and why, "
        "exact sizes, memory, disk, time, and who can open the result.",
    ),
]

Device = Annotated[
    str | None,
    _flag(
        "Machine",
        "--device",
        "Where to compute (default {device}; also --device_map): cpu, cuda, cuda:1, xpu or 0.",
        "NAME",
    ),
]
ComputeDtype = Annotated[
    str | None,
    _flag(
        "Machine",
        "--compute_dtype",
        "What blocks run in (default {compute_dtype}: the faster of bfloat16 and float32 here, found by trying); name "
        "one to get the same result on different machines.",
        "NAME",
    ),
]
LowGpuMemUsage = Annotated[
    bool | None,
    _flag(
        "Machine",
        "--low_gpu_mem_usage",
        "Keep the samples' activations in the host's memory (default {low_gpu_mem_usage}); when the accelerator's runs "
        "out, at some cost in time.",
    ),
]
TorchCompile = Annotated[
    bool | None,
    _flag(
        "Machine",
        "--enable_torch_compile/--disable_torch_compile",
        "Compile each block first (default {enable_torch_compile}); worth it on an accelerator with many steps, needs "
        "a C++ compiler.",
    ),
]


MaxMemory = Annotated[
    str | None,
    _flag(
        "Machine",
        "--max_memory",
        "Resident memory to stay below, such as 6GB (default: what the machine has); activations go to disk and fewer "
        "samples through a block at once, with the same result but for last bits.",
        "SIZE",
    ),
]
ActivationsOnDisk = Annotated[
    bool | None,
    _flag(
        "Machine",
        "--activations_on_disk",
        "Keep the samples' activations in files beside the output (default off: only when memory is short).",
    ),
]


def _print_version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"auto-round {__version__}")
        raise typer.Exit


Version = Annotated[
    bool | None, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
]

ConvertSource = Annotated[str, typer.Argument(metavar="SOURCE", show_default=False)]
ConvertOutput = Annotated[str, typer.Argument(metavar="FOLDER", show_default=False)]
ConvertFormat = Annotated[
    str,
    _flag(
        "Output",
        "--format",
        "What to write, by name: auto_round, auto_gptq, gptq_v2, auto_awq, llm_compressor, fake, gguf:q4_0, gguf:q8_0.",
        "NAME",
    ),
]
Requantize = Annotated[
    bool,
    _flag(
        "Output",
        "--requantize",
        "Round layers again that the format cannot hold as they are, and say how much is lost (default off: an error).",
    ),
]
ConvertScheme = Annotated[
    str | None,
    _flag(
        "Output",
        "--scheme",
        "With --requantize: the scheme to round to (default: of at least as many bits, the nearest that fits).",
        "NAME",
    ),
]
InspectPath = Annotated[str, typer.Argument(metavar="FOLDER", show_default=False)]
Layers = Annotated[bool, _flag("Output", "--layers", "A row for every layer (default off: one for those alike).")]
Check = Annotated[bool, _flag("Output", "--check/--no-check", "Read every tensor, not only the headers (default on).")]
JsonInspection = Annotated[
    bool | None, _flag("Output", "--json", "Print everything as JSON instead of a table (default off); for scripts.")
]
