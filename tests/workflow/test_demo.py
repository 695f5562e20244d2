"""The demo study as a newcomer runs it: config.yaml as it stands, in a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from tests.browser.chromium import chromium
from tests.browser.overview import expected_numbers
from tests.workflow.conftest import REPOSITORY, clean_environment

pytestmark = pytest.mark.slow
THREADS = ["dictionary=1", "activation_part=1", "compare=1"]
"""As in `make demo`."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = snakemake(folder, "--set-threads", *THREADS, "--show-failed-logs")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def snakemake(folder, *arguments):
    command = [sys.executable, "-m", "snakemake", "-s", str(REPOSITORY / "Snakefile"), "--directory", str(folder)]
    return subprocess.run(
        [*command, "--cores", "2", *arguments], capture_output=True, text=True, env=clean_environment(), cwd=folder
    )


def test_the_tuning_gains_at_least_one_at_a_kl_of_at_most_eight(demo):
    metrics = json.loads((demo / "results/policies/tiny.ppo/manifest.json").read_text())["metrics"]
    assert metrics["reward_gain"] >= 1.0
    assert metrics["reward_gain_ci95"][0] > 0
    assert metrics["kl"] <= 8


def test_the_dictionaries_reconstruct_held_out_rows(demo):
    manifests = list((demo / "results/dictionaries").rglob("manifest.json"))
    assert len(manifests) == 8  # base and tuned, two layers, small and big
    for path in manifests:
        for seed in json.loads(path.read_text())["metrics"].values():
            assert seed["fvu"] < 0.1
            assert seed["dead_share"] < 0.6  # the generated language has some ninety directions


def test_explanations_tell_firing_rows_from_others_on_held_out_documents(demo):
    latents = pd.read_parquet(demo / "results/interpretation/demo/latents.parquet")
    assert latents.detection_auc.notna().sum() >= 100
    assert latents.detection_auc.mean() > 0.7


def test_the_latents_that_raise_the_reward_carry_it(demo):
    """Of the small dictionaries on 128 prompts: by the demo's own 24 it depends on the processor's rounding."""
    content = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    asked = {"latents": 2, "interventions": {"prompts": 128, "random_sets": 9, "gains": [2]}, "probes": None}
    study = content["studies"]["demo"] | {"dictionaries": ["small"], "sizes": None, "interpretation": asked}
    study["layers"] = json.loads((demo / "results/divergence/demo/chosen.json").read_text())["layers"]
    (demo / "asked.yaml").write_text(yaml.safe_dump(content | {"studies": {"asked": study}}))
    target = "results/interpretation/asked/manifest.json"
    done = snakemake(demo, "--configfile", "asked.yaml", "--set-threads", *THREADS, "--show-failed-logs", "--", target)
    assert done.returncode == 0, done.stdout + done.stderr
    ablations = pd.read_parquet(demo / "results/interpretation/asked/ablations.parquet")
    reward = ablations[(ablations.policy == "tuned") & (ablations.set == "reward")]
    assert len(reward) == 2
    assert (reward.reward_change < 0).all()
    assert (reward.random_quantile == 1).all()


def test_everything_is_current_and_a_second_run_does_nothing(demo):
    again = snakemake(demo)
    assert "Nothing to be done" in again.stdout + again.stderr
    command = [sys.executable, "-m", "rlsae", "status", str(REPOSITORY / "config.yaml")]
    status = subprocess.run(command, capture_output=True, text=True, cwd=demo, env=clean_environment())
    assert status.returncode == 0, status.stdout


def test_the_tutorial_runs_on_its_results(demo):
    nbclient = pytest.importorskip("nbclient", reason="nothing executes notebooks here (make drivers)")
    notebook = nbformat.read(REPOSITORY / "docs/tutorial.ipynb", as_version=4)
    environment = {"RLSAE_RESULTS": str(demo / "results"), "PYTHONPATH": str(REPOSITORY)}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(env=clean_environment() | environment)


# --- its report, in a real browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports(demo):
    return demo / "results/reports"


@pytest.fixture
def visit():
    with chromium() as visit:
        yield visit
        assert visit.complaints == []
        assert visit.requests == []


def test_every_page_opens_from_disk_without_a_complaint(reports, visit):
    pages = [reports / "index.html", *(reports / "demo").rglob("*.html")]
    assert len(pages) > 100
    for page in pages:
        visit.open(page)
        assert visit.page.locator("h1").count() == 1
    for page in [reports / "index.html", reports / "demo/index.html", reports / "demo/latents.html", pages[-1]]:
        visit.open(page, width=390)
        assert visit.fits(), page


def test_the_report_is_small(reports):
    assert sum(path.stat().st_size for path in reports.rglob("*") if path.is_file()) < 10e6
    assert max(path.stat().st_size for path in (reports / "demo/latents").iterdir()) <= 30_000


def test_every_number_of_the_overview_is_that_of_the_tables(demo, reports, visit):
    page = visit.open(reports / "demo/index.html")
    cells = (
        "tables => tables.flatMap(t => [...t.tBodies[0].rows].map(r => [...r.querySelectorAll('td.n')].map(c => c.innerText)))"
    )
    for section, rows in expected_numbers(demo / "results", "demo").items():
        shown = page.locator(f"#{section} table").evaluate_all(cells)
        shown = [[text.strip() for text in row] for row in shown]
        if section == "changes":
            shown = shown[: len(rows)]  # the largest changes and the shared map follow
        assert (sorted(shown) if section == "comparison" else shown) == rows, section


def test_a_reader_finds_a_latent_opens_it_and_comes_back(reports, visit):
    page = visit.open(reports / "demo/latents.html")
    rows, table = page.locator("table.latents tbody tr:visible"), reports / "demo/latents.html"
    every = len(list((reports / "demo/latents").iterdir()))
    assert rows.count() == 100
    page.get_by_role("button", name=f"show the other {every - 100}").click()
    assert rows.count() == every
    page.get_by_role("button", name="density").click()
    shown = [float(text) for text in page.locator("tbody tr:visible td[data-label=density]").all_inner_texts()]
    assert shown == sorted(shown, reverse=True)
    page.get_by_label("model").select_option("tuned")
    page.get_by_label("score, at least").fill("0.8")
    assert 0 < rows.count() < every
    assert f"{rows.count()} of {every} fit" in page.locator("output").inner_text()
    page.get_by_label("search").fill("raises")
    left, address = rows.count(), page.url
    assert all("raises" in text for text in page.locator("tbody tr:visible td.explanation").all_text_contents())
    rows.first.locator("a").click()
    assert page.locator("h1").inner_text().startswith("Latent")
    page.go_back()
    assert (page.url, rows.count()) == (address, left)
    page.get_by_role("button", name="all", exact=True).first.click()
    page.wait_for_function(f"document.querySelector('output').textContent.startsWith('{every} of')")
    assert table.exists()


def test_numbers_of_tokens_are_reached_by_the_keyboard(reports, visit):
    page = visit.open(next((reports / "demo/latents").glob("tuned-*.html")))
    mark = page.locator("#activations .windows mark").first
    mark.focus()
    shown = mark.evaluate("element => getComputedStyle(element, '::after').content")
    assert shown == f'"{mark.get_attribute("data-v")}"'


def test_figures_can_be_downloaded(reports, visit):
    page = visit.open(reports / "demo/index.html")
    for link in page.locator(".files a").all():
        assert (reports / "demo" / link.get_attribute("href")).exists()
    page.locator("#tuning .files a").first.click()  # from disk it opens; from a server it is saved
    page.wait_for_url("**/figures/tuning-reward.svg")
    visit.open(next((reports / "demo/latents").glob("tuned-*.html")))
    with page.expect_download() as download:
        page.locator("#activations .files a").last.click()
    assert download.value.suggested_filename.endswith(".csv")
    assert Path(download.value.path()).read_text().startswith("from,to,rows")


def test_a_report_prints_as_a_document(reports, visit):
    page = visit.open(reports / "demo/index.html")
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def test_snakemake_packs_its_own_report(demo):
    done = snakemake(demo, "--report", "report.zip")
    assert done.returncode == 0, done.stderr
    assert (demo / "report.zip").stat().st_size > 100_000
