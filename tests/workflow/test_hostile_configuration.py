"""No string of a configuration is a command: each is refused when it is read, or reaches its stage as one word."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlsae.config import Entry, Interpretation, InterpretationJob, OpenAiLlm
from rlsae.errors import RlsaeError
from rlsae.expand import parse_config
from rlsae.sae.dictionary import SparseAutoencoder
from tests.workflow.conftest import REPOSITORY, TINY, Run, write_inputs

TOUCH = "touch executed"
PLAIN = f'it\'s "so" `{TOUCH}` $({TOUCH}) ; {TOUCH} & %s $HOME * ~ \\ two  spaces\n{TOUCH}\n'
"""In a shell, every unquoted part of it would leave a file. It is a legal file name."""
HOSTILE = PLAIN + "{wildcards} {0} {{x}}"
"""No path, where braces are refused."""
PROBED = {"latents": 2, "examples": 3, "interventions": None, "task": HOSTILE}
STUDY = {"model": "local", "tuning": "own", "corpus": "texts", "activation": "mlp", "layers": [0], "dictionaries": ["small"]}
JUDGED = {"method": "external", "reward": "lexicon", "corpus": "reviews", "evaluation_prompts": 16}
CONFIG = TINY | {
    "corpora": {
        "reviews": TINY["corpora"]["reviews"],
        "texts": TINY["corpora"]["texts"] | {"path": f"inputs/{PLAIN}.jsonl", "text_field": HOSTILE},
        "far": {"source": "hub"} | dict.fromkeys(["dataset", "subset", "split", "revision", "text_field"], HOSTILE),
    },
    "models": {
        "local": {"source": "path", "path": f"inputs/{PLAIN}"},
        "far": {"source": "hub", "repository": HOSTILE, "revision": HOSTILE},
    },
    "rewards": {
        "own": {"kind": "python", "path": f"inputs/{PLAIN}.py", "function": HOSTILE},
        "lexicon": {"kind": "lexicon", "path": f"inputs/{PLAIN}.tsv"},
        "classifier": {"kind": "classifier", "path": f"inputs/classifier {PLAIN}", "label": HOSTILE},
        "far": {"kind": "classifier", "label": HOSTILE, "repository": HOSTILE, "revision": HOSTILE},
    },
    "tunings": {
        "own": TINY["tunings"]["own-ppo"],
        "lexicon": JUDGED | {"path": f"inputs/{PLAIN}"},
        "classifier": JUDGED | {"path": f"inputs/{PLAIN}", "reward": "classifier"},
        "far": JUDGED | {"repository": HOSTILE, "revision": HOSTILE, "reward": "far"},
    },
    "dictionaries": {
        "small": TINY["dictionaries"]["small"],
        "elsewhere": {"architecture": "external", "path": f"inputs/{PLAIN}/{{policy}}/{{layer}}"},
    },
    "llms": {
        "here": {"kind": "hf_local", "path": f"inputs/{PLAIN}", "max_tokens": 8},
        "far": {"kind": "hf_local", "repository": HOSTILE, "revision": HOSTILE},
        "served": {"kind": "openai", "base_url": f"http://127.0.0.1:9/{HOSTILE}", "model": HOSTILE}
        | {"key_variable": None, "retries": 0},
    },
    "studies": {
        "files": STUDY
        | {"llm": "here", "dictionaries": ["small", "elsewhere"]}
        | {"interpretation": PROBED | {"probes": {"path": f"inputs/{PLAIN}.triples.jsonl"}}},
        "served": STUDY | {"llm": "served", "interpretation": PROBED | {"probes": None}},
        "far": STUDY | {"llm": "far", "interpretation": PROBED | {"probes": None}},
    },
}
MADE = ["reports/files", "interpretation/served", "policies/local.lexicon", "policies/local.classifier"]
FAR = {"corpora/far": "data set", "models/far": "model", "policies/local.far": "model", "interpretation/far": "model"}
"""What a hub would have to serve, under names that no hub has: these stages run, and fail."""


# --- the configuration is as hostile as can be -------------------------------------------------------------------------


def entries(content: Any) -> list[Entry]:
    """Every entry of a validated configuration, however deep."""
    if isinstance(content, BaseModel):
        inside = [entry for name in type(content).model_fields for entry in entries(getattr(content, name))]
        return [content, *inside] if isinstance(content, Entry) else inside
    return [entry for value in content.values() for entry in entries(value)] if isinstance(content, dict) else []


def kinds(kind: type[Entry]) -> set[type[Entry]]:
    """The kinds of entries that a configuration can hold: those that no other refines."""
    return {found for child in kind.__subclasses__() for found in kinds(child)} or {kind}


def admits(field: FieldInfo, value: str) -> bool:
    try:
        TypeAdapter(Annotated[field.annotation, "", *field.metadata]).validate_python(value)
    except ValidationError:
        return False
    return True


def test_every_string_that_is_free_is_hostile_in_this_configuration():
    found = entries(parse_config(copy.deepcopy(CONFIG)))
    hostile = {
        (type(entry), name) for entry in found for name in type(entry).model_fields if TOUCH in str(getattr(entry, name))
    }
    written = kinds(Entry) - {InterpretationJob} | {Interpretation}
    free = {(kind, name) for kind in written for name, field in kind.model_fields.items() if admits(field, HOSTILE)}
    assert free - {(OpenAiLlm, "key_variable")} <= hostile


@pytest.mark.parametrize("path", ["inputs/{{x}}", "inputs/{x}", "inputs/{"])
def test_braces_in_the_path_of_an_autoencoder_name_its_layer_and_policy_or_nothing(path):
    content = copy.deepcopy(CONFIG)
    content["dictionaries"]["elsewhere"]["path"] = path
    with pytest.raises(RlsaeError, match=r"only \{layer\} and \{policy\} may stand in braces"):
        parse_config(content)


def strings(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The place of every string and every entry of a configuration."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, str | dict):
            yield (*path, key)
        yield from strings(value, (*path, key))


def test_everything_else_is_refused_and_its_place_named():
    left = TINY | {"llms": {"served": CONFIG["llms"]["served"] | {"key_variable": "A_KEY"}}}
    for path in strings(left):
        content = copy.deepcopy(left)
        entry = content
        for key in path[:-1]:
            entry = entry[key]
        if isinstance(entry[path[-1]], dict):
            entry[HOSTILE] = entry.pop(path[-1])
        elif TOUCH in entry[path[-1]] or path[-1] == "path":
            continue
        else:
            entry[path[-1]] = HOSTILE
        with pytest.raises(RlsaeError, match=path[0]):
            parse_config(content)


# --- and runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Run:
    """The workflow has run on it, as far as it goes."""
    run = Run(tmp_path_factory.mktemp("hostile"))
    run.repository.symlink_to(REPOSITORY)
    write_hostile_inputs(run.workdir / "inputs")
    run.write_config(CONFIG)
    targets = [f"results/{folder}/manifest.json" for folder in [*MADE, *FAR]]
    done = run.snakemake("--keep-going", "--show-failed-logs", "--printshellcmds", "--", *targets)
    (run.workdir / "said.txt").write_text(done.stdout + done.stderr)
    return run


def write_hostile_inputs(folder: Path) -> None:
    """The files that the configuration names."""
    write_inputs(folder)
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    (folder / f"{PLAIN}.jsonl").write_text("".join(json.dumps({HOSTILE: text}) + "\n" for text in texts))
    (folder / "model").rename(folder / PLAIN)
    (folder / "words.tsv").rename(folder / f"{PLAIN}.tsv")
    reward = (folder / "own_reward.py").read_text()
    (folder / f"{PLAIN}.py").write_text(f"{reward}\n\nglobals()[{HOSTILE!r}] = reward\n")
    triple = {"context": "the film was", "positive": "good", "negative": "bad", "neutral": "story"}
    (folder / f"{PLAIN}.triples.jsonl").write_text("".join(json.dumps(triple) + "\n" for _ in range(20)))
    labels = {"id2label": {0: HOSTILE, 1: "other"}, "label2id": {HOSTILE: 0, "other": 1}}
    classifier = AutoModelForSequenceClassification.from_pretrained(folder / PLAIN, **labels)
    classifier.save_pretrained(folder / f"classifier {PLAIN}")
    AutoTokenizer.from_pretrained(folder / PLAIN).save_pretrained(folder / f"classifier {PLAIN}")
    for policy in ("local", "local.own"):
        W_FD = torch.randn(24, 16, generator=torch.Generator().manual_seed(len(policy)))
        SparseAutoencoder(W_FD.T.contiguous(), torch.zeros(24), W_FD, torch.zeros(16)).save(folder / PLAIN / policy / "0")


@pytest.mark.slow
def test_no_part_of_it_reaches_a_shell(hostile):
    assert not [path for path in hostile.workdir.rglob("executed*") if path.is_file()]
    assert "Traceback" not in (hostile.workdir / "said.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("folder", MADE)
def test_files_and_names_arrive_whole(hostile, folder):
    assert (hostile.workdir / "results" / folder / "manifest.json").exists(), (hostile.workdir / "said.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "what"), FAR.items())
def test_a_repository_under_such_a_name_is_a_plain_error(hostile, folder, what):
    assert not (hostile.workdir / "results" / folder / "manifest.json").exists()
    assert f"cannot load the {what} {HOSTILE}" in (hostile.workdir / "logs" / f"{folder}.log").read_text()
