"""What tests of tunings share: settings of a small PPO run, an easy reward, a run that is killed."""

from __future__ import annotations

import torch

from rlsae.artifacts import MANIFEST, Manifest
from rlsae.config import PPOTuning, PythonReward
from rlsae.models import save
from rlsae.resumable import Stage
from rlsae.tuning.ppo import tune
from rlsae.tuning.rollout import Rollout
from rlsae.tuning.stage import build_policy

FAMILY = "gpt_neox"


def entry(**changes):
    sizes = {"batches": 3, "batch_size": 8, "minibatch_size": 4, "evaluation_prompts": 20}
    lengths = {"query_tokens": (2, 4), "response_tokens": (3, 6)}
    return PPOTuning(**{"method": "ppo", "reward": "letters", "corpus": "reviews"} | sizes | lengths | changes)


def letters(prompts, responses):
    """An easy reward: the share of letters of a response that are vowels."""
    return [sum(letter in "aeiou" for letter in response) / (1 + len(response)) for response in responses]


def runner(random_model, tokenizer, corpus, folder):
    """Function of a name and settings: tune a random model by PPO; the tuned model and its history."""

    def run(name, reward=letters, stage_type=Stage, family=FAMILY, **changes):
        with stage_type("policies", folder / name, {}, {}) as stage:
            return tune(random_model(family), random_model(family), tokenizer, corpus, reward, entry(**changes), stage)

    return run


def publisher(random_model, tokenizer, corpus, folder):
    """Function of a name and settings: the folder of a published tuning; the reward file counts its calls."""
    source, calls = folder / "reward.py", folder / "calls"
    source.write_text(
        "from pathlib import Path\n\n\ndef reward(prompts, responses):\n"
        f"    with Path({str(calls)!r}).open('a') as file:\n        file.write('x')\n"
        "    return [text.count('e') for text in responses]\n"
    )
    reward = PythonReward(kind="python", path=str(source))

    def publish(name="a", family=FAMILY, **changes):
        base = folder / "results" / "models" / family
        if not base.exists():
            save(random_model(family), tokenizer, base / "model")
            (base / MANIFEST).write_text(Manifest("models", {}, {}, {}, {}).to_json())
        out = folder / name / "policies" / "tiny.ppo"
        settings = entry(**changes)
        told = {"tuning": settings.settings(), "reward": reward.settings()}
        build_policy(settings, reward, told, out, None, base, corpus, source, None)
        return out

    publish.calls = calls
    return publish


def equal(one, other):
    """Whether two models have the same weights, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def responses(lengths, longest=6):
    """A rollout with responses of these lengths and prompts of two tokens; its texts and ids mean nothing."""
    mask_BR = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ids_BT = torch.randint(1, 300, (len(lengths), 2 + longest), generator=torch.Generator().manual_seed(0))
    texts = [""] * len(lengths)
    return Rollout(ids_BT, torch.ones(len(lengths), 2, dtype=torch.bool), mask_BR, texts, texts)


def killed_in(batch, calls):
    """The easy reward, which is killed when it is asked for this batch; `calls` counts how often it was asked."""

    def reward(prompts, texts):
        if len(calls) == batch:
            raise KeyboardInterrupt
        calls.append(batch)
        return letters(prompts, texts)

    return reward


def saving_after(*moments):
    """A stage that saves its partial state after these batches, counted over its life."""

    class SavingStage(Stage):
        asked = 0

        def due(self):
            self.asked += 1
            return self.asked in moments

    return SavingStage
