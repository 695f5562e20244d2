"""The report: its findings follow the numbers, its pages are static, escaped and equal for equal artifacts."""

from __future__ import annotations

import html
import re
from xml.etree import ElementTree

import pandas as pd
import pytest
from small_reports import PPO, TAGS, build_small_report

from rlsae.artifacts import MANIFEST, PROVENANCE, Manifest, digest
from rlsae.report.content import Changes
from rlsae.report.findings import changes_sentence, reward_sentence
from rlsae.report.formatting import interval, listing, number, percent, quoted, size, spread


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Function that builds the report of a small study and returns its folder."""

    def build(**changes):
        return build_small_report(tmp_path_factory.mktemp("study"), **changes)

    return build


@pytest.fixture(scope="module")
def plain(report):
    """The report of the small study as it is."""
    return report()


def pages(folder):
    """Text of every page by its path in the report."""
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}


def prose(page):
    """The findings at the head of a page."""
    found = re.search(r'<p class="findings">(.*?)</dl>', page, re.DOTALL)[1]
    return " ".join(html.unescape(re.sub("<.*?>", "", found)).split())


def test_pages_need_nothing_from_outside(plain):
    for name, text in pages(plain).items():
        text = re.sub("http(:|%3A)//www.w3.org/2000/svg", "", text)  # a name, which nothing loads
        assert not re.search(r"https?:|//\w+\.|@import|fetch\(|XMLHttp", text), name
        assert str(plain.parents[2]) not in text


def test_every_link_leads_somewhere(plain):
    found = pages(plain)
    for name, text in found.items():
        for link in re.findall(r'(?:src|href)="([^"]*)"', text):
            file, _, anchor = link.partition("#")
            if link.startswith("data:") or file == "../index.html":  # of all studies, which another job writes
                continue
            target = (plain / name).parent / file if file else plain / name
            assert target.exists(), (name, link)
            assert not anchor or f'id="{anchor}"' in target.read_text(encoding="utf-8"), (name, link)


def test_the_files_of_a_report_are_its_pages_and_their_figures(plain):
    own = {"index.html", "latents.html", "latents", "figures", "report.css", "report.js", "status.js"}
    assert {path.name for path in plain.iterdir()} == own | {MANIFEST, PROVENANCE}
    shown = re.findall(r"<figure>", (plain / "index.html").read_text(encoding="utf-8"))
    names = [path.stem for path in (plain / "figures").glob("*.svg")]
    assert sorted(names) == sorted(path.stem for path in (plain / "figures").glob("*.csv"))
    assert len(names) == len(shown)


def test_a_figure_can_be_used_without_its_page(plain):
    text = (plain / "figures" / "tuning-reward.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "var(--" not in text
    assert pd.read_csv(plain / "figures" / "tuning-reward.csv").reward.tolist() == [0.1, 0.2, 0.3]


def test_the_changes_are_told_by_the_tested_latents_and_by_those_that_recur(plain):
    found = prose(pages(plain)["index.html"])
    assert "3 latents write something else in the tuned model than in the base" in found
    assert "recur in another seed's dictionary; in all, 10 of 100 tested latents are tagged" in found


def test_one_seed_is_told_not_to_say_whether_changes_recur(report):
    assert "one seed cannot say whether they recur" in prose(pages(report(seeds=(0,)))["index.html"])


@pytest.mark.parametrize(
    ("tags", "sentence"),
    [
        (dict.fromkeys(TAGS, 0) | {"unchanged": 7}, "No change of single latents beyond noise: none of the 7 tested ones"),
        (dict.fromkeys(TAGS, 0) | {"added": 3}, "No change of single latents that recurs: 3 of 3 tested latents are tagged"),
        (dict.fromkeys(TAGS, 0) | {"untestable": 7}, "No latent fires often enough to be tested for a change."),
    ],
)
def test_that_nothing_was_found_is_not_told_as_that_nothing_was_tested(tags, sentence):
    assert changes_sentence([Changes(1, "small", tags | {"replicated": 0}, {}, False)]).startswith(sentence)


def test_findings_follow_the_numbers(plain):
    found = prose(pages(plain)["index.html"])
    assert "raised the mean reward on 512 held-out prompts from 0.03 to 1.76, a gain of 1.73" in found
    assert "95 % interval 1.65 to 1.81" in found
    assert "6.40 (95 % interval 6.18 to 6.63) nats per response" in found
    assert "13.4 tokens" in found
    assert "perplexity of 6.49" in found
    assert "Layer 1 of the model's 2 is looked into: highest weight change (sum of L2 norms)" in found
    assert "layer 1 in 97 %" in found
    assert "different seeds: 0.310, where two seeds of one model reach 0.330" in found
    assert "overlap in 1 of 1" in found
    assert "decides nothing" in found


def test_a_gain_must_exceed_the_noise(report):
    found = prose(pages(report(metrics={"reward_gain": 0.1, "reward_gain_ci95": [-0.1, 0.3]}))["index.html"])
    assert "brought no gain beyond noise" in found
    assert "a difference of 0.100 (95 % interval −0.100 to 0.300), which includes 0" in found
    assert "raised" not in found


def test_a_loss_and_an_unmeasured_reward_are_named():
    assert "lowered the mean reward" in reward_sentence(PPO | {"reward_gain": -0.5, "reward_gain_ci95": [-0.6, -0.4]})
    assert "not measured" in reward_sentence({"kl": 1.0})


def test_one_seed_has_no_floor(report):
    folder = report(seeds=(0,), sizes=False)
    index = pages(folder)["index.html"]
    assert "No floor: one seed" in prose(index)
    assert index.count("no floor: one seed") == 2  # figure and table
    assert "overlap in" not in index
    assert "small→big" not in index
    assert not re.search(r"\bnan\b", re.sub("<(svg|script|style).*?</\\1>", "", index, flags=re.DOTALL).lower())


def test_missing_values_read_na(plain):
    assert '<td class="n">n/a</td>' in pages(plain)["index.html"]  # ce_recovered


def test_no_explained_latent(report):
    found = pages(report(latents=0))
    assert "No latent was explained." in prose(found["index.html"])
    assert "<table" not in found["latents.html"]


def test_a_checkpoint_is_named(report):
    index = pages(report(step=12))["index.html"]
    assert "tiny.ppo@12 on reviews" in index
    assert "those of its checkpoint 12" in index


def test_the_chain_is_listed(plain):
    text = pages(plain)["index.html"]
    assert re.search(r"<td>tokens/tiny.reviews</td><td><code>(ab){6}</code>", text)
    assert '<a href="../../policies/tiny.ppo/">policies/tiny.ppo</a>' in text
    assert "68.7 MB" in text


def test_equal_artifacts_give_equal_bytes(report, plain):
    first, second = plain, report()
    assert Manifest.read(first) == Manifest.read(second)
    assert [digest(first / name) for name in ("index.html", "figures", "latents")] == [
        digest(second / name) for name in ("index.html", "figures", "latents")
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (float("nan"), "n/a"),
        (0, "0"),
        (1234567, "1,234,567"),
        (12345.6, "12,346"),
        (1.7296, "1.73"),
        (9.996, "10.0"),
        (-0.1, "−0.100"),
        (0.0512, "0.0512"),
        (0.00001, "1.00e−05"),
        (float("-inf"), "−∞"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_other_texts():
    assert interval([1.648, 1.811]) == "1.65 to 1.81"
    assert interval(None) == "n/a"
    assert spread([0.3, 0.3001]) == "0.300"
    assert spread([]) == "n/a"
    assert percent(0.015625) == "1.6 %"
    assert percent(None) == "n/a"
    assert size(68746025) == "68.7 MB"
    assert size(12) == "12 B"
    assert listing([1, 2, 3]) == "1, 2 and 3"
    assert quoted("fires on ‹ a› ‹\n›") == "fires on ‹·a› ‹⏎›"


# --- what changed ------------------------------------------------------------------------------------------------


def section(page, name):
    return re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)[1]


def test_what_changed_is_drawn_and_told(plain):
    text = section(pages(plain)["index.html"], "changes")
    assert text.count("<svg") == 3  # write changes and angles of the one layer, tags
    assert "25 %" in text  # of the latents move
    assert re.search(r"rotated, replicated</td><td class=\"n\">0.800", text)
    assert "40°" in text


def test_the_directions_of_the_shared_map_are_told_with_their_reward(plain):
    text = section(pages(plain)["index.html"], "changes")
    assert "‹·a·film›" in text
    assert "‹·bad›" in text
    assert re.search(r"0.31.*?0.250 to 0.370", text, re.DOTALL)


def test_what_ablation_costs_stands_beside_what_random_sets_cost(plain):
    text = section(pages(plain)["index.html"], "causes")
    assert "the latents that raise the reward most carry it in 1 of 1 dictionaries (−0.410 of 1.50)" in text
    assert re.search(r"−0.410 <small>−0.520 to −0.310</small>.*?−0.0200.*?97 %", text, re.DOTALL)


def test_a_study_without_explained_latents_or_a_map_says_so(report):
    empty = pages(report(latents=0))["index.html"]
    text = section(empty, "changes")
    assert "No explained latent is tagged." in text
    assert "No layer has one" in text
    assert "the study asks for no interventions (studies.demo.interpretation.interventions)" in section(empty, "causes")
    assert "No probe could be scored: too few triples." in section(empty, "probes")


def test_the_probe_is_told_beside_what_it_must_beat(plain):
    text = section(pages(plain)["index.html"], "probes")
    assert "ranks held-out words with a τ of 0.300 (95 % interval 0.200 to 0.400)" in text
    assert "worse than its rows themselves" in text
    assert "better than a bag of words" in text
    assert re.search(r"latents of the tuned model</td>.*?0.300.*?80 %.*?60 %", text, re.DOTALL)


def test_a_transplant_is_told_as_a_share_of_the_gain(plain):
    text = section(pages(plain)["index.html"], "causes")
    assert re.search(r"map</td>.*?21 % <small>17 % to 26 %|map</td>.*?21 %", text, re.DOTALL)


def test_what_a_dictionary_is_worth_to_either_model_is_told_beside_its_scores(plain):
    text = section(pages(plain)["index.html"], "dictionaries")
    (table,) = re.findall(r"<h3>In the other model</h3>.*?</table>", text, re.DOTALL)
    rows = [re.findall(r'<td class="n">([\d.]+|n/a)(?: <small>.*?</small>)?</td>', row) for row in table.split("<tr>")[2:]]
    assert rows == [["0.0500", "0.200", "0.0500", "n/a", "0.0500", "0.200"], ["0.200", "0.0500"] * 3]
    assert table.count("<small>0.190 to 0.210</small>") == 5
