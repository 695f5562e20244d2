"""What threads should do while they wait, spin or sleep: `python -m tests.benchmarks.waiting`.

The same small matrix products in fresh processes, in turn with both settings; then again beside two busy processes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

ROUNDS = 3
PRODUCTS = """
import time, torch
torch.set_num_threads(2)
layers, x = [torch.nn.Linear(256, 1024) for _ in range(12)], torch.randn(1024, 256)
with torch.no_grad():
    start = count = 0
    while time.perf_counter() - start < 4:
        y = x
        for layer in layers:
            y = torch.nn.functional.gelu(layer(y)[:, :256])
        start, count = start or time.perf_counter(), count + 1
print(count / 4)
"""


def rate(policy: str) -> float:
    """Passes per second under `OMP_WAIT_POLICY`."""
    environment = os.environ | {"OMP_WAIT_POLICY": policy}
    return float(subprocess.run([sys.executable, "-c", PRODUCTS], env=environment, capture_output=True, check=True).stdout)


def compare(name: str) -> None:
    """Print the median rate of both settings."""
    rates = {"active": [], "passive": []}
    for _ in range(ROUNDS):
        for policy, values in rates.items():
            values.append(rate(policy))
    spin, sleep = (statistics.median(values) for values in rates.values())
    print(f"{name:24} spin {spin:6.1f}/s   sleep {sleep:6.1f}/s   sleep/spin {sleep / spin:.2f}")


def main() -> None:
    compare("alone")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        compare("beside two busy ones")
    finally:
        for process in busy:
            process.kill()


if __name__ == "__main__":
    main()
