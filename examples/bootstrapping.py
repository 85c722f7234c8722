"""BLIP's bootstrapping (its Tables 1 and 2) in small: models trained from nothing on the same web data, curated or not.

    python examples/bootstrapping.py [--run runs/bootstrapping] [--urls 8000] [--steps 1000] [--seeds 3] [--threads 1]
                                     [--only none,filter,captioner,both,beam] [--fine-tune] [--smoke]

In: nothing but the package. Out: RUN/bootstrapping.md and .json, written anew after every model: what the data sets are
by the world's truth; what the models reach on 500 scenes nobody trained on, mean and spread over the seeds; whether
that is the paper's order: none < filter < captioner < both (Table 1), beam < nucleus (Table 2).

The web is the miniature world's: noisy alt-text, downloaded from a site on loopback. Every image gets one synthetic
caption, by nucleus sampling and, in a generation of its own, by beam search; all texts are scored once. A data set is a
selection from the stored scores: the web captions, those that the filter keeps, both kinds of captions, or those of
them that it keeps. All models have equal sizes, steps, batches and schedule; a seed fixes initialisation, order and
draws. What is done is not done again, and an interrupted training goes on from its last checkpoint; once the data are
there, a second process may train other data sets (`--only`) beside the first. A step takes half a second on one core of
an AMD EPYC, so 15 trainings of 1,000 steps take two hours and a half.

What differs from the paper, beside size and world:
- captioner and filter are the embedded ones: trained on true captions alone (the world's "human" pairs), not fine-tuned
  from a model that was trained on the noisy web. They err less often than BLIP's.
- all models take equally many steps, so a smaller data set is seen more often. The paper trains equal epochs, and finds
  that more of them do not explain its gain.
- an epoch shows every image once with one of its captions, not every pair; no human pairs are among the data.
- contrast is within the batch, without momentum encoders, and the optimizer is Muon, as for the embedded models.
- the models are measured as they are; with `--fine-tune` also after a fine-tuning on 1,000 human pairs of the world, as
  the paper measures them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capfilt.assets import FAST, NO_MOMENTUM, NO_REGULARISATION, TINY_BLIP
from capfilt.curation.annotate import annotate
from capfilt.curation.selection import SOURCES, reselect
from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.errors import CapfiltError
from capfilt.figures import measure_filter, measure_greedy, measure_retrieval
from capfilt.pipeline import run_recipe, stages_of
from capfilt.progress import Progress, StreamProgress
from capfilt.recipes import Recipe, SourceSettings, read_recipe
from capfilt.settings import BlipTrainSettings
from capfilt.train.blip import train_blip, train_captioner, train_filter
from capfilt.train.loop import binding_settings
from capfilt.train.pairs import runs_digest
from capfilt.weights.find import find_embedded
from capfilt.world.audit import audit_manifest, sum_audits
from capfilt.world.training_run import WorldRunSettings, write_world_run

WORLD_SEED = 2
"""Of the site; its scenes are of the train split, those of the measurements of the test split."""
THRESHOLD = 0.5
HUMAN_SEED = 3_000_000

PRE_TRAINING = BlipTrainSettings(
    **TINY_BLIP, **FAST, **NO_REGULARISATION, **NO_MOMENTUM, learning_rate=3e-3, min_learning_rate=3e-4,
)  # fmt: skip
FINE_TUNING = BlipTrainSettings(
    **FAST, **NO_REGULARISATION, **NO_MOMENTUM, prompt="a picture of ", learning_rate=1e-3,
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much of everything; the defaults are those of the figures."""

    num_urls: int = 8000
    num_steps: int = 1000
    num_seeds: int = 3
    batch_size: int = 64
    num_unseen: int = 500
    k_test: int = 32
    """Candidates that ITM ranks again."""
    urls_per_shard: int = 1000
    timeout_seconds: float = 10.0
    """Some addresses never answer; a busy machine must lose no others."""
    num_human_pairs: int = 1000
    num_fine_tuning_steps: int = 200


SMOKE = Scale(
    num_urls=64, num_steps=3, num_seeds=2, batch_size=8, num_unseen=20, k_test=4, urls_per_shard=32,
    timeout_seconds=3.0, num_human_pairs=16, num_fine_tuning_steps=2,
)  # fmt: skip


# --- the data sets --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """A selection from the stored scores."""

    title: str
    sources: tuple[str, ...] = SOURCES
    threshold: float = THRESHOLD
    has_beam: bool = False
    """Whether the synthetic captions are those of beam search."""


DATA_SETS = {
    "none": DataSet("web captions as they are", ("web",), 0.0),
    "filter": DataSet("web captions, filtered", ("web",)),
    "captioner": DataSet("web and synthetic captions as they are", threshold=0.0),
    "both": DataSet("web and synthetic captions, filtered"),
    "beam": DataSet("as both, captions by beam search", has_beam=True),
}
"""Name, also of the generation → what is taken. The first four are Table 1; the last two are Table 2."""
PAIRS_OF_THE_PAPER = (("none", "filter"), ("filter", "captioner"), ("captioner", "both"), ("beam", "both"))
"""Which is worse and which is better by the paper: Table 1 three times, Table 2."""


def curation_recipe(scale: Scale) -> Recipe:
    """The quick start's, with BLIP's one caption an image by nucleus sampling (§4.2); CLIP chooses nothing."""
    recipe = read_recipe("quickstart")
    assert recipe.caption is not None
    assert recipe.rank is not None
    return replace(
        recipe,
        source=SourceSettings(world_urls=scale.num_urls, world_seed=WORLD_SEED),
        download=replace(
            recipe.download, samples_per_shard=scale.urls_per_shard, timeout_seconds=scale.timeout_seconds
        ),
        caption=replace(recipe.caption, num_captions=1, top_k=0),
        rank=replace(recipe.rank, keep=1),
    )


def curate(run_path: Path, scale: Scale, progress: Progress) -> None:
    """Download, caption, score, and choose the data sets; each is a generation of the run."""
    recipe = curation_recipe(scale)
    assert recipe.caption is not None
    for step in run_recipe(recipe, run_path, progress=progress):
        print(step.summary.line())
    by_beam = replace(recipe.caption, decoding="beam", num_beams=3)
    beam = RunDir.open(run_path, "beam")
    summary = annotate(beam, stages_of(recipe), by_beam, recipe.rank, recipe.filter, progress)
    print(f"by beam search: {summary.line()}", flush=True)
    for name, chosen in DATA_SETS.items():
        view = RunDir.open(run_path, name)
        reselect(view, threshold=chosen.threshold, keep=1, sources=chosen.sources)


def describe_data(run_path: Path, name: str) -> dict[str, float]:
    """What a data set holds, by the world's truth, and what the filter drops of all captions of either source."""
    columns = ["key", "url", "source", "text", "itm_score", "kept"]
    manifest = read_manifest([RunDir.open(run_path, name)], columns)
    audits = audit_manifest(manifest, run_path / "world" / "truth.parquet")
    kept, total = manifest.filter(manifest["kept"]), sum_audits(audits)
    texts = kept.filter(np.equal(kept["source"].to_numpy(), "synthetic"))["text"].to_pylist()
    found = {
        "images": len(kept["key"].unique()), "web pairs": audits["web"].num_kept,
        "synthetic pairs": audits["synthetic"].num_kept, "pairs true": total.precision,
        "distinct synthetic captions": len(set(texts)) / len(texts) if texts else 0.0,
    }  # fmt: skip
    for source in SOURCES:
        scores = manifest.filter(np.equal(manifest["source"].to_numpy(), source))["itm_score"].drop_null().to_numpy()
        found |= {
            f"{source} captions true": audits[source].share_true,
            f"{source} captions dropped at {THRESHOLD:g}": float((scores < THRESHOLD).mean()),
        }
    return found


# --- training and measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One data set and one seed."""

    run_path: Path
    data_set: str
    seed: int
    scale: Scale
    fine_tunes: bool

    @property
    def model_dir(self) -> Path:
        """Where the model is saved; trainings of different lengths stand side by side."""
        return self.run_path / "models" / f"{self.scale.num_steps}-steps" / f"{self.data_set}-seed{self.seed}"

    @property
    def record_file(self) -> Path:
        """What was measured, and of what."""
        return self.model_dir.with_suffix(".json")

    def fields(self) -> dict[str, Any]:
        """What the figures depend on, as JSON gives it back."""
        fields = {
            "pairs": runs_digest([RunDir.open(self.run_path, self.data_set)]),
            "settings": [binding_settings(settings) for settings in (self.pre_training(), self.fine_tuning())],
            "scale": [self.scale.num_unseen, self.scale.k_test, self.scale.num_human_pairs],
            "has_cider": find_spec("pycocoevalcap") is not None,
        }
        return json.loads(json.dumps(fields))

    def pre_training(self) -> BlipTrainSettings:
        """Equal for all data sets."""
        steps = self.scale.num_steps
        return replace(
            PRE_TRAINING, tokenizer=str(find_embedded("captioner")), max_steps=steps, warmup_steps=max(1, steps // 10),
            batch_size=self.scale.batch_size, seed=self.seed,
        )  # fmt: skip

    def fine_tuning(self) -> BlipTrainSettings:
        """From the pre-trained model, on human pairs."""
        steps = self.scale.num_fine_tuning_steps
        return replace(
            FINE_TUNING, init=str(self.model_dir), max_steps=steps, warmup_steps=max(1, steps // 10),
            batch_size=self.scale.batch_size, seed=self.seed,
        )  # fmt: skip

    def known_figures(self) -> dict[str, dict[str, float]]:
        """Figures of an earlier run by how the model was used; empty where there are none, or of something else."""
        if not self.record_file.exists():
            return {}
        record = json.loads(self.record_file.read_text(encoding="utf-8"))
        return record["figures"] if record["fields"] == self.fields() else {}

    def carry_out(self, progress: Progress) -> dict[str, dict[str, float]]:
        """Train, measure and keep the figures, as far as that was not done before."""
        figures = self.known_figures()
        if "as pre-trained" not in figures:
            data = RunDir.open(self.run_path, self.data_set)
            train_blip([data], self.pre_training(), self.model_dir, progress)
            self._keep(figures, "as pre-trained", measure(self.model_dir, self.scale))
        if self.fine_tunes and "fine-tuned" not in figures:
            human, tuned_dir = self.run_path / "human", self.model_dir.with_name(f"{self.model_dir.name}-tuned")
            train_captioner([human], self.fine_tuning(), tuned_dir / "captioner", progress)
            train_filter([human], self.fine_tuning(), tuned_dir / "filter", progress)
            self._keep(figures, "fine-tuned", measure(tuned_dir, self.scale))
        return figures

    def _keep(self, figures: dict[str, dict[str, float]], use: str, found: dict[str, float]) -> None:
        figures[use] = found
        write_text(self.record_file, json.dumps({"fields": self.fields(), "figures": figures}, indent=2))


def measure(model_dir: Path, scale: Scale) -> dict[str, float]:
    """Shares on unseen scenes: R@1 both ways by ITC and after ITM, true greedy captions, ITM's area under the curve."""
    matching = measure_filter(model_dir / "filter", scale.num_unseen)
    return {
        **measure_retrieval(model_dir / "filter", scale.num_unseen, scale.k_test),
        "ITM AUC, one changed fact": matching["AUC against one changed fact"],
        **measure_greedy(model_dir / "captioner", scale.num_unseen),
    }


# --- what came out ------------------------------------------------------------------------------------------

Results = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Data set → seed → figures of one use of the models."""


def summarise(results: Results) -> dict[str, Any]:
    """Per data set the figures of every seed, mean and sample standard deviation (None for one seed)."""
    return {
        name: {
            figure: {
                "seeds": {str(seed): found[figure] for seed, found in seeds.items()},
                "mean": statistics.mean(values := [found[figure] for found in seeds.values()]),
                "spread": statistics.stdev(values) if len(values) > 1 else None,
            }
            for figure in next(iter(seeds.values()))
        }
        for name, seeds in results.items()
    }


def compare(results: Results) -> dict[str, dict[str, Any]]:
    """Figure → "worse < better" by the paper → the mean gain, and in how many of the seeds of both there is one."""
    found: dict[str, dict[str, Any]] = {}
    for worse, better in PAIRS_OF_THE_PAPER:
        seeds = sorted(set(results.get(worse, {})) & set(results.get(better, {})))
        for figure in results[worse][seeds[0]] if seeds else ():
            gains = [results[better][seed][figure] - results[worse][seed][figure] for seed in seeds]
            entry = {"gain": statistics.mean(gains), "seeds_with_gain": sum(g > 0 for g in gains), "seeds": len(seeds)}
            found.setdefault(figure, {})[f"{worse} < {better}"] = entry
    return found


def verdict(gains: Sequence[Mapping[str, Any]]) -> str:
    """What a figure says of an order of the paper's."""
    if all(gain["seeds_with_gain"] == gain["seeds"] for gain in gains):
        return "holds in every seed"
    return "holds in the mean" if all(gain["gain"] > 0 for gain in gains) else "does not hold"


def result_lines(by_use: Mapping[str, Results]) -> Iterator[str]:
    """What the models reach, in percent: mean and standard deviation over the seeds, and the paper's order."""
    for use, results in by_use.items():
        figures = list(next(iter(next(iter(results.values())).values())))
        yield f"\n## {use}: percent, mean ± standard deviation over the seeds\n"
        yield from _table_head(["data set", "seeds", *figures])
        for name, found in summarise(results).items():
            cells = [
                f"{100 * found[figure]['mean']:.1f}"
                + ("" if found[figure]["spread"] is None else f" ± {100 * found[figure]['spread']:.1f}")
                for figure in figures
            ]
            yield _row([name, str(len(results[name])), *cells])
        yield from _order_lines(compare(results))


def data_lines(data: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """What the data sets are, and what the filter drops of each kind of caption."""
    yield "## The data\n"
    yield from _table_head(["data set", "what", "images", "web pairs", "synthetic pairs", "true", "distinct synthetic"])
    for name, found in data.items():
        counts = [f"{found[key]:,.0f}" for key in ("images", "web pairs", "synthetic pairs")]
        shares = [f"{found[key]:.1%}" for key in ("pairs true", "distinct synthetic captions")]
        yield _row([name, DATA_SETS[name].title, *counts, *shares])
    yield "\nOf all captions, before anything is chosen:\n"
    yield from _table_head(["captions", "true", f"dropped by the filter at {THRESHOLD:g}"])
    for title, name, source in (
        ("web", "both", "web"), ("by nucleus sampling (BLIP: 25% dropped)", "both", "synthetic"),
        ("by beam search (BLIP: 19% dropped)", "beam", "synthetic"),
    ):  # fmt: skip
        shares = [f"{source} captions true", f"{source} captions dropped at {THRESHOLD:g}"]
        yield _row([title, *(f"{data[name][share]:.1%}" for share in shares)])


def _order_lines(compared: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Gains from worse to better by the paper, and whether its orders hold."""
    columns = [f"{worse} < {better}" for worse, better in PAIRS_OF_THE_PAPER]
    if not compared:
        return
    yield "\nThe paper's orders: mean gain, and the seeds in which there is one\n"
    yield from _table_head(["figure", *columns, "Table 1", "Table 2"])
    for figure, gains in compared.items():
        cells = [
            f"{100 * gain['gain']:+.1f} ({gain['seeds_with_gain']} of {gain['seeds']})" if gain else "–"
            for gain in map(gains.get, columns)
        ]
        tables = [
            verdict([gains[column] for column in wanted]) if set(wanted) <= set(gains) else "–"
            for wanted in (columns[:3], columns[3:])
        ]
        yield _row([figure, *cells, *tables])


def _table_head(names: Sequence[str]) -> Iterator[str]:
    yield _row(names)
    yield _row(["---"] * len(names))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_text(path: Path, text: str) -> None:
    """The file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}-{os.getpid()}")
    staged.write_text(text + "\n", encoding="utf-8")
    staged.replace(path)


def report(run_path: Path, scale: Scale, data: Mapping[str, Mapping[str, float]]) -> None:
    """Write and print the tables of all models of this scale that were measured, by whatever process."""
    by_use: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for name in DATA_SETS:
        for seed in range(scale.num_seeds):
            for use, figures in Trial(run_path, name, seed, scale, False).known_figures().items():
                by_use.setdefault(use, {}).setdefault(name, {})[seed] = figures
    results = "\n".join(result_lines(by_use))
    found = {
        "scale": asdict(scale), "data": data,
        **{use: {"models": summarise(results), "order": compare(results)} for use, results in by_use.items()},
    }  # fmt: skip
    write_text(run_path / "bootstrapping.md", "\n".join([*data_lines(data), results]))
    write_text(run_path / "bootstrapping.json", json.dumps(found, indent=2))
    print(results, flush=True)


def bootstrap(run_path: Path, scale: Scale, names: Sequence[str], *, fine_tunes: bool, progress: Progress) -> None:
    """All of it; the tables are printed after every model."""
    curate(run_path, scale, progress)
    if fine_tunes:
        human = WorldRunSettings(num_scenes=scale.num_human_pairs, first_seed=HUMAN_SEED, captions_per_scene=1)
        write_world_run(run_path / "human", human, progress)
    data = {name: describe_data(run_path, name) for name in DATA_SETS}
    print("\n".join(data_lines(data)), flush=True)
    for seed in range(scale.num_seeds):
        for name in names:
            Trial(run_path, name, seed, scale, fine_tunes).carry_out(progress)
            report(run_path, scale, data)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options, those of the command line unless given; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/bootstrapping"), help="the run directory")
    parser.add_argument("--urls", type=int, help=f"URLs of the world to curate ({Scale.num_urls:,})")
    parser.add_argument("--steps", type=int, help=f"steps of every training ({Scale.num_steps:,})")
    parser.add_argument("--seeds", type=int, help=f"trainings on every data set ({Scale.num_seeds})")
    parser.add_argument("--only", default=",".join(DATA_SETS), help="data sets to train on, with commas")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute")
    parser.add_argument("--fine-tune", action="store_true", help="measure after a fine-tuning on human pairs too")
    parser.add_argument("--smoke", action="store_true", help="a minute's rehearsal: the figures say nothing")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if odd := set(names) - set(DATA_SETS):
        parser.error(f"--only: {', '.join(sorted(odd))}; expected some of {', '.join(DATA_SETS)}")
    torch.set_num_threads(options.threads)
    given = {"num_urls": options.urls, "num_steps": options.steps, "num_seeds": options.seeds}
    scale = replace(SMOKE if options.smoke else Scale(), **{name: n for name, n in given.items() if n is not None})
    try:
        bootstrap(options.run, scale, names, fine_tunes=options.fine_tune, progress=StreamProgress(sys.stderr))
    except CapfiltError as error:
        print(f"bootstrapping: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
