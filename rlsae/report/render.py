"""Templates to pages: every value is escaped unless it is markup of our own, and no character of a corpus can harm a page."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlsae.report import formatting
from rlsae.status import BANNER

HERE = Path(__file__).parent
ASSETS = ("report.css", "report.js")
"""Within the main pages, so that each is whole in itself; beside the pages of latents, which share them."""


def render(template: str, **content: Any) -> str:
    """Fill a template."""
    return _environment().get_template(template).render(content)


def asset(name: str) -> str:
    """Style sheet or script."""
    return (HERE / "static" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=formatting.harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("number", "interval", "percent", "size", "quoted"):
        environment.filters[name] = getattr(formatting, name)
    style, script = (Markup(asset(name)) for name in ASSETS)
    environment.globals |= {"style": style, "script": script, "banner": BANNER, "root": "", "whole": True, "comparing": False}
    return environment
