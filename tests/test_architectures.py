"""A tiny random model of each odd shape goes the whole road: tune, save, open with transformers, compare.

benchmarks/architectures.py does the same for every architecture that transformers has.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from auto_round import AutoRound, AutoRoundConfig
from auto_round.conversion import convert
from auto_round.errors import FormatError, SourceError, SpecError
from auto_round.formats import FORMATS
from auto_round.load import fused_of, load_qtensors
from auto_round.pipeline import needs, runner
from auto_round.pipeline.preparing import prepare
from auto_round.source.blocks import linears_in
from auto_round.source.checkpoint import Checkpoint
from auto_round.source.skeleton import Skeleton
from auto_round.spec.plan import Plan
from auto_round.tune.block import BlockTask, TunedBlock, tune_block

TOKENS = torch.randint(3, 90, (6, 20), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
HEAD = {**SMALL, "head_dim": 16}
EXPERTS = {**HEAD, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}

CONFIGS: dict[str, t.PretrainedConfig] = {
    # Conv1D in place of Linear, biases, one projection for q, k and v
    "gpt2": t.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64),
    # a Linear class of its own, attention and MLP in parallel
    "falcon": t.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128),
    # q, k, v and gate, up in one Linear each
    "phi3": t.Phi3Config(**SMALL),
    "qwen2": t.Qwen2Config(**SMALL, tie_word_embeddings=True),
    # experts stored one by one and stacked when they are loaded, under other names
    "mixtral": t.MixtralConfig(**HEAD, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": t.Qwen3MoeConfig(**EXPERTS),
    # a shared expert with a gate, tensors of another prediction layer in real checkpoints
    "qwen2_moe": t.Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=64),
    # experts stored as stacks, inputs before outputs, with biases
    "gpt_oss": t.GptOssConfig(**HEAD, num_local_experts=4, num_experts_per_tok=2),
    # every expert in one batched product
    "llama4_text": t.Llama4TextConfig(**HEAD, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=96),
    # convolutions beside attention
    "lfm2": t.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    # linear attention beside attention, experts
    "qwen3_next": t.Qwen3NextConfig(
        **EXPERTS,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        shared_expert_intermediate_size=64,
    ),
    # Mamba beside attention
    "jamba": t.JambaConfig(
        **SMALL,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    ),
    # low-rank projections of queries, keys and values
    "deepseek_v3": t.DeepseekV3Config(
        **{**EXPERTS, "num_key_value_heads": 4, "head_dim": 16},
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
    ),
}


class Tuned(NamedTuple):
    plan: Plan
    weights: dict[str, Tensor]


def tiny(config: t.PretrainedConfig, auto: Any = t.AutoModelForCausalLM) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    return model


def tune(folder: Path, output: Path, **changes: Any) -> Tuned:
    settings: dict[str, Any] = {
        "group_size": 32,
        "iters": 2,
        "nsamples": 6,
        "seqlen": 20,
        "batch_size": 2,
        "dataset": TOKENS,
        **changes,
    }
    tuner = AutoRound(folder, device="cpu", compute_dtype="float32", **settings)
    result = tuner.quantize()
    tuner.save_quantized(output)
    return Tuned(result.plan, {name: result.tensor(name).dequantize() for name in result.plan.quantised})


@torch.no_grad()
def dequantise_into(model: nn.Module, result: Tuned) -> None:
    slices = {name: view for item in fused_of(model) for name, view in item.slices.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in result.weights.items():
        target = slices[name].of(parameters[slices[name].parameter]) if name in slices else parameters[f"{name}.weight"]
        # Four bits with compensation are near (0.15 to 0.2); a transposed or permuted weight is 1.4 away.
        assert (weight - target).norm() < 0.3 * target.norm(), name
        target.copy_(weight)


@torch.no_grad()
def logits_of(model: nn.Module, **inputs: Tensor) -> Tensor:
    logits: Tensor = model(**{"input_ids": TOKENS, **inputs}, use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shape_of_model_is_served_as_it_was_tuned(name: str, tmp_path: Path) -> None:
    tiny(CONFIGS[name]).save_pretrained(tmp_path / "plain")
    result = tune(tmp_path / "plain", tmp_path / "out")
    expected = t.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    before = logits_of(expected)
    dequantise_into(expected, result)
    opening = {"dtype": torch.float32, "device_map": "cpu"}
    exact = AutoRoundConfig(backend="torch")
    loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=exact, **opening).eval()
    torch.testing.assert_close(logits_of(loaded), logits_of(expected), rtol=1e-5, atol=1e-5)
    assert (logits_of(loaded) - before).abs().max() > 1e-3
    # A kernel's own rounding (4e-6 of a product) grows where a model divides by small norms: single logits by 1e-4.
    fast = logits_of(t.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **opening).eval())
    assert (fast - logits_of(expected)).norm() < 3e-5 * logits_of(expected).norm()


def test_experts_are_layers_with_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    tiny(CONFIGS["mixtral"]).save_pretrained(tmp_path / "plain")
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    result = tune(tmp_path / "plain", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    experts = [name for name in stored if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert all(f"{name.removesuffix('.weight')}.qweight" in written for name in experts)
    routers = [name for name in stored if name.endswith(".gate.weight")]
    assert len(routers) == 2
    assert all(torch.equal(written[name], stored[name]) for name in routers)
    assert not any(name.endswith(".gate") for name in result.plan.quantised)


def test_an_expert_may_have_bits_of_its_own_but_not_be_kept_alone(tmp_path: Path) -> None:
    tiny(CONFIGS["qwen3_moe"]).save_pretrained(tmp_path / "plain")
    result = tune(tmp_path / "plain", tmp_path / "out", layer_config={"*.0.mlp.experts.1.down_proj": {"bits": 8}})
    assert result.plan.quantised["model.layers.0.mlp.experts.1.down_proj"].scheme.bits == 8  # type: ignore[union-attr]
    expected = t.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    dequantise_into(expected, result)
    loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu")
    torch.testing.assert_close(logits_of(loaded), logits_of(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(SpecError, match=r"experts\.1\.down_proj.*all experts"):
        tune(tmp_path / "plain", tmp_path / "other", layer_config={"*.0.mlp.experts.1.down_proj": "keep"})
    kept = tune(tmp_path / "plain", tmp_path / "kept", ignore_layers=".0.mlp.experts.*")
    assert not any(".0.mlp.experts." in name for name in kept.plan.quantised)
    loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.float32, device_map="cpu")
    assert torch.isfinite(logits_of(loaded)).all()


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_mixed_bits_are_found_under_the_model_s_and_the_file_s_names(name: str, tmp_path: Path) -> None:
    model = tiny(CONFIGS[name])
    # A checkpoint of the bare model has other names too.
    base = model.transformer if name == "gpt2" else model
    base.save_pretrained(tmp_path / "plain")
    result = tune(tmp_path / "plain", tmp_path / "out", layer_config={"0.attn.c_attn|0.*experts.1.": {"bits": 8}})
    eights = [layer.name for layer in result.plan.quantised.values() if layer.scheme and layer.scheme.bits == 8]
    assert len(eights) == (1 if name == "gpt2" else 3)
    expected = t.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    dequantise_into(expected, result)
    loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu")
    torch.testing.assert_close(logits_of(loaded), logits_of(expected), rtol=1e-4, atol=1e-4)
    AutoRound(tmp_path / "plain", recipe="rtn", group_size=32, device="cpu", compute_dtype="float32").quantize_and_save(
        tmp_path / "fake", format="fake"
    )
    fake = t.AutoModelForCausalLM.from_pretrained(tmp_path / "fake", dtype=torch.float32)
    for layer, parameter in expected.named_parameters():
        assert (fake.get_parameter(layer) - parameter).norm() < 0.4 * parameter.norm() + 1e-6, layer


@pytest.mark.parametrize("format", ["auto_awq", "llm_compressor"])
def test_a_conv1d_is_not_written_for_readers_that_leave_it_out(format: str, tmp_path: Path) -> None:
    tiny(CONFIGS["gpt2"]).save_pretrained(tmp_path / "plain")
    with pytest.raises(SpecError, match=f"it is a Conv1D, and readers of {format} look for Linears only"):
        AutoRound(tmp_path / "plain", group_size=32, device="cpu").quantize_and_save(tmp_path / "out", format)


@pytest.mark.parametrize("bare", [False, True])
def test_a_conv1d_is_converted_as_what_it_is(bare: bool, tmp_path: Path) -> None:
    model = tiny(CONFIGS["gpt2"])
    (model.transformer if bare else model).save_pretrained(tmp_path / "plain")
    result = tune(tmp_path / "plain", tmp_path / "out")
    for format in ("auto_awq", "llm_compressor"):
        with pytest.raises(FormatError, match=f"it is a Conv1D, and readers of {format} look for Linears only"):
            convert(tmp_path / "out", tmp_path / "no", format)
    convert(tmp_path / "out", tmp_path / "fake", "fake")
    expected = t.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    dequantise_into(expected, result)
    found = t.AutoModelForCausalLM.from_pretrained(tmp_path / "fake", dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(found), logits_of(expected), rtol=1e-4, atol=1e-4)


def test_every_format_finds_mixed_bits_in_a_checkpoint_of_the_bare_model(tmp_path: Path) -> None:
    tiny(t.LlamaConfig(**{**HEAD, "tie_word_embeddings": True})).model.save_pretrained(tmp_path / "plain")  # layers.0
    rules = {"*.layers.0.mlp.up_proj": {"bits": 8}, "*.layers.1.mlp.up_proj": "keep"}
    names = ["auto_round", "auto_gptq", "gptq_v2", "llm_compressor"]
    AutoRound(tmp_path / "plain", recipe="rtn", group_size=32, device="cpu", layer_config=rules).quantize_and_save(
        tmp_path / "out", names, enable_check=False
    )
    for name in names:
        found = dict(load_qtensors(tmp_path / "out" / name))
        assert found["layers.0.mlp.up_proj"].scheme.bits == 8
        assert "layers.1.mlp.up_proj" not in found
        assert found["layers.1.mlp.down_proj"].scheme.bits == 4


def test_experts_that_no_token_reaches_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny(t.MixtralConfig(**HEAD, num_local_experts=8, num_experts_per_tok=1)).save_pretrained(tmp_path / "plain")
    tuner = AutoRound(
        tmp_path / "plain",
        group_size=32,
        iters=1,
        nsamples=1,
        seqlen=2,
        dataset=TOKENS[:1, :2],
        device="cpu",
        compute_dtype="float32",
    )
    report = tuner.quantize_and_save(tmp_path / "out")
    assert all(block.unreached >= 6 * 3 for block in report.blocks)
    assert (
        f"{sum(block.unreached for block in report.blocks)} layers were reached by no calibration token" in caplog.text
    )


def test_stacks_of_experts_are_read_once_for_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(CONFIGS["gpt_oss"])
    model.save_pretrained(tmp_path / "plain")
    read: list[str] = []
    tensor = Checkpoint.tensor

    def counted(self: Checkpoint, name: str) -> Tensor:
        read.append(name)
        return tensor(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    skeleton = Skeleton(model.config, Checkpoint(tmp_path / "plain"))
    block = skeleton.model.get_submodule("model.layers.0")
    skeleton.load(block, "model.layers.0", torch.float32, torch.device("cpu"))
    stacks = [name for name in read if "experts" in name and "bias" not in name]
    assert len(stacks) == len(set(stacks)) == 2
    names = [f"model.layers.0.{name}.weight" for name in linears_in(block)]
    read.clear()
    weights = skeleton.weights(names)
    assert list(weights) == names
    assert all(torch.equal(weights[name], dict(block.named_parameters())[name[15:]]) for name in names)
    assert len([name for name in read if "experts" in name]) == 2


@pytest.mark.parametrize("format", ["auto_round", "llm_compressor"])
@pytest.mark.parametrize(("name", "router"), [("qwen3_moe", "mlp.gate"), ("mixtral", "block_sparse_moe.gate")])
def test_routers_that_are_no_linears_are_named_as_kept(name: str, router: str, format: str, tmp_path: Path) -> None:
    model = tiny(CONFIGS[name])
    model.save_pretrained(tmp_path / "plain")
    AutoRound(tmp_path / "plain", recipe="rtn", group_size=32, device="cpu").quantize_and_save(
        tmp_path / "out", format, enable_check=False
    )
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    named = settings["ignore"] if format == "llm_compressor" else settings["extra_config"]
    assert all(f"model.layers.{i}.{router}" in named for i in range(model.config.num_hidden_layers))
    if format == "auto_round":
        assert named[f"model.layers.0.{router}"]["bits"] == 16
        loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu")
        assert torch.isfinite(logits_of(loaded)).all()


def test_encoders_are_refused(tmp_path: Path) -> None:
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    whisper = t.WhisperConfig(
        **small, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=100
    )
    whisper.update({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1})
    t.WhisperForConditionalGeneration(whisper).save_pretrained(tmp_path / "whisper")
    bert = t.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=100
    )
    t.BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    for name in ("whisper", "bert"):
        with pytest.raises(SourceError, match="models that predict the next token"):
            AutoRound(tmp_path / name, recipe="rtn", device="cpu").quantize_and_save(tmp_path / "out")


def test_a_model_of_stacked_experts_can_be_planned(tmp_path: Path) -> None:
    tiny(CONFIGS["gpt_oss"]).save_pretrained(tmp_path / "plain")
    forecast = AutoRound(tmp_path / "plain", group_size=32, device="cpu", dataset=TOKENS).plan(tmp_path / "out")
    assert forecast.total_seconds > 0
    assert not any("cannot be written" in problem for problem in forecast.problems)


def test_experts_count_in_a_forecast_as_often_as_they_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("auto_round.pipeline.needs.resident_bytes", lambda: 0)
    found = {}
    for count in (4, 32):
        tiny(t.Qwen3MoeConfig(**{**EXPERTS, "num_experts": count})).save_pretrained(tmp_path / str(count))
        job = AutoRound(tmp_path / str(count), group_size=32, device="cpu")._job
        prepared = prepare(job, [FORMATS["auto_round"]], tmp_path)
        found[count] = needs.all_sizes(prepared)[0]
    few, many = found[4], found[32]
    assert many.parameters > 4 * few.parameters
    assert many.features <= few.features + 200  # the router's outputs
    assert many.multiplied < 1.3 * few.multiplied


def test_activations_leave_an_accelerator_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(CONFIGS["qwen2"]).save_pretrained(tmp_path / "plain")
    prepared = prepare(
        AutoRound(tmp_path / "plain", group_size=32, device="cpu")._job, [FORMATS["auto_round"]], tmp_path
    )
    prepared = replace(prepared, job=replace(prepared.job, device=torch.device("cuda")))  # nothing is run there

    def chosen(free: int) -> tuple[bool, int, bool]:
        monkeypatch.setattr(needs, "free_device_bytes", lambda device: free)
        wanted = needs.needs(prepared, 128, 64)
        return wanted.on_host, wanted.samples_per_forward, needs.device_shortage(wanted, prepared.job) is not None

    monkeypatch.setattr(needs, "free_device_bytes", lambda device: 10**12)
    most = needs.needs(prepared, 128, 64)
    assert most.device_bytes is not None
    assert chosen(most.device_bytes) == (False, 8, False)
    assert chosen(most.device_bytes - 1) == (True, 8, False)
    assert chosen(most.device_bytes - most.activation_bytes - 1) == (True, 4, False)
    assert chosen(1000) == (True, 8, True)  # fewer samples would not help


def test_the_size_before_counts_a_shared_weight_once(tmp_path: Path) -> None:
    tiny(t.Qwen2Config(**{**HEAD, "tie_word_embeddings": True})).save_pretrained(tmp_path / "plain")
    tuner = AutoRound(tmp_path / "plain", recipe="rtn", group_size=32, device="cpu", quant_lm_head=True)
    expected = sum(tensor.nbytes for tensor in load_file(tmp_path / "plain" / "model.safetensors").values())
    assert tuner.plan(tmp_path / "out").model_bytes == expected
    assert tuner.quantize_and_save(tmp_path / "out").bytes_before == expected


class Counting:
    """Tunes blocks with room for `moment_bytes` of moments and counts how often they are run."""

    def __init__(self, moment_bytes: int | None) -> None:
        self.moment_bytes, self.runs, self.tune = moment_bytes, 0, tune_block

    def __call__(self, task: BlockTask, *rest: Any) -> TunedBlock:
        def run(hidden: Tensor, rows: Tensor) -> Tensor:
            self.runs += 1
            return task.run(hidden, rows)

        return self.tune(replace(task, run=run), *rest, moment_bytes=self.moment_bytes)


def test_moments_gathered_one_at_a_time_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(CONFIGS["qwen3_moe"]).save_pretrained(tmp_path / "plain")
    found = {}
    for name, counting in {"whole": Counting(None), "lots": Counting(1)}.items():
        monkeypatch.setattr(runner, "tune_block", counting)
        found[name] = tune(tmp_path / "plain", tmp_path / name), counting.runs
    (whole, fewest), (lots, most) = found["whole"], found["lots"]
    assert all(torch.equal(lots.weights[name], weight) for name, weight in whole.weights.items())
    # Moments of q, k, v, of o, and two of each of 4 experts: 9 more rounds of 3 batches in each of 2 blocks.
    assert most - fewest == 9 * 3 * 2


def test_lists_of_blocks_can_be_named(tmp_path: Path) -> None:
    tiny(CONFIGS["qwen2"]).save_pretrained(tmp_path / "plain")
    result = tune(tmp_path / "plain", tmp_path / "out", to_quant_block_names="model.layers")
    assert result.plan.block_lists == ("model.layers",)
    with pytest.raises(SpecError, match=r"'model\.layer' is no list of blocks.*model\.layers"):
        tune(tmp_path / "plain", tmp_path / "other", to_quant_block_names=["model.layer"])


def test_tensors_of_no_module_pass_through(tmp_path: Path) -> None:
    tiny(CONFIGS["qwen2"]).save_pretrained(tmp_path / "plain")
    file = tmp_path / "plain" / "model.safetensors"
    tensors = load_file(file)
    extra = {
        "mtp.layers.0.mlp.up_proj.weight": torch.randn(64, 64).to(torch.float8_e4m3fn),
        "model.layers.2.self_attn.q_proj.weight": torch.randn(64, 64),
        "strange": torch.arange(5, dtype=torch.int8),
    }
    save_file({**tensors, **extra}, file, metadata={"format": "pt"})
    tune(tmp_path / "plain", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in extra.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_tied_head_is_untied_when_asked(tmp_path: Path) -> None:
    tiny(CONFIGS["qwen2"]).save_pretrained(tmp_path / "plain")
    result = tune(tmp_path / "plain", tmp_path / "out", quant_lm_head=True, layer_config={"lm_head": {"bits": 8}})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["extra_config"]["lm_head"]["bits"] == 8
    plain = t.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32, tie_word_embeddings=False)
    with torch.no_grad():
        plain.lm_head.weight = nn.Parameter(plain.model.embed_tokens.weight.clone())
    dequantise_into(plain, result)
    loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu")
    torch.testing.assert_close(logits_of(loaded), logits_of(plain), rtol=1e-4, atol=1e-4)
    embedding = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding, load_file(tmp_path / "plain" / "model.safetensors")["model.embed_tokens.weight"])
