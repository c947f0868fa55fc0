"""What the documentation names is there: linked pages and headings, files, modules, verbs' options, and keys."""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from pathlib import Path

import pytest

from gptb_ds.cli import VERBS
from gptb_ds.config import Config, Group

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
GROUPS = {
    name: set(field.annotation.model_fields)
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Group)
}


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or anchor in headings(there), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_are_named_are_there(page: Path):
    text = page.read_text()
    files = re.findall(
        r"(?<![\w/.-])(?:gptb_ds|tests|launch|ds_configs|docs)/[\w/.-]+\.(?:py|sh|sbatch|json|md)\b", text
    )
    missing = [name for name in files if not (ROOT / name).exists() and Path(name).stem != "X"]
    modules = re.findall(r"python -m ((?:gptb_ds|tests)[\w.]*)", text)
    places = [ROOT / name.replace(".", "/") for name in modules]
    assert not missing + [
        str(place) for place in places if not place.is_dir() and not place.with_suffix(".py").exists()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_are_named_are_there(page: Path):
    text = page.read_text()
    named = re.findall(r"--([a-z]+)\.(\w+)", text)
    # In running text `model.` is Python's as well.
    named += re.findall(r"`(data|optim|train|task|run)\.(\w+)(?!\w|\.\w|\()", text)
    assert not [f"{group}.{key}" for group, key in named if key not in GROUPS.get(group, set())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_verbs_that_are_shown_are_there(page: Path):
    for verb, rest in re.findall(r"gptb-ds (\w+)((?:[^`\n\\#|;&]|\\\n)*)", page.read_text()):
        if verb in VERBS and verb != "train":
            parser = argparse.ArgumentParser()
            import_module(f"gptb_ds.commands.{verb}").add_arguments(parser)
            known = {option for action in parser._actions for option in action.option_strings}
            assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest)) <= known, f"gptb-ds {verb}{rest}"
