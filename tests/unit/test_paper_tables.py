"""The paper's tables and figures: ours and what is published side by side, in three formats, from whatever is there."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from small_reports import build_small_report

from rlsae.errors import RlsaeError
from rlsae.paper.published import beside
from rlsae.paper.rows import evenly
from rlsae.paper.stage import as_markdown, build_paper

ROWS = [("a", "pythia-70m", "imdb-train", 0.5), ("b", "tiny", "reviews", 0.1)]
OURS = pd.DataFrame(ROWS, columns=["study", "model", "tuned_on", "p"])
EXHIBITS = [("Table", n) for n in range(2, 13)] + [("Figure", n) for n in (4, 5, 7, 8)]


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The folder of the tables of two studies."""
    folder = tmp_path_factory.mktemp("paper")
    build_small_report(folder, name="strong")
    build_small_report(folder, name="silent", model="other", latents=0)
    build_paper(folder / "results", folder / "results" / "paper", None)
    return folder / "results" / "paper"


def table(paper, name):
    return pd.read_csv(paper / f"{name}.csv")


def test_a_published_number_stands_beside_the_study_of_its_model_and_task_and_alone_where_there_is_none():
    found = beside(OURS, "table4").set_index("model")
    assert found.published_p["pythia-70m"] == "0.26"
    assert pd.isna(found.published_p["tiny"])
    assert found.published_p["untrained baseline"] == "0.55"
    assert pd.isna(found.p["gpt-neo-125m"])


def test_what_is_published_of_all_models_stands_beside_each_study_of_the_task():
    found = beside(OURS, "table7").set_index("study")
    assert found.published_lift["a"] == "2 to 3"
    assert pd.isna(found.published_lift["b"])


def test_whole_numbers_stay_whole_beside_rows_without_any():
    found = beside(OURS.assign(layer=[1, 2]), "table7")
    assert as_markdown(found).splitlines()[2].startswith("| a | pythia-70m | imdb-train | 0.500 | 1 |")


def test_every_table_and_figure_of_the_paper_is_there(paper):
    assert {path.stem for path in paper.glob("*.csv")} == {f"{kind.lower()}{n}" for kind, n in EXHIBITS}
    assert {path.stem for path in paper.glob("*.svg")} == {"figure4", "figure7"}  # no pairs, one l1
    text = (paper / "tables.md").read_text(encoding="utf-8")
    titles = [line.partition(":")[0] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [f"## {kind} {n}" for kind, n in EXHIBITS]
    assert json.loads((paper / "manifest.json").read_text())["metrics"] == {"studies": ["silent", "strong"]}


def test_numbers_are_those_of_the_studies(paper):
    taus = table(paper, "table4").set_index("study")
    assert (taus.tau["strong"], taus.tau_low["strong"], taus.p["strong"]) == (0.3, pytest.approx(0.2), 0.005)
    assert "silent" not in taus.index  # it has no scored probe
    ablation = table(paper, "table6").set_index("study").loc["strong"]
    assert ablation.reward_after == pytest.approx(1.5 - 0.41)
    assert set(table(paper, "figure7").dropna(subset="study").divergence) == {1.0, 2.0}


def test_predictions_are_stretched_onto_the_range_of_the_lexicon_and_averaged_per_word(paper):
    words = table(paper, "table9").query("study == 'strong'")
    assert words.vader.is_monotonic_increasing
    assert words.probe.between(-3.9, 3.4).all()
    assert words.vader.iloc[0] == pytest.approx(-1)  # the mean of three rows
    assert len(table(paper, "table2").query("study == 'strong'")) == 11


def test_text_of_a_corpus_is_data(paper):
    assert "| a\\|b |" in (paper / "tables.md").read_text(encoding="utf-8")
    shown = as_markdown(pd.DataFrame({"token": ["<b>\n*x*"]})).splitlines()
    assert shown == ["| token |", "|---|", "| &lt;b&gt; \\*x\\* |"]


def test_a_sample_is_even_and_keeps_both_ends():
    assert evenly(pd.DataFrame({"n": range(100)}), 3).n.tolist() == [0, 50, 99]
    assert evenly(pd.DataFrame({"n": range(2)}), 3).n.tolist() == [0, 1]


def test_without_a_finished_study_it_says_what_to_run(tmp_path):
    with pytest.raises(RlsaeError, match="holds no finished study; make one with: snakemake --cores all interpretation"):
        build_paper(tmp_path, tmp_path / "paper", None)


def test_a_study_of_an_earlier_version_is_named(tmp_path):
    build_small_report(tmp_path, name="old")
    (tmp_path / "results" / "interpretation" / "old" / "probe_components.parquet").unlink()
    with pytest.raises(RlsaeError, match=r"the study 'old' was made by an earlier version; run the workflow again"):
        build_paper(tmp_path / "results", tmp_path / "results" / "paper", None)
