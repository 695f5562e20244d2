"""Which artifacts of a configuration are there and current, which are not and why, and which nobody names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlsae.artifacts import MANIFEST, Manifest, digest
from rlsae.expand import parse_config
from rlsae.layout import Layout
from rlsae.status import check, delete, mark_reports, orphans, write_banner

RESULTS = Path("results")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def raw(raw):
    """The shared configuration with layers that need no measurement and a corpus from a file."""
    raw["corpora"]["reviews"] = {"source": "file", "path": "reviews.txt"}
    raw["studies"]["main"]["layers"] = [0]
    Path("reviews.txt").write_text("one\ntwo\n")
    return raw


def write_manifest(artifact, inputs, **content):
    artifact.folder.mkdir(parents=True, exist_ok=True)
    (artifact.folder / "data").write_text(str(artifact.folder))
    outputs = {"data": digest(artifact.folder / "data")}
    manifest = Manifest(artifact.stage, artifact.settings, inputs, outputs, {"name": str(artifact.folder)} | content)
    (artifact.folder / MANIFEST).write_text(manifest.to_json())


def run(raw, studies=None):
    """Write every artifact of a configuration that is not there, as a run of the workflow would. Returns it parsed."""
    config = parse_config(raw)
    layout = Layout(config)
    for study in studies or config.studies:
        for artifact in layout.artifacts(study):
            if not (artifact.folder / MANIFEST).exists():
                inputs = {folder.relative_to(RESULTS).as_posix(): digest(folder / MANIFEST) for folder in artifact.inputs}
                inputs |= {f"file:{label}": digest(path) for label, path in artifact.files.items()}
                write_manifest(artifact, inputs)
                if artifact.stage == "divergence":
                    (artifact.folder / "chosen.json").write_text('{"layers": [0]}')
    return config


def edit(folder, **changes):
    """Change a manifest as a run with another outcome would."""
    path = RESULTS / folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def problems(raw_or_config):
    """Problem by artifact, of those that are not current."""
    config = parse_config(raw_or_config) if isinstance(raw_or_config, dict) else raw_or_config
    return {str(f.relative_to(RESULTS)): s.problem for f, s in check(config).items() if s.problem is not None}


# --- current and missing -----------------------------------------------------------------------------------------


def test_everything_is_current_after_a_run(raw):
    config = run(raw)
    assert problems(config) == {}
    assert len(check(config)) == 16


def test_everything_is_missing_before_the_first_run(raw):
    states = check(parse_config(raw))
    assert {state.problem for state in states.values()} == {"not there"}
    assert all(state.missing for state in states.values())


def test_artifacts_are_told_upstream_first(raw):
    stages = [state.artifact.stage for state in check(run(raw)).values()]
    assert stages.index("corpora") < stages.index("policies") < stages.index("divergence") < stages.index("comparison")
    assert stages[-1] == "reports"


def test_an_artifact_of_two_studies_is_told_once(raw):
    raw["studies"]["other"] = raw["studies"]["main"] | {"dictionaries": ["small"]}
    folders = list(check(run(raw)))
    assert len(folders) == len(set(folders)) == 16 + 4


def test_the_state_is_told_without_the_folder_of_snakemake_and_wherever_the_results_were_made(raw, tmp_path, monkeypatch):
    config = run(raw)
    (tmp_path / "results").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved").rename(tmp_path / "elsewhere" / "results")
    (tmp_path / "elsewhere" / "reviews.txt").write_bytes((tmp_path / "reviews.txt").read_bytes())
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert problems(config) == {}


def test_a_deleted_artifact_is_missing_and_what_was_made_from_it_is_not_current(raw):
    config = run(raw)
    (RESULTS / "interpretation/main" / MANIFEST).unlink()
    states = check(config)
    assert states[RESULTS / "interpretation/main"].missing
    assert not states[RESULTS / "reports/main"].missing
    assert "interpretation/main" in problems(config)["reports/main"]
    assert len(problems(config)) == 2


def test_a_study_whose_layers_are_not_chosen_yet_has_no_report(raw):
    raw["studies"]["main"]["layers"] = {"count": 1}
    states = check(parse_config(raw))
    assert states[RESULTS / "reports/main"].problem == "its layers are not chosen yet"
    assert RESULTS / "comparison/main" not in states


def test_the_layers_that_a_run_chose_name_what_stands_behind_them(raw):
    raw["studies"]["main"]["layers"] = {"count": 1}
    config = run(raw)
    config = run(raw)  # the second half of the run, once the layers are chosen
    assert problems(config) == {}
    assert RESULTS / "activations/tiny.reviews/mlp/layers-0" in check(config)


# --- stale -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "folder", "key"),
    [
        (lambda raw: raw["dictionaries"]["small"].update(l1=0.5), "dictionaries/tiny.reviews/mlp/layers-0/layer0/small", "l1"),
        (lambda raw: raw["tunings"]["ppo"].update(clip=0.5), "policies/tiny.ppo", "tuning.clip"),
        (lambda raw: raw["rewards"]["lexicon"].update(scale=0.5), "policies/tiny.ppo", "reward.scale"),
        (lambda raw: raw["corpora"]["reviews"].update(drop_positions=1), "tokens/tiny.reviews", "drop_positions"),
        (lambda raw: raw["activations"]["mlp"].update(rows=99), "activations/tiny.ppo.reviews/mlp/layers-0", "rows"),
        (lambda raw: raw["studies"]["main"].update(dictionaries=["small"]), "comparison/main", "dictionaries"),
        (
            lambda raw: raw["studies"]["main"].update(sizes={"small": "small", "big": "big"}),
            "comparison/main",
            "sizes, sizes.big, sizes.small",
        ),
    ],
)
def test_an_artifact_of_other_settings_is_stale_and_the_keys_are_named(raw, change, folder, key):
    run(raw)
    change(raw)
    assert problems(raw)[folder] == f"made with other settings: {key}"


def test_a_changed_recipe_makes_stale_what_was_made_from_it_and_nothing_beside_it(raw):
    run(raw)
    raw["dictionaries"]["big"]["l1"] = 0.5
    found = problems(raw)
    behind = {"comparison/main", "interpretation/main", "reports/main"}
    big = {f"dictionaries/{policy}.reviews/mlp/layers-0/layer0/big" for policy in ("tiny", "tiny.ppo")}
    assert set(found) == big | behind
    assert found["comparison/main"] == f"made from {min(big)}, which is not current"
    assert found["reports/main"].endswith(", which is not current")


def test_an_input_that_was_made_anew_with_another_outcome_makes_stale_what_was_made_from_it(raw):
    config = run(raw)
    edit("policies/tiny.ppo", metrics={"kl": 3.0})
    found = problems(config)
    assert found["activations/tiny.ppo.reviews/mlp/survey"] == "made from another policies/tiny.ppo"
    assert found["divergence/main"].startswith("made from ")
    assert found["comparison/main"].endswith(", which is not current")
    assert not {"policies/tiny.ppo", "models/tiny", "activations/tiny.reviews/mlp/survey"} & set(found)


def test_an_input_that_was_made_anew_with_the_same_outcome_changes_nothing(raw):
    config = run(raw)
    path = RESULTS / "policies/tiny.ppo" / MANIFEST
    path.write_bytes(path.read_bytes())
    os.utime(path, (2e9, 2e9))
    assert problems(config) == {}


def test_a_changed_file_outside_the_results_is_named_by_its_label(raw):
    config = run(raw)
    Path("reviews.txt").write_text("one\ntwo\nthree\n")
    found = problems(config)
    assert found["corpora/reviews"] == "made from another source file"
    assert found["models/tiny"] == "made from corpora/reviews, which is not current"


def test_a_file_that_was_moved_or_touched_with_its_content_changes_nothing(raw):
    run(raw)
    Path("reviews.txt").rename("other.txt")
    raw["corpora"]["reviews"]["path"] = "other.txt"
    assert problems(raw) == {}


def test_a_file_that_is_gone_is_told(raw):
    config = run(raw)
    Path("reviews.txt").unlink()
    assert problems(config)["corpora/reviews"] == "made from another source file"


def test_a_deleted_output_is_named(raw):
    config = run(raw)
    (RESULTS / "models/tiny/data").unlink()
    assert problems(config)["models/tiny"] == "data is missing"


def test_a_store_that_need_not_be_kept_may_be_gone(raw):
    raw["activations"]["mlp"]["keep"] = False
    config = run(raw)
    (RESULTS / "activations/tiny.reviews/mlp/layers-0/data").unlink()
    assert problems(config) == {}


@pytest.mark.parametrize("content", ["{", '{"schema": 9}'])
def test_a_manifest_that_cannot_be_read_is_a_problem_of_its_artifact_and_no_failure(raw, content):
    config = run(raw)
    (RESULTS / "models/tiny" / MANIFEST).write_text(content)
    assert "models/tiny" in problems(config)["models/tiny"]
    assert problems(config)["policies/tiny.ppo"] == "made from another models/tiny"


def test_a_study_that_now_names_another_tuning_is_stale_though_both_are_there(raw):
    raw["tunings"]["strong"] = raw["tunings"]["ppo"] | {"kl_coefficient": 0.01}
    raw["studies"]["strong"] = raw["studies"]["main"] | {"tuning": "strong"}
    run(raw)
    assert problems(raw) == {}
    raw["studies"]["main"]["tuning"] = "strong"
    assert {"divergence/main", "comparison/main", "interpretation/main", "reports/main"} <= set(problems(raw))


@pytest.mark.parametrize("first", ["main", "follower"])
def test_a_study_that_takes_over_stale_layers_is_stale_wherever_it_stands_in_the_file(raw, first):
    raw["studies"]["main"]["layers"] = {"count": 1}
    follower = raw["studies"]["main"] | {"layers": {"same_as": "main"}}
    studies = {"main": raw["studies"]["main"], "follower": follower}
    raw["studies"] = {first: studies[first]} | studies
    run(raw, ["main", "follower"])
    run(raw, ["main", "follower"])
    assert problems(raw) == {}
    raw["studies"]["main"]["layers"] = {"count": 1, "order": "lowest"}
    found = problems(raw)
    assert found["divergence/main"] == "made with other settings: layers.order"
    assert found["divergence/follower"] == "made from divergence/main, which is not current"


# --- orphans -----------------------------------------------------------------------------------------------------


def test_artifacts_that_no_study_names_are_orphans(raw):
    raw["studies"]["other"] = raw["studies"]["main"] | {"dictionaries": ["small"]}
    run(raw)
    assert orphans(parse_config(raw)) == []
    del raw["studies"]["other"]
    assert [str(folder) for folder in orphans(parse_config(raw))] == [
        f"results/{stage}/other" for stage in ("comparison", "divergence", "interpretation", "reports")
    ]


def test_what_is_deleted_is_exactly_the_orphans(raw):
    raw["studies"]["other"] = raw["studies"]["main"]
    run(raw)
    del raw["studies"]["other"]
    (RESULTS / ".work/comparison/main").mkdir(parents=True)
    (RESULTS / "notes.txt").write_text("mine")
    config = parse_config(raw)
    delete(orphans(config))
    assert orphans(config) == []
    assert problems(config) == {}
    assert not (RESULTS / "comparison/other").exists()
    assert (RESULTS / ".work/comparison/main").exists()
    assert (RESULTS / "notes.txt").exists()


def test_a_stale_artifact_is_no_orphan(raw):
    run(raw)
    raw["dictionaries"]["small"]["l1"] = 0.5
    assert orphans(parse_config(raw)) == []


def test_dumps_of_layers_that_are_no_longer_chosen_are_orphans(raw):
    run(raw)
    raw["studies"]["main"]["layers"] = [1]
    found = {str(folder) for folder in orphans(parse_config(raw))}
    assert "results/activations/tiny.reviews/mlp/layers-0" in found
    assert "results/dictionaries/tiny.reviews/mlp/layers-0/layer0/small" in found
    assert "results/comparison/main" not in found


def test_while_the_layers_are_not_chosen_nothing_of_the_study_is_an_orphan(raw):
    raw["studies"]["main"]["layers"] = {"count": 1}
    run(raw)
    config = run(raw)
    delete([RESULTS / "divergence/main"])  # as when it is about to be measured again
    assert orphans(config) == []


def test_a_folder_without_results_has_no_orphans(raw):
    assert orphans(parse_config(raw)) == []


# --- the banner of a report --------------------------------------------------------------------------------------


def banner(study="main"):
    """What a page of the report sees in `window.rlsaeStale`."""
    text = (RESULTS / "reports" / study / "status.js").read_text()
    assert text.startswith("window.rlsaeStale = ")
    assert text.endswith(";\n")
    return json.loads(text.removeprefix("window.rlsaeStale = ").removesuffix(";\n"))


def test_the_report_of_a_stale_study_says_why_and_a_current_one_says_nothing(raw):
    config = run(raw)
    mark_reports(config)
    assert banner() is None
    raw["dictionaries"]["big"]["l1"] = 0.5
    mark_reports(parse_config(raw))
    assert banner() == problems(raw)["reports/main"]
    assert "not current" in banner()
    mark_reports(config)
    assert banner() is None


def test_a_report_that_is_not_there_gets_no_banner(raw):
    mark_reports(parse_config(raw))
    assert not RESULTS.exists()


def test_a_report_whose_layers_must_be_measured_again_says_so(raw):
    raw["studies"]["main"]["layers"] = {"count": 1}
    run(raw)
    config = run(raw)
    delete([RESULTS / "divergence/main"])
    mark_reports(config)
    assert banner() == "its layers are not chosen yet"


def test_the_banner_changes_neither_the_manifest_nor_the_state_of_a_report(raw):
    config = run(raw)
    before = (RESULTS / "reports/main" / MANIFEST).read_bytes()
    mark_reports(config)
    assert (RESULTS / "reports/main" / MANIFEST).read_bytes() == before
    assert problems(config) == {}


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<!--", 'a "quote"; and \\ ', "\u2028 line", "ü"])
def test_the_text_of_a_banner_is_data_and_no_markup(raw, text):
    folder = RESULTS / "reports/main"
    folder.mkdir(parents=True)
    write_banner(folder, text)
    assert banner() == text
    content = (folder / "status.js").read_text()
    assert "<" not in content
    assert content.isascii()
    assert len(content.splitlines()) == 1
