"""BLIP-2's fine-tuning: losses against transformers', what trains and what does not, rates, resumption, learning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor, Blip2ForConditionalGeneration, CLIPVisionConfig, CLIPVisionModel

from capfilt.data.rundir import RunDir
from capfilt.errors import UsageError
from capfilt.models.blip2 import Blip2FineTuning, Stage2
from capfilt.models.llms import OPT
from capfilt.models.qformer import QFormerConfig
from capfilt.progress import NullProgress
from capfilt.settings import Blip2CaptionsSettings, Blip2TuningSettings, Blip2VqaSettings
from capfilt.train import step as train_step
from capfilt.train.blip2_tuning import load_start, train_blip2_captions
from capfilt.train.blocks import compile_blocks
from capfilt.train.clip_tower import load_blip2_with_clip
from capfilt.train.generate import load_generator, prepare_images
from capfilt.train.loop import TrainSummary
from capfilt.train.saved import load_stage2, save_stage2
from capfilt.weights.image_encoders import load_image_encoder
from capfilt.weights.llms import load_llm
from tests import blip2_layouts
from tests.evaluate.small_blip2 import save_blip2
from tests.train import small_models
from tests.train.test_processes import start

CPU = torch.device("cpu")
PROMPTS = ["a photo of", "question : what color is the square ? answer :", "", "here is the"]
TEXTS = ["a red square on the left", "blue", "a square", "white square on the top"]
CAPTIONS = Blip2CaptionsSettings(
    dropout=0.0, max_steps=3, batch_size=8, accumulation_steps=1, warmup_steps=0, learning_rate=1e-3, image_size_px=0,
    log_every_steps=1, save_every_steps=2, device="cpu",
)  # fmt: skip
VISION, LLM, NORM = "vision_model.", "language_model.", "vision_model.post_layernorm."


@pytest.fixture(scope="module", params=["opt", "t5"])
def stage2_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip2(tmp_path_factory.mktemp("blip2") / request.param, request.param)


@pytest.fixture(scope="module")
def opt_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip2(tmp_path_factory.mktemp("blip2-opt") / "opt", "opt")


def tune(run: RunDir, init: Path, output: Path, **changes: Any) -> TrainSummary:
    return train_blip2_captions([run.path], init, "", replace(CAPTIONS, **changes), output)


# --- losses -------------------------------------------------------------------------------------------------


def theirs_loss(theirs: Any, llm: Any, pixels: Tensor, prompt: str, text: str) -> tuple[float, int]:
    """transformers' loss of one text with labels, and how many tokens it is the mean of."""
    image = [theirs.config.image_token_index] * 4
    begin = llm.tokenizer(prompt, add_special_tokens=False).input_ids
    target = [*llm.tokenizer(text, add_special_tokens=False).input_ids, llm.end_token_id]
    if isinstance(llm, OPT):
        before = [*image, llm.bos_token_id, *begin]
        tokens, labels = [*before, *target], [-100] * len(before) + target
    else:
        tokens, labels = [*image, *begin, llm.end_token_id], target
    out = theirs(pixel_values=pixels, input_ids=torch.tensor([tokens]), labels=torch.tensor([labels]))
    return float(out.loss), len(target)


@torch.no_grad()
def test_loss_equals_transformers_text_by_text(stage2_dir: Path) -> None:
    theirs = Blip2ForConditionalGeneration.from_pretrained(stage2_dir).eval()
    saved = load_stage2(stage2_dir, CPU)
    images, _ = small_models.draw_pairs(len(TEXTS), seed=7)
    pixels = prepare_images(list(images), saved.encoder.preparation)
    frozen = Blip2FineTuning(saved.stage).eval()
    whole = Blip2FineTuning(saved.stage, saved.encoder.vision).eval()
    total, num_tokens = 0.0, 0
    for row, (prompt, text) in enumerate(zip(PROMPTS, TEXTS, strict=True)):
        own = pixels[row : row + 1]
        expected, num = theirs_loss(theirs, saved.stage.llm, own, prompt, text)
        found = frozen([prompt], [text], features_BPD=saved.encoder.vision(own))["loss"]
        assert float(found) == pytest.approx(expected, abs=1e-4)
        total, num_tokens = total + num * expected, num_tokens + num
    together = whole(PROMPTS, TEXTS, images_BCHW=pixels)
    assert float(together["lm"]) == pytest.approx(total / num_tokens, abs=1e-4)


def test_only_the_text_behind_a_prompt_carries_loss(opt_dir: Path) -> None:
    saved = load_stage2(opt_dir, CPU)
    llm = saved.stage.llm
    assert isinstance(llm, OPT)
    seen: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    handle = llm.model.model.register_forward_hook(keep)
    features = torch.randn(len(TEXTS), 17, 48)
    Blip2FineTuning(saved.stage)(PROMPTS, TEXTS, features_BPD=features)["loss"].backward()
    handle.remove()
    gradient = seen[0].grad
    assert gradient is not None
    for row, (prompt, text) in enumerate(zip(PROMPTS, TEXTS, strict=True)):
        # four visual prompts and bos, the last of which predicts a text without a prompt
        first = 4 + len(llm.tokenizer(prompt, add_special_tokens=False).input_ids)
        last = first + len(llm.tokenizer(text, add_special_tokens=False).input_ids)
        carries = gradient[row].abs().sum(dim=1) > 0
        assert carries.nonzero().flatten().tolist() == list(range(first, last + 1))


def test_a_space_stands_between_prompt_and_text_as_in_one_sentence() -> None:
    llm = load_llm("capfilt/world/assets/opt")
    assert isinstance(llm, OPT)
    for prompt, text in (("a photo of", "a red ball"), ("Question: what color is the ball? Answer:", "red")):
        joint = llm.tokenizer(f"{prompt} {text}\n", add_special_tokens=False).input_ids
        assert llm._encode(prompt) + llm._continue(prompt, text) == joint


def test_a_prompt_that_is_too_long_is_refused(opt_dir: Path) -> None:
    saved = load_stage2(opt_dir, CPU)
    with pytest.raises(UsageError, match=r"has 91 tokens; with 7 for image and text .* takes 96"):
        Blip2FineTuning(saved.stage)(["a " * 90], ["a red"], features_BPD=torch.randn(1, 17, 48))


# --- what trains --------------------------------------------------------------------------------------------


def changed(before: Path, after: Path) -> dict[str, bool]:
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    return {name: old[name].shape != new[name].shape or not torch.equal(old[name], new[name]) for name in old}


def test_the_language_model_and_by_default_the_image_encoder_stay_as_they_were(
    run: RunDir, stage2_dir: Path, tmp_path: Path
) -> None:
    tune(run, stage2_dir, tmp_path / "out")
    for name, is_other in changed(stage2_dir, tmp_path / "out").items():
        if name.startswith(LLM) or name.startswith(VISION) and not name.startswith(NORM):
            assert not is_other, name
        elif "attention.key.bias" not in name and "attention.attention.key.bias" not in name:
            assert is_other, name  # the loss does not depend on biases of keys


def test_a_trained_image_encoder_is_saved_and_transformers_generates_the_same(
    run: RunDir, stage2_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    tune(run, stage2_dir, folder, train_image_encoder=True, image_size_px=48, recompute=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 48
    found = changed(stage2_dir, folder)
    vision = {name: is_other for name, is_other in found.items() if name.startswith(VISION)}
    assert all(vision.values()), [name for name, is_other in vision.items() if not is_other]
    assert not any(is_other for name, is_other in found.items() if name.startswith(LLM))

    theirs, info = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    generator, processor = load_generator(folder, device="cpu"), AutoProcessor.from_pretrained(folder)
    images = list(small_models.draw_pairs(5, seed=7)[0])
    pixels = prepare_images(images, generator.encoder.preparation)
    assert pixels.shape[-1] == 48
    prompt = "here is a"
    inputs = processor(images=images, text=[prompt] * 5, return_tensors="pt")
    length = {"max_new_tokens": 9, "min_new_tokens": 4}
    tokens = theirs.eval().generate(**{**inputs, "pixel_values": pixels}, do_sample=False, **length)
    expected = processor.batch_decode(tokens, skip_special_tokens=True)
    texts = generator.generate(images, [prompt] * 5, **length)
    assert texts == [text.removeprefix(prompt).strip() for text in expected]  # OPT's repeat the prompt
    assert any(texts)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
def test_recomputed_and_compiled_layers_train_alike(
    run: RunDir, opt_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled as far as tracing and differentiation go; torch's compiler takes minutes."""
    monkeypatch.setattr(train_step, "compile_blocks", lambda module: compile_blocks(module, backend="aot_eager"))
    plain, other = tmp_path / "plain", tmp_path / "other"
    tune(run, opt_dir, plain, max_steps=1, train_image_encoder=True, learning_rate=1e-4)
    again = {"recompute": True, "compile": True}
    tune(run, opt_dir, other, max_steps=1, train_image_encoder=True, learning_rate=1e-4, **again)
    expected, found = (load_file(folder / "model.safetensors") for folder in (plain, other))
    for name in expected:
        if "key.bias" not in name and "qkv.bias" not in name:  # no loss depends on biases of keys: noise moves them
            torch.testing.assert_close(found[name], expected[name], atol=5e-5, rtol=0, msg=name)


def test_each_block_takes_its_share_of_the_rate(run: RunDir, opt_dir: Path, tmp_path: Path) -> None:
    """AdamW's first step moves every weight by the rate: the saved weights tell it."""
    rate, decay, depth = 1e-3, 0.5, 2
    plain = {"max_steps": 1, "weight_decay": 0.0, "learning_rate": rate, "train_image_encoder": True}
    tune(run, opt_dir, tmp_path, image_encoder_decay=decay, **plain)
    old, new = (load_file(folder / "model.safetensors") for folder in (opt_dir, tmp_path))
    expected = {
        "vision_model.embeddings.": decay ** (depth + 1),
        "vision_model.encoder.layers.0.": decay**2,
        "vision_model.encoder.layers.1.": decay,
        "vision_model.post_layernorm.": 1.0,
        "qformer.": 1.0,
        "query_tokens": 1.0,
        "language_projection.": 1.0,
    }
    for prefix, share in expected.items():
        names = [name for name in old if name.startswith(prefix)]
        assert names
        for name in names:
            moved = float((new[name] - old[name]).abs().max())
            if "key.bias" not in name:
                assert moved == pytest.approx(share * rate, rel=0.02), name


def test_a_clip_trains_and_stays_a_clip(run: RunDir, models_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    encoder = load_image_encoder(str(tmp_path / "clip"), CPU)
    sizes = QFormerConfig(
        num_queries=4, width=32, depth=2, num_heads=4, mlp_width=64, vision_width=48, with_text=False, dropout=0.0
    )
    stage = Stage2(sizes, load_llm(small_models.save_opt(models_dir / "opt-of-clip")))
    (tmp_path / "stage2").mkdir()
    save_stage2(tmp_path / "stage2", encoder, stage)
    tune(run, tmp_path / "stage2", tmp_path / "out", train_image_encoder=True)
    towers = [load_file(tmp_path / name / "image_encoder" / "model.safetensors") for name in ("stage2", "out")]
    assert towers[0].keys() == towers[1].keys()
    same = [name for name in towers[0] if torch.equal(towers[0][name], towers[1][name])]
    assert [name for name in same if not name.startswith("post_layernorm") and "k_proj.bias" not in name] == []
    theirs, generator = load_blip2_with_clip(tmp_path / "out"), load_generator(tmp_path / "out", device="cpu")
    images = list(small_models.draw_pairs(3, seed=7)[0])
    pixels = prepare_images(images, generator.encoder.preparation)
    with torch.no_grad():
        expected = theirs.get_image_features(pixels).pooler_output
        found = generator.stage.visual_prompts(generator.encoder.vision(pixels))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_lavis_files_with_a_language_model_beside(run: RunDir, models_dir: Path, tmp_path: Path) -> None:
    llm_dir = small_models.save_opt(models_dir / "opt-of-lavis")
    llm = load_llm(llm_dir)
    model = blip2_layouts.build_generation(llm.model.config, len(small_models.WORDS))
    path = blip2_layouts.save_pth(
        tmp_path / "blip2_stage2.pth", blip2_layouts.lavis_state(model.state_dict(), llm="opt")
    )
    settings = replace(CAPTIONS, train_image_encoder=True)
    train_blip2_captions([run.path], path, str(llm_dir), settings, tmp_path / "out")
    saved = load_stage2(tmp_path / "out", CPU)
    assert not torch.equal(saved.encoder.vision.class_embedding, model.vision_model.embeddings.class_embedding)
    assert torch.equal(saved.stage.llm.model.lm_head.weight[: llm.model.config.vocab_size], llm.model.lm_head.weight)
    with pytest.raises(UsageError, match="holds no language model"):
        train_blip2_captions([run.path], path, "", settings, tmp_path / "none")


# --- resumption ---------------------------------------------------------------------------------------------


class CrashError(Exception):
    """Ends a training as a crash would."""


class CrashAt(NullProgress):
    """Crashes after so many steps."""

    def __init__(self, num_steps: int) -> None:
        self.left, self.name = num_steps, ""

    def start(self, name: str, total: int | None, unit: str, /) -> None:
        self.name = name

    def advance(self, n: int = 1, /, *, already: bool = False, **fields: object) -> None:
        if self.name.startswith("blip2-") and n and not already:
            self.left -= 1
            if not self.left:
                raise CrashError


@pytest.mark.parametrize("trains", [False, True])
def test_a_crash_changes_nothing(run: RunDir, opt_dir: Path, tmp_path: Path, trains: bool) -> None:
    changes = {"train_image_encoder": trains, "dropout": 0.1, "random_flip": True, "max_steps": 5}
    tune(run, opt_dir, tmp_path / "whole", **changes)
    settings = replace(CAPTIONS, **changes)
    with pytest.raises(CrashError):
        train_blip2_captions([run.path], opt_dir, "", settings, tmp_path / "cut", CrashAt(4))
    assert (tmp_path / "cut" / "checkpoints" / "step-00000002").is_dir()
    assert not (tmp_path / "cut" / "training.json").exists()
    tune(run, opt_dir, tmp_path / "cut", **changes)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert tune(run, opt_dir, tmp_path / "cut", **changes).already_done


@pytest.mark.slow
def test_processes_with_shares_of_the_weights_save_what_one_does(run: RunDir, opt_dir: Path, tmp_path: Path) -> None:
    """The image encoder's shares are put together again before it is saved."""
    options = ("--learning-rate", "1e-3", "--max-steps", "2", "--warmup-steps", "0", "--image-size-px", "0")
    options += ("--train-image-encoder", "--accumulation-steps", "1", "--set", "dropout=0", "--device", "cpu")
    command = ("-m", "capfilt", "train", "blip2-captions", str(run.path), "--init", str(opt_dir), *options)
    done = start(2, *command, "--batch-size", "4", "--sharding", "full", "--output", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    tune(run, opt_dir, tmp_path / "one", max_steps=2, train_image_encoder=True)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "key.bias" not in name and "qkv.bias" not in name:  # no loss depends on biases of keys: noise moves them
            torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=0, msg=name)
    assert any(is_other for name, is_other in changed(opt_dir, tmp_path / "two").items() if ".layers.0." in name)


# --- settings -----------------------------------------------------------------------------------------------


def test_images_that_patches_do_not_fill_and_other_models_are_refused(
    run: RunDir, opt_dir: Path, blip_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="image_size_px is 364; expected a multiple of the encoder's patches, 8 px"):
        tune(run, opt_dir, tmp_path, image_size_px=364)
    with pytest.raises(UsageError, match="expected Blip2ForConditionalGeneration"):
        tune(run, blip_dir, tmp_path)
    with pytest.raises(UsageError, match="has a language model of its own"):
        train_blip2_captions([run.path], opt_dir, "embedded-opt", CAPTIONS, tmp_path)


def test_a_trained_image_encoder_is_whole_and_not_kept(opt_dir: Path) -> None:
    trained = Blip2TuningSettings(train_image_encoder=True, image_size_px=0, device="cpu")
    assert load_start(opt_dir, "", trained).encoder.dtype == torch.float32
    half = load_start(opt_dir, "", replace(trained, train_image_encoder=False, encoder_dtype="bfloat16"))
    assert half.encoder.dtype == torch.bfloat16
    for change, said in (
        ({"encoder_dtype": "bfloat16"}, "encoder_dtype is 'bfloat16'; expected auto or float32 where"),
        ({"feature_cache_dir": "x"}, "feature_cache_dir is 'x'; expected None where the image encoder trains"),
        ({"image_encoder_decay": 0.0}, "image_encoder_decay is 0.0; expected more than 0, at most 1"),
    ):
        with pytest.raises(UsageError, match=said):
            replace(trained, **change)
    with pytest.raises(UsageError, match="expected a text with {} for the question"):
        Blip2VqaSettings(prompt="Question:")


def test_defaults_are_the_papers() -> None:
    captions, vqa = Blip2CaptionsSettings(), Blip2VqaSettings()
    assert [s.batch_size * s.accumulation_steps for s in (captions, vqa)] == [256, 128]
    assert [s.image_size_px for s in (captions, vqa)] == [364, 490]
    assert all((s.learning_rate, s.warmup_steps, s.weight_decay) == (1e-5, 1000, 0.05) for s in (captions, vqa))
    assert np.isclose(captions.max_steps * 256 / 566_747, 5, rtol=0.01)
    assert np.isclose(vqa.max_steps * 128 / (443_757 + 214_354), 5, rtol=0.01)
