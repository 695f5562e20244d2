"""The page of several studies: each with its finding, the same figures side by side, and what sets them apart."""

from __future__ import annotations

import re
import shutil

import pandas as pd
import pytest
from small_reports import build_small_report

from rlsae.errors import RlsaeError
from rlsae.report.studies import FOLDER, build_page


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results with two studies of different tunings and one without explained latents."""
    folder = tmp_path_factory.mktemp("studies")
    build_small_report(folder, name="strong")
    build_small_report(folder, name="null", model="other", metrics={"reward_gain": 0.01, "reward_gain_ci95": [-0.1, 0.1]})
    build_small_report(folder, name="silent", model="third", latents=0, seeds=(0,))
    return folder / "results"


@pytest.fixture(scope="module")
def page(results):
    build_page(results, ["null", "strong", "silent"])
    return (results / "reports" / "index.html").read_text(encoding="utf-8")


def test_each_study_is_told_by_its_finding_and_leads_to_its_report(page):
    told = dict(re.findall(r'<dt><a href="([\w/.]+)">\w+</a></dt><dd>(.*?)</dd>', page))
    assert list(told) == ["null/index.html", "strong/index.html", "silent/index.html"]
    assert "brought no gain beyond noise" in told["null/index.html"]
    assert "raised the mean reward" in told["strong/index.html"]


def test_every_link_and_picture_is_there(results, page):
    for link in re.findall(r'(?:src|href)="([^"]*)"', page):
        within = link.startswith("data:") or (link.startswith("#") and f'id="{link[1:]}"' in page)
        assert within or (results / "reports" / link).exists(), link


def test_the_settings_that_differ_are_told(page):
    table = re.search("Settings in which they differ.*?</table>", page, re.DOTALL)[0]
    assert re.search(r"<th>base</th><td>other</td><td>tiny</td><td>third</td>", table)
    assert "method" not in table


def test_the_dots_of_the_figures_are_the_numbers_of_the_studies(results, page):
    gains = pd.read_csv(results / "reports" / FOLDER / "studies-reward_gain.csv", keep_default_na=False).set_index("study")
    assert gains.loc["null", ["value", "low", "high"]].tolist() == [0.01, -0.1, 0.1]
    ablations = pd.read_csv(results / "reports" / FOLDER / "studies-ablation.csv", keep_default_na=False)
    assert ablations.study.tolist() == ["null", "strong"]  # the third has none


def test_every_dictionary_is_a_dot_between_error_and_sparsity(results, page):
    rows = pd.read_csv(results / "reports" / FOLDER / "studies-frontier.csv", keep_default_na=False)
    assert rows.groupby("study").role.apply(list).to_dict() == {
        name: ["base", "tuned"] for name in ("null", "silent", "strong")
    }
    assert rows[["fvu", "l0", "dead_share"]].drop_duplicates().to_numpy().tolist() == [[0.05, 6.0, 0.01]]
    assert (rows.mmcs_floor == "").tolist() == [name == "silent" for name in rows.study]  # it has one seed
    section = re.search('id="dictionaries".*?</section>', page, re.DOTALL)[0]
    assert section.count("<tr>") == 1 + len(rows)


def test_one_study_stands_alone(results):
    build_page(results, ["strong"])
    page = (results / "reports" / "index.html").read_text(encoding="utf-8")
    assert "<h1>1 study</h1>" in page
    assert "Settings in which they differ" not in page


def test_a_study_without_a_report_is_named(results, tmp_path):
    with pytest.raises(RlsaeError, match="no report of missing; make it with: snakemake --cores all reports"):
        build_page(results, ["strong", "missing"])
    with pytest.raises(RlsaeError, match="no report of any study"):
        build_page(tmp_path, [])


def test_results_that_were_moved_still_give_the_page(results, tmp_path):
    shutil.copytree(results, tmp_path / "elsewhere")
    build_page(tmp_path / "elsewhere", ["strong"])
    assert str(tmp_path) not in (tmp_path / "elsewhere" / "reports" / "index.html").read_text(encoding="utf-8")
