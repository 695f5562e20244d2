"""What a study found, in sentences made from its numbers alone."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from rlsae.divergence.figures import TITLES
from rlsae.report.content import Changes, Quality, records, scored_probes
from rlsae.report.formatting import MISSING, alike, interval, listing, number, percent, spread

CAUSAL = 0.95
"""Share of the random sets that a set of latents must outdo."""


def reward_sentence(metrics: dict[str, Any]) -> str:
    """Whether the tuning raised the reward on held-out prompts, and by how much."""
    gain, bounds = metrics.get("reward_gain"), metrics.get("reward_gain_ci95")
    if gain is None or bounds is None:
        return "The reward of this tuning was not measured."
    before, after = alike(metrics.get("reward_base"), metrics.get("reward_tuned"))
    where = f"on {number(metrics.get('evaluation_prompts'))} held-out prompts"
    size = f"{number(gain)} (95 % interval {interval(bounds)})"
    if bounds[0] <= 0 <= bounds[1]:
        return (
            f"The tuning brought no gain beyond noise: {where} the mean reward went from {before} to {after}, "
            f"a difference of {size}, which includes 0."
        )
    verb, noun = ("raised", "gain") if gain > 0 else ("lowered", "change")
    return f"The tuning {verb} the mean reward {where} from {before} to {after}, a {noun} of {size}."


def cost_sentence(metrics: dict[str, Any]) -> str:
    """How far the tuned model moved from the base, and what became of its text."""
    bounds = interval(metrics.get("kl_ci95"))
    kl = number(metrics.get("kl")) + (f" (95 % interval {bounds})" if bounds != MISSING else "")
    return (
        f"Its KL divergence from the base is {kl} nats per response. "
        f"Responses are {number(metrics.get('response_length_tuned'))} tokens long on average, "
        f"the base's {number(metrics.get('response_length_base'))}; under the base model, "
        f"the tuned text has a perplexity of {number(metrics.get('perplexity_tuned'))}, "
        f"the base's own text one of {number(metrics.get('perplexity_base'))}."
    )


SIGNS = {
    "kl_high": "its divergence from the base exceeds 1 nat per token",
    "distinct_2_collapsed": "its text has less than half the base's distinct bigrams",
    "eos_suppressed": "it ends its responses less than half as often as the base",
}


def hacking_sentence(metrics: dict[str, Any]) -> str:
    """A warning where the reward may have been gained by means that nobody wanted; empty where nothing hints at it."""
    signs = metrics.get("signs_of_reward_hacking")
    return f"Signs of reward hacking: {listing(SIGNS[sign] for sign in signs)}." if signs else ""


def preference_sentence(metrics: dict[str, Any]) -> str:
    """How often the tuned model prefers what people preferred, beside length alone; empty where there are no pairs."""
    if "preference_accuracy" not in metrics:
        return ""
    accuracy, baseline = alike(metrics["preference_accuracy"], metrics["length_only_accuracy"])
    return (
        f"On {number(metrics['preference_pairs'])} held-out pairs it prefers the chosen response in a share of {accuracy} "
        f"(95 % interval {interval(metrics['preference_accuracy_ci95'])}); a rule that looks at length alone reaches "
        f"{baseline} (95 % interval {interval(metrics['length_only_accuracy_ci95'])})."
    )


OF_TUNING = (cost_sentence, preference_sentence, hacking_sentence)


def layers_sentence(chosen: dict[str, Any], count: int) -> str:
    """Which layers were looked into, why, and how stable that choice is."""
    layers = chosen["layers"]
    named = {measure: title[0].lower() + title[1:] for measure, title in TITLES.items()}
    why = re.sub(r"\w+", lambda word: named.get(word[0], word[0]), chosen["why"])
    subject, verb = ("Layers", "are") if len(layers) > 1 else ("Layer", "is")
    text = f"{subject} {listing(layers)} of the model's {count} {verb} looked into: {why}."
    if chosen["stability"]:
        shares = listing(f"layer {layer} in {percent(share)}" for layer, share in chosen["stability"].items())
        text += f" In bootstrap resamples, the same rule chooses {shares}."
    return text


def quality_sentence(qualities: list[Quality]) -> str:
    """How much of the activations the dictionaries miss, with how many latents."""
    fvu, l0, dead = ([row.scores[key] for row in qualities] for key in ("fvu", "l0", "dead_share"))
    return (
        f"{number(len(qualities))} dictionaries, by layer, size, model and seed, miss a share of {spread(fvu)} of the variance "
        f"of held-out rows with {spread(l0)} latents at a row; at most {percent(max(dead))} of their latents are dead."
    )


def changes_sentence(tags: list[Changes]) -> str:
    """How many latents the tuning changed, the replicated ones first."""
    tested = sum(row.tested for row in tags)
    if not tested:
        return "No latent fires often enough to be tested for a change."
    changed, replicated = sum(row.changed for row in tags), [row.replicated for row in tags if row.replicated is not None]
    if not changed:
        return f"No change of single latents beyond noise: none of the {number(tested)} tested ones is tagged."
    told = f"{number(changed)} of {number(tested)} tested latents"
    beyond = "write something else in the tuned model than in the base, beyond what the layer as a whole does"
    if len(replicated) < len(tags):
        return f"{told} {beyond}; one seed cannot say whether they recur (dictionaries.*.seeds)."
    if not sum(replicated):
        return f"No change of single latents that recurs: {told} are tagged, none of them in the dictionaries of two seeds."
    return f"{number(sum(replicated))} latents {beyond}, and recur in another seed's dictionary; in all, {told} are tagged."


def cosine_sentences(aggregates: pd.DataFrame) -> str:
    """How alike the dictionaries of base and tuned are beside the floor, and what that does not say."""
    paired = aggregates.dictionary[aggregates.measure == "mmcs_base_tuned"]
    if paired.empty:
        return "The dictionaries read the rows of both models together, so that there are none to match with each other."
    aggregates = aggregates[aggregates.dictionary.isin(paired)]
    wide = aggregates.pivot_table(index=["layer", "dictionary"], columns="measure", values=["value", "ci_low", "ci_high"])
    same = spread(_column(wide, "value", "mmcs_base_tuned"))
    other = _column(wide, "value", "mmcs_base_tuned_other_seed")
    text = (
        f"Base and tuned dictionaries trained from the same seed match at a mean cosine of {same}, "
        "but such pairs share their start, so that they would be alike without any finding. "
    )
    if other.empty:
        reason = aggregates.loc[aggregates.measure == "mmcs_floor", "note"].iloc[0]
        text += f"{reason.capitalize()}, so nothing says how alike two dictionaries of one model would be. "
    else:
        floor = _column(wide, "value", "mmcs_floor")
        overlap = (_column(wide, "ci_low", "mmcs_base_tuned_other_seed") <= _column(wide, "ci_high", "mmcs_floor")) & (
            _column(wide, "ci_low", "mmcs_floor") <= _column(wide, "ci_high", "mmcs_base_tuned_other_seed")
        )
        text += (
            f"The fair comparison with the re-seed floor is the figure over different seeds: {spread(other)}, "
            f"where two seeds of one model reach {spread(floor)}; the intervals of the two overlap "
            f"in {overlap.sum()} of {len(overlap)} layers × dictionaries. "
        )
    return text + "A cosine match is a description and decides nothing: it does not show which latents the tuning changed."


def latents_sentence(metrics: dict[str, Any]) -> str:
    """How many latents were explained, and how well the explanations hold on held-out documents."""
    if not metrics["latents_explained"]:
        return "No latent was explained."
    text = f"{number(metrics['latents_explained'])} latents were explained by where they fire and what they write; "
    if metrics["detection_auc"] is None:
        return text + "none of these explanations could be scored on held-out documents."
    auc = number(metrics["detection_auc"])
    return text + f"on held-out documents these explanations reach a mean detection AUC of {auc} (0.5 is chance)."


def language_model_sentence(scores: dict[str, Any], study: str) -> str:
    """Says that no language model explained or judged anything, where none did."""
    if any(part.startswith("llm") for name in scores for part in name.split()):
        return ""
    return f"No language model was asked for explanations (studies.{study}.llm)."


def probes_sentence(probes: pd.DataFrame, study: str) -> str:
    """Whether latents predict the reward of words, and better than what they are made from."""
    found = scored_probes(probes)
    if ("tuned_sae", "tau") not in found:
        if probes.empty:
            return f"No probe was trained: the study asks for none (studies.{study}.interpretation.probes)."
        return f"No probe could be scored: {listing(sorted(set(probes.status)))}."
    tau = found["tuned_sae", "tau"]
    text = f"A linear probe of the tuned model's latents ranks held-out words with a τ of {number(tau['value'])} "
    text += f"(95 % interval {interval([tau['ci_low'], tau['ci_high']])})"
    for features, name in (("tuned_raw", "its rows themselves"), ("bag_of_words", "a bag of words")):
        gain = found[f"tuned_sae - {features}", "tau_difference"]
        verdict = "better than" if gain["ci_low"] > 0 else "worse than" if gain["ci_high"] < 0 else "not told apart from"
        text += f", {verdict} {name} ({number(gain['value'])}, {interval([gain['ci_low'], gain['ci_high']])})"
    return text + "."


def causes_sentence(ablations: pd.DataFrame, study: str) -> str:
    """Whether the latents that raise the reward carry it, beside random sets as dense, and whether the tagged ones do."""
    rows = [row for row in records(ablations) if row["policy"] == "tuned"]
    if not rows:
        return (
            "No latents were changed while the tuned model wrote: the study asks for no interventions "
            f"(studies.{study}.interpretation.interventions), or no latent is linked to the reward."
        )
    told = []
    for name, who in (("reward", "the latents that raise the reward most"), ("tagged", "the tagged latents")):
        mine = [row for row in rows if row["set"] == name]
        if mine:
            carry = [row for row in mine if row["random_quantile"] >= CAUSAL and row["ci_high"] < 0]
            changes = spread(pd.Series([row["reward_change"] for row in mine]))
            told.append(
                f"{who} carry it in {len(carry)} of {len(mine)} dictionaries ({changes} of {number(mine[0]['reward'])})"
            )
    return (
        "Taken away while the tuned model writes, " + ", ".join(told) + ". "
        "Latents carry the reward where it falls for certain, and by more than without 95 % of random sets as dense."
    )


def _column(wide: pd.DataFrame, field: str, measure: str) -> pd.Series:
    """One field of a measure by layer and dictionary; empty where it was not measured."""
    return wide[field, measure].dropna() if (field, measure) in wide else pd.Series(dtype=float)
