"""Stage 2 with OPT and T5: losses against transformers, generation, folders of plain transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoProcessor, Blip2ForConditionalGeneration, Blip2VisionConfig

from capfilt.data.rundir import RunDir
from capfilt.errors import FingerprintMismatchError, UsageError
from capfilt.models.llms import OPT, T5, LanguageModel, split_caption
from capfilt.models.vit import VisionTransformer
from capfilt.settings import Stage1Settings, Stage2Settings
from capfilt.train.batches import from_arrays
from capfilt.train.generate import load_generator, prepare_images
from capfilt.train.saved import load_stage1, load_stage2, save_stage1
from capfilt.train.stage1 import start_stage1, train_stage1_on
from capfilt.train.stage2 import load_start, train_stage2, train_stage2_on
from capfilt.weights.image_encoders import ImageEncoder
from capfilt.weights.llms import load_llm
from capfilt.weights.model_files import ImagePreparation, weights_digest
from tests.train import small_models

CPU = torch.device("cpu")
FAMILIES = ("opt", "opt-untied", "t5", "t5-tied")
SETTINGS = Stage2Settings(
    dropout=0.0, max_steps=5, batch_size=16, warmup_steps=1, learning_rate=2e-3,
    log_every_steps=1, device="cpu",
)  # fmt: skip
DEFAULT_PX = Blip2VisionConfig().image_size
TEXTS = ["a red square on the left", "here is a blue square", "a", "white"]


@pytest.fixture(scope="module")
def llm_dirs(models_dir: Path) -> dict[str, Path]:
    return {
        "opt": small_models.save_opt(models_dir / "opt"),
        "opt-untied": small_models.save_opt(models_dir / "opt-untied", tied=False),
        "t5": small_models.save_t5(models_dir / "t5"),
        "t5-tied": small_models.save_t5(models_dir / "t5-tied", tied=True),
    }


@pytest.fixture(scope="module")
def stage1_dir(blip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    settings = Stage1Settings(
        image_encoder=str(blip_dir), num_queries=4, embed_dim=16, dropout=0.0, max_steps=20, batch_size=16,
        warmup_steps=5, learning_rate=5e-3, device="cpu",
    )  # fmt: skip
    train_stage1_on(from_arrays(*small_models.draw_pairs(200, seed=3)), settings, folder)
    return folder


def test_a_config_without_an_image_size_means_the_default_of_blip2(stage1_dir: Path, tmp_path: Path) -> None:
    saved = load_stage1(stage1_dir, CPU)
    vision = VisionTransformer(replace(saved.encoder.vision.config, image_size_px=DEFAULT_PX))
    vision.norm = nn.Identity()
    encoder = ImageEncoder(vision, {}, ImagePreparation(DEFAULT_PX))
    save_stage1(tmp_path, encoder, saved.stage, saved.tokenizer, saved.embed_dim)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vision_config"].pop("image_size") == DEFAULT_PX  # as published configurations leave it out
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_stage1(tmp_path, CPU).encoder.preparation.image_size_px == DEFAULT_PX


@pytest.fixture(scope="module")
def trained_dirs(
    run: RunDir, stage1_dir: Path, llm_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in folders.items():
        train_stage2([run.path], stage1_dir, str(llm_dirs[name]), SETTINGS, folder)
    return folders


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_plain_transformers_loads_it_and_generates_the_same(trained_dirs: dict[str, Path], family: str) -> None:
    folder = trained_dirs[family]
    theirs, info = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.eval()
    generator = load_generator(folder, device="cpu")
    images, _ = small_models.draw_pairs(6, seed=7)
    pixels = prepare_images(list(images), generator.encoder.preparation)
    processor = AutoProcessor.from_pretrained(folder)
    length = {"max_new_tokens": 9, "min_new_tokens": 4}
    found = generator.generate(list(images), **length)
    tokens = theirs.generate(pixel_values=pixels, do_sample=False, **length)
    assert found == [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    assert any(found)
    prompt = "question : what color ? answer :"
    found = generator.generate(list(images), [prompt] * 6, **length)
    inputs = processor(images=list(images), text=[prompt] * 6, return_tensors="pt")
    tokens = theirs.generate(**{**inputs, "pixel_values": pixels}, do_sample=False, **length)
    expected = processor.batch_decode(tokens, skip_special_tokens=True)
    assert found == [text.removeprefix(prompt).strip() for text in expected]  # OPT's repeat the prompt


@torch.no_grad()
def test_visual_prompts_and_loss_equal_transformers(trained_dirs: dict[str, Path], family: str) -> None:
    """transformers gets one text at a time, without padding; the mean goes over all predicted tokens."""
    folder = trained_dirs[family]
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    saved = load_stage2(folder, CPU)
    llm, stage = saved.stage.llm, saved.stage.eval()
    images, _ = small_models.draw_pairs(len(TEXTS), seed=7)
    pixels = prepare_images(list(images), saved.encoder.preparation)
    image_tokens = [theirs.config.image_token_index] * 4
    losses = []
    for index, text in enumerate(TEXTS):
        words = llm.tokenizer(text, add_special_tokens=False).input_ids
        if isinstance(llm, OPT):
            tokens = [*image_tokens, llm.bos_token_id, *words, llm.end_token_id]
            logits = theirs(pixel_values=pixels[index : index + 1], input_ids=torch.tensor([tokens])).logits[0]
            losses += F.cross_entropy(logits[4:-1], torch.tensor(tokens[5:]), reduction="none").tolist()
        else:
            prefix = words[:1] if len(words) > 1 else []  # a draw of 0 splits after the first word
            target = torch.tensor([[*words[len(prefix) :], 1]])
            tokens = torch.tensor([[*image_tokens, *prefix, 1]])
            logits = theirs(pixel_values=pixels[index : index + 1], input_ids=tokens, labels=target).logits[0]
            losses += F.cross_entropy(logits, target[0], reduction="none").tolist()
    found = float(stage(saved.encoder.vision(pixels), TEXTS, draws=[0.0] * len(TEXTS))["lm"])
    assert found == pytest.approx(float(np.mean(losses)), abs=1e-4)


def test_the_language_model_and_the_image_encoder_stay_as_they_were(
    trained_dirs: dict[str, Path], llm_dirs: dict[str, Path], stage1_dir: Path, family: str
) -> None:
    saved = load_stage2(trained_dirs[family], CPU)
    before = load_llm(str(llm_dirs[family])).model.state_dict()
    after = saved.stage.llm.model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor)
    assert not [name for name, p in saved.stage.named_parameters() if p.requires_grad and name.startswith("llm.")]


def test_batches_of_prompts_give_what_single_ones_give(trained_dirs: dict[str, Path], family: str) -> None:
    generator = load_generator(trained_dirs[family], device="cpu")
    images, _ = small_models.draw_pairs(3, seed=8)
    prompts = ["", "question : what color is the square ? answer :", "a"]
    for beams in (1, 3):
        together = generator.generate(list(images), prompts, max_new_tokens=6, num_beams=beams)
        single = [
            generator.generate([image], [prompt], max_new_tokens=6, num_beams=beams)[0]
            for image, prompt in zip(images, prompts, strict=True)
        ]
        assert together == single


def test_answers_use_the_papers_frames(trained_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = small_models.draw_pairs(1)
    seen: list[tuple[list[str], dict]] = []
    for name, cls in (("opt", OPT), ("t5", T5)):
        generator = load_generator(trained_dirs[name], device="cpu")
        monkeypatch.setattr(cls, "generate", lambda _, __, prompts, **options: seen.append((prompts, options)) or [""])
        generator.answer(list(images), ["what color"])
    assert [prompts for prompts, _ in seen] == [
        ["Question: what color Answer:"],
        ["Question: what color Short answer:"],
    ]
    assert all(options == {"max_new_tokens": 10, "num_beams": 5, "length_penalty": -1.0} for _, options in seen)


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_training_lowers_the_loss(stage1_dir: Path, llm_dirs: dict[str, Path], tmp_path: Path, name: str) -> None:
    settings = replace(SETTINGS, max_steps=25, learning_rate=1e-2, log_every_steps=5)
    dataset = from_arrays(*small_models.draw_pairs(200, seed=3))
    summary = train_stage2_on(dataset, stage1_dir, str(llm_dirs[name]), settings, tmp_path)
    assert summary.last_losses["lm"] < 0.8 * summary.first_losses["lm"]


def split_many(llm: LanguageModel, text: str) -> set[tuple[str, str]]:
    assert isinstance(llm, T5)
    return {split_caption(text, draw, llm.whole_caption_share) for draw in np.linspace(0, 1, 200, endpoint=False)}


def test_prefixes_end_between_the_first_word_and_the_middle(llm_dirs: dict[str, Path]) -> None:
    llm = load_llm(str(llm_dirs["t5"]))
    assert isinstance(llm, T5)
    assert split_many(llm, "a b c d e f") == {("a", "b c d e f"), ("a b", "c d e f"), ("a b c", "d e f")}
    assert split_many(llm, "a b") == {("a", "b")}
    assert split_many(llm, "a") == {("", "a")}
    llm.whole_caption_share = 0.5
    assert ("", "a b") in split_many(llm, "a b")


def test_a_language_model_of_another_family(blip_dir: Path) -> None:
    with pytest.raises(UsageError, match="'blip'; the language model must be one of opt, t5"):
        load_llm(str(blip_dir))


def test_half_precision_where_asked(stage1_dir: Path, llm_dirs: dict[str, Path], tmp_path: Path) -> None:
    settings = replace(SETTINGS, llm_dtype="bfloat16", max_steps=2)
    train_stage2_on(from_arrays(*small_models.draw_pairs(20)), stage1_dir, str(llm_dirs["opt"]), settings, tmp_path)
    saved = load_stage2(tmp_path, CPU)
    assert next(saved.stage.llm.model.parameters()).dtype == torch.bfloat16
    assert saved.stage.projection.weight.dtype == torch.float32


# --- without stage 1 ----------------------------------------------------------------------------------------

NEW = replace(SETTINGS, num_queries=4, max_steps=2)


def test_without_stage1_it_starts_as_stage1_would(blip_dir: Path, llm_dirs: dict[str, Path], tmp_path: Path) -> None:
    """The Q-Former, the norm and the image encoder of a stage 1 that took no step."""
    settings = replace(NEW, image_encoder=str(blip_dir), init_cross_attention=True, seed=5)
    found = load_start("", str(llm_dirs["opt"]), settings)
    untrained = start_stage1(
        Stage1Settings(
            image_encoder=str(blip_dir), num_queries=4, embed_dim=16, dropout=0.0, init_cross_attention=True, seed=5
        )
    )
    wanted = untrained.stage.qformer.state_dict()
    for name, tensor in found.stage.qformer.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert torch.equal(found.stage.vision_norm.weight, untrained.stage.vision_norm.weight)
    other_seed = load_start("", str(llm_dirs["opt"]), replace(settings, seed=6))
    assert not torch.equal(other_seed.stage.qformer.query_tokens, found.stage.qformer.query_tokens)


def test_without_stage1_it_trains_and_its_record_names_its_models(
    run: RunDir, blip_dir: Path, stage1_dir: Path, llm_dirs: dict[str, Path], tmp_path: Path
) -> None:
    bert = small_models.save_bert(tmp_path / "bert")
    settings = replace(NEW, image_encoder=str(blip_dir), qformer_init=str(bert))
    train_stage2([run.path], "", str(llm_dirs["t5"]), settings, tmp_path / "out")
    assert Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out").config.num_query_tokens == 4
    fields = json.loads((tmp_path / "out" / "training.json").read_text())["fields"]
    assert fields["qformer_init_sha256"] == weights_digest(bert)
    assert fields["image_encoder_sha256"] == weights_digest(blip_dir)
    assert "init_sha256" not in fields
    with pytest.raises(FingerprintMismatchError, match="another result of stage 1|another start of the Q-Former"):
        train_stage2([run.path], stage1_dir, str(llm_dirs["t5"]), replace(NEW, num_queries=32), tmp_path / "out")


@pytest.mark.parametrize(
    "given",
    [{"num_queries": 4}, {"qformer_init": "x"}, {"image_encoder_layer": "last"}, {"init_cross_attention": True}],
)
def test_settings_of_a_new_qformer_are_refused_with_a_stage1(stage1_dir: Path, given: dict) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(given))} is .*to be left out with init"):
        load_start(stage1_dir, "unread", replace(SETTINGS, **given))


def test_neither_a_stage1_nor_an_image_encoder_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Neither --init nor --image-encoder.*RUN/stage1"):
        load_start("", "unread", SETTINGS)
