"""Reading BLIP checkpoints: published layouts load, all else is refused with advice, and nothing runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from capfilt.errors import UsageError
from capfilt.models.convert_blip import Kind
from capfilt.weights.blip import LoadedBlip, load_blip, load_trainable_blip
from tests import factories

CPU = torch.device("cpu")


def load(name: Path | str, kind: Kind = "captioner") -> LoadedBlip:
    return load_blip(str(name), kind, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    factories.save_captioner(root / "captioner")
    factories.save_filter(root / "filter")
    return {"captioner": root / "captioner", "filter": root / "filter"}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A captioner's folder to spoil."""
    return Path(shutil.copytree(folders["captioner"], tmp_path / "copy"))


@pytest.mark.parametrize("kind", ["captioner", "filter"])
def test_folder_loads_with_the_digest_of_every_file(folders: dict[str, Path], kind: Kind) -> None:
    loaded = load(folders[kind], kind)
    assert set(loaded.digests) >= {
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    assert loaded.preparation.image_size_px == factories.IMAGE_SIZE_PX
    assert loaded.prompt == "a picture of "
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_sharded_safetensors_and_bin_load_alike(copy: Path, folders: dict[str, Path]) -> None:
    state = load_file(copy / "model.safetensors")
    expected = load(folders["captioner"]).model.state_dict()
    (copy / "model.safetensors").unlink()
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: state[name] for name in part}, copy / f"model-0000{number}-of-00002.safetensors")
    found = load(copy)
    assert len([name for name in found.digests if name.startswith("model-")]) == 2
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.model.state_dict().items())
    for file in copy.glob("model-*"):
        file.unlink()
    torch.save(state, copy / "pytorch_model.bin")
    found = load(copy)
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.model.state_dict().items())


@pytest.mark.parametrize("kind", ["captioner", "filter"])
def test_original_pth_loads_with_the_tokenizer_beside_it(kind: Kind, tmp_path: Path) -> None:
    build = factories.build_captioner if kind == "captioner" else factories.build_filter
    vocabulary = factories.read_bert_vocabulary()
    theirs = build(config=factories.original_config(vocabulary_size=len(vocabulary)))
    factories.save_original(tmp_path / "model.pth", theirs.state_dict())
    factories.save_tokenizer(tmp_path, vocabulary)
    loaded = load(tmp_path / "model.pth", kind)
    weight = "vision_model.encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(loaded.model.vision.blocks[1].fc1.weight, theirs.state_dict()[weight])
    assert set(loaded.digests) >= {"model.pth", "vocab.txt"}
    factories.save_tokenizer(tmp_path)  # of another model
    with pytest.raises(UsageError, match=r"\[SEP\] 3; the model has 30524 and 102"):
        load(tmp_path / "model.pth", kind)


@pytest.mark.parametrize(("kind", "other"), [("captioner", "filter"), ("filter", "captioner")])
def test_the_other_kind_is_named_for_what_it_is(folders: dict[str, Path], kind: Kind, other: Kind) -> None:
    with pytest.raises(UsageError, match=f"weights of a BLIP {other}; expected a {kind}") as refused:
        load(folders[other], kind)
    assert str(folders[other]) in str(refused.value)


@pytest.mark.parametrize("kind", ["captioner", "filter"])
def test_what_is_trained_has_the_weights_of_what_is_run(folders: dict[str, Path], kind: Kind) -> None:
    to_run, to_train = load(folders[kind], kind), load_trainable_blip(folders[kind], kind)
    found = to_train.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in to_run.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in to_train.model.parameters())
    assert to_train.preparation == to_run.preparation
    assert not to_train.tokenizer.init_kwargs["local_files_only"]  # would be saved with what is trained


def test_captioner_names_its_own_prompt(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"capfilt_prompt": "photo of "}))
    assert load(copy).prompt == "photo of "


def test_half_precision_files_load_in_the_precision_asked_for(copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in state.items()}, copy / "model.safetensors")
    assert {p.dtype for p in load(copy).model.parameters()} == {torch.float32}


def spoil_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


def drop_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["vision_model.post_layernorm.bias"]
    save_file(state, folder / "model.safetensors")


def shrink_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["vision_model.post_layernorm.bias"] = torch.zeros(3)
    save_file(state, folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_resample(folder: Path) -> None:
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"resample": 0}))


SPOILT = {
    "truncated weights": (spoil_weights, "cannot be read"),
    "a missing weight": (drop_weight, r"missing: vision_model\.post_layernorm\.bias"),
    "a weight of another size": (shrink_weight, r"vision\.norm\.bias \(3,\), expected \(48,\)"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"has no model\.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "cannot be read"),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
    "another architecture": (lambda folder: change_config(folder, model_type="bert"), "'bert' model"),
    "an absurd config": (
        lambda folder: change_config(folder, vision_config={"hidden_size": "x"}),
        "no BLIP conf",
    ),
    "nearest-neighbour resizing": (change_resample, "bicubic"),
    "a broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "no readable tokenizer",
    ),
    "no tokenizer": (
        lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")],
        "neither tokenizer.json nor vocab.txt",
    ),
}


@pytest.mark.parametrize("damage", list(SPOILT))
def test_spoilt_folder_is_refused_with_what_was_found(copy: Path, damage: str) -> None:
    spoil, message = SPOILT[damage]
    spoil(copy)
    for loader in (load, load_trainable_blip):
        if damage == "nearest-neighbour resizing" and loader is load_trainable_blip:
            continue  # training asks the processor for mean and deviation only
        with pytest.raises(UsageError, match=message):
            loader(copy, "captioner")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "Give --captioner"),
        ("./nowhere", "There is no captioner"),
        ("/nowhere/at/all", "There is no captioner"),
    ],
)
def test_name_that_means_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(name)


def test_hub_id_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="`hf download nobody/nothing-at-all"):
        load("nobody/nothing-at-all")


def test_hub_id_in_the_cache_loads_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folders: dict[str, Path]
) -> None:
    import huggingface_hub.constants as constants

    snapshot = tmp_path / "models--someone--blip" / "snapshots" / ("0" * 40)
    shutil.copytree(folders["captioner"], snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert load("someone/blip").digests == load(folders["captioner"]).digests
