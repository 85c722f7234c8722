"""A run of scenes is a run as any other: it verifies, and its captions are true."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_samples
from capfilt.world.language import judge
from capfilt.world.scenes import draw_scene
from capfilt.world.training_run import WorldRunSettings, write_world_run

SETTINGS = WorldRunSettings(num_scenes=30, first_seed=500, min_count=2, captions_per_scene=3, scenes_per_shard=20)


def test_run_holds_true_captions(tmp_path: Path) -> None:
    run = write_world_run(tmp_path / "run", SETTINGS)
    assert run.shard_names() == ["00000", "00001"]
    rows = read_manifest([run], kept_only=True).to_pylist()
    assert len(rows) == 30 * 3
    scenes = {row["url"]: draw_scene(int(row["url"].removeprefix("world:"))) for row in rows}
    assert len(scenes) == 30
    assert all(judge(row["text"], scenes[row["url"]]).is_true for row in rows)
    assert all(sum(group.count for group in scene.groups) >= 2 for scene in scenes.values())
    samples = [sample for shard in run.shard_names() for sample in read_samples(run, shard)]
    assert [sample.key for sample in samples] == list(dict.fromkeys(row["key"] for row in rows))


def test_false_captions_are_dropped_as_known_false(tmp_path: Path) -> None:
    run = write_world_run(tmp_path / "run", replace(SETTINGS, false_captions_per_scene=2))
    rows = read_manifest([run]).to_pylist()
    scenes = {row["url"]: draw_scene(int(row["url"].removeprefix("world:"))) for row in rows}
    dropped = [row for row in rows if not row["kept"]]
    assert len(dropped) == 30 * 2
    assert {row["drop_reason"] for row in dropped} == {"known_false"}
    assert all(judge(row["text"], scenes[row["url"]]).verdict == "false" for row in dropped)
    assert len(read_manifest([run], kept_only=True)) == 30 * 3


def test_finished_shards_are_not_written_again(tmp_path: Path) -> None:
    run = write_world_run(tmp_path / "run", SETTINGS)
    files = {path: path.stat().st_mtime_ns for path in run.path.rglob("*.parquet")}
    run.stage_file("manifest", "00001").unlink()
    write_world_run(tmp_path / "run", SETTINGS)
    again = {path: path.stat().st_mtime_ns for path in RunDir.open(run.path).path.rglob("*.parquet")}
    assert again.keys() == files.keys()
    assert [path.parent.name for path in files if files[path] != again[path]] == ["manifest"]


def test_run_of_pairs_has_a_relation_in_every_scene(tmp_path: Path) -> None:
    settings = WorldRunSettings(num_scenes=12, num_groups=2, captions_per_scene=1, scenes_per_shard=12)
    rows = read_manifest([write_world_run(tmp_path / "run", settings)]).to_pylist()
    scenes = [draw_scene(int(row["url"].removeprefix("world:"))) for row in rows]
    assert len(scenes) == 12
    assert all(scene.relation is not None for scene in scenes)
