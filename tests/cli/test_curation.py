"""From URLs to the manifest through the command line, with small random models and a real site."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from capfilt.data.manifest import read_manifest
from tests.cli.conftest import NUM_URLS, Models, capfilt

SHORT = ("--num-captions", 3, "--max-length", 12)


def curate(run: Path, models: Models, *extra: object) -> list[str]:
    """The three stage commands; gives their summaries."""
    outputs = []
    for arguments in (
        ("caption", run, "--captioner", models.captioner, *SHORT, *extra),
        ("rank", run, "--clip-model", models.clip, "--keep", 2),
        ("filter", run, "--filter-model", models.filter, "--threshold", 0.4),
    ):
        done = capfilt(*arguments)
        assert done.code == 0, done.err
        outputs.append(done.out)
        assert "Next: capfilt " in done.err
    return outputs


def write_recipe(path: Path, models: Models) -> Path:
    path.write_text(
        f'''
[caption]
captioner = "{models.captioner}"
num_captions = 3
max_length = 12

[rank]
clip_model = "{models.clip}"

[filter]
filter_model = "{models.filter}"
threshold = 0.4
''',
        encoding="utf-8",
    )
    return path


def test_stage_commands_and_recipe_give_equal_rows(run: Path, downloaded: Path, models: Models, tmp_path: Path) -> None:
    other = Path(shutil.copytree(downloaded, tmp_path / "other"))
    outputs = curate(run, models)
    assert outputs[0].startswith("Wrote captions")
    assert "pairs kept" in outputs[2]
    recipe = write_recipe(tmp_path / "mine.toml", models)

    plan = capfilt("run", recipe, other, "--dry-run", "--json").json()
    states = {step["name"]: step["state"] for step in plan["steps"]}
    assert states.pop("shards") == "3 shards"
    assert states == dict.fromkeys(["captions", "clip", "itm", "manifest"], "to do")
    assert not (other / "captions").exists()
    done = capfilt("run", recipe, other)
    assert done.code == 0, done.err
    assert read_manifest([other]).equals(read_manifest([run]))

    again = capfilt("run", recipe, other)
    assert again.code == 0
    assert "Nothing to do" in again.out
    assert "3 of 3 shards" in capfilt("run", recipe, other, "--dry-run").out

    for command in (("run", recipe, other), ("run", recipe, other, "--dry-run"), ("verify", other)):
        named = capfilt(*command, "--generation", "again")
        assert named.err.rstrip().endswith("--generation again"), (command, named)
    unknown = capfilt("stats", other, "--generation", "agian")
    assert unknown.code == 2
    assert "those it has: again" in unknown.err
    assert "--keep K --generation again" in capfilt("stats", other, "--generation", "again").err
    unknown = capfilt("verify", other, "--generation", "agian")
    assert (unknown.code, "those it has: again" in unknown.err) == (2, True)


def test_stats_select_verify(run: Path, models: Models) -> None:
    curate(run, models)
    stats = capfilt("stats", run, "--json").json()
    assert stats["download"]["num_rows"] == NUM_URLS
    assert stats["download"]["num_images"] + sum(stats["download"]["by_reason"].values()) == NUM_URLS
    assert stats["pairs"]["synthetic"]["num_pairs"] == 3 * stats["download"]["num_images"]
    shown = capfilt("stats", run)
    assert "kept rate at ITM thresholds" in shown.out
    assert "\x1b" not in shown.out

    everything = capfilt("select", run, "--threshold", 0, "--keep", 1, "--json").json()
    nothing = capfilt("select", run, "--threshold", 1, "--keep", 1)
    assert everything["num_kept"] > 0
    assert "Kept 0 of" in nothing.out
    assert "No pair is left to train on. `capfilt stats" in nothing.err
    assert "Nothing to do" in capfilt("select", run, "--threshold", 1, "--keep", 1).out
    web = capfilt("select", run, "--threshold", 0, "--sources", "web", "--generation", "web", "--json").json()
    assert 0 < web["num_kept"] < everything["num_kept"]
    assert web["drop_reasons"]["other_source"] > 0
    assert capfilt("select", run, "--sources", "alt").code == 2

    verified = capfilt("verify", run, "--deep")
    assert verified.code == 0, verified.out
    assert "complete and reconciled" in verified.out
    assert "stages: captions, clip, itm, manifest" in verified.out
    manifest = run / "manifest" / "00001.parquet"
    data = bytearray(manifest.read_bytes())
    data[len(data) // 2] ^= 1
    manifest.write_bytes(data)
    damaged = capfilt("verify", run, "--json")
    assert damaged.code == 5
    assert damaged.json()["findings"][0]["shard"] == "00001"
    assert damaged.json()["remedies"] == [
        line for line in capfilt("verify", run, "--deep").err.splitlines() if "remove" in line
    ]
    assert "remove its .parquet and repeat `capfilt filter`" in capfilt("verify", run).err
    assert capfilt("stats", run).code == 5
    manifest.unlink()
    assert capfilt("select", run, "--threshold", 0).code == 0
    assert capfilt("verify", run, "--deep").code == 0


def test_another_prompt_is_refused_and_fits_a_generation(run: Path, models: Models) -> None:
    first = ("caption", run, "--captioner", models.captioner, *SHORT)
    assert capfilt(*first).code == 0
    refused = capfilt(*first, "--prompt", "a photo of ")
    assert refused.code == 3
    assert "prompt" in refused.err
    assert "--generation" in refused.err
    assert capfilt(*first, "--prompt", "a photo of ", "--generation", "photo").code == 0
    assert (run / "captions@photo").is_dir()
    one = capfilt("caption", run, "--captioner", models.captioner, "--decoding", "greedy", "--generation", "greedy")
    assert "Next: capfilt rank" in one.err
    assert one.err.rstrip().endswith("--generation greedy")
    assert capfilt("stats", run, "--generation", "greedy", "--json").json()["diversity"]["captions_per_image"] == 1


def test_batch_size_does_not_change_the_captions(run: Path, models: Models) -> None:
    command = ("caption", run, "--captioner", models.captioner, *SHORT)
    assert capfilt(*command, "--batch-size", 32).code == 0
    assert capfilt(*command, "--batch-size", 5, "--generation", "five").code == 0
    # Equal parameters: what is there already counts as done in the generation too.
    assert not (run / "captions@five").exists()


def test_no_model_is_taken_silently(run: Path) -> None:
    done = capfilt("caption", run)
    assert done.code == 2
    assert "No captioner is named" in done.err
    assert "embedded" in done.err


def test_a_download_that_gives_nothing_fails(tmp_path: Path) -> None:
    table = tmp_path / "urls.csv"
    table.write_text("url,text\nhttp://127.0.0.1/a.jpg,a cat\n")
    done = capfilt("download", table, tmp_path / "run")
    assert done.code == 1
    assert "None of the 1 rows gave an image (blocked_address 1)" in done.err
    advised = f"`capfilt retry {tmp_path / 'run'} --reason blocked_address --allow-private-addresses`"
    assert advised in done.err.replace("\n", " ")
    assert "Next:" not in done.err
    assert capfilt("verify", tmp_path / "run").code == 0, "its failure is accounted for"


def test_no_retry_is_advised_that_would_be_refused(tmp_path: Path) -> None:
    table = tmp_path / "urls.csv"
    table.write_text(f"url,text\nhttp://127.0.0.1/a.jpg,{'a cat ' * 2000}\n")
    done = capfilt("download", table, tmp_path / "run")
    assert done.code == 1
    assert "(caption_too_long 1)" in done.err
    assert "capfilt retry" not in done.err


def test_all_columns_that_lack_are_named_and_no_run_is_left(downloaded: Path, tmp_path: Path) -> None:
    table = tmp_path / "urls.csv"
    table.write_text("address,words\nhttp://127.0.0.1:9/a.jpg,a cat\n")
    done = capfilt("download", table, tmp_path / "run")
    assert done.code == 2
    assert "no column 'url' and 'text'" in done.err
    assert "--url-column NAME --caption-column NAME" in done.err
    assert not (tmp_path / "run").exists()
    assert capfilt("import", tmp_path / "none.tar", tmp_path / "run").code == 2
    assert not (tmp_path / "run").exists()
    assert capfilt("download", table, downloaded).code == 2
    assert capfilt("verify", downloaded).code == 0, "a run that was there stays"


def test_import(downloaded: Path, tmp_path: Path) -> None:
    done = capfilt("import", downloaded / "shards" / "0000{0..2}.tar", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    assert done.json()["num_new_tars"] == 3
    several = capfilt("import", *sorted((downloaded / "shards").glob("*.tar")), tmp_path / "run")
    assert several.code == 0
    assert "Nothing to import" in several.out


def test_wrong_usage_says_what_helps(tmp_path: Path, downloaded: Path, models: Models) -> None:
    for arguments, code, said in (
        (("stats", tmp_path / "none"), 2, "capfilt download"),
        (("run", "capfilt", tmp_path / "none"), 2, "capfilt download"),
        (("run", "quickstrat"), 2, "Did you mean quickstart?"),
        (("rank", downloaded, "--clip-model", models.clip), 2, "capfilt caption"),
        (("caption", downloaded, "--captioner", "embedded", "--top-p", "2"), 2, "top_p is 2.0"),
        (("download", tmp_path / "no.parquet", tmp_path / "run"), 2, "no.parquet"),
        (
            ("train", "stage1", downloaded, "--output", tmp_path / "x", "--image-encoder", models.filter),
            2,
            "manifest",
        ),
    ):
        done = capfilt(*arguments)
        assert done.code == code, (arguments, done)
        assert said in done.err, (arguments, done)


@pytest.mark.parametrize("command", ["caption", "train stage1", "download", "run"])
def test_every_option_has_help(command: str) -> None:
    text = capfilt(*command.split(), "--help").out
    assert "Usage: " in text
    options = [line for line in text.splitlines() if line.startswith("  --")]
    assert options
    assert all(len(line.split(None, 1)) == 2 for line in options)
