"""Trials on plants: the ways to tag stand side by side, and their curves say what the trials found."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from rlsae.artifacts import Manifest
from rlsae.cli.app import app
from rlsae.errors import RlsaeError
from rlsae.plants.curves import build_curves, by_density, by_effect, summary
from rlsae.plants.trial import run_trial
from rlsae.plants.trials import DOCUMENTS, FEW_SEEDS, MAIN, METHODS, NULL, PAIRS, SEEDS, VARIATIONS, Trial, all_trials
from rlsae.plants.ways import _below_floor

TRIALS = [Trial("topk", "rest", 400, 3), Trial("topk", "null-map-4", 400, 3)]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Folders of small trials: one with changes, one without."""
    folder = tmp_path_factory.mktemp("plants")
    for trial in TRIALS:
        run_trial(trial, folder / trial.path, None)
    return [folder / trial.path for trial in TRIALS]


def scores(folder):
    return pd.read_parquet(folder / "scores.parquet").set_index("way")


def test_the_test_of_write_changes_finds_what_its_dictionaries_cover_and_little_else(artifacts):
    found = scores(artifacts[0]).loc["write change"]
    assert found.recall_covered >= 0.9
    assert found.false_discovery <= 0.1
    assert found.kind_accuracy >= 0.8


def test_other_ways_to_tag_are_worse(artifacts):
    found = scores(artifacts[0])
    assert found.false_discovery["decoder cosine < 0.7"] > 0.3
    assert found.recall_covered["below the floor of seeds"] < 0.2
    assert found.recall_covered["scale error < 0.5"] < found.recall_covered["write change"]
    assert found.kind_accuracy.notna().tolist() == [True, True, False, False, False]


def test_replication_tags_fewer(artifacts):
    found = scores(artifacts[0])
    assert 0 < found.tagged["write change, replicated"] < found.tagged["write change"]


def test_a_null_has_no_tags(artifacts):
    assert scores(artifacts[1]).tagged["write change"] == 0


def test_a_match_is_below_the_floor_only_where_few_of_two_seeds_are_as_bad():
    cosine = np.array([0.1] * 10 + [0.9] * 90)
    assert _below_floor(cosine, np.linspace(0.5, 1, 100)).tolist() == [False] * 100
    assert _below_floor(cosine, np.linspace(0.5, 1, 1000)).tolist() == [True] * 10 + [False] * 90


def test_the_curves_hold_every_trial(artifacts, tmp_path):
    build_curves(artifacts, tmp_path / "curves", None)
    table = pd.read_csv(tmp_path / "curves" / "summary.tsv", sep="\t")
    assert table.groupby("variation", sort=False).size().to_dict() == {"rest": 5, "null-map-4": 5}
    assert (tmp_path / "curves" / "figures" / "curves.svg").read_text().startswith("<?xml")
    assert set(Manifest.read(tmp_path / "curves").outputs) == {
        "densities.tsv", "effects.tsv", "figures", "methods.tsv", "scores.parquet", "summary.tsv",
    }  # fmt: skip


def directions(**columns):
    """The truth with what one way found, for hand-made trials."""
    table = pd.DataFrame(columns)
    trial = {"method": "topk", "variation": "rest", "documents": 2000, "seed": 3, "way": "write change"}
    return table.assign(**trial)


def test_recall_by_effect_is_of_the_covered_changes():
    table = directions(
        kind=["rotated", "rotated", "rotated", "rescaled", "unchanged"],
        angle=[15, 30, 30, 0, 0],
        factor=[1.0, 1.0, 1.0, 0.5, 1.0],
        density=0.05,
        covered=[True, True, False, True, True],
        found=[False, True, False, True, False],
    )
    found = by_effect(table).set_index("effect")
    assert found.recall.to_dict() == {"rotated 15°": 0, "rotated 30°": 1, "rescaled ×0.5": 1}
    assert found.coverage["rotated 30°"] == 0.5


def test_coverage_by_density_is_of_all_directions_and_recall_of_the_changes_that_must_be_found():
    table = directions(
        kind=["unchanged", "unchanged", "removed", "rotated"],
        angle=[0, 0, 0, 15],
        factor=[1.0, 1.0, 0.0, 1.0],
        density=[0.005, 0.03, 0.03, 0.03],
        covered=[False, True, True, True],
        found=[False, False, True, False],
    )
    found = by_density(table.iloc[[2, 0, 1, 3]]).set_index("density")
    assert found.coverage.to_dict() == {"≤ 4%": 1}  # no change lies below 1 %
    assert found.recall.to_dict() == {"≤ 4%": 1}


def test_the_summary_tells_means_and_the_worst():
    numbers = dict.fromkeys(("recall", "coverage", "kind_accuracy", "tagged", "rank"), 1.0)
    trials = [
        {"method": "topk", "variation": "rest", "documents": 2000, "way": "w", "seed": seed} | numbers
        | {"recall_covered": recall, "false_discovery": false}
        for seed, recall, false in ((3, 1.0, 0.0), (4, 0.9, 0.1))
    ]  # fmt: skip
    row = summary(pd.DataFrame(trials)).iloc[0]
    assert (row.recall_covered, row.worst_recall_covered) == (0.95, 0.9)
    assert (row.false_discovery, row.worst_false_discovery, row.trials) == (0.05, 0.1, 2)


def test_the_main_method_meets_every_plant_and_its_null_and_the_others_every_plant():
    found = all_trials()
    assert len({trial.path for trial in found}) == len(found)
    whole = [trial for trial in found if trial.documents == DOCUMENTS]
    for name in VARIATIONS:
        assert [t.seed for t in whole if (t.method, t.variation) == (MAIN, name)] == list(SEEDS)
        assert [t.seed for t in whole if (t.method, t.variation) == (MAIN, NULL + name)] == list(FEW_SEEDS)
        assert {t.method for t in whole if t.variation == name} >= set(PAIRS)
    for method in METHODS:
        assert [t.seed for t in whole if (t.method, t.variation) == (method, NULL + "rest")] == list(FEW_SEEDS)


@pytest.mark.parametrize(("key", "value"), [("method", "gated"), ("variation", "rst")])
def test_unknown_trials_are_refused(tmp_path, key, value):
    settings = {"method": "topk", "variation": "rest", "documents": 16, "seed": 0} | {key: value}
    result = CliRunner().invoke(app, ["plant-trial", "--settings", json.dumps(settings), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert isinstance(result.exception, RlsaeError)
    assert f"{key}: expected one of" in str(result.exception)


@pytest.mark.parametrize("method", ["crosscoder_topk", "difference_topk", "stagewise_topk"])
def test_dictionaries_beyond_pairs_are_judged_by_the_same_plant(tmp_path, method):
    run_trial(Trial(method, "rest", 400, 3), tmp_path / "out", None)
    found = scores(tmp_path / "out").loc["write change"]
    assert found.false_discovery <= 0.1
    assert found.coverage >= 0.7
    if method == "difference_topk":  # the rule of the bulk leaves it few tags: docs/methods.md
        assert found.recall_covered < 0.5
    else:
        assert found.recall_covered >= 0.9
        assert found.kind_accuracy >= 0.8


@pytest.mark.parametrize("method", ["crosscoder_topk", "crosscoder_relu", "difference_topk", "stagewise_topk"])
def test_beyond_pairs_a_null_has_no_tags_either(tmp_path, method):
    run_trial(Trial(method, "null-rest", 400, 3), tmp_path / "out", None)
    assert scores(tmp_path / "out").tagged["write change"] <= 0.01
