"""The documents' links lead somewhere: files that are there, and headings that they have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "models").rglob("*.md"))]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page: lower case, hyphens for spaces, without other signs."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_anchors_are_those_of_the_headings(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# The model (`a/b`, 10.0 MB)\n\n```sh\n# no heading\n```\n\n### By t_B, at last\n")
    assert anchors(page) == {"the-model-ab-100-mb", "by-t_b-at-last"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?:", link):
            target, _, anchor = link.partition("#")
            found = page.parent / target if target else page
            assert found.exists(), link
            assert not anchor or anchor in anchors(found), link
