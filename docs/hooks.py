"""What mkdocs does for the manual beside its plugins.

The pages are read in the repository as well, where results, the changelog and CONTRIBUTING.md are beside docs/. Here
they become a part of the site, and links to them are changed accordingly. The page of the command line is made from its
parsers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.structure.files import File, Files, InclusionLevel

from timm_ghn.cli import command_parser

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"


def on_files(files: Files, config: Any) -> Files:
    """Adds what lies beside docs/ to the site."""
    results = (path for path in sorted((ROOT / RESULTS).rglob("*.*")) if path.suffix != ".jsonl")
    for path in (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *results):
        uri = path.relative_to(ROOT).as_posix()
        inclusion = InclusionLevel.INCLUDED if path.name == "CONTRIBUTING.md" else InclusionLevel.NOT_IN_NAV
        files.append(File(uri, str(ROOT), config.site_dir, config.use_directory_urls, inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links from the repository's into the site's, and writes the reference of the command line."""
    if page.file.src_uri in ("CONTRIBUTING.md", "CHANGELOG.md"):
        markdown = markdown.replace("](docs/", "](").replace("](README.md", "](index.md")
    elif "/" not in page.file.src_uri:
        markdown = markdown.replace("](../", "](")
    return f"{markdown}\n{_commands()}" if page.file.src_uri == "command_line.md" else markdown


def _commands() -> str:
    """A section for each command, with its help at a fixed width."""
    with mock.patch.dict("os.environ", COLUMNS="100"):
        parser = command_parser()
        (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        sections = []
        for name, command in commands.choices.items():
            command.learn()
            about, _, more = (command.description or "").strip().partition("\n\n")
            command.description = None
            text = "\n\n".join(part for part in (about, more) if part)
            sections.append(f"## {name}\n\n{text}\n\n```text\n{command.format_help().rstrip()}\n```\n")
    return "\n".join(sections)
