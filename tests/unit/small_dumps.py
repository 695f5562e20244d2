"""A small dump of activations whose parts are run one by one, for the tests of the extraction."""

from __future__ import annotations

from small_artifacts import DUMP

from rlsae.activations.extract import consolidate, extract_part

LENGTHS = [12, 1, 30, 7, 3, 22, 64, 2, 9, 17, 5, 40, 1, 28, 11, 6, 33]
"""291 tokens: with parts of 64 rows four whole parts and a shorter one, whose edges cut documents."""
PARTS = 5
HALF_ULP = 2**-11


class Dump:
    """A dump whose parts are run one by one."""

    def __init__(self, tmp_path, policy, tokens, name="mlp", **settings):
        self.settings, self.policy, self.tokens = DUMP | settings, policy, tokens
        self.out = tmp_path / "activations" / name / "survey"
        self.work = tmp_path / "work" / name
        self.stamps = tmp_path / "stamps" / name

    def stamp(self, number):
        return self.stamps / f"part-{number}.json"

    def part(self, number):
        stamp, weights = self.stamp(number), self.policy / "model"
        extract_part(self.settings, number, stamp, self.work, self.policy, weights, self.tokens)
        return stamp

    def parts(self, numbers=range(PARTS)):
        for number in numbers:
            self.part(number)
        return self

    def publish(self):
        stamps = [self.stamp(number) for number in range(PARTS)]
        consolidate(self.settings, self.out, self.work, self.policy, self.tokens, stamps)
        return self.out
