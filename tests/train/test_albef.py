"""Training ALBEF from shards: it learns, goes on exactly, starts from published weights, and its results open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, BertModel, BlipImageProcessor, ViTModel
from transformers import ViTConfig as TheirViTConfig

from capfilt.data.rundir import RunDir
from capfilt.errors import FingerprintMismatchError, UsageError
from capfilt.models.albef import AlbefLosses
from capfilt.settings import AlbefTrainSettings
from capfilt.train.albef import AlbefInputs, build_objective, train_albef
from capfilt.train.batches import Batch, Cursor, Draws
from capfilt.train.processes import join_processes
from capfilt.weights.albef import LoadedAlbef, load_albef, load_trainable_albef
from capfilt.world.tokenizers import build_bert_tokenizer
from capfilt.world.training_run import WorldRunSettings, write_world_run
from tests.models.small_vits import build_original_albef, build_timm
from tests.train import small_models

TINY = AlbefTrainSettings(
    image_size_px=32, patch_size_px=8, vision_width=32, vision_depth=1, text_width=32, text_depth=1, fusion_depth=1,
    head_width=16, max_positions=48, embed_dim=16, max_steps=8, warmup_steps=2, batch_size=8, learning_rate=3e-3,
    log_every_steps=4, save_every_steps=3, queue_size=32, random_flip=False, random_crop=1.0,
)  # fmt: skip

ORIGINAL = replace(TINY, vision_width=64, text_width=64, head_width=64, save_original=True)
"""With heads as wide as the original's."""


@pytest.fixture(scope="module")
def world_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_world_run(tmp_path_factory.mktemp("world") / "run", WorldRunSettings(num_scenes=32))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_bert_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def trained(world_run: RunDir, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("albef") / "out"
    train_albef([world_run], replace(ORIGINAL, tokenizer=str(tokenizer_dir)), output)
    return output


def weights_of(loaded: LoadedAlbef) -> dict[str, Tensor]:
    return {**loaded.model.state_dict(), **{f"m.{n}": t for n, t in (loaded.momentum or {}).items()}}


def assert_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("name", ["itc", "itm", "mlm"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_each_loss_falls(world_run: RunDir, tokenizer_dir: Path, tmp_path: Path, name: str, momentum: float) -> None:
    settings = replace(
        TINY, tokenizer=str(tokenizer_dir), losses=(name,), momentum=momentum, queue_size=8, max_steps=40,
        log_every_steps=10, dropout=0.0, mlm_share=0.3, save_every_steps=100,
    )  # fmt: skip
    summary = train_albef([world_run], settings, tmp_path / "out")
    assert set(summary.last_losses) == {name, "loss"}
    share = {"itc": 0.95, "itm": 0.95, "mlm": 0.9}[name]
    assert summary.last_losses[name] < share * summary.first_losses[name]


def test_a_folder_and_an_original_file_hold_the_same(trained: Path, tmp_path: Path) -> None:
    names = {"config.json", "model.safetensors", "momentum.safetensors", "albef.pth", "preprocessor_config.json"}
    assert names <= {path.name for path in trained.iterdir()}
    folder = load_trainable_albef(str(trained))
    assert folder.momentum is not None
    assert 0 < int(folder.momentum["queue.images"].square().sum(dim=1).count_nonzero()) == 32
    content = torch.load(trained / "albef.pth", weights_only=True)["model"]
    assert content["temp"].shape == ()
    assert content["image_queue"].shape == (16, 32)
    assert torch.equal(folder.temperature, content["temp"].reshape(1))
    assert not torch.equal(folder.temperature, torch.tensor([0.07]))
    for path in trained.glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "albef.pth").write_bytes((trained / "albef.pth").read_bytes())
    file = load_trainable_albef(str(tmp_path / "albef.pth"))
    assert_equal(weights_of(file), weights_of(folder))
    assert replace(file.model.config, dropout=0.1) == folder.model.config
    assert file.model.vision.config == folder.model.vision.config
    own = load_file(trained / "model.safetensors")
    assert {name.split(".")[0] for name in own} == {
        "bert", "cls", "visual_encoder", "vision_proj", "text_proj", "itm_head", "temp"
    }  # fmt: skip


def test_the_text_encoder_opens_as_bert(trained: Path) -> None:
    bert, info = BertModel.from_pretrained(trained, add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert len(bert.encoder.layer) == 1
    tokenizer = AutoTokenizer.from_pretrained(trained)
    encoded = tokenizer(["a red ball", "two small blue stars"], padding=True, return_tensors="pt")
    loaded = load_albef(str(trained), device=torch.device("cpu"))
    mask = encoded.attention_mask.bool()
    with torch.no_grad():
        expected = bert.eval()(**encoded).last_hidden_state
        found = loaded.model.text.encode(encoded.input_ids, mask)
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-4, rtol=1e-4)
    assert BlipImageProcessor.from_pretrained(trained).size == {"height": 32, "width": 32}
    assert not loaded.model.training
    assert loaded.momentum is None


def test_training_goes_on_with_momentum_and_queue(world_run: RunDir, trained: Path, tmp_path: Path) -> None:
    settings = replace(
        TINY, init=str(trained), max_steps=1, learning_rate=1e-9, min_learning_rate=0.0, weight_decay=0.0
    )
    train_albef([world_run], settings, tmp_path / "out")
    before, after = load_trainable_albef(str(trained)), load_trainable_albef(str(tmp_path / "out"))
    for name, tensor in weights_of(before).items():
        if name.startswith("m.queue"):
            continue
        torch.testing.assert_close(weights_of(after)[name], tensor, atol=1e-4, rtol=1e-3)
    assert before.momentum is not None
    assert after.momentum is not None
    place = int(before.momentum["queue.place"])
    assert int(after.momentum["queue.place"]) == (place + 8) % 32
    rows = [row for row in range(32) if (row - place) % 32 >= 8]
    assert torch.equal(after.momentum["queue.texts"][rows], before.momentum["queue.texts"][rows])
    smaller = build_objective(before, replace(settings, queue_size=8)).momentum
    assert smaller is not None
    assert bool(smaller.queue.features()[0].square().sum(dim=1).all())


class StopError(Exception):
    """Ends a training as a crash would."""


def test_a_crash_changes_nothing(
    world_run: RunDir, tokenizer_dir: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(ORIGINAL, tokenizer=str(tokenizer_dir))
    whole, forward = AlbefLosses.forward, [0]

    def crash(self: AlbefLosses, *args: Any, **options: Any) -> dict[str, Tensor]:
        forward[0] += 1
        if forward[0] == 6:
            raise StopError
        return whole(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AlbefLosses, "forward", crash)
        with pytest.raises(StopError):
            train_albef([world_run], settings, tmp_path / "out")
    torch.rand(100)  # the generator's state at the restart must not matter
    train_albef([world_run], settings, tmp_path / "out")
    for name in ("model.safetensors", "momentum.safetensors"):
        assert_equal(load_file(tmp_path / "out" / name), load_file(trained / name))
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (tmp_path / "out", trained)]
    plain = [[{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in own] for own in lines]
    assert plain[0] == plain[1]


def test_another_model_to_start_from_is_another_training(world_run: RunDir, trained: Path, tmp_path: Path) -> None:
    settings = replace(TINY, init=str(trained), max_steps=1)
    train_albef([world_run], settings, tmp_path / "out")
    assert train_albef([world_run], settings, tmp_path / "out").already_done
    with pytest.raises(FingerprintMismatchError, match="another model to start from"):
        train_albef([world_run], replace(settings, init=str(tmp_path / "out")), tmp_path / "out")


def test_an_original_file_starts_model_momentum_and_queue(
    world_run: RunDir, tokenizer_dir: Path, tmp_path: Path
) -> None:
    size = len(AutoTokenizer.from_pretrained(tokenizer_dir))
    original = build_original_albef(size)
    for file in tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({"model": original, "epoch": 29}, tmp_path / "ALBEF.pth")
    settings = replace(TINY, init=str(tmp_path / "ALBEF.pth"), queue_size=8, max_steps=1)
    loaded = load_trainable_albef(settings.init)
    assert loaded.model.config.mask_token_id == 4
    objective = build_objective(loaded, settings)
    assert objective.contrast.temperature.item() == pytest.approx(0.05)
    assert objective.momentum is not None
    assert torch.equal(objective.momentum.queue.features()[0], original["image_queue"].T)
    assert torch.equal(objective.momentum.model.vision.class_embedding, original["visual_encoder_m.cls_token"])
    train_albef([world_run], settings, tmp_path / "out")
    plain = {name: tensor for name, tensor in original.items() if "_m." not in name and "queue" not in name}
    torch.save({"model": plain}, tmp_path / "ALBEF.pth")
    assert load_trainable_albef(settings.init).momentum is None
    plain["surprise"] = plain.pop("itm_head.bias")
    torch.save({"model": plain}, tmp_path / "ALBEF.pth")
    with pytest.raises(UsageError, match=r"missing: itm_head\.bias; unknown: surprise\."):
        load_albef(settings.init, device=torch.device("cpu"))


def test_parts_start_from_published_weights(world_run: RunDir, tmp_path: Path) -> None:
    bert_dir = small_models.save_bert(tmp_path / "bert")
    torch.save({"model": build_timm().state_dict()}, tmp_path / "deit.pth")
    torch.manual_seed(0)
    vit = ViTModel(
        TheirViTConfig(
            hidden_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
        )
    )
    vit.save_pretrained(tmp_path / "vit")
    plain = replace(TINY, text_init=str(bert_dir), max_steps=1, learning_rate=1e-9, min_learning_rate=0.0)
    bert = load_file(bert_dir / "model.safetensors")
    expected = {"deit.pth": build_timm().state_dict()["norm.weight"], "vit": vit.state_dict()["layernorm.weight"]}
    for name, norm in expected.items():
        output = tmp_path / f"from-{name}"
        train_albef([world_run], replace(plain, vision_init=str(tmp_path / name)), output)
        saved = load_file(output / "model.safetensors")
        torch.testing.assert_close(saved["visual_encoder.norm.weight"], norm, atol=1e-6, rtol=0)
        assert saved["visual_encoder.pos_embed"].shape[1] == 1 + 16, "at the size of the images"
        same = [key for key in bert if key in saved]
        assert "bert.encoder.layer.1.output.dense.weight" in same
        assert "cls.predictions.transform.dense.weight" in same
        for key in same:
            torch.testing.assert_close(saved[key], bert[key], atol=1e-6, rtol=0)
    with pytest.raises(UsageError, match="fewer --text-depth or --fusion-depth"):
        train_albef([world_run], replace(plain, text_depth=2), tmp_path / "out")


def test_going_on_with_larger_images_interpolates_the_positions(
    world_run: RunDir, trained: Path, tmp_path: Path
) -> None:
    settings = replace(TINY, init=str(trained), max_steps=1, image_size_px=48)
    train_albef([world_run], settings, tmp_path / "out")
    loaded = load_trainable_albef(str(tmp_path / "out"))
    assert loaded.preparation.image_size_px == 48
    assert loaded.model.vision.position_embedding.shape[1] == 1 + 36
    assert loaded.momentum is not None
    assert loaded.momentum["model.vision.position_embedding"].shape[1] == 1 + 36
    own = replace(settings, image_size_px=None)
    assert train_albef([world_run], own, tmp_path / "own").steps == 1
    assert load_trainable_albef(str(tmp_path / "own")).preparation.image_size_px == 32
    with pytest.raises(UsageError, match="--image-size-px 50: .*no multiple of patch 8"):
        train_albef([world_run], replace(settings, image_size_px=50), tmp_path / "none")
    with pytest.raises(UsageError, match="image_size_px is 50; expected a multiple of the patch, 8"):
        train_albef([world_run], replace(TINY, tokenizer=str(trained), image_size_px=50), tmp_path / "none")


def test_one_fine_tuned_for_retrieval_is_run_and_not_trained(trained: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    tokenizer.save_pretrained(tmp_path)
    original = build_original_albef(len(tokenizer))
    tuned = {name.replace(".bert.", "."): tensor for name, tensor in original.items() if ".cls." not in name}
    tuned["idx_queue"] = torch.full((1, 8), -100)
    torch.save({"model": original}, tmp_path / "ALBEF.pth")
    torch.save({"model": tuned}, tmp_path / "mscoco.pth")
    whole, headless = (load_albef(str(tmp_path / f), device=torch.device("cpu")) for f in ("ALBEF.pth", "mscoco.pth"))
    images, tokens = torch.randn(2, 3, 32, 32), tokenizer(["a red ball", "a blue star"], return_tensors="pt").input_ids
    with torch.no_grad():
        logits = [own.model.itm_logits(own.model.vision(images), tokens, tokens > 0) for own in (whole, headless)]
    assert torch.equal(logits[0], logits[1])
    assert not any(name.startswith("head.") for name in headless.model.state_dict())
    with pytest.raises(UsageError, match=r"missing: text_encoder\.cls\.predictions\.bias"):
        load_trainable_albef(str(tmp_path / "mscoco.pth"))
    del tuned["visual_encoder_m.cls_token"]
    torch.save({"model": tuned}, tmp_path / "mscoco.pth")
    with pytest.raises(UsageError, match=r"missing: visual_encoder_m\.cls_token\."):
        load_albef(str(tmp_path / "mscoco.pth"), device=torch.device("cpu"))


def test_what_cannot_be_started_from_is_said(world_run: RunDir, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="None of --init, --text-init and --tokenizer"):
        train_albef([world_run], TINY, tmp_path / "out")
    small_models.save_opt(tmp_path / "opt")
    with pytest.raises(UsageError, match=r"no \[CLS\], \[MASK\], \[SEP\]; expected one of BERT's kind"):
        train_albef([world_run], replace(TINY, tokenizer=str(tmp_path / "opt")), tmp_path / "out")
    small_models.save_blip(tmp_path / "blip")
    with pytest.raises(UsageError, match="is a 'blip' model; expected an 'albef' one"):
        train_albef([world_run], replace(TINY, init=str(tmp_path / "blip")), tmp_path / "out")
    settings = replace(TINY, text_init=str(tmp_path / "opt"), vision_init=str(tmp_path / "blip"))
    with pytest.raises(UsageError, match="is a 'blip' model; expected one of vit, deit"):
        train_albef([world_run], settings, tmp_path / "out")
    with pytest.raises(UsageError, match="max_text_tokens is 60; expected at most 48"):
        train_albef([world_run], replace(TINY, init=str(trained), max_text_tokens=60), tmp_path / "out")


def test_masks_depend_on_seed_step_and_row_alone(trained: Path) -> None:
    loaded = load_trainable_albef(str(trained))
    settings = replace(TINY, tokenizer="x", mlm_share=0.5)
    inputs = AlbefInputs(settings, loaded.tokenizer, join_processes(settings), num_images=8)

    def masks(texts: list[str], step: int, seed: int = 0) -> Tensor:
        batch = Batch(torch.zeros(len(texts), 3, 32, 32), texts, [str(row) for row in range(len(texts))], Cursor())
        return inputs(batch, Draws(seed, step))["is_masked_BT"]

    texts = ["a red ball and a blue star on grass"] * 4
    first = masks(texts, 0)
    torch.rand(10)
    assert torch.equal(masks(texts, 0), first)
    assert not torch.equal(masks(texts, 1), first)
    assert not torch.equal(masks(texts, 0, seed=1), first)
    assert not torch.equal(first[0], first[1])
    longer = masks([*texts[:3], f"{texts[0]} and {texts[0]}"], 0)
    words = first.shape[1] - 1
    assert torch.equal(longer[:3, :words], first[:3, :words]), "another row's length changes nothing"
