"""The training loop: resumption, refusals, signals, metrics."""

from __future__ import annotations

import io
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from capfilt.errors import CapfiltError, CorruptionError, FingerprintMismatchError, UsageError
from capfilt.models.vit import VisionTransformer, ViTConfig
from capfilt.progress import Progress, StreamProgress
from capfilt.settings import TrainSettings
from capfilt.train.batches import Batch, Cursor, Draws, from_arrays, iterate_batches
from capfilt.train.loop import TrainSummary, train
from capfilt.train.optim import (
    build_optimizer,
    learning_rate_at,
    parameter_groups,
    set_learning_rate,
    vision_rate_scales,
)
from capfilt.train.processes import join_processes
from capfilt.weights.devices import name_dtype

SETTINGS = TrainSettings(
    max_steps=20, batch_size=8, warmup_steps=3, save_every_steps=5, log_every_steps=4, random_flip=True,
    learning_rate=1e-2,
)  # fmt: skip
Hook = Callable[[int, Tensor], Tensor]


def run_training(
    folder: Path,
    hook: Hook = lambda _, loss: loss,
    settings: TrainSettings = SETTINGS,
    while_saving: Callable[[], None] = lambda: None,
    dropout: float = 0.1,
    while_opening: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> TrainSummary:
    """A small network on 50 random images; `hook` may change the loss of a step."""
    images = np.random.default_rng(0).integers(0, 255, (50, 8, 8, 3), dtype=np.uint8)
    dataset = from_arrays(images, [[f"a {i}", f"here is {i}", "c"] for i in range(50)])
    torch.manual_seed(settings.seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Dropout(dropout), nn.LayerNorm(16), nn.Linear(16, 1))

    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor, target: Tensor, step: int) -> dict[str, Tensor]:
            loss = (self.model(images).squeeze(1) - target).square().mean()
            return {"loss": hook(step, loss), "mse": loss}

    def prepare(batch: Batch, draws: Draws) -> dict[str, Any]:
        target = torch.tensor([float(len(text)) for text in batch.texts])
        return {"images": batch.images_on("cpu"), "target": target, "step": draws.step}

    def open_batches(cursor: Cursor) -> Iterator[Batch]:
        while_opening()
        return iterate_batches(dataset, settings, cursor)

    def save(target: Path) -> None:
        while_saving()
        torch.save(model.state_dict(), target / "model.bin")

    return train(
        Objective(),
        prepare,
        open_batches=open_batches,
        settings=settings,
        output_dir=folder,
        save=save,
        processes=join_processes(settings),
        progress=progress,
    )


def read_metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "model.bin", weights_only=True)


class StopError(Exception):
    """Ends a training as a crash would."""


def stop_at(step: int) -> Hook:
    def hook(current: int, loss: Tensor) -> Tensor:
        if current == step:
            raise StopError
        return loss

    return hook


def test_what_comes_before_the_first_step_is_ended_at_once_and_not_counted(tmp_path: Path) -> None:
    """All pictures may be decoded there, which takes minutes."""
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "ended", while_opening=lambda: signal.raise_signal(signal.SIGINT))
    assert not (tmp_path / "ended" / "checkpoints").exists()
    began = time.monotonic()
    summary = run_training(tmp_path / "slow", while_opening=lambda: time.sleep(1.5))
    assert time.monotonic() - began - summary.seconds >= 1.5


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainSummary]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run_training(folder)


@pytest.mark.parametrize("step", [2, 7, 13, 19])
def test_a_crash_changes_nothing(undisturbed: tuple[Path, TrainSummary], tmp_path: Path, step: int) -> None:
    with pytest.raises(StopError):
        run_training(tmp_path, stop_at(step))
    torch.rand(100)  # the generator's state at the restart must not matter
    summary = run_training(tmp_path)
    assert read_metrics(tmp_path) == read_metrics(undisturbed[0])
    expected = weights(undisturbed[0])
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path).items())
    assert summary.first_losses == undisturbed[1].first_losses
    assert summary.last_losses == undisturbed[1].last_losses


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_and_the_next_command_goes_on(
    undisturbed: tuple[Path, TrainSummary], tmp_path: Path, number: int, error: type[BaseException]
) -> None:
    def interrupt(step: int, loss: Tensor) -> Tensor:
        if step == 6:
            signal.raise_signal(number)
        return loss

    before = signal.getsignal(number)
    said = io.StringIO()
    with pytest.raises(error) as caught:
        run_training(tmp_path, interrupt, progress=StreamProgress(said))
    assert "Stopped after step 7, which is saved; the same command goes on from there.\n" in said.getvalue()
    assert error is KeyboardInterrupt or caught.value.code == 143
    assert signal.getsignal(number) is before
    assert (tmp_path / "checkpoints" / "step-00000007").is_dir()
    run_training(tmp_path, stop_at(6))  # step 6 is not taken again
    assert read_metrics(tmp_path) == read_metrics(undisturbed[0])


def test_a_signal_while_the_model_is_written_is_raised_after_it(tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path, settings=settings, while_saving=lambda: signal.raise_signal(signal.SIGINT))
    assert (tmp_path / "model.bin").exists()
    assert run_training(tmp_path, settings=settings).already_done


def test_where_it_goes_on_is_said_and_what_is_passed_over(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        run_training(tmp_path, stop_at(12))
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert len(kept) == 2
    (kept[1] / "model.safetensors").write_bytes(b"")
    said = io.StringIO()
    run_training(tmp_path, progress=StreamProgress(said))
    step = int(kept[0].name.removeprefix("step-"))
    assert f"{kept[1]} is damaged and passed over.\nGoes on after step {step}, from {kept[0]}.\n" in said.getvalue()


def test_a_finished_model_that_is_gone_is_missed_and_comes_back(tmp_path: Path) -> None:
    run_training(tmp_path)
    expected = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "model.bin").unlink()
    with pytest.raises(CorruptionError, match=r"model\.bin is gone. Remove .*training\.json and repeat"):
        run_training(tmp_path)
    (tmp_path / "training.json").unlink()
    run_training(tmp_path, stop_at(0))
    assert (tmp_path / "model.bin").read_bytes() == expected


def test_the_same_command_again_does_nothing(tmp_path: Path) -> None:
    first = run_training(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    second = run_training(tmp_path, stop_at(0))
    assert second == replace(first, already_done=True)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fields": 1}', "\0"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    run_training(tmp_path)
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(CorruptionError, match=r"training\.json cannot be read .*Remove it and repeat"):
        run_training(tmp_path)


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        run_training(tmp_path, stop_at(7))
    with pytest.raises(FingerprintMismatchError, match=r"learning_rate 0.01 -> 0.02"):
        run_training(tmp_path, settings=replace(SETTINGS, learning_rate=0.02))
    run_training(tmp_path, settings=replace(SETTINGS, log_every_steps=5, save_every_steps=7))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_with_step_and_keys(tmp_path: Path, value: float) -> None:
    seen: list[str] = []

    def spoil(step: int, loss: Tensor) -> Tensor:
        return loss * value if step == 7 else loss

    with pytest.raises(CapfiltError, match=r"Step 8: the loss \(loss (nan|inf), mse [0-9.]+\) is not finite") as caught:
        run_training(tmp_path, spoil)
    seen = str(caught.value).split("Keys of the batch: ")[1].split(".")[0].split(", ")
    assert len(seen) == 8
    assert all(key.isdigit() for key in seen)
    assert (tmp_path / "checkpoints" / "step-00000005").is_dir()
    assert not (tmp_path / "training.json").exists()


def test_a_gradient_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    def spoil(step: int, loss: Tensor) -> Tensor:
        return loss + (loss * 0).sqrt() if step == 3 else loss  # the root's slope at 0 has no bound

    with pytest.raises(CapfiltError, match=r"Step 4: the gradient norm \((nan|inf)\) is not finite"):
        run_training(tmp_path, spoil)


def test_summary_and_metrics_are_averages(undisturbed: tuple[Path, TrainSummary]) -> None:
    folder, summary = undisturbed
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20]
    assert summary.first_losses == {name: lines[0][name] for name in ("loss", "mse")}
    assert summary.last_losses["loss"] < summary.first_losses["loss"]
    assert summary.steps == 20
    record = json.loads((folder / "training.json").read_text())
    assert record["sha256"].keys() == {"model.bin"}


def test_the_rate_warms_up_and_follows_a_cosine() -> None:
    settings = TrainSettings(max_steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.2)
    rates = [learning_rate_at(step, settings) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.6)
    assert rates[110] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_muon_goes_on_exactly_where_it_stopped(tmp_path: Path) -> None:
    settings = replace(SETTINGS, optimizer="muon")
    run_training(tmp_path / "whole", settings=settings)

    def stop(step: int, loss: Tensor) -> Tensor:
        return loss * math.nan if step == 12 else loss

    with pytest.raises(CapfiltError, match="not finite"):
        run_training(tmp_path / "parts", stop, settings)
    run_training(tmp_path / "parts", settings=settings)
    whole, parts = (torch.load(tmp_path / part / "model.bin") for part in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_muon_takes_the_matrices_inside_and_adamw_the_rest() -> None:
    model = nn.ModuleDict({"word_embedding": nn.Embedding(6, 4), "inside": nn.Linear(4, 3), "norm": nn.LayerNorm(3)})
    model["head"] = nn.ModuleDict({"vocabulary": nn.Linear(4, 6)})
    model["head"]["vocabulary"].weight = model["word_embedding"].weight
    before = model["inside"].weight.detach().clone()
    optimizer = build_optimizer(model.named_parameters(), replace(SETTINGS, optimizer="muon", weight_decay=0.0))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [sorted(names[id(p)] for p in group["params"]) for group in optimizer.param_groups]
    assert groups == [
        ["inside.weight"],
        ["word_embedding.weight"],
        ["head.vocabulary.bias", "inside.bias", "norm.bias", "norm.weight"],
    ]
    hidden = model["inside"](model["word_embedding"](torch.tensor([0, 3, 5])))
    (model["norm"](hidden) * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    optimizer.step()
    update = torch.linalg.svdvals(before - model["inside"].weight.detach())
    assert update[0] < 2 * update[1], "singular values of an update are about equal"


def test_vectors_and_frozen_weights_have_no_decay_and_no_state() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    decayed, free = parameter_groups(model.named_parameters(), 0.05)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 4)]
    assert [tuple(p.shape) for p in free["params"]] == [(4,), (4,), (4,)]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_take_their_share_of_every_steps_rate(optimizer: str) -> None:
    vision = VisionTransformer(ViTConfig(image_size_px=8, patch_size_px=4, width=8, depth=3, num_heads=2, mlp_width=8))
    model = nn.ModuleDict({"vision": vision, "head": nn.Linear(8, 2)})
    scales = vision_rate_scales(dict(model.named_parameters()), depth=3, decay=0.5)
    settings = replace(SETTINGS, optimizer=optimizer)
    built = build_optimizer(model.named_parameters(), settings, scales)
    again = build_optimizer(model.named_parameters(), settings, scales)
    again.load_state_dict({"state": {}, "param_groups": again.state_dict()["param_groups"]})  # as a resumption does
    for found in (built, again):
        set_learning_rate(found, 0.1)
        rates = {id(p): group["lr"] for group in found.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            share = 1.0
            if name.startswith("vision."):
                share = 0.5**4
            if name.startswith("vision.blocks."):
                share = 0.5 ** (3 - int(name.split(".")[2]))
            assert rates[id(parameter)] == pytest.approx(0.1 * share), name
        assert len(rates) == len(list(model.parameters()))


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    for name in ("run.json", "captioner/config.json"):
        file = tmp_path / name.replace("/", "-") / name
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        with pytest.raises(UsageError, match=f"holds other files \\({name.split('/')[0]}\\)"):
            run_training(tmp_path / name.replace("/", "-"))
        assert file.read_text() == "{}"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "train.log").write_text("begun")
    run_training(tmp_path / "new")
    assert (tmp_path / "new" / "train.log").read_text() == "begun"


def test_bfloat16_products_give_about_the_same_training(tmp_path: Path) -> None:
    full = run_training(tmp_path / "full")
    half = run_training(tmp_path / "half", settings=replace(SETTINGS, autocast="bfloat16"))
    for name, loss in full.last_losses.items():
        assert half.last_losses[name] == pytest.approx(loss, rel=0.05)
        assert half.last_losses[name] != loss
    assert {tensor.dtype for tensor in weights(tmp_path / "half").values()} == {torch.float32}
    with pytest.raises(FingerprintMismatchError, match="autocast"):
        run_training(tmp_path / "full", settings=replace(SETTINGS, autocast="bfloat16"))


def test_auto_is_what_the_device_is_fast_at_and_stays_as_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fast_at(dtype: torch.dtype) -> None:
        monkeypatch.setattr("capfilt.train.loop.choose_fast_dtype", lambda _name, _device: dtype)

    auto = replace(SETTINGS, autocast="auto")
    for dtype in (torch.float32, torch.bfloat16):
        name = name_dtype(dtype)
        fast_at(dtype)
        found = run_training(tmp_path / f"auto-{name}", settings=auto)
        explicit = run_training(tmp_path / name, settings=replace(SETTINGS, autocast=name))
        assert found.last_losses == explicit.last_losses
    fast_at(torch.float32)  # as on another machine
    assert run_training(tmp_path / "auto-bfloat16", settings=auto).already_done
    with pytest.raises(StopError):
        run_training(tmp_path / "cut", stop_at(13), auto)
    fast_at(torch.bfloat16)
    run_training(tmp_path / "cut", settings=auto)
    assert json.loads((tmp_path / "cut" / "training.json").read_text())["fields"]["autocast"] == "float32"
    for name, value in weights(tmp_path / "auto-float32").items():
        assert torch.equal(weights(tmp_path / "cut")[name], value)


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path: Path) -> None:
    large = replace(SETTINGS, batch_size=12, random_flip=False, log_every_steps=1, max_steps=6)
    small = replace(large, batch_size=4, accumulation_steps=3)
    expected = run_training(tmp_path / "large", settings=large, dropout=0.0)
    found = run_training(tmp_path / "small", settings=small, dropout=0.0)
    assert found.last_losses == pytest.approx(expected.last_losses, rel=1e-5)
    for name, value in weights(tmp_path / "large").items():
        torch.testing.assert_close(weights(tmp_path / "small")[name], value, atol=1e-6, rtol=1e-5)


def test_accumulation_goes_on_exactly_where_it_stopped(tmp_path: Path) -> None:
    settings = replace(SETTINGS, batch_size=4, accumulation_steps=2)
    run_training(tmp_path / "whole", settings=settings)
    with pytest.raises(StopError):
        run_training(tmp_path / "cut", stop_at(13), settings)
    run_training(tmp_path / "cut", settings=settings)
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")


def overflow_at(step: int) -> Hook:
    """A loss that is finite, but whose gradients are not, scaled or not."""

    def hook(current: int, loss: Tensor) -> Tensor:
        if current == step:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    return hook


def test_float16_passes_over_an_overflow_and_goes_on_with_its_scale(tmp_path: Path) -> None:
    half = replace(SETTINGS, autocast="float16")
    full = run_training(tmp_path / "full")
    found = run_training(tmp_path / "half", settings=half)  # its first steps overflow and are passed over
    assert found.last_losses == pytest.approx(full.last_losses, rel=0.2)
    with pytest.raises(StopError):
        run_training(tmp_path / "cut", lambda step, loss: stop_at(8)(step, overflow_at(3)(step, loss)), half)
    state = json.loads((tmp_path / "cut" / "checkpoints" / "step-00000005" / "state.json").read_text())
    assert state["scaler"]["scale"] < 65536, "lowered after the overflow, and kept"
    run_training(tmp_path / "cut", overflow_at(3), half)
    run_training(tmp_path / "undisturbed", overflow_at(3), half)
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "undisturbed")


def test_float16_refuses_gradients_that_never_are_finite(tmp_path: Path) -> None:
    settings = replace(SETTINGS, autocast="float16", max_steps=60, save_every_steps=100)
    with pytest.raises(CapfiltError, match=r"gradient norm .* is not finite"):
        run_training(tmp_path, lambda _, loss: overflow_at(0)(0, loss), settings)


def test_the_plot_is_there_when_the_training_is(undisturbed: tuple[Path, TrainSummary]) -> None:
    with Image.open(undisturbed[0] / "losses.png") as plot:
        assert plot.size == (960, 720)
