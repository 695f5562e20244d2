"""What the main page of a report must say, computed from the tables by other means than the report's own."""

from __future__ import annotations

import json
import math

import pandas as pd

from rlsae.report.formatting import interval, number, percent

TAGS = ["unchanged", "removed", "added", "rotated", "rescaled", "untestable", "dead"]
PROBED = ["tuned_sae", "base_sae", "tuned_raw", "base_raw", "random_projection", "bag_of_words", "shuffled"]


def cell(text, bounds=None):
    """A cell's text, with its interval below it."""
    return f"{text}\n{interval(bounds)}" if bounds is not None and bounds[0] == bounds[0] else text


def expected_numbers(results, study):
    """By section of the page, the rows of numbers of its tables, from top to bottom, as texts.

    Args:
        results: folder of the demo's results.
    """

    def table(name):
        return pd.read_parquet(results / f"{name}.parquet")

    found = {}
    layers = table(f"divergence/{study}/layers")
    whole = layers[(layers.component == "layer") | ~layers.measure.str.startswith("weight")]
    found["layers"] = []
    for family in (("weight_",), ("activation_",), ("kl_", "reward_")):
        measures = [measure for measure in layers.measure.unique() if measure.startswith(family)]
        for layer in sorted(whole.layer.unique()):
            row = []
            for measure in measures:
                one = whole[(whole.layer == layer) & (whole.measure == measure)].iloc[0]
                row += [cell(number(one.value), (one.ci_low, one.ci_high)), str(one["rank"])]
            found["layers"].append(row)

    levels, latents = table(f"comparison/{study}/levels"), table(f"comparison/{study}/latents")
    aggregates = table(f"comparison/{study}/aggregates")
    places = list(dict.fromkeys(zip(levels.layer, levels.dictionary, strict=True)))
    found["changes"] = []
    for layer, name in places:
        mine = latents[(latents.layer == layer) & (latents.dictionary == name)]
        level = levels[(levels.layer == layer) & (levels.dictionary == name)]
        counts = [number(int((mine.tag == tag).sum())) for tag in TAGS]
        replicated = number(int(mine.replicated.fillna(False).sum()))
        shares = [percent(level[column].mean()) for column in ("difference", "mean_shift", "linear_map", "tagged", "moved")]
        found["changes"].append([*counts, replicated, *shares])

    found["dictionaries"] = []
    for role in ("base", "tuned"):
        for layer, name in places:
            for seed, row in enumerate(_scores(results, study, role, layer, name)):
                keys = ("fvu", "explained_variance", "l0", "dead_share", "ce_recovered", "rows_trained", "rows_held_out")
                shown = [percent(row[key]) if key == "dead_share" else number(row[key]) for key in keys]
                found["dictionaries"].append(shown)
                of_level = levels[(levels.role == role) & (levels.layer == layer) & (levels.dictionary == name)]
                assert math.isclose(of_level[of_level.seed == seed].fvu.item(), row["fvu"])
    for layer, name in places:
        of_place = aggregates[(aggregates.layer == layer) & (aggregates.dictionary == name)].set_index("measure")
        for role in ("base", "tuned"):
            measures = [f"fvu_{role}_on_{other}" for other in ("base", "tuned")]
            measures += [f"{score}_recovered_{role}_in_{other}" for score in ("ce", "kl") for other in ("base", "tuned")]
            rows = [of_place.loc[measure] for measure in measures]
            found["dictionaries"].append([cell(number(row.value), (row.ci_low, row.ci_high)) for row in rows])

    found["causes"] = [
        [
            number(row.latents),
            number(row.reward),
            cell(number(row.reward_change), (row.ci_low, row.ci_high)),
            cell(number(row.random_change), (row.random_low, row.random_high)),
            percent(row.random_quantile),
        ]
        for row in table(f"interpretation/{study}/ablations").itertuples()
    ]
    transplants = table(f"interpretation/{study}/transplants").drop_duplicates(["layer", "level"], keep="last")
    found["causes"] += [
        [number(row.latents), number(row.reward), cell(percent(row.share), (row.share_low, row.share_high)), number(row.kl)]
        for row in transplants.itertuples()
    ]
    found["causes"] += [
        [
            number(row.latents),
            cell(percent(row.ablated), (row.ablated_low, row.ablated_high)),
            cell(percent(row.transplanted), (row.transplanted_low, row.transplanted_high)),
        ]
        for row in table(f"interpretation/{study}/carried").itertuples()
    ]

    probes = table(f"interpretation/{study}/probes")
    probes = probes[(probes.probe == "ridge") & (probes.target == "lexicon")].set_index(["features", "metric"])
    found["probes"] = []
    for features in PROBED:
        tau = probes.loc[(features, "tau")]
        signs = [percent(probes.loc[(features, f"sign_accuracy_{side}")].value) for side in ("positive", "negative")]
        found["probes"].append([number(tau.value), interval((tau.ci_low, tau.ci_high)), number(tau.p), *signs])

    cosines = aggregates[aggregates.measure.str.startswith("mmcs")]
    found["comparison"] = sorted(
        [number(row.value), interval((row.ci_low, row.ci_high)), number(row.latents)] for row in cosines.itertuples()
    )
    return found


def _scores(results, study, role, layer, name):
    """Scores of a dictionary by seed."""
    inputs = json.loads((results / "comparison" / study / "manifest.json").read_text())["inputs"]
    (one,) = [
        identity
        for identity in inputs
        if identity.endswith(f"layer{layer}/{name}") and (".ppo." in identity) == (role == "tuned")
    ]
    return [scores for _, scores in sorted(json.loads((results / one / "manifest.json").read_text())["metrics"].items())]
