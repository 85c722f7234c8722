"""Work on a Ray cluster of this machine: the results of one process, whoever dies."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from capfilt.curation.annotate import annotate
from capfilt.curation.download import download
from capfilt.curation.selection import reselect
from capfilt.data.commit import file_sha256
from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from capfilt.engines.base import SHARDS
from capfilt.engines.cluster import RayEngine
from capfilt.errors import CapfiltError, UsageError
from capfilt.export.pairs import export_pairs
from capfilt.report.stats import compute_stats
from capfilt.settings import DownloadSettings, RaySettings
from capfilt.world.site import SiteSettings, WorldSite
from tests.cli.conftest import capfilt, capfilt_process
from tests.curation.downloads import rows_of, wait_for
from tests.curation.small_runs import Models, make_run, save_models
from tests.engines.works import UNITS, Sleeps, Tally

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

ALL = ("captions", "clip", "itm", "manifest")
NAMES = [f"{number:05d}" for number in range(12)]
TWO = RayEngine(RaySettings(num_workers=2, cpus_per_worker=1))
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a cluster of two cores on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    as_important_as_other_tests = {"worker_niceness": 0}
    context = ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, _system_config=as_important_as_other_tests
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def expected(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the stages that one process makes of `fresh_run`."""
    run = fresh_run(tmp_path_factory.mktemp("expected") / "run")
    annotated(run, models)
    return stage_files(run)


def fresh_run(path: Path) -> RunDir:
    return make_run(path, num_shards=6, num_samples=12)


def annotated(run: RunDir, models: Models, **options: object) -> object:
    settings = models.caption(batch_size=4), models.rank(batch_size=4), models.filter(batch_size=4)
    return annotate(run, ALL, *settings, **options)  # type: ignore[arg-type]


def stage_files(run: RunDir) -> dict[str, str]:
    return {str(path.relative_to(run.path)): file_sha256(path) for path in sorted(run.path.glob("*/*.parquet"))}


@pytest.mark.parametrize("is_light", [False, True])
def test_every_shard_once_by_other_processes(cluster: str, is_light: bool) -> None:
    tally, unit = Tally(), SHARDS if is_light else "images"
    names = [f"{number:05d}" for number in range(50)]
    found = dict(TWO.run(Sleeps(50, 0.2, is_light=is_light, unit=unit), names, tally))
    assert sorted(found) == names
    assert os.getpid() not in found.values()
    assert len(set(found.values())) == 2
    assert (tally.title, tally.done, tally.finished) == ("sleep", 50 if is_light else 50 * UNITS, 1)


def test_a_shard_that_ends_its_workers_is_set_aside(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    tally, done = Tally(), list[tuple[str, int]]()
    with pytest.raises(CapfiltError, match=r"1 of 12 shards were set aside: each ended 3 workers \(00004") as failure:
        done.extend(TWO.run(Sleeps(12 * UNITS, deadly="00004"), NAMES, tally))
    assert failure.value.exit_code == 1
    assert sorted(name for name, _ in done) == [name for name in NAMES if name != "00004"]
    assert tally.done == 11 * UNITS
    assert [text.partition(":")[0] for text in tally.said] == ["A worker ended at 00004"] * 3
    assert capsys.readouterr().out == ""


def test_that_there_is_less_room_than_asked_for_is_said(cluster: str) -> None:
    engine = RayEngine(RaySettings(num_workers=2, cpus_per_worker=2))
    found = dict(engine.run(Sleeps(12 * UNITS), NAMES, tally := Tally()))
    assert sorted(found) == NAMES
    assert [text.partition(";")[0] for text in tally.said] == ["The cluster has room for 1 worker of 2 CPUs"]


def test_a_shard_that_does_not_end_is_set_aside(cluster: str) -> None:
    tally, done = Tally(), list[tuple[str, int]]()
    engine = RayEngine(RaySettings(num_workers=2, cpus_per_worker=1, max_deaths=2, stall_seconds=4))
    with pytest.raises(CapfiltError, match=r"1 of 12 shards were set aside.*00004.*did not get on for 4 s"):
        done.extend(engine.run(Sleeps(12 * UNITS, seconds=3.0, endless="00004"), NAMES, tally))
    assert sorted(name for name, _ in done) == [name for name in NAMES if name != "00004"]
    assert tally.done == 11 * UNITS


def test_a_worker_that_is_stopped_is_replaced(cluster: str) -> None:
    """As one is whose machine hangs; its shard is done by another one."""
    stopped = list[int]()

    def stop_one() -> None:
        victim = wait_for(lambda: [one for one in psutil.Process().children(recursive=True) if is_working(one)])[0]
        os.kill(victim.pid, signal.SIGSTOP)
        stopped.append(victim.pid)

    stopper = threading.Thread(target=stop_one)
    stopper.start()
    engine = RayEngine(RaySettings(num_workers=2, cpus_per_worker=1, stall_seconds=2))
    found = dict(engine.run(Sleeps(12 * UNITS, seconds=1.0), NAMES, tally := Tally()))
    stopper.join()
    assert sorted(found) == NAMES
    assert stopped[0] not in list(found.values())[-6:]
    assert any("did not get on for 2 s" in text for text in tally.said)
    assert tally.done == 12 * UNITS


def test_an_error_of_the_work_is_raised_as_it_is(cluster: str) -> None:
    with pytest.raises(UsageError, match="^00004 is refused$"):
        list(TWO.run(Sleeps(12, refused="00004"), NAMES))


def test_stages_are_those_of_one_process(
    cluster: str, models: Models, expected: dict[str, str], tmp_path: Path
) -> None:
    run, tally = fresh_run(tmp_path / "run"), Tally()
    summary = annotated(run, models, progress=tally, engine=TWO)
    assert stage_files(run) == expected
    assert tally.done == 72
    assert "Wrote captions, clip, itm, manifest of 72 images" in summary.line()  # type: ignore[attr-defined]
    again = annotated(run, models, engine=TWO)
    assert "Nothing to do" in again.line()  # type: ignore[attr-defined]
    assert compute_stats(run, TWO) == compute_stats(run)
    assert verify_run(run, deep=True, engine=TWO) == verify_run(run, deep=True)
    chosen = reselect(run, threshold=0.3, engine=TWO)
    files = stage_files(run)
    export_pairs(run, tmp_path / "there.csv", dropped=True, engine=TWO)
    export_pairs(run, tmp_path / "here.csv", dropped=True)
    assert (tmp_path / "there.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()
    reselect(run, threshold=0.5)
    assert reselect(run, threshold=0.3).num_kept == chosen.num_kept
    assert stage_files(run) == files


def test_workers_that_are_killed_lose_nothing(
    cluster: str, models: Models, expected: dict[str, str], tmp_path: Path
) -> None:
    run, over, killed = fresh_run(tmp_path / "run"), threading.Event(), list[int]()

    def kill_now_and_then() -> None:
        rng = random.Random(0)
        while not over.wait(rng.uniform(0.1, 0.6)) and len(killed) < 3:
            if victims := [one for one in psutil.Process().children(recursive=True) if is_working(one)]:
                killed.append(victims[0].pid)
                os.kill(victims[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    engine = RayEngine(RaySettings(num_workers=2, cpus_per_worker=1, max_deaths=10))
    annotated(run, models, engine=engine)
    over.set()
    killer.join()
    assert killed
    assert stage_files(run) == expected


def is_working(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[:1] in (["ray::ShardActor.work_off"], ["ray::ShardActor.counts"])
    except psutil.Error:
        return False


def test_a_command_that_is_killed_goes_on(
    cluster: str, models: Models, expected: dict[str, str], tmp_path: Path
) -> None:
    """By the same command; no worker of the first is left then."""
    run = fresh_run(tmp_path / "run")
    command = ["caption", run.path, "--captioner", models.root / "captioner", "--dtype", "float32", "--batch-size", 4]
    command += ["--num-captions", 4, "--engine", "ray", "--address", cluster, "--num-workers", 2]
    command += ["--cpus-per-worker", 1]
    first = capfilt_process(*command)
    end = time.monotonic() + 120
    while not list((run.path / "captions").glob("*.parquet")) and time.monotonic() < end:
        time.sleep(0.01)
    first.kill()
    first.communicate()
    done = len(run.committed("captions"))
    assert 0 < done < 6
    second = capfilt(*command)
    assert second.code == 0, second.err
    assert f"Next: capfilt rank {run.path}" in second.err
    names = [name for name in expected if name.startswith("captions/")]
    assert {name: stage_files(run)[name] for name in names} == {name: expected[name] for name in names}
    assert verify_run(run).findings == []


def test_a_download_by_several_workers(cluster: str, tmp_path: Path) -> None:
    """One of which is killed at its shards: what it had committed stays, the rest comes from another one."""
    run, tally, killed = RunDir.create(tmp_path / "run"), Tally(), list[int]()
    settings = DownloadSettings(
        allow_private_addresses=True, samples_per_shard=10, num_processes=2, num_threads=4, timeout_seconds=10.0
    )

    def kill_one() -> None:
        wait_for(lambda: list(run.path.glob(".staging/*/*/current")))
        victims = wait_for(lambda: [one for one in psutil.Process().children(recursive=True) if is_working(one)])
        killed.append(victims[0].pid)
        os.kill(killed[0], signal.SIGKILL)

    with WorldSite(SiteSettings(num_urls=120, behaviour_shares={"not_found": 0.1, "truncated": 0.1})) as site:
        table, truth = site.write_table(tmp_path / "urls.parquet"), list(site.rows())
        killer = threading.Thread(target=kill_one)
        killer.start()
        download(str(table), run, settings, tally, engine=TWO)
        killer.join()
        assert "Nothing to download" in download(str(table), run, settings, engine=TWO).line()
    assert killed
    assert (tally.title, tally.done) == ("download", 120)
    assert len(tally.said) <= 1, "it may have handed its shards in just before"
    assert [(row["url"], row["reason"]) for row in rows_of(run)] == [(row.url, row.reason) for row in truth]
    assert verify_run(run, deep=True).exit_code == 0
    assert not any((run.path / ".staging").glob("*/*/*"))


def test_what_cannot_be_reached_or_does_not_belong(tmp_path: Path) -> None:
    make_run(tmp_path / "run", num_shards=1, num_samples=2)
    done = capfilt("verify", tmp_path / "run", "--num-workers", 2)
    assert (done.code, "--num-workers belongs to --engine ray" in done.err) == (2, True)
    done = capfilt("verify", tmp_path / "run", "--engine", "spark")
    assert (done.code, "expected one of local, ray" in done.err) == (2, True)
    process = capfilt_process("verify", tmp_path / "run", "--engine", "ray", "--address", "127.0.0.1:1")
    _, said = process.communicate(timeout=60)
    assert (process.returncode, "There is no Ray cluster at 127.0.0.1:1" in said) == (2, True)
