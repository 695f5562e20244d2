"""The tables of the pages, row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rlsae.artifacts import PROVENANCE, Manifest, stored_bytes
from rlsae.comparison.kinds import CHANGED
from rlsae.divergence.figures import FAMILIES, whole_layers
from rlsae.report.formatting import listing, number
from rlsae.report.study import Study

STAGES = ["file", "corpora", "models", "policies", "tokens", "activations", "divergence", "dictionaries", "comparison"]
"""The order of the chain; interpretation, not named, comes last."""


@dataclass(frozen=True)
class Made:
    """One artifact of the chain."""

    name: str
    digest: str
    holds: str
    bytes: int | None
    """None where only the digest is known."""
    link: str | None
    """From the report's folder, where it lies among the same results."""


@dataclass(frozen=True)
class Metric:
    """One row of the table of the tuning: values as text, with their intervals."""

    name: str
    base: str
    tuned: str
    difference: str = ""
    difference_ci95: Any = None
    base_ci95: Any = None
    tuned_ci95: Any = None


@dataclass(frozen=True)
class Shift:
    """How far one layer moved: one row of the divergence table."""

    layer: int
    chosen: bool
    values: dict[str, dict[str, Any]]
    """By measure: value, ci_low, ci_high, rank."""


@dataclass(frozen=True)
class Quality:
    """One dictionary and its scores on held-out rows."""

    policy: str
    role: str
    layer: int
    dictionary: str
    seed: str
    scores: dict[str, Any]


@dataclass(frozen=True)
class Transfer:
    """What the dictionaries of one policy are worth to both, as means over seeds."""

    role: str
    policy: str
    layer: int
    dictionary: str
    scores: list[tuple[float | None, Any]]
    """FVU on the rows of base and tuned, then CE and KL recovered in base and tuned: each with its interval."""


@dataclass(frozen=True)
class Changes:
    """What the test says of the latents of one layer and dictionary."""

    layer: int
    dictionary: str
    tags: dict[str, int | None]
    """Latents with each tag, and how many of the changed ones are `replicated`."""
    shares: dict[str, float]
    """Of the rows' variance that differs; of that difference, what each level holds; of the tested latents, how many move."""
    diffuse: bool

    @property
    def changed(self) -> int:
        return sum(self.tags[tag] or 0 for tag in CHANGED)

    @property
    def tested(self) -> int:
        return self.changed + (self.tags["unchanged"] or 0)

    @property
    def replicated(self) -> int | None:
        return self.tags["replicated"]


def chain(study: Study, digests: dict[str, str]) -> list[Made]:
    """All artifacts that the report rests on, in the order of the chain.

    Args:
        digests: of the manifests that the report reads, by identifier.
    """
    named = {identifier: label for label, identifier in study.identifiers.items()}
    for manifest in study.manifests.values():
        digests = {**manifest.inputs, **digests}
    made = []
    for identifier in sorted(digests, key=lambda i: (_position(i), i)):
        label = named.get(identifier)
        holds, size = "", None
        if label:
            manifest, folder = study.manifests[label], study.folders[label]
            stored = sum(stored_bytes(folder / name) for name in manifest.outputs)
            holds, size = contents(manifest), manifest.metrics.get("bytes") or stored
        link = f"../../{identifier}/" if (study.comparison.parents[1] / identifier).is_dir() else None
        made.append(Made(identifier, digests[identifier].removeprefix("sha256:")[:12], holds, size, link))
    return made


def versions(study: Study) -> str:
    """Of the code and libraries that interpreted the study, as its provenance tells; empty without one."""
    path = study.interpretation / PROVENANCE
    if not path.exists():
        return ""
    made = json.loads(path.read_text(encoding="utf-8"))
    known = {"rlsae": made.get("rlsae"), "commit": (made.get("commit") or "")[:12], "python": made.get("python")}
    return listing(f"{name} {version}" for name, version in (known | made.get("libraries", {})).items() if version)


def contents(manifest: Manifest) -> str:
    """What an artifact holds, in a few words."""
    metrics, parameters = manifest.metrics, manifest.parameters
    match manifest.stage:
        case "models":
            return f"{number(metrics.get('parameters'))} parameters, {number(metrics.get('layers'))} layers"
        case "policies":
            steps = metrics.get("checkpoints")
            return f"{parameters['tuning']['method']}; checkpoints: {listing(steps) if steps else 'none'}"
        case "activations":
            return (
                f"{number(metrics['rows'])} rows × {number(metrics['channels'])} channels, layers {listing(metrics['layers'])}"
            )
        case "divergence":
            return f"chosen layers: {listing(metrics['chosen_layers'])}"
        case "dictionaries":
            shown = {"architecture": "", "expansion": "expansion ", "l1": "l1 ", "learning_rate": "learning rate "}
            recipe = [f"{text}{parameters[key]}" for key, text in shown.items() if key in parameters]
            return ", ".join([*recipe, f"seeds {listing(name.removeprefix('seed') for name in metrics)}"])
        case "interpretation":
            return f"{number(metrics['latents_explained'])} explained latents"
    return ""


def _position(identifier: str) -> int:
    stage = identifier.replace(":", "/").split("/")[0]
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def tuning_metrics(metrics: dict[str, Any]) -> Iterator[Metric]:
    """The rows of the table of the tuning, those that were measured."""
    rows = [
        ("reward", "Reward"),
        ("response_length", "Response length (tokens)"),
        ("eos_rate", "Responses that end by themselves (share)"),
        ("perplexity", "Perplexity under the base"),
        ("distinct_2", "Distinct bigrams of words (share)"),
    ]
    for key, name in rows:
        base, tuned = metrics.get(f"{key}_base"), metrics.get(f"{key}_tuned")
        if base is None and tuned is None:
            continue
        difference = number(tuned - base) if base is not None and tuned is not None else ""
        yield Metric(
            name,
            number(base),
            number(tuned),
            difference,
            metrics.get("reward_gain_ci95") if key == "reward" else None,
            metrics.get(f"{key}_base_ci95"),
            metrics.get(f"{key}_tuned_ci95"),
        )
    yield Metric("KL from the base (nats per response)", "0", number(metrics.get("kl")), tuned_ci95=metrics.get("kl_ci95"))
    yield Metric("KL from the base (nats per token)", "0", number(metrics.get("kl_per_token")))
    for key, name in (
        ("preference_accuracy", "Held-out pairs preferred rightly (share)"),
        ("length_only_accuracy", "The same by a rule that looks at length alone"),
    ):
        if key in metrics:
            yield Metric(name, "", number(metrics[key]), tuned_ci95=metrics[f"{key}_ci95"])


def shifts(layers: pd.DataFrame, chosen: list[int]) -> list[Shift]:
    """The rows of the divergence table: whole layers."""
    whole = whole_layers(layers)
    return [
        Shift(layer, layer in chosen, {row["measure"]: row for row in records(whole[whole.layer == layer])})
        for layer in sorted(whole.layer.unique().tolist())
    ]


def families(layers: pd.DataFrame) -> dict[str, list[str]]:
    """The measures of each family, in the order of the table."""
    measures = layers.measure.unique().tolist()
    return {family: [m for m in measures if m.startswith(beginning)] for family, beginning in FAMILIES.items()}


def changes(study: Study) -> list[Changes]:
    """One row per layer and dictionary: counts over roles and seeds, shares of the difference as means over them."""
    levels = pd.read_parquet(study.comparison / "levels.parquet")
    found = []
    for layer, name, figures in _compared(study):
        of_pair = levels[(levels.layer == layer) & (levels.dictionary == name)]
        shares = of_pair[["difference", "mean_shift", "linear_map", "tagged", "moved"]].mean()
        found.append(
            Changes(
                layer,
                name,
                figures["tags"],
                {str(level): float(share) for level, share in shares.items()},
                bool(of_pair.diffuse.any()),
            )
        )
    return found


def qualities(study: Study) -> list[Quality]:
    """One row per dictionary and seed."""
    return [
        Quality(study.policies[role], role, layer, name, seed.removeprefix("seed"), scores)
        for role, layer, name in study.dictionaries
        for seed, scores in sorted(study.manifests[f"{role} layer {layer} {name}"].metrics.items())
    ]


def transfers(study: Study) -> list[Transfer]:
    """One row per layer, dictionary and policy that it was trained for."""
    found = []
    for layer, name, figures in _compared(study):
        for role, policy in study.policies.items():
            if ("base", layer, name) not in study.dictionaries:  # it reads the rows of both policies
                continue
            measures = [f"fvu_{role}_on_{other}" for other in study.policies]
            measures += [f"{score}_recovered_{role}_in_{other}" for score in ("ce", "kl") for other in study.policies]
            scores = [(figures[measure], figures[f"{measure}_ci95"]) for measure in measures]
            found.append(Transfer(role, policy, layer, name, scores))
    return found


def _compared(study: Study) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Layer, dictionary and what the comparison's manifest says of them, in the order of the study."""
    layers = study.manifests["comparison"].metrics["layers"]
    for layer, name in dict.fromkeys((layer, name) for _, layer, name in study.dictionaries):
        yield layer, name, layers[str(layer)]["dictionaries"][name]


PROBED = {
    "tuned_sae": "latents of the tuned model",
    "base_sae": "latents of the base",
    "tuned_raw": "rows of the tuned model",
    "base_raw": "rows of the base",
    "random_projection": "random projection of tuned rows",
    "bag_of_words": "bag of words",
    "shuffled": "latents, labels shuffled",
}


def probe_rows(probes: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per feature set: τ-b with the lexicon's values, its interval and p, and the right signs of both kinds of words."""
    found = scored_probes(probes)
    rows = []
    for features, name in PROBED.items():
        if (features, "tau") in found:
            tau = found[features, "tau"]
            signs = [found[features, f"sign_accuracy_{side}"]["value"] for side in ("positive", "negative")]
            ci95 = [tau["ci_low"], tau["ci_high"]]
            rows.append({"name": name, "tau": tau["value"], "ci95": ci95, "p": tau["p"], "signs": signs})
    return rows


def scored_probes(probes: pd.DataFrame) -> dict[tuple[str, str], dict[str, Any]]:
    """The scored rows of the probes for the lexicon's values, by features and metric."""
    mine = probes[(probes.probe == "ridge") & (probes.target == "lexicon") & (probes.status == "scored")]
    return {(row["features"], row["metric"]): row for row in records(mine)}


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as plain values by column."""
    return [{str(column): value for column, value in row.items()} for row in table.to_dict("records")]
