"""Do tunings that differ in their seed alone change the same latents? `python -m tests.benchmarks.recurrence RESULTS STUDY...`

The studies share the base model and its dictionaries, so that their tags of the base's latents stand side by side. Printed:
for each study the tags by layer and dictionary, and the matched cosines with their floor; for each pair of studies how much
likelier a latent with a replicated tag in one is to have one in the other, as an odds ratio over the latents that both tested
(0.5 added to each count; Woolf's 95 % interval); and the largest replicated changes, with their tokens where explained.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import pandas as pd

from rlsae.artifacts import Manifest
from rlsae.comparison.kinds import CHANGED, UNTESTED

KEY = ["layer", "dictionary", "seed", "latent"]
LARGEST = 10


def base_latents(results: Path, study: str) -> pd.DataFrame:
    """The base dictionary's latents: `tag`, `replicated`, `write_change`, and whether each was tested."""
    table = pd.read_parquet(results / "comparison" / study / "latents.parquet")
    table = table[table.role == "base"].set_index(KEY)
    changed = table.tag.isin(CHANGED)
    again = table.replicated.fillna(value=False).astype(bool)
    return table[["tag", "write_change", "density"]].assign(
        tested=~table.tag.isin(UNTESTED), tagged=changed, replicated=changed & again
    )


def odds_ratio(first: pd.Series, second: pd.Series) -> tuple[float, float, float, list[int]]:
    """Odds ratio of two yes-no columns with its 95 % interval, and the counts (both, first alone, second alone, neither)."""
    counts = [int((first & second).sum()), int((first & ~second).sum()), int((~first & second).sum())]
    counts.append(int((~first & ~second).sum()))
    a, b, c, d = (count + 0.5 for count in counts)
    log, error = math.log(a * d / (b * c)), math.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    return math.exp(log), math.exp(log - 1.96 * error), math.exp(log + 1.96 * error), counts


def print_tags(results: Path, study: str) -> None:
    print(f"\n### {study}\n")
    print("| layer | dictionary | tested | tagged | replicated | base ↔ tuned | other seed | floor |\n" + "|---" * 8 + "|")
    for layer, entry in Manifest.read(results / "comparison" / study).metrics["layers"].items():
        for name, found in entry["dictionaries"].items():
            tags = found["tags"]
            changed = sum(tags[tag] for tag in CHANGED)
            cosines = [
                f"{found[key]:.3f} [{found[key + '_ci95'][0]:.3f}, {found[key + '_ci95'][1]:.3f}]"
                for key in ("mmcs_base_tuned", "mmcs_base_tuned_other_seed", "mmcs_floor")
            ]
            tested = changed + tags["unchanged"]
            print(f"| {layer} | {name} | {tested} | {changed} | {tags['replicated']} | {' | '.join(cosines)} |")
        for name, value in entry.get("sizes", {}).items():
            if not name.endswith("_ci95"):
                low, high = entry["sizes"][f"{name}_ci95"]
                print(f"| {layer} | {name} | | | | {value:.3f} [{low:.3f}, {high:.3f}] | | |")


def print_overlap(tables: dict[str, pd.DataFrame]) -> None:
    print("\n### Overlap of the tags of the base's latents\n")
    print("| studies | tags | both | one alone | neither | odds ratio | 95 % |\n" + "|---" * 7 + "|")
    for first, second in itertools.combinations(tables, 2):
        joined = tables[first].join(tables[second].add_suffix("_second"))
        joined = joined[joined.tested & joined.tested_second]
        for column in ("tagged", "replicated"):
            ratio, low, high, (both, one, other, neither) = odds_ratio(joined[column], joined[f"{column}_second"])
            told = f"{ratio:.1f} | {low:.1f} to {high:.1f}" if both + one and both + other else "no tags | "
            print(f"| {first}, {second} | {column} | {both} | {one} + {other} | {neither} | {told} |")


def print_largest(results: Path, tables: dict[str, pd.DataFrame]) -> None:
    print("\n### The largest replicated changes, by the mean over the studies that tag them\n")
    columns = pd.concat({study: table for study, table in tables.items()}, names=["study"])
    of = columns[columns.replicated].groupby(KEY)
    found = of.agg(studies=("tag", "size"), write_change=("write_change", "mean"), tag=("tag", lambda tags: tags.mode()[0]))
    found = found.sort_values(["studies", "write_change"], ascending=False).head(LARGEST)
    explained = [
        pd.read_parquet(path / "latents.parquet").query("role == 'base'").set_index(KEY).explanation
        for study in tables
        if (path := results / "interpretation" / study).exists()
    ]
    print("| layer | dictionary | seed | latent | studies | tag | write change | explanation |\n" + "|---" * 8 + "|")
    for key, row in found.iterrows():
        text = next((texts[key] for texts in explained if key in texts.index), "")
        print(f"| {' | '.join(map(str, key))} | {row.studies} | {row.tag} | {row.write_change:.2f} | {text} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("studies", nargs="+")
    given = parser.parse_args()
    tables = {study: base_latents(given.results, study) for study in given.studies}
    for study in tables:
        print_tags(given.results, study)
    print_overlap(tables)
    print_largest(given.results, tables)


if __name__ == "__main__":
    main()
