"""Models that see: the text tower is quantised, the rest is kept unless asked for, and answers about images agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from auto_round import AutoRound
from auto_round.calibrate.dataset import CalibrationSet
from auto_round.calibrate.front import Walk
from auto_round.calibrate.pairs import from_pairs
from auto_round.calibrate.walker import walk
from auto_round.conversion import convert
from auto_round.errors import CalibrationError, SourceError, SpecError
from auto_round.runtime.events import LogListener
from auto_round.source.blocks import block_names, find_block_lists
from auto_round.source.opening import open_source
from auto_round.source.skeleton import Skeleton
from tests.test_architectures import HEAD, SMALL, VISION, dequantise_into, logits_of, tiny, tune

IMAGE = 120  # the id of the token that stands for a piece of an image
TEXT = {**HEAD, "bos_token_id": 1, "eos_token_id": 2}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
QWEN_TEXT: dict[str, Any] = {
    **TEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
TEXT_MODEL = re.compile("language_model|text_model")
PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def question(images: int) -> Tensor:
    """(1, tokens) ids: some text, `images` places for an image, some text."""
    return torch.tensor([[5, 6, 7, *[IMAGE] * images, 8, 9, 10, 11]])


def patches(channels: int) -> dict[str, Tensor]:
    """An image of 8 x 8 patches as the Qwen models take it: 16 places after merging 2 x 2."""
    pixels = torch.randn(64, channels, generator=torch.Generator().manual_seed(1))
    ids = question(16)
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


# Config, and an image with a question about it.
MODELS: dict[str, tuple[t.PretrainedConfig, dict[str, Tensor]]] = {
    "qwen2_vl": (
        t.Qwen2VLConfig(
            text_config=QWEN_TEXT,
            vision_config={**QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
            **QWEN_IDS,
        ),
        patches(3 * 2 * 4 * 4),
    ),
    "qwen2_5_vl": (
        t.Qwen2_5_VLConfig(
            text_config=QWEN_TEXT,
            vision_config={**QWEN_VISION, "hidden_size": 32, "intermediate_size": 64, "window_size": 16},
            **QWEN_IDS,
        ),
        patches(3 * 2 * 4 * 4),
    ),
    "qwen3_vl": (
        t.Qwen3VLConfig(
            text_config={
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            },
            vision_config={
                **QWEN_VISION,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
            **QWEN_IDS,
        ),
        patches(3 * 2 * 4 * 4),
    ),
    "llava": (
        t.LlavaConfig(
            text_config=t.LlamaConfig(**TEXT),
            vision_config=t.CLIPVisionConfig(**VISION, projection_dim=32),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
        ),
        {"input_ids": question(4), "pixel_values": PIXELS},
    ),
    "gemma3": (
        t.Gemma3Config(
            text_config=t.Gemma3TextConfig(**TEXT, sliding_window=8),
            vision_config=t.SiglipVisionConfig(**VISION),
            mm_tokens_per_image=4,
            image_token_id=IMAGE,
            boi_token_id=121,
            eoi_token_id=122,
        ),
        {"input_ids": question(4), "pixel_values": PIXELS, "token_type_ids": (question(4) == IMAGE).int()},
    ),
    "mllama": (
        t.MllamaConfig(
            text_config={**SMALL, "num_hidden_layers": 3, "cross_attention_layers": [1]},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 32,
                "patch_size": 16,
                "max_num_tiles": 1,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1]],
            },
            image_token_index=IMAGE,
        ),
        {
            "input_ids": question(1),
            "pixel_values": PIXELS[:, None, None],
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.int64),
            "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.int64),
            "cross_attention_mask": torch.ones(1, question(1).shape[1], 1, 1, dtype=torch.int64),
        },
    ),
}


def opened(folder: Path) -> nn.Module:
    model: nn.Module = t.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_answers_about_an_image_are_those_of_the_dequantised_model(name: str, tmp_path: Path) -> None:
    config, asked = MODELS[name]
    tiny(config, t.AutoModelForImageTextToText).save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "preprocessor_config.json").write_text('{"image_processor_type": "Any"}')
    result = tune(tmp_path / "plain", tmp_path / "out")
    assert all("language_model" in layer for layer in result.plan.quantised)
    expected, loaded = opened(tmp_path / "plain"), opened(tmp_path / "out")
    before = logits_of(expected, **asked)
    blind = logits_of(expected, input_ids=asked["input_ids"]) if name != "mllama" else torch.zeros_like(before)
    assert (before - blind).abs().max() > 1e-3  # it looks at the image
    dequantise_into(expected, result)
    torch.testing.assert_close(logits_of(loaded, **asked), logits_of(expected, **asked), rtol=1e-4, atol=1e-4)
    assert (logits_of(loaded, **asked) - before).abs().max() > 1e-3
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("format", ["auto_awq", "llm_compressor"])
def test_readers_that_convert_every_linear_are_told_to_leave_vision_alone(format: str, tmp_path: Path) -> None:
    config, _ = MODELS["llava"]
    tiny(config, t.AutoModelForImageTextToText).save_pretrained(tmp_path / "plain")
    AutoRound(tmp_path / "plain", recipe="rtn", group_size=32, device="cpu").quantize_and_save(
        tmp_path / "out", format, enable_check=False
    )
    assert_only_text_is_converted(tmp_path / "plain", tmp_path / "out", format)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("format", ["auto_awq", "llm_compressor"])
def test_they_are_told_so_by_converted_folders_too(format: str, name: str, tmp_path: Path) -> None:
    config, _ = MODELS[name]
    tiny(config, t.AutoModelForImageTextToText).save_pretrained(tmp_path / "plain")
    AutoRound(tmp_path / "plain", recipe="rtn", group_size=32, device="cpu").quantize_and_save(
        tmp_path / "gptq", "auto_gptq", enable_check=False
    )
    convert(tmp_path / "gptq", tmp_path / "out", format)
    assert_only_text_is_converted(tmp_path / "plain", tmp_path / "out", format)


def assert_only_text_is_converted(plain: Path, folder: Path, format: str) -> None:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    left = settings["modules_to_not_convert" if format == "auto_awq" else "ignore"]
    linears = {name for name, module in opened(plain).named_modules() if isinstance(module, nn.Linear)}
    inside = {name for name in linears if ".language_model." in f".{name}" and ".layers." in name}
    assert inside < linears
    assert {name for name in linears if should_convert_module(name, left)} == inside


def test_a_converted_folder_of_a_model_that_renames_its_tensors_opens(tmp_path: Path) -> None:
    config, asked = MODELS["qwen2_5_vl"]
    tiny(config, t.AutoModelForImageTextToText).save_pretrained(tmp_path / "plain")
    AutoRound(tmp_path / "plain", recipe="rtn", group_size=32, device="cpu").quantize_and_save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "gptq", "auto_gptq")
    settings = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert not settings["lm_head"]
    assert not settings.get("dynamic")
    convert(tmp_path / "gptq", tmp_path / "again", "auto_round")
    first, second = (logits_of(opened(tmp_path / name), **asked) for name in ("ours", "again"))
    assert torch.equal(first, second)


def test_vision_is_quantised_when_asked(tmp_path: Path) -> None:
    config, asked = MODELS["llava"]
    tiny(config, t.AutoModelForImageTextToText).save_pretrained(tmp_path / "plain")
    result = tune(tmp_path / "plain", tmp_path / "out", quant_nontext_module=True)
    assert any("vision_tower" in layer for layer in result.plan.quantised)
    assert any("multi_modal_projector" in layer for layer in result.plan.quantised)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["extra_config"]
    assert any("vision_tower" in layer for layer in written)
    expected = opened(tmp_path / "plain")
    dequantise_into(expected, result)
    answer = logits_of(opened(tmp_path / "out"), **asked)
    torch.testing.assert_close(answer, logits_of(expected, **asked), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "gemma3", "mllama"])
def test_pairs_of_image_and_text_calibrate(name: str, tmp_path: Path) -> None:
    config, asked = MODELS[name]
    tiny(config, t.AutoModelForImageTextToText).save_pretrained(tmp_path / "plain")
    other = {**asked, "pixel_values": -asked["pixel_values"]}
    result = tune(tmp_path / "plain", tmp_path / "out", dataset=[asked, other, asked], seqlen=64)
    blind = tune(tmp_path / "plain", tmp_path / "blind")
    assert any(not torch.equal(result.weights[layer], blind.weights[layer]) for layer in result.weights)
    expected = opened(tmp_path / "plain")
    dequantise_into(expected, result)
    answer = logits_of(opened(tmp_path / "out"), **asked)
    torch.testing.assert_close(answer, logits_of(expected, **asked), rtol=1e-4, atol=1e-4)


def entered(folder: Path, built: CalibrationSet) -> Tensor:
    """(samples, tokens, width) behind the first block of the text model, as tuning has it."""
    source = open_source(folder, None, folder)
    skeleton = Skeleton(source.config, source.checkpoint)
    names = block_names(skeleton.model, find_block_lists(skeleton.model))
    cpu = torch.device("cpu")
    settings = Walk(batch_size=2, quantised_inputs=False, device=cpu, dtype=torch.float32, store=cpu)
    blocks = iter(walk(skeleton, names, built.tokens, settings, built.beside))
    return next(block.targets for block in blocks if TEXT_MODEL.search(block.name))


def test_positions_around_images_are_those_of_every_pair(tmp_path: Path) -> None:
    config, asked = MODELS["qwen2_5_vl"]
    model = tiny(config, t.AutoModelForImageTextToText)
    model.save_pretrained(tmp_path / "plain")
    ids = asked["input_ids"].roll(2, 1)  # the image stands later
    other = {**asked, "input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}
    pairs = [asked, asked, other]
    built = from_pairs(pairs, None, nsamples=3, seqlen=64, listener=LogListener())
    with torch.no_grad():
        expected = [model(**pair, output_hidden_states=True, use_cache=False).hidden_states[1] for pair in pairs]
    torch.testing.assert_close(entered(tmp_path / "plain", built), torch.cat(expected), rtol=1e-4, atol=1e-4)


def pixels(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))


# Config, and questions about images of several sizes, or about several images, as the processor gives one at a time.
SIZES: dict[str, tuple[t.PretrainedConfig, list[dict[str, Tensor]]]] = {
    "llava_next": (
        t.LlavaNextConfig(
            text_config=t.LlamaConfig(**TEXT),
            vision_config=t.CLIPVisionConfig(**VISION, projection_dim=32),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            image_grid_pinpoints=[[32, 64], [64, 64]],
        ),
        [
            {"input_ids": question(14), "pixel_values": pixels(3, 3, 32, 32), "image_sizes": torch.tensor([[32, 64]])},
            {"input_ids": question(24), "pixel_values": pixels(5, 3, 32, 32), "image_sizes": torch.tensor([[64, 64]])},
        ],
    ),
    "pixtral": (
        t.LlavaConfig(
            text_config=t.LlamaConfig(**TEXT),
            vision_config=t.PixtralVisionConfig(**{**VISION, "image_size": 64}),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        [
            {"input_ids": question(6), "pixel_values": pixels(3, 32, 48), "image_sizes": torch.tensor([[32, 48]])},
            {"input_ids": question(8), "pixel_values": pixels(3, 64, 32), "image_sizes": torch.tensor([[64, 32]])},
        ],
    ),
    "idefics3": (
        t.Idefics3Config(
            text_config=t.LlamaConfig(**TEXT),
            vision_config={**VISION, "patch_size": 8},
            image_token_id=IMAGE,
            scale_factor=2,
        ),
        [
            {
                "input_ids": question(4 * count),
                "pixel_values": pixels(count, 3, 32, 32),
                "pixel_attention_mask": torch.ones(1, count, 32, 32, dtype=torch.int64),
            }
            for count in (1, 3)
        ],
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_images_of_several_sizes_stand_in_one_batch(name: str, tmp_path: Path) -> None:
    config, pairs = SIZES[name]
    model = tiny(config, t.AutoModelForImageTextToText)
    model.save_pretrained(tmp_path)
    built = from_pairs(pairs, None, nsamples=2, seqlen=64, listener=LogListener())
    found = entered(tmp_path, built)
    with torch.no_grad():
        for row, mask, pair in zip(found, built.mask, pairs, strict=True):
            expected = model(**pair, output_hidden_states=True, use_cache=False).hidden_states[1][0]
            torch.testing.assert_close(row[mask], expected, rtol=1e-4, atol=1e-4)


def test_images_of_several_sizes_are_refused_where_zeros_would_be_seen() -> None:
    pairs = [{"input_ids": question(4), "pixel_values": pixels(3, size, 32)} for size in (32, 32, 64)]
    with pytest.raises(
        CalibrationError, match=r"pairs 0 and 2 have pixel_values of shapes \(1, 3, 32, 32\) and \(1, 3, 64, 32\)"
    ):
        from_pairs(pairs, None, nsamples=3, seqlen=64, listener=LogListener())


def test_pairs_are_refused_where_images_come_in_between_blocks(tmp_path: Path) -> None:
    config, asked = MODELS["qwen3_vl"]
    tiny(config, t.AutoModelForImageTextToText).save_pretrained(tmp_path / "plain")
    with pytest.raises(SourceError, match=r"changes the hidden states between its blocks.*give text alone"):
        tune(tmp_path / "plain", tmp_path / "out", dataset=[asked, asked], seqlen=64)


def test_a_processor_makes_the_samples(tmp_path: Path) -> None:
    config, asked = MODELS["llava"]
    tiny(config, t.AutoModelForImageTextToText).save_pretrained(tmp_path / "plain")
    seen: list[dict[str, Any]] = []

    def processor(**arguments: Any) -> dict[str, Tensor]:
        seen.append(arguments)
        return asked

    pairs = [{"images": "a picture", "text": "What is this?"}] * 2
    tune(tmp_path / "plain", tmp_path / "out", dataset=pairs, processor=processor, seqlen=64)
    assert seen == [{"images": "a picture", "text": "What is this?", "return_tensors": "pt"}] * 2
    with pytest.raises(CalibrationError, match="fits seqlen=4"):
        tune(tmp_path / "plain", tmp_path / "short", dataset=pairs, processor=processor, seqlen=4)
    with pytest.raises(SpecError, match="self_nsamples goes with text"):
        tune(tmp_path / "plain", tmp_path / "more", dataset=pairs, processor=processor, seqlen=64, self_nsamples=2)
    with pytest.raises(CalibrationError, match="need the model's processor"):
        tune(tmp_path / "plain", tmp_path / "none", dataset=pairs, seqlen=64)
