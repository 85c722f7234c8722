"""The benchmarks' own parts: sides that compute the same, the protocol between processes, the count of operations."""

from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import curation, floor, ranks, training
from benchmarks.__main__ import ROWS, table
from benchmarks.sides import Case
from benchmarks.timing import time_sides
from benchmarks.works import SIDES
from capfilt.weights.find import EMBEDDED_DIR, EMBEDDED_FOLDERS

CASE = Case(models=Path("nowhere"), size="embedded", dtype="float32", batch_size=2, num_images=3)

pytestmark = pytest.mark.skipif(
    not all((EMBEDDED_DIR / folder).is_dir() for folder in EMBEDDED_FOLDERS.values()),
    reason="the embedded models are not built (make assets)",
)


def test_every_row_has_sides_and_a_goal_for_each_precision() -> None:
    for row in ROWS:
        assert {"capfilt", *row.goals} - set(SIDES[row.work]) <= {"floor", "data-juicer"}
        assert {len(goals) for goals in row.goals.values()} == {len(row.dtypes)}


def test_the_script_finds_the_scores_of_the_run() -> None:
    """Captions are drawn differently, but the web captions' scores must be those of `capfilt run`."""
    script = curation.plain_script(CASE)()
    assert isinstance(script, dict)
    run = curation.OurRun(CASE)
    run()
    web = {row["key"]: row for row in run.read_manifest() if row["source"] == "web"}
    assert len(web) == len(script) == 3
    for ours, theirs in zip(web.values(), script.values(), strict=True):
        assert ours["text"] == theirs["texts"][0]
        assert ours["clip_score"] == pytest.approx(theirs["clip_scores"][0], abs=1e-4)
        assert len(theirs["texts"]) == 11
        assert len(theirs["itm_scores"]) == len(set(theirs["chosen"])) == 3
        assert all(0 <= score <= 1 for score in theirs["itm_scores"])


def test_operations_grow_with_the_images_and_are_those_of_the_image_encoders() -> None:
    one, three = (floor.count_gflop(replace(CASE, num_images=number, batch_size=1)) for number in (1, 3))
    assert 2.5 < three / one < 3.5
    assert 0.1 < one < 10
    assert floor.measure_peak(torch.float32) > 1


def test_sides_answer_from_processes_of_their_own() -> None:
    timed = time_sides("run", CASE, 2, ["capfilt", "models alone"])
    assert [len(side.seconds) for side in timed.values()] == [2, 2]
    assert all(side.peak_mib > 100 and side.minimum > 0 for side in timed.values())


def test_table_has_a_line_for_each_ratio() -> None:
    side = {"median_seconds_per_image": 1.0, "minimum_seconds_per_image": 0.5, "peak_mib": 10.0, "seconds": [1.0]}
    ratio = {"median": 6.0, "minimum": 5.0, "goal": None}
    row = {
        "name": "run", "size": "base", "dtype": "float32", "sides": {"capfilt": side, "a": side, "b": side},
        "ratios": dict(zip("ab", itertools.repeat(ratio), strict=False)),
    }  # fmt: skip
    assert [line.count("|") for line in table([row, row]).splitlines()] == [11] * 6


def test_the_plain_step_of_stage_1_has_the_losses_and_gradients_of_ours() -> None:
    """With transformers' Q-Former, a pass for each loss: an implementation apart from ours, with the same weights."""
    case = Case(models=Path("nowhere"), size="tiny", dtype="float32", batch_size=6)
    sizes = training.SIZES["tiny"]
    stage = training.build_stage1(case)
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # lively
    plain = training.PlainStage1(deepcopy(stage))
    for module in (stage, plain):
        module.eval()  # no dropout
    _, texts = training.draw_batch(case)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(6, 5, sizes.vision.width, generator=generator)
    uniform = torch.rand(2, 6, generator=generator)
    ours, theirs = stage(features, texts, uniform_2B=uniform), plain(features, texts, uniform)
    for name, loss in theirs.items():
        assert ours[name].item() == pytest.approx(loss.item(), rel=1e-4), name
    ours["loss"].backward()
    torch.stack(list(theirs.values())).sum().backward()
    pairs = {
        "query_tokens": (stage.qformer.query_tokens, plain.model.query_tokens),
        "vision_norm": (stage.vision_norm.weight, plain.norm.weight),
        "words": (stage.qformer.word_embedding.weight, plain.model.embeddings.word_embeddings.weight),
        "itm_head": (stage.itm_head.weight, plain.model.itm_head.weight),
    }
    for name, (own, other) in pairs.items():
        torch.testing.assert_close(own.grad, other.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("side", sorted(SIDES["stage1"]))
def test_both_steps_of_stage_1_run(side: str) -> None:
    step = SIDES["stage1"][side](Case(models=Path("nowhere"), size="tiny", dtype="float32", batch_size=2))
    step()
    step()


def test_the_readme_has_the_memory_of_a_rank() -> None:
    """Of the papers' sizes: 188M for the Q-Former with its text side, as BLIP-2 says, and the 2.7B of OPT."""
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    for need in ranks.needs():
        assert f"  {need.row()}\n" in readme
    by_name = {need.name: need for need in ranks.needs()}
    assert by_name["stage 1, EVA ViT-g/14"].trained == pytest.approx(188e6, rel=0.01)
    assert by_name["stage 2, ViT-g, OPT-2.7B"].llm == pytest.approx(2.7e9, rel=0.03)
