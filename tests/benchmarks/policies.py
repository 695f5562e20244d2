"""Print the held-out figures of tuned policies as a table: `python -m tests.benchmarks.policies results/policies`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLUMNS = {
    "reward": lambda m: f"{m['reward_base']:.3f} → {m['reward_tuned']:.3f}",
    "gain [95 % interval]": lambda m: with_interval(m, "reward_gain"),
    "KL (nats per response)": lambda m: with_interval(m, "kl"),
    "length": lambda m: f"{m['response_length_base']:.1f} → {m['response_length_tuned']:.1f}",
    "ended": lambda m: f"{m['eos_rate_base']:.2f} → {m['eos_rate_tuned']:.2f}",
    "perplexity ratio": lambda m: f"{m['perplexity_tuned'] / m['perplexity_base']:.2f}",
    "distinct-2 ratio": lambda m: f"{m['distinct_2_tuned'] / m['distinct_2_base']:.2f}",
    "pairs preferred rightly": lambda m: with_interval(m, "preference_accuracy"),
    "by length alone": lambda m: with_interval(m, "length_only_accuracy"),
    "signs of hacking": lambda m: ", ".join(m["signs_of_reward_hacking"]) or "none",
}


def with_interval(metrics: dict[str, Any], key: str) -> str:
    if key not in metrics:
        return ""
    low, high = metrics[f"{key}_ci95"]
    return f"{metrics[key]:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    rows = []
    for path in sorted(parser.parse_args().folder.glob("*/manifest.json")):
        metrics = json.loads(path.read_text())["metrics"]
        provenance = json.loads((path.parent / "provenance.json").read_text())
        seconds = f"{provenance['tuning_seconds']:.0f}"
        rows.append([path.parent.name, *(column(metrics) for column in COLUMNS.values()), seconds])
    shown = [place for place in range(len(rows[0])) if any(row[place] for row in rows)]
    header = ["policy", *COLUMNS, "tuning (s)"]
    print("| " + " | ".join(header[place] for place in shown) + " |")
    print("|" + "---|" * len(shown))
    for row in rows:
        print("| " + " | ".join(row[place] for place in shown) + " |")


if __name__ == "__main__":
    main()
