"""What threads should do while they wait, spin or sleep: `python -m tests.benchmarks.waiting`.

The same small matrix products in fresh processes, in turn with both settings; then again beside a second process that does
the same with its own two threads, as jobs that share a machine do.
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
def forward():
    y = x
    for layer in layers:
        y = torch.nn.functional.gelu(layer(y)[:, :256])
with torch.no_grad():
    forward()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        forward()
        count += 1
print(count / SECONDS)
"""


def rate(policy: str) -> float:
    """Passes per second under `OMP_WAIT_POLICY`."""
    environment = os.environ | {"OMP_WAIT_POLICY": policy}
    command = [sys.executable, "-c", PRODUCTS.replace("SECONDS", "4")]
    return float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


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
    other = subprocess.Popen([sys.executable, "-c", PRODUCTS.replace("SECONDS", "600")])
    try:
        compare("beside another")
    finally:
        other.kill()


if __name__ == "__main__":
    main()
