"""Which changes of code rerun a stage, and which do not."""

from __future__ import annotations

import ast

import pytest

from rlsae import code_digest as module
from rlsae.code_digest import PACKAGE, code_digest
from rlsae.errors import RlsaeError

SOURCES = {
    "config/__init__.py": "DEFAULT = 1\n",
    "base.py": "def double(x):\n    return 2 * x\n",
    "middle.py": "from rlsae.base import double\nfrom rlsae.config import DEFAULT\n\nVALUE = double(DEFAULT)\n",
    "train.py": '"""Trains."""\n\nfrom rlsae.middle import VALUE\n\ndef train():\n    """Train."""\n    return VALUE\n',
    "other.py": "OTHER = 1\n",
    "sae/__init__.py": "",
    "sae/train.py": "from rlsae.sae import figures\n",
    "sae/figures.py": "from rlsae.other import OTHER\n",
    "report/__init__.py": "",
    "report/build.py": "PAGE = 'page.html'\n",
    "report/config.py": "COLOURS = 3\n",
    "report/templates/page.html": "<p>hello</p>\n",
}


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """Function of changed files: digest of `train` (or other modules) in a copy of the package with these changes."""
    copies = []

    def digest(changes=None, modules=("train",)):
        package = tmp_path / str(len(copies))
        copies.append(package)
        for name, source in (SOURCES | (changes or {})).items():
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            (package / name).write_text(source)
        monkeypatch.setattr(module, "PACKAGE", package)
        return code_digest(*modules)

    return digest


def test_equal_code_has_equal_digests_wherever_it_lies(changed):
    assert changed() == changed()


@pytest.mark.parametrize(
    "source",
    [
        SOURCES["train.py"] + "# a comment\n",
        SOURCES["train.py"].replace('"""Train."""', '"""Train with care."""').replace("Trains.", "Trains well."),
        SOURCES["train.py"].replace('    """Train."""\n', ""),
        SOURCES["train.py"].replace("return VALUE", "return (\n        VALUE\n    )"),
    ],
    ids=["comment", "docstring", "no docstring", "layout"],
)
def test_comments_docstrings_and_layout_do_not_count(changed, source):
    assert source != SOURCES["train.py"]
    assert changed({"train.py": source}) == changed()


def test_a_change_of_code_counts(changed):
    assert changed({"train.py": SOURCES["train.py"].replace("return VALUE", "return VALUE + 1")}) != changed()


def test_a_change_in_an_imported_module_counts_however_far_away(changed):
    assert changed({"base.py": SOURCES["base.py"].replace("2", "3")}) != changed()


def test_a_change_in_a_module_that_is_not_imported_does_not_count(changed):
    assert changed({"other.py": "OTHER = 2\n"}) == changed()


def test_the_configuration_does_not_count_because_settings_are_parameters_of_their_own(changed):
    assert changed({"config/__init__.py": "DEFAULT = 2\n"}) == changed()


@pytest.mark.parametrize("name", ["sae/figures.py", "other.py"])
def test_how_the_figure_of_a_training_is_drawn_does_not_count(changed, name):
    assert changed({name: SOURCES[name] + "x = 1\n"}, ["sae"]) == changed(modules=["sae"])
    assert changed({"sae/train.py": "x = 1\n"}, ["sae"]) != changed(modules=["sae"])


def test_a_module_of_a_subpackage_counts_though_it_has_the_name_of_a_neutral_one(changed):
    assert changed({"report/config.py": "COLOURS = 4\n"}, ["report"]) != changed(modules=["report"])


@pytest.mark.parametrize(
    "line",
    [
        "import rlsae.other",
        "from rlsae import other",
        "from rlsae.other import OTHER",
        "def f():\n    from rlsae.other import OTHER",
        "if True:\n    import rlsae.other as o",
    ],
)
def test_every_way_to_import_a_module_is_followed(changed, line):
    importing = {"train.py": line + "\n"}
    assert changed(importing | {"other.py": "OTHER = 2\n"}) != changed(importing)


def test_no_module_of_the_package_has_relative_imports_which_are_not_followed():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}, line {node.lineno}"


@pytest.mark.parametrize("name", ["report/build.py", "report/templates/page.html"])
def test_a_package_stands_for_all_its_files(changed, name):
    assert changed({name: SOURCES[name] + "x = 1\n"}, ["report"]) != changed(modules=["report"])


def test_compiled_files_do_not_count(changed):
    assert changed({"report/__pycache__/build.pyc": "compiled"}, ["report"]) == changed(modules=["report"])


def test_modules_that_import_each_other_have_a_digest(changed):
    circle = {"base.py": "import rlsae.middle\n" + SOURCES["base.py"]}
    assert changed(circle) not in (changed(), changed(circle | {"middle.py": "import rlsae.base\n"}))


def test_the_order_of_the_modules_does_not_count(changed):
    assert changed(modules=["train", "other"]) == changed(modules=["other", "train"])
    assert changed(modules=["train", "other"]) != changed()


def test_a_module_that_does_not_exist_is_refused_and_has_no_constant_digest(changed):
    with pytest.raises((RlsaeError, ValueError)):
        changed(modules=["trian"])


def test_stages_of_this_package_have_digests_of_their_own():
    stages = ["corpora", "models", "tuning.stage"]
    assert len({code_digest(stage) for stage in stages}) == len(stages)
