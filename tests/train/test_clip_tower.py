"""BLIP-2 on a CLIP: both stages, what is saved, and transformers' own model with the CLIP put into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from capfilt.errors import UsageError
from capfilt.settings import Stage1Settings, Stage2Settings
from capfilt.train.batches import from_arrays
from capfilt.train.clip_tower import load_blip2_with_clip
from capfilt.train.generate import load_generator, prepare_images
from capfilt.train.saved import encode_texts, load_stage1, load_stage2
from capfilt.train.stage1 import train_stage1_on
from capfilt.train.stage2 import train_stage2_on
from capfilt.weights.image_encoders import load_image_encoder
from capfilt.weights.llms import load_llm
from capfilt.weights.model_files import weights_digest
from tests.cli.conftest import capfilt
from tests.train import small_models

CPU = torch.device("cpu")
STEPS = {"max_steps": 4, "batch_size": 16, "warmup_steps": 1, "learning_rate": 2e-3, "dropout": 0.0, "device": "cpu"}
MEAN = (0.4, 0.5, 0.6)


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
    )  # fmt: skip
    model = CLIPVisionModel(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, image_mean=list(MEAN)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stage1_dir(clip_dir: Path, blip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    settings = Stage1Settings(
        image_encoder=str(clip_dir), qformer_init=str(blip_dir), num_queries=4, embed_dim=16, **STEPS
    )
    train_stage1_on(from_arrays(*small_models.draw_pairs(40)), settings, folder)
    return folder


@pytest.fixture(scope="module", params=["opt", "t5"])
def stage2_dir(
    request: pytest.FixtureRequest, stage1_dir: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp(f"stage2-{request.param}")
    save_llm = small_models.save_opt if request.param == "opt" else small_models.save_t5
    llm = save_llm(models_dir / f"{request.param}-clip")
    settings = Stage2Settings(min_learning_rate=0.0, **STEPS)
    train_stage2_on(from_arrays(*small_models.draw_pairs(40)), stage1_dir, str(llm), settings, folder)
    return folder


def draw() -> list[np.ndarray]:
    return list(small_models.draw_pairs(5, seed=7)[0])


@torch.no_grad()
def test_the_saved_image_encoder_is_the_clip_up_to_its_second_last_layer(clip_dir: Path, stage1_dir: Path) -> None:
    saved, info = CLIPVisionModel.from_pretrained(stage1_dir / "image_encoder", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert saved.config.num_hidden_layers == 2
    images = torch.randn(2, 3, 32, 32)
    expected = CLIPVisionModel.from_pretrained(clip_dir)(images, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(saved.eval()(images).last_hidden_state, expected, atol=1e-4, rtol=0)
    again = load_image_encoder(str(stage1_dir / "image_encoder"), CPU)
    torch.testing.assert_close(again.vision(images), expected, atol=1e-4, rtol=0)
    assert again.preparation.mean == MEAN
    whole = load_image_encoder(str(stage1_dir), CPU)
    torch.testing.assert_close(whole.vision(images), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_itm_and_itc_of_stage1_equal_transformers_with_the_clip(stage1_dir: Path) -> None:
    theirs, saved = load_blip2_with_clip(stage1_dir), load_stage1(stage1_dir, CPU)
    stage, texts = saved.stage.eval(), ["a red square on the left", "here is a blue square"]
    pixels = prepare_images(draw()[:2], saved.encoder.preparation)
    encoded = encode_texts(saved.tokenizer, texts, 32, CPU)
    inputs = {"pixel_values": pixels, "input_ids": encoded.tokens, "attention_mask": encoded.mask.long()}
    image = stage.image_key_values(saved.encoder.vision(pixels))
    expected = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(stage.itm_logits(image, encoded), expected, atol=1e-4, rtol=0)
    found = stage.embed_queries(stage.qformer.encode_queries(image)[0])
    torch.testing.assert_close(found, theirs(**inputs).image_embeds, atol=1e-4, rtol=0)


@torch.no_grad()
def test_generation_and_forward_equal_transformers_with_the_clip(stage2_dir: Path) -> None:
    theirs, generator = load_blip2_with_clip(stage2_dir), load_generator(stage2_dir, device="cpu")
    images, length = draw(), {"max_new_tokens": 9, "min_new_tokens": 4}
    processor = AutoProcessor.from_pretrained(stage2_dir)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, prepare_images(images, generator.encoder.preparation), atol=1e-4, rtol=0)
    found = generator.generate(images, **length)
    tokens = theirs.generate(pixel_values=pixels, do_sample=False, **length)
    assert found == [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    assert any(found)
    ours = generator.stage.visual_prompts(generator.encoder.vision(pixels))
    queries = theirs.get_image_features(pixels).pooler_output
    torch.testing.assert_close(ours, queries, atol=1e-4, rtol=0)
    ids = processor(images=images, text=["a red square"] * 5, return_tensors="pt")
    decoder = {} if theirs.config.use_decoder_only_language_model else {"decoder_input_ids": torch.zeros(5, 1).long()}
    logits = theirs(**ids, **decoder).logits
    torch.testing.assert_close(logits, _our_logits(generator, theirs, ids, decoder), atol=1e-4, rtol=0)


def _our_logits(generator: Any, theirs: Any, inputs: Any, decoder: dict[str, Tensor]) -> Tensor:
    """The language model on our visual prompts in the places of <image>."""
    model = generator.stage.llm.model
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    visual = generator.stage.visual_prompts(generator.encoder.vision(inputs["pixel_values"]))
    embedded[inputs["input_ids"] == theirs.config.image_token_index] = visual.flatten(0, 1)
    return model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"], **decoder).logits


def test_training_goes_on_from_both_stages(stage1_dir: Path, stage2_dir: Path, tmp_path: Path) -> None:
    dataset = from_arrays(*small_models.draw_pairs(40))
    train_stage1_on(dataset, Stage1Settings(init=str(stage1_dir), **STEPS), tmp_path / "1")
    train_stage2_on(dataset, stage2_dir, "", Stage2Settings(min_learning_rate=0.0, **STEPS), tmp_path / "2")
    for before, after in ((stage1_dir, tmp_path / "1"), (stage2_dir, tmp_path / "2")):
        towers = [load_file(folder / "image_encoder" / "model.safetensors") for folder in (before, after)]
        torch.testing.assert_close(towers[0], towers[1], atol=1e-6, rtol=1e-6)
        norms = [load_file(f / "model.safetensors")["vision_model.post_layernorm.weight"] for f in (before, after)]
        assert not torch.equal(*norms)
        assert load_blip2_with_clip(after).vision_model.clip.config.num_hidden_layers == 2


def test_the_command_describes_images_with_a_clip(stage2_dir: Path, tmp_path: Path) -> None:
    Image.fromarray(draw()[0]).save(tmp_path / "square.png")
    done = capfilt("generate", stage2_dir, tmp_path / "square.png", "--max-new-tokens", 5)
    assert done.code == 0, done.err


def test_the_digest_of_a_folder_is_one_of_its_image_encoder_too(stage1_dir: Path, tmp_path: Path) -> None:
    before = weights_digest(stage1_dir)
    path = stage1_dir / "image_encoder" / "model.safetensors"
    state = load_file(path)
    try:
        save_file(state | {"post_layernorm.bias": state["post_layernorm.bias"] + 1}, path, metadata={"format": "pt"})
        assert weights_digest(stage1_dir) != before
    finally:
        save_file(state, path, metadata={"format": "pt"})


def test_folders_without_a_clip_or_with_missing_weights(stage1_dir: Path, blip_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no image_encoder/"):
        load_blip2_with_clip(blip_dir)
    for source in [stage1_dir / "config.json", *(stage1_dir / "image_encoder").iterdir()]:
        target = tmp_path / source.relative_to(stage1_dir)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    state = load_file(stage1_dir / "model.safetensors")
    del state["itm_head.bias"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"1 weights, such as itm_head\.bias"):
        load_blip2_with_clip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Blip2Model"]}))
    with pytest.raises(UsageError, match="expected one of Blip2ForConditionalGeneration"):
        load_blip2_with_clip(tmp_path)


def test_a_clip_has_no_texts_for_the_qformer(clip_dir: Path, tmp_path: Path) -> None:
    settings = Stage1Settings(image_encoder=str(clip_dir), **STEPS)
    with pytest.raises(UsageError, match="--qformer-init google-bert/bert-base-uncased"):
        train_stage1_on(from_arrays(*small_models.draw_pairs(20)), settings, tmp_path)


def test_half_precision_of_the_frozen_encoder(clip_dir: Path, blip_dir: Path, models_dir: Path, tmp_path: Path) -> None:
    settings = Stage1Settings(
        image_encoder=str(clip_dir), qformer_init=str(blip_dir), num_queries=4, encoder_dtype="bfloat16", **STEPS
    )
    dataset = from_arrays(*small_models.draw_pairs(20))
    train_stage1_on(dataset, settings, tmp_path / "1")
    llm = small_models.save_opt(models_dir / "opt-half")
    half = Stage2Settings(encoder_dtype="bfloat16", min_learning_rate=0.0, **STEPS)
    train_stage2_on(dataset, tmp_path / "1", str(llm), half, tmp_path / "2")
    saved = load_stage2(tmp_path / "2", CPU, dtype=torch.bfloat16)
    assert saved.encoder.dtype == torch.bfloat16
    assert load_llm(llm).width == saved.stage.projection.out_features
    assert load_file(tmp_path / "2" / "image_encoder" / "model.safetensors")["pre_layrnorm.bias"].dtype == torch.float32
