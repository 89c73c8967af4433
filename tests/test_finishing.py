"""What is judged by the model's tokens: the last block, and the stage after all blocks, in which codes stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, JetMoeConfig, JetMoeForCausalLM

from auto_round import AutoRound
from auto_round.errors import SpecError
from auto_round.load import load_qtensors
from auto_round.pipeline import finishing, flow, runner
from auto_round.report.record import RunReport
from auto_round.tune.block import token_weights
from tests.conftest import VOCABULARY, tiny_llama, tiny_xlnet
from tests.test_short_memory import Device

SAMPLES = torch.randint(3, VOCABULARY, (32, 24), generator=torch.Generator().manual_seed(3))


class Killed(BaseException):
    """What stops a run in the middle."""


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose logits are far from uniform, so that there is something to lose."""
    folder = tmp_path_factory.mktemp("loud")
    model = tiny_llama()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    model.save_pretrained(folder)
    return folder


def tuner(model: Path, **changes: Any) -> AutoRound:
    settings: dict[str, Any] = {
        "scheme": "W2A16G32",
        "dataset": SAMPLES,
        "iters": 0,
        "start": "plain",
        "nsamples": 8,
        "seqlen": 24,
        "batch_size": 4,
        "finish_iters": 16,
        "finish_lr": 1e-2,
        "finish_nsamples": 32,
        "device": "cpu",
        "compute_dtype": "float32",
    }
    return AutoRound(model, **{**settings, **changes})


def divergence(model: Path, folder: Path, tokens: Tensor) -> float:
    """KL(original || quantised), nats a token."""
    plain, rounded = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (model, folder))
    with torch.no_grad():
        expected, found = (m(tokens).logits.log_softmax(-1) for m in (plain, rounded))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@torch.no_grad()
def behind_last_block(folder: Path, tokens: Tensor) -> Tensor:
    """Hidden states (samples, tokens, hidden) that leave the last block."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    caught: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _, args, output: caught.append(output))
    model(tokens)
    return caught[0]


@pytest.fixture(scope="module")
def finished(loud: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, RunReport]:
    """The model without the stage and with it, and the record of the latter."""
    folder = tmp_path_factory.mktemp("finished")
    tuner(loud, finish_iters=0).quantize_and_save(folder / "before")
    report = tuner(loud).quantize_and_save(folder / "after")
    return folder / "before", folder / "after", report


@pytest.mark.parametrize("short", [24, 9], ids=["whole", "padded"])
def test_a_last_block_of_2_bits_is_judged_by_the_tokens(loud: Path, tmp_path: Path, short: int) -> None:
    rows = [row[:length] for row, length in zip(SAMPLES, (24, short) * 4, strict=False)]
    run = tuner(loud, dataset=rows, start="compensated", iters=4, heldout=0.0, finish_iters=0, finish_nsamples=8)
    report = run.quantize_and_save(tmp_path / "out")
    found = sum(len(row) * divergence(loud, tmp_path / "out", row[None]) for row in rows) / sum(map(len, rows))
    assert report.blocks[-1].loss_end == pytest.approx(found, rel=1e-3)


def test_a_last_block_of_more_bits_is_judged_by_its_square_error(loud: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "start": "compensated",
        "iters": 4,
        "heldout": 0.0,
        "finish_iters": 0,
        "finish_nsamples": 8,
    }
    run = tuner(loud, scheme="W4A16G32", dataset=SAMPLES[:8], **settings)
    report = run.quantize_and_save(tmp_path / "out")
    target, output = (behind_last_block(path, SAMPLES[:8]) for path in (loud, tmp_path / "out"))
    errors = (output - target).square().mean(-1) * token_weights(target, None)
    assert report.blocks[-1].loss_end == pytest.approx(float(errors.mean()), rel=1e-3)


def test_the_whole_model_comes_nearer_to_the_original(loud: Path, finished: tuple[Path, Path, RunReport]) -> None:
    before, after, report = finished
    assert divergence(loud, after, SAMPLES) < 0.9 * divergence(loud, before, SAMPLES)
    assert report.finishing is not None
    assert report.finishing["kl_after"] == pytest.approx(divergence(loud, after, SAMPLES[-2:]), rel=1e-3)
    assert report.finishing["kl_before"] == pytest.approx(divergence(loud, before, SAMPLES[-2:]), rel=1e-3)


def test_codes_stay_and_scales_move(finished: tuple[Path, Path, RunReport]) -> None:
    before, after = (dict(load_qtensors(folder)) for folder in finished[:2])
    assert all(torch.equal(tensor.codes, after[name].codes) for name, tensor in before.items())
    assert not any(torch.equal(tensor.scales, after[name].scales) for name, tensor in before.items())


def test_accumulated_batches_are_one_large_one(loud: Path, tmp_path: Path) -> None:
    tuner(loud, finish_iters=4).quantize_and_save(tmp_path / "whole")
    tuner(loud, finish_iters=4, batch_size=2, gradient_accumulate_steps=2).quantize_and_save(tmp_path / "parts")
    whole, parts = (dict(load_qtensors(tmp_path / name)) for name in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor.scales, parts[name].scales, rtol=2e-3, atol=0)


def test_short_memory_takes_the_same_steps_in_parts(
    loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner(loud, finish_iters=4).quantize_and_save(tmp_path / "whole")
    device = Device(2)
    monkeypatch.setattr(runner, "tune_block", device)
    tuner(loud, finish_iters=4).quantize_and_save(tmp_path / "parts")
    assert device.tried[:2] == [4, 2]
    whole, parts = (dict(load_qtensors(tmp_path / name)) for name in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor.scales, parts[name].scales, rtol=2e-3, atol=0)


def test_a_divergence_that_is_no_number_leaves_what_the_blocks_gave(
    loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(finishing, "kl_divergence", lambda *_: torch.tensor(torch.nan))
    report = tuner(loud).quantize_and_save(tmp_path / "out", enable_check=False)
    assert report.finishing is None
    assert "no finishing: the KL divergence from the original is not finite" in caplog.text


def test_a_quantised_head_stays_and_is_what_the_loss_sees(loud: Path, tmp_path: Path) -> None:
    report = tuner(loud, quant_lm_head=True).quantize_and_save(tmp_path / "out")
    assert report.finishing is not None
    assert report.finishing["kl_after"] == pytest.approx(divergence(loud, tmp_path / "out", SAMPLES[-2:]), rel=1e-3)


def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    loud: Path, finished: tuple[Path, Path, RunReport], tmp_path: Path
) -> None:
    steps: list[int] = []

    class Stopping:
        """Stops the run at its eleventh step of the stage."""

        def finishing(self, iteration: int, iters: int, loss: float) -> None:
            steps.append(iteration)
            if iteration == 10 and steps.count(10) == 1:
                raise Killed

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    with pytest.raises(Killed):
        tuner(loud, listener=Stopping()).quantize_and_save(tmp_path / "out")
    tuner(loud, listener=Stopping()).quantize_and_save(tmp_path / "out")
    assert steps == [*range(11), *range(10, 16)]
    for file in finished[1].iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_blocks_of_gguf_learn_too(smollm2: Path, tmp_path: Path) -> None:
    learning = tuner(smollm2, finish_iters=4, finish_lr=4e-3)
    report = learning.quantize_and_save(tmp_path / "out", format="gguf:q2_k_s", max_kl=20)
    assert report.finishing is not None
    assert report.finishing["kl_after"] < report.finishing["kl_before"]


def test_experts_whose_own_name_ends_in_weight_learn_too(tmp_path: Path) -> None:
    config = JetMoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    JetMoeForCausalLM(config).save_pretrained(tmp_path / "jetmoe")
    result = tuner(tmp_path / "jetmoe", finish_iters=1).quantize()
    assert "model.layers.0.mlp.input_linear.0.weight" in result.plan.quantised
    assert result.journal.stats("finished").layers == len(result.plan.quantised)


def test_fewer_samples_than_the_blocks_have_are_an_error(loud: Path) -> None:
    with pytest.raises(SpecError, match="finish_nsamples=4"):
        tuner(loud, finish_nsamples=4)


def test_a_model_that_shows_no_logits_is_left_as_the_blocks_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_xlnet().save_pretrained(tmp_path / "xlnet")
    tuner(tmp_path / "xlnet").quantize()
    assert "no finishing: XLNetLMHeadModel gave no logits" in caplog.text


def test_a_block_damaged_behind_a_finished_stage_is_done_again_with_all_that_follows(
    loud: Path, finished: tuple[Path, Path, RunReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends just before its output is written, and a file that then loses a bit."""

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(flow, "publish", killed)
        with pytest.raises(Killed):
            tuner(loud).quantize_and_save(tmp_path / "out")
    block = min((tmp_path / ".out.auto-round" / "blocks").glob("*.safetensors"))
    data = bytearray(block.read_bytes())
    data[-1] ^= 1
    block.write_bytes(data)
    tuner(loud).quantize_and_save(tmp_path / "out")
    for file in finished[1].iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
