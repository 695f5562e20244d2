"""Peak memory of a dump as the corpus grows: `python -m tests.benchmarks.dump_memory`.

`rlsae extract` in a process of its own for every part, one after the other; then for one part that holds the whole of the
largest corpus. A part of the smallest corpus spans several shards of full size, so that one is written while the next one
is computed: rows are wide (2,048 channels of float16 inside the MLP of a small model) to reach that with few tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoModelForCausalLM

from rlsae.activations.store import SHARD_BYTES, Geometry
from rlsae.pretrain import train_tokenizer
from tests.unit.small_artifacts import DUMP, tokens_of, write_policy, write_tokens

SIZES = (1, 2, 4, 8)
CHANNELS, SHARDS, DOCUMENT = 2048, 3, 128
"""Width of a row, shards of a part, tokens of a document."""
MEGABYTE = 1 << 20
EXTRACT = """
import re, sys
from pathlib import Path
from rlsae.cli import main
sys.argv = ["rlsae", "extract", *sys.argv[1:]]
try:
    main()
except SystemExit as ended:
    if ended.code:
        raise
# Of this process alone: what getrusage gives starts at the size of the process that started it.
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak(folder: Path, tokens: Path, part: int, rows_per_part: int, work: Path) -> float:
    """Largest resident size of one part's process, in MB."""
    settings = DUMP | {"hook": "mlp.act", "layers": [0], "rows": 10**9, "rows_per_part": rows_per_part}
    arguments = ["--settings", json.dumps(settings), "--part", part, "--stamp", folder / "part.json", "--work", work]
    arguments += ["--policy", folder / "models/small", "--weights", folder / "models/small/model", "--tokens", tokens]
    command = [sys.executable, "-c", EXTRACT, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | {"RLSAE_DEVICE": "cpu"}, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout) / 1024


def dump(folder: Path, size: int, parts: int) -> list[float]:
    """Peaks of the parts of a corpus that is `size` times the smallest one."""
    shard_rows = SHARD_BYTES // (CHANNELS * 2)
    rows = size * SHARDS * shard_rows
    rows_per_part = rows // parts
    assert Geometry.of(CHANNELS, 2, rows_per_part).shard_rows == shard_rows
    tokens = folder / f"tokens/small.{size}"
    if not tokens.exists():
        ids = np.random.default_rng(0).integers(1, 300, (rows // DOCUMENT, DOCUMENT), np.int32)
        write_tokens(tokens, tokens_of(list(ids)))
    with tempfile.TemporaryDirectory(dir=folder) as work:
        peaks = [peak(folder, tokens, part, rows_per_part, Path(work)) for part in range(parts)]
    print(f"| {size} | {rows:,} | {parts} | {rows_per_part // shard_rows} | {max(peaks):,.0f} |", flush=True)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": CHANNELS}
        config = AutoConfig.for_model("gpt_neox", vocab_size=320, bos_token_id=0, eos_token_id=0, **shape)
        tokenizer = train_tokenizer(["a text", "another text"], vocabulary=260)
        write_policy(folder / "models/small", AutoModelForCausalLM.from_config(config), tokenizer)
        print(f"one layer, {CHANNELS * 2 / 1024:.0f} kB per row, shards of {SHARD_BYTES // MEGABYTE} MiB\n")
        print("| corpus | rows | parts | shards per part | peak (MB) |\n|---|---|---|---|---|")
        peaks = {size: max(dump(folder, size, size)) for size in SIZES}
        whole = max(dump(folder, SIZES[-1], 1))
    equal, one = (f"{largest / peaks[1] - 1:+.1%}" for largest in (peaks[SIZES[-1]], whole))
    print(f"\ngrowth from 1× to {SIZES[-1]}×: {equal} in equal parts, {one} in one part")


if __name__ == "__main__":
    main()
