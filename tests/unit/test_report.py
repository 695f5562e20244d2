"""The report: its findings follow the numbers, its pages are static, escaped and equal for equal artifacts."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from rlsae.artifacts import MANIFEST, PROVENANCE, Manifest, digest
from rlsae.report.build import build_report
from rlsae.report.content import Changes
from rlsae.report.findings import changes_sentence, reward_sentence
from rlsae.report.formatting import interval, listing, number, percent, quoted, size, spread

MEASURES = ("weight_l2_sum", "activation_l2_relative", "kl_swap_out", "reward_swap_out")
TAGS = {"unchanged": 90, "removed": 1, "added": 2, "rotated": 3, "rescaled": 4, "untestable": 20, "dead": 8}
LEVEL = {"layer": 1, "dictionary": "small", "difference": 0.05, "mean_shift": 0.2, "linear_map": 0.6, "tagged": 0.1}
LEVEL |= {"diffuse": False, "moved": 0.25, "minimum_effect": 0.35}
DIRECTION = {"layer": 1, "direction": 0, "share": 0.4, "lowers": "‹ bad›", "written_at": "‹ is›", "reward_correlation": 0.31}
DIRECTION |= {"reward_correlation_low": 0.25, "reward_correlation_high": 0.37}
TRANSFER = {
    f"{score}_{role}_{where}_{policy}": 0.05 if role == policy else 0.2
    for score, where in [("fvu", "on"), ("ce_recovered", "in"), ("kl_recovered", "in")]
    for role in ("base", "tuned")
    for policy in ("base", "tuned")
}
TRANSFER |= {f"{measure}_ci95": [value - 0.01, value + 0.01] for measure, value in TRANSFER.items()}
TRANSFER |= {"ce_recovered_base_in_tuned": None, "ce_recovered_base_in_tuned_ci95": None}
ABLATION = {
    "policy": "tuned",
    "set": "reward",
    "layer": 1,
    "dictionary": "small",
    "seed": 0,
    "latents": 3,
    "reward": 1.5,
    "reward_change": -0.41,
}
ABLATION |= {"ci_low": -0.52, "ci_high": -0.31, "random_change": -0.02, "random_low": -0.06, "random_high": 0.01}
ABLATION |= {"random_quantile": 0.97}
DOSE = {"policy": "tuned", "layer": 1, "dictionary": "small", "set": "reward", "gain": 2.0, "reward": 1.7}
DOSE |= {"reward_low": 1.6, "reward_high": 1.8}
TRANSPLANT = {"layer": 1, "dictionary": "small", "level": "map", "latents": 0, "reward": 0.4, "share": 0.21}
TRANSPLANT |= {"share_low": 0.17, "share_high": 0.26, "kl": 0.5}
PROBE = {"probe": "ridge", "target": "lexicon", "metric": "tau", "p": 0.005, "status": "scored"}
PROBES = [
    PROBE | {"features": features, "metric": metric, "value": value, "ci_low": value - 0.1, "ci_high": value + 0.1}
    for features, metric, value in [
        ("tuned_sae", "tau", 0.3),
        ("tuned_sae", "sign_accuracy_positive", 0.8),
        ("tuned_sae", "sign_accuracy_negative", 0.6),
        ("tuned_sae - tuned_raw", "tau_difference", -0.2),
        ("tuned_sae - bag_of_words", "tau_difference", 0.25),
    ]
]
NO_PROBE = PROBE | {"features": "tuned_sae", "value": np.nan, "ci_low": np.nan, "ci_high": np.nan, "status": "too few triples"}
SCORE = {"mean": 0.9, "ci95": [0.87, 0.93], "latents": 4}
SUMMARY = {"scores": {"ensemble detection": SCORE}, "other_latents_explanation": {}, "shuffled_activations": {}}
EVIL = "<script>alert('x')</script> & \"quoted\""
PPO = {
    "evaluation_prompts": 512,
    "reward_base": 0.0256,
    "reward_tuned": 1.7552,
    "reward_gain": 1.7296,
    "reward_gain_ci95": [1.648, 1.811],
    "reward_base_ci95": [-0.03, 0.08],
    "reward_tuned_ci95": [1.69, 1.82],
    "kl": 6.4,
    "kl_ci95": [6.18, 6.63],
    "kl_per_token": 0.478,
    "response_length_base": 13.1,
    "response_length_tuned": 13.4,
    "perplexity_base": 5.13,
    "perplexity_tuned": 6.49,
    "checkpoints": [],
}


def artifact(folder, metrics, parameters, tables=None, inputs=None):
    """A finished artifact with the given tables."""
    folder.mkdir(parents=True)
    for name, rows in (tables or {}).items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(rows))
        else:
            pd.DataFrame(rows).to_parquet(folder / name, index=False)
    stage = folder.relative_to(next(p for p in folder.parents if p.name == "results")).parts[0]
    outputs = {name: digest(folder / name) for name in (tables or {})}
    (folder / MANIFEST).write_text(Manifest(stage, parameters, inputs or {}, outputs, metrics).to_json())
    return folder


def cosines(seeds, sizes):
    """Rows of `aggregates.parquet`; a figure that needs two seeds is missing with one."""
    two = len(seeds) > 1
    figures = [("mmcs_base_tuned", 0.78, True), ("mmcs_base_tuned_other_seed", 0.31, two), ("mmcs_floor", 0.33, two)]
    rows = [("small", *figure) for figure in figures]
    if sizes:
        rows += [("small→big", f"mmcs_small_big_{role}{end}", 0.35, True) for role in ("base", "tuned") for end in ("", "_max")]
    return [
        {"layer": 1, "dictionary": name, "measure": measure, "value": value if known else np.nan}
        | {"ci_low": value - 0.03 if known else np.nan, "ci_high": value + 0.03 if known else np.nan, "latents": 9 * known}
        for name, measure, value, known in rows
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Function that writes the artifacts of a small study, builds its report, and returns the report's folder."""

    def build(seeds=(0, 1), sizes=True, metrics=None, latents=2, evil="a film", step=None, out="demo"):
        results = tmp_path_factory.mktemp("study") / "results"
        history = {c: [0.1, 0.2, 0.3] for c in ("reward", "kl", "kl_coefficient", "entropy", "response_length")}
        samples = [{"prompt": evil, "response_base": evil, "reward_base": 0.5, "response_tuned": evil, "reward_tuned": 2.0}]
        measured = {"value": [1.0, 2.0], "ci_low": [np.nan, 1.9], "ci_high": [np.nan, 2.1], "rank": [2, 1]}
        layers = [
            {"layer": n, "measure": measure, "component": component, **{k: v[n] for k, v in measured.items()}}
            for measure, component in zip(MEASURES, ("layer", "mlp", "layer", "layer"), strict=True)
            for n in (0, 1)
        ]
        keys = [
            {"role": role, "layer": 1, "dictionary": "small", "seed": 0, "latent": i}
            for role in ("base", "tuned")
            for i in range(latents)
        ]
        told = [
            {"selected_for": "least changed", "explanation": f"fires on ‹ {evil}›", "raises": f"‹ {evil}›", "lowers": "‹ x›"}
            | {"ablation_reward_change": -0.13 if i else np.nan}
            | ({"detection_auc": np.nan, "status": "not scored"} if i % 2 else {"detection_auc": 0.9, "status": "scored"})
            for i in range(len(keys))
        ]
        changed = {"write_change": 0.8, "write_angle": 40.0, "tag": "rotated", "replicated": True, "firings": 500}
        matched = changed | {
            "density": 0.01,
            "match_cosine_decoder": 0.8,
            "floor_percentile": np.nan if len(seeds) == 1 else 90.0,
        }
        tags = TAGS | {"replicated": 3 if len(seeds) > 1 else None}
        score = {"layer": 1, "dictionary": "small", "measure": "fvu_base_on_tuned", "value": 0.2}
        window = {"document": 3, "held_out": True, "peak": 1, "tokens": [evil, " film\n", " x"], "activations": [0.5, 2.0, 0.0]}
        window |= {"activations_other": [0.0, 1.0, 0.0]}
        tuning = {"method": "ppo", "reward": "vader", "kl_target": None}
        scores = {"fvu": 0.05, "explained_variance": 0.95, "l0": 6.0, "dead_share": 0.01, "ce_recovered": None}
        scores |= {"rows_trained": 350208, "rows_held_out": 13787}
        curve = [{"seed": s, "step": t, "mse": 1 / t, "l1": 1.0, "l0": 9 / t} for s in seeds for t in (1, 2, 3)]
        stores = {
            role: artifact(
                results / "activations" / f"{policy}.reviews" / "mlp" / "layers-1",
                {"rows": 131072, "channels": 8, "layers": [1], "bytes": 68746025},
                {"checkpoint": step if role == "tuned" else None},
                inputs={"tokens/tiny.reviews": "sha256:" + "ab" * 32},
            )
            for role, policy in (("base", "tiny"), ("tuned", f"tiny.ppo@{step}" if step else "tiny.ppo"))
        }
        dictionaries = {
            (role, 1, "small"): artifact(
                results / "dictionaries" / stores[role].parts[-3] / "mlp" / "layers-1" / "layer1" / "small",
                {f"seed{s}": scores for s in seeds},
                {"architecture": "tied_relu", "l1": 0.01},
                {"metrics.parquet": curve},
            )
            for role in ("base", "tuned")
        }
        divergence = artifact(
            results / "divergence" / "demo",
            {"chosen_layers": [1]},
            {},
            {
                "layers.parquet": layers,
                "steps.parquet": [{"step": 3, **row} for row in layers],
            },
        )
        taus = [{"measure": a, "other": b, "kendall_tau": 1.0} for a in MEASURES for b in MEASURES]
        pd.DataFrame(taus).to_csv(divergence / "agreement.tsv", sep="\t", index=False)
        chosen = {"layers": [1], "why": "highest weight_l2_sum", "stability": {"1": 0.97}}
        (divergence / "chosen.json").write_text(json.dumps(chosen))
        folder = results / "reports" / out
        build_report(
            "demo",
            {},
            folder,
            None,
            base=artifact(results / "models" / "tiny", {"parameters": 1044224, "layers": 2}, {}),
            tuned=artifact(
                results / "policies" / "tiny.ppo",
                PPO | (metrics or {}),
                {"tuning": tuning, "reward": {"kind": "lexicon"}},
                {"history.parquet": {"batch": [0, 1, 2], **history}, "samples.parquet": samples},
            ),
            divergence=divergence,
            comparison=artifact(
                results / "comparison" / "demo",
                {"layers": {"1": {"dictionaries": {"small": TRANSFER | {"tags": tags}}}}},
                {},
                {
                    "levels.parquet": [LEVEL | {"role": role, "seed": seed} for role in ("base", "tuned") for seed in seeds],
                    "aggregates.parquet": [*cosines(seeds, sizes), score],
                    "latents.parquet": [{**key, **matched, "match_latent": key["latent"]} for key in keys]
                    or [{"role": "base", "layer": 1, "dictionary": "small", "seed": 0, "latent": 0, **matched}],
                },
            ),
            interpretation=artifact(
                results / "interpretation" / "demo",
                {"latents_explained": len(keys), "detection_auc": 0.9 if keys else None},
                {},
                {
                    "latents.parquet": [key | row for key, row in zip(keys, told, strict=True)],
                    "examples.parquet": [{**key, **window, "rank": 0} for key in keys],
                    "summary.json": SUMMARY if keys else {name: {} for name in SUMMARY},
                    "ablations.parquet": [ABLATION] if keys else pd.DataFrame(columns=list(ABLATION)),
                    "probes.parquet": PROBES if keys else [NO_PROBE],
                    "steering.parquet": [DOSE] if keys else pd.DataFrame(columns=list(DOSE)),
                    "transplants.parquet": [TRANSPLANT] if keys else pd.DataFrame(columns=list(TRANSPLANT)),
                    "map_directions.parquet": [DIRECTION | {"raises": f"‹ {evil}›"}] if keys else [],
                },
            ),
            dictionaries=dictionaries,
            stores=stores,
        )
        return folder

    return build


@pytest.fixture(scope="module")
def plain(report):
    """The report of the small study as it is."""
    return report()


def pages(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.html")}


def prose(page):
    """The text of a page's first paragraph of findings."""
    paragraph = re.search(r'<p class="findings">(.*?)</p>', page, re.DOTALL)[1]
    return " ".join(html.unescape(re.sub("<.*?>", "", paragraph)).split())


def test_pages_need_nothing_from_outside(plain):
    assert {path.name for path in plain.iterdir()} == {"index.html", "latents.html", "status.js", MANIFEST, PROVENANCE}
    for path in plain.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?:|//\w+\.|@import|fetch\(|XMLHttp", text), path.name
        assert str(plain.parents[2]) not in text
    for text in pages(plain).values():
        for link in re.findall(r'(?:src|href)="([^"]*)"', text):
            file, _, anchor = link.partition("#")
            if link.startswith("data:"):
                continue
            assert not file or (plain / file).exists(), link
            assert not anchor or f'id="{anchor}"' in pages(plain)[file or "index.html"] or f'id="{anchor}"' in text, link


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


def test_text_of_the_corpus_is_data(report):
    class Elements(HTMLParser):
        def __init__(self):
            super().__init__()
            self.scripts, self.text = 0, ""

        def handle_starttag(self, tag, attrs):
            self.scripts += tag == "script"

        def handle_data(self, data):
            self.text += data

    for text in pages(report(evil=EVIL)).values():
        elements = Elements()
        elements.feed(text)
        assert elements.scripts == 2  # the banner, and our own
        assert EVIL.replace(" ", "·") in elements.text
        assert "<script>alert" not in text


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
    assert "nan" not in re.sub("<(svg|script|style).*?</\\1>", "", index, flags=re.DOTALL).lower()


def test_missing_values_read_na(plain):
    found = pages(plain)
    assert '<td class="n" data-label="AUC">n/a</td>' in found["latents.html"]
    assert "Not scored." in found["latents.html"]
    assert '<td class="n">n/a</td>' in found["index.html"]  # ce_recovered


def test_windows_show_spaces_and_heat(plain):
    text = pages(plain)["latents.html"]
    assert '<mark style="--h:1.00" title="2.00" class="peak">·film⏎</mark>' in text
    assert '<mark style="--h:0.25" title="0.500">a·film</mark>' in text
    assert "<span>·x</span>" in text
    assert 'href="#tuned-1-small-0-0"' in text


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
    assert "68.7 MB" in text


def test_equal_artifacts_give_equal_bytes(report, plain):
    first, second = plain, report(out="other")
    assert Manifest.read(first) == Manifest.read(second)
    assert digest(first / "index.html") == digest(second / "index.html")


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
    empty = pages(report(latents=0, out="empty"))["index.html"]
    text = section(empty, "changes")
    assert "No explained latent is tagged." in text
    assert "No layer has one" in text
    assert "No latents were changed while the tuned model wrote." in section(empty, "causes")
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
