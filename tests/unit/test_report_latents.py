"""The table of latents and the page of each: what is shown, and that no text of a corpus can harm it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from small_reports import build_small_report

from rlsae.report.formatting import LONGEST
from rlsae.report.histogram import histogram

SCRIPT = "<script>alert('x')</script> & \"quoted\""
HOSTILE = {
    "markup": SCRIPT,
    "attribute": "\" onmouseover='alert(1)' x=\"",
    "template": "{{ 7 * 7 }}{% raw %}",
    "right to left": "\u202eevil\u202c שלום",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈",
    "nul": "a\x00b\x1b[31m",
    "end of a script": "</script><!-- <style>",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Function that builds the report of a small study and returns the text of every page by its path."""

    def build(**changes):
        folder = build_small_report(tmp_path_factory.mktemp("study"), **changes)
        return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}

    return build


@pytest.fixture(scope="module")
def plain(report):
    return report()


class Shown(HTMLParser):
    """What a browser would show: texts, tags, and attributes by name."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.attributes = "", [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_the_table_leads_to_a_page_per_latent(plain):
    links = re.findall(r'<a href="(latents/[^"]+)">(\d+)</a>', plain["latents.html"])
    assert len(links) == 4
    assert {link for link, _ in links} == set(plain) - {"index.html", "latents.html"}


def test_a_latent_stands_beside_its_neighbours_and_its_partner(plain):
    page = plain["latents/base-1-small-1.html"]
    assert re.search(r'rel="prev" href="base-1-small-0.html"', page)
    assert re.search(r'rel="next" href="tuned-1-small-0.html"', page)
    assert '<a href="tuned-1-small-1.html">latent 1</a>' in page


def test_windows_show_both_models_with_spaces_and_heat(plain):
    page = plain["latents/tuned-1-small-0.html"]
    assert '<mark class="h9 peak" data-v=2.00>·film⏎</mark>' in page  # the latent's own model
    assert '<mark class="h5 peak" data-v=1.00>·film⏎</mark>' in page  # the other one
    assert "<mark class=h2 data-v=0.500>a·film</mark>" in page
    assert "<bdi>·x<wbr></bdi>" in page


def test_every_explainer_stands_with_its_scores_and_its_failures(plain):
    page = plain["latents/tuned-1-small-0.html"]
    assert re.search(r"<th>tokens</th>.*?0.900.*?0.800 to 0.970", page, re.DOTALL)
    assert "tokens: missed, document 9" in page
    assert "No language model was asked: name one" in page


def test_a_judge_that_was_not_asked_about_an_explanation_leaves_its_place_empty(plain):
    page = plain["latents/tuned-1-small-0.html"]
    rows = dict(re.findall(r"<tr><th>(tokens|ensemble)</th>(.*?)</tr>", page, re.DOTALL))
    assert rows["tokens"].endswith('<td class="n"></td>')
    assert "0.750" in rows["ensemble"]


def test_what_was_not_measured_is_said(plain):
    assert '<td class="n" data-label="score">n/a</td>' in plain["latents.html"]
    assert "not tried alone" in plain["latents/base-1-small-0.html"]
    assert "−0.130" in plain["latents/base-1-small-1.html"]


def test_the_histogram_tells_the_rows_of_each_bar():
    drawn = histogram([3, 0, 1], 6.0)
    assert re.findall(r"<title>(.*?)</title>", drawn.svg) == ["0 to 2.00: 3 rows", "4.00 to 6.00: 1 rows"]
    assert drawn.csv_link == "data:text/csv,from%2Cto%2Crows%0A0%2C2%2C3%0A2%2C4%2C0%0A4%2C6%2C1%0A"


@pytest.mark.parametrize("evil", HOSTILE.values(), ids=HOSTILE)
def test_text_of_the_corpus_is_data(report, plain, evil):
    for name, page in report(evil=evil).items():
        shown, usual = Shown(page), Shown(plain[name])
        assert shown.tags == usual.tags, name
        assert shown.attributes == usual.attributes, name
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\u202a-\u202e\u2066-\u2069]", page), name
    drawn = evil.replace(" ", "·").replace("\x00", "␀").replace("\x1b", "␛").replace("\u202e", "�").replace("\u202c", "�")
    assert drawn in Shown(page).text


def test_a_very_long_token_is_cut(report):
    page = report(evil="a" * 100_000)["latents/tuned-1-small-0.html"]
    assert "a" * LONGEST + "…" in page
    assert "a" * (LONGEST + 1) not in page


def test_no_explained_latent_is_a_sentence_not_an_empty_table(report):
    page = report(latents=0)["latents.html"]
    assert "studies.demo.interpretation.latents" in page
    assert "<table" not in page
