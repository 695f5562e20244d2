"""The history of a training: a row per batch, its rates, and a tracker that is told of it on demand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pandas as pd
import pytest
from accelerate import tracking

from rlsae.config import DPOTuning, PPOTuning
from rlsae.errors import RlsaeError
from rlsae.resumable import Stage
from rlsae.tuning.history import TRACKER, History, flat

PARAMETERS = {"tuning": {"method": "dpo", "batches": 3, "lora": {"rank": 2}, "max_tokens": None, "range": [2, 4]}}


def entry(kind=DPOTuning, **changes):
    return kind(method="dpo", reward="letters", corpus="reviews", batches=3, batch_size=8, **changes)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.delenv(TRACKER, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def stage(tmp_path):
    with Stage("policies", tmp_path / "results" / "tiny.dpo", PARAMETERS, {}) as stage:
        yield stage


@pytest.fixture
def fake(monkeypatch):
    """A tracker that remembers what it is told, installed under its name; with a folder on demand."""
    told = SimpleNamespace(calls=[], made_with=None, started=False)

    class Tracker(tracking.GeneralTracker):
        name = "fake"
        requires_logging_directory = False

        def __init__(self, run_name, *folder, **options):
            told.made_with = (run_name, *folder)
            super().__init__()

        @property
        def tracker(self):
            return self

        def start(self):
            told.started = True

        def store_init_configuration(self, values):
            assert told.started
            told.calls.append(("config", values))

        def log(self, values, step=None, **options):
            told.calls.append(("log", values, step))

        def finish(self):
            told.calls.append(("finish",))

    told.kind = Tracker
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "fake", Tracker)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["fake"])
    monkeypatch.setenv(TRACKER, "fake")
    return told


# --- rows --------------------------------------------------------------------------------------------------------


def test_rows_are_numbered_from_zero_in_the_order_they_are_added(stage):
    history = History(stage, entry(), [])
    for loss in (0.7, 0.6, 0.5):
        history.add({"loss": loss, "margin": 1 - loss})
    expected = pd.DataFrame({"batch": [0, 1, 2], "loss": [0.7, 0.6, 0.5], "margin": [1 - 0.7, 1 - 0.6, 1 - 0.5]})
    pd.testing.assert_frame_equal(history.table(), expected, check_exact=True)


def test_rows_of_an_earlier_run_come_first(stage):
    history = History(stage, entry(), [{"batch": 0, "loss": 0.7}, {"batch": 1, "loss": 0.6}])
    history.add({"loss": 0.5})
    assert history.table().to_dict("list") == {"batch": [0, 1, 2], "loss": [0.7, 0.6, 0.5]}


def test_each_batch_has_a_rate_in_the_provenance_and_those_of_an_earlier_run_have_none(stage):
    history = History(stage, entry(), [{"batch": 0, "loss": 0.7}, {"batch": 1, "loss": 0.6}])
    history.add({"loss": 0.5})
    rates = json.loads(json.dumps(stage.details))["samples_per_second"]
    assert rates[:2] == [None, None]
    assert rates[2] > 0
    assert len(rates) == 3
    assert "samples_per_second" not in history.table()


@pytest.mark.parametrize("kind", [DPOTuning, PPOTuning])
def test_the_rate_counts_the_samples_of_a_batch(stage, monkeypatch, kind):
    clock = iter([0.0, 2.0, 6.0])
    monkeypatch.setattr("rlsae.tuning.history.time", SimpleNamespace(monotonic=lambda: next(clock)))
    sizes = {"batches": 2, "batch_size": 8} | ({"minibatch_size": 4} if kind is PPOTuning else {})
    method = "dpo" if kind is DPOTuning else "ppo"
    history = History(stage, kind(method=method, reward="letters", corpus="reviews", **sizes), [])
    history.add({"loss": 0.7})
    history.add({"loss": 0.6})
    assert stage.details["samples_per_second"] == [4.0, 2.0]


# --- a tracker ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [None, ""])
def test_without_a_tracker_nothing_is_written(stage, in_an_empty_folder, monkeypatch, wanted):
    if wanted is not None:
        monkeypatch.setenv(TRACKER, wanted)
    history = History(stage, entry(), [])
    history.add({"loss": 0.7})
    history.table()
    assert list(in_an_empty_folder.iterdir()) == []


@pytest.mark.parametrize("wanted", ["wandb", "no-such-tracker", "all", "Fake"])
def test_a_tracker_that_is_unknown_or_not_installed_is_refused_with_those_that_are(stage, monkeypatch, wanted):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [tracking.LoggerType.TENSORBOARD, "mine"])
    monkeypatch.setenv(TRACKER, wanted)
    expected = f"RLSAE_REPORT_TO={wanted}: expected one that is installed: mine, tensorboard"
    with pytest.raises(RlsaeError, match=expected):
        History(stage, entry(), [])


def test_where_no_tracker_is_installed_the_error_says_so(stage, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    monkeypatch.setenv(TRACKER, "tensorboard")
    with pytest.raises(RlsaeError, match="expected one that is installed: none is"):
        History(stage, entry(), [])


def test_a_tracker_is_started_told_the_settings_each_batch_and_the_end(stage, fake):
    history = History(stage, entry(), [])
    history.add({"loss": 0.7, "kl": 0.0})
    history.add({"loss": 0.6, "kl": 0.1})
    table = history.table()
    rates = stage.details["samples_per_second"]
    assert fake.made_with == ("tiny.dpo",)
    assert fake.calls == [
        ("config", flat(PARAMETERS)),
        ("log", {"loss": 0.7, "kl": 0.0, "samples_per_second": rates[0]}, 0),
        ("log", {"loss": 0.6, "kl": 0.1, "samples_per_second": rates[1]}, 1),
        ("finish",),
    ]
    assert list(table) == ["batch", "loss", "kl"]


def test_a_tracker_of_a_run_that_goes_on_is_told_the_batches_from_there(stage, fake):
    history = History(stage, entry(), [{"batch": 0, "loss": 0.7}])
    history.add({"loss": 0.6})
    assert [call[2] for call in fake.calls if call[0] == "log"] == [1]


def test_a_tracker_that_writes_files_gets_a_folder_of_its_name(stage, fake):
    fake.kind.requires_logging_directory = True
    History(stage, entry(), [])
    assert [str(part) for part in fake.made_with] == ["tiny.dpo", "logs/fake"]


def test_a_tracker_changes_neither_settings_nor_history(stage, fake):
    history = History(stage, entry(), [])
    history.add({"loss": 0.7})
    assert stage.parameters == PARAMETERS
    assert history.table().to_dict("list") == {"batch": [0], "loss": [0.7]}


def test_trackers_get_settings_as_one_level_of_plain_values():
    assert flat({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None, "f": True, "g": 0.5, "h": "text"}) == {
        "a.b.c": 1,
        "a.d": "[1, 2]",
        "e": "None",
        "f": True,
        "g": 0.5,
        "h": "text",
    }
