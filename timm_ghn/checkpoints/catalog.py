"""The GHNs that have a tag: those that this version ships a pin of, and those that a program registers."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError
from .source import HUB_PREFIX, HubConfig, LocalFiles, Published, Source, source_at


class Catalog:
    """Tags, and what they stand for.

    Attributes:
        registered: The sources that `register` was given, by tag.
        on_register: Called with a tag that is being registered; raising refuses it. The timm plugin lists its names
            here.
    """

    def __init__(self, folder: Path):
        """Takes the folder with a ``TAG.json`` for each published GHN."""
        self._folder = folder
        self._lock = threading.Lock()  # guards `registered`
        self.registered: dict[str, Source] = {}
        self.on_register: list[Callable[[str], None]] = []

    @functools.cached_property
    def published(self) -> dict[str, HubConfig]:
        """The published GHNs by tag.

        Raises:
            CheckpointError: If a file does not have the fields of `HubConfig`.
        """
        configs = {}
        for file in sorted(self._folder.glob("*.json")):
            try:
                configs[file.stem] = HubConfig(**json.loads(file.read_text(encoding="utf-8")))
            except (TypeError, ValueError) as error:
                fields = ", ".join(field.name for field in dataclasses.fields(HubConfig))
                raise CheckpointError(
                    f"{file} must be a JSON object with exactly the fields {fields}: {error}."
                ) from error
        return configs

    def list_ghns(self) -> list[str]:
        """The tags of the published GHNs and of those added by `register`."""
        with self._lock:
            return sorted({*self.published, *self.registered})

    def tag_of(self, source: str) -> str:
        """What a saved model says it was predicted by: a tag, or "ghn" for a GHN that has none, never a path."""
        return source if source in self.list_ghns() else "ghn"

    def register(self, tag: str, source: str | os.PathLike[str]) -> None:
        """Gives a GHN a tag, so that ``timm.create_model(name, pretrained_cfg=tag)`` predicts with it.

        Args:
            tag: Letters, digits, ``_`` and ``-``. A tag registered before is replaced.
            source: A directory with ``model.safetensors`` and ``config.json``, a ``.safetensors`` file, or
                ``hf-hub:org/repo@revision``. A relative path is kept as the absolute one.

        Raises:
            CheckpointError: If the tag cannot be one, or the source does not exist.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]+", tag):
            raise CheckpointError(f"The tag {tag!r} must consist of letters, digits, '_' and '-'.")
        found = source_at(os.fspath(source))
        if isinstance(found, LocalFiles):
            found.files()
        with self._lock:
            before = self.registered.get(tag)
            self.registered[tag] = found
        try:
            for tell in self.on_register:
                tell(tag)
        except BaseException:
            with self._lock:
                if before is None:
                    del self.registered[tag]
                else:
                    self.registered[tag] = before
            raise

    def find(self, name: str) -> Source:
        """What a tag, a path or a Hub repository refers to.

        Raises:
            CheckpointError: If it is none of these.
        """
        if not name:
            raise CheckpointError("The GHN's name is empty; give a tag, a path or hf-hub:org/repo.")
        with self._lock:
            if name in self.registered:
                return self.registered[name]
        if name in self.published:
            return Published(name, self.published[name])
        path = Path(name).expanduser()
        source = source_at(name)
        if name.startswith(HUB_PREFIX) or path.exists() or path.suffix or len(path.parts) > 1:
            return source
        known = self.list_ghns()
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise CheckpointError(
            f"Unknown GHN {name!r}: did you mean {nearest[0]!r}? Known tags: {', '.join(known)}."
            if nearest
            else f"Unknown GHN {name!r}, and no tag is known: register one with timm_ghn.register(tag, source)."
        )


def _folder() -> Path:
    """Inside the package when installed from a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    folders = [package / "hub_configs", package.parent / "hub_configs"]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


CATALOG = Catalog(_folder())
list_ghns, register = CATALOG.list_ghns, CATALOG.register
