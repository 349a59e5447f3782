"""The hook in timm: the only file that touches timm's private names.

`create_model` itself is left alone, because code that imported it earlier holds the function. What is replaced are
names that timm's functions look up in their own modules when they run, and only calls that name a GHN's tag are
treated differently. The tags live in timm's registry as ``architecture.tag``; listings show them to a filter that asks.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib
import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import timm
from torch import nn

from . import hub
from .assign import initialize
from .creation import create_predicted
from .errors import CheckpointError, GHNError

logger = logging.getLogger("timm_ghn.plugin")

_TESTED = "1.0.22 to 1.0.31"
_factory = importlib.import_module("timm.models._factory")
_builder = importlib.import_module("timm.models._builder")
_registry = importlib.import_module("timm.models._registry")

# What a pretrained cfg says about the weights it was made for, which predicted weights are not.
_WEIGHTS_FIELDS = (
    "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "label_offset", "license", "description",
    "origin_url", "paper_name", "paper_ids", "notes",
)  # fmt: skip
_SOURCE_FIELDS = ("url", "file", "state_dict", "hf_hub_id", "source")
_UNKNOWN = object()

_lock = threading.RLock()
_installed = False
_originals: dict[tuple[ModuleType, str], Any] = {}
# Names that somebody else had patched on top of ours when we uninstalled; they still lead here.
_buried: set[tuple[ModuleType, str]] = set()
# Name in timm's registry -> the architecture's default cfg that the entry was derived from.
_entries: dict[str, Any] = {}
_call = threading.local()


class _NameTag(str):
    """A GHN's tag that came with the model's name and so, unlike the argument, means weights only if pretrained."""


class _TagFilter(str):
    """A filter of `list_models` that spells out a GHN's tag."""


def install() -> None:
    """Makes ``pretrained_cfg="ghn2"`` and the names ``*.ghn2`` known to timm; does nothing if that is so already.

    Raises:
        GHNError: If this timm lacks one of the names the hook stands on, or has a tag with a GHN's name.
    """
    global _installed
    with _lock:
        if _installed:
            return
        hooks = _hooks()
        for tag in hub.list_ghns():
            _refuse_timm_tag(tag)
        for (module, name), hook in hooks.items():
            if (module, name) not in _buried:
                _originals[module, name] = getattr(module, name)
                setattr(module, name, hook)
        _buried.clear()
        hub.on_register.append(_on_register)
        _installed = True
        _update_registry(hub.list_ghns())


def uninstall() -> None:
    """Leaves timm exactly as it was before `install`; does nothing if it is not installed."""
    global _installed
    with _lock:
        if not _installed:
            return
        _installed = False
        hub.on_register.remove(_on_register)
        for (module, name), hook in _hooks().items():
            # Whoever patched the name after us keeps their patch; it calls ours, which now only passes on.
            if getattr(module, name) is hook:
                setattr(module, name, _originals[module, name])
            else:
                _buried.add((module, name))
        for entry in _entries:
            _registry._model_pretrained_cfgs.pop(entry, None)
            _registry._model_has_pretrained.discard(entry)
        _entries.clear()


def _hooks() -> dict[tuple[ModuleType, str], Any]:
    """The replaced names, each with its replacement.

    Raises:
        GHNError: If timm has no such name.
    """
    hooks: dict[tuple[ModuleType, str], Any] = {
        (_factory, "split_model_name_tag"): _split_model_name_tag,
        (_factory, "model_entrypoint"): _model_entrypoint,
        (_builder, "load_pretrained"): _load_pretrained,
        (_registry, "_expand_filter"): _expand_filter,
        (_registry, "fnmatch"): _FNMATCH,
    }
    # timm has had this one since 1.0.31; before that it did not record create_model's arguments on the model.
    if hasattr(_factory, "_resolve_model_source"):
        hooks[_factory, "_resolve_model_source"] = _resolve_model_source
    data = ("_model_entrypoints", "_deprecated_models", "_model_pretrained_cfgs", "_model_has_pretrained")
    needed = [*hooks, *((_registry, name) for name in data)]
    missing = [f"{module.__name__}.{name}" for module, name in needed if not hasattr(module, name)]
    code = getattr(_factory.create_model, "__code__", None)
    if code and "model_entrypoint" not in code.co_names:
        missing.append("the use of model_entrypoint in create_model")
    if missing:
        raise GHNError(f"timm {timm.__version__} lacks {', '.join(missing)}; timm-ghn is tested with timm {_TESTED}.")
    return hooks


def _on_register(tag: str) -> None:
    with _lock:
        _refuse_timm_tag(tag)
        _update_registry([tag])


def _refuse_timm_tag(tag: str) -> None:
    suffix = f".{tag}"
    for name in _registry._model_pretrained_cfgs:
        if name.endswith(suffix) and name not in _entries:
            raise CheckpointError(f"The tag {tag!r} is timm's own ({name} exists): register the GHN under another one.")


def _update_registry(tags: Iterable[str]) -> None:
    """Adds ``architecture.tag`` for every architecture that does not have it, or has a newer cfg since."""
    with _lock:
        cfgs = _registry._model_pretrained_cfgs
        for arch in _registry._model_entrypoints.keys() - _registry._deprecated_models.keys():
            default = cfgs.get(arch)
            for tag in tags:
                entry = f"{arch}.{tag}"
                if entry in cfgs and (entry not in _entries or _entries[entry] is default):
                    continue
                blank = dict.fromkeys(_WEIGHTS_FIELDS)
                cfgs[entry] = dataclasses.replace(
                    default or timm.models.PretrainedCfg(), **blank, custom_load=False, architecture=arch, tag=tag
                )
                _registry._model_has_pretrained.add(entry)
                _entries[entry] = default


def _ghn_tag(arch: str, pretrained_cfg: Any) -> str | None:
    """The GHN's tag that a `pretrained_cfg` argument of timm's asks for, if it does.

    Raises:
        CheckpointError: If it looks like a GHN's tag, but there is none of that name.
    """
    if isinstance(pretrained_cfg, str):
        tag = str(pretrained_cfg)
        if f"{arch}.{tag}" in _registry._model_pretrained_cfgs and f"{arch}.{tag}" not in _entries:
            return None
        if tag not in hub.list_ghns():
            if tag.lower().startswith("ghn"):
                hub.resolve(tag)
            return None
        return tag
    if dataclasses.is_dataclass(pretrained_cfg):
        pretrained_cfg = vars(pretrained_cfg)
    # A whole cfg is what timm's scripts pass on; one with a source describes weights that exist, a fine-tuned model's.
    if isinstance(pretrained_cfg, dict) and not any(map(pretrained_cfg.get, _SOURCE_FIELDS)):
        return pretrained_cfg["tag"] if pretrained_cfg.get("tag") in hub.list_ghns() else None
    return None


def _split_model_name_tag(*args: Any, **kwargs: Any) -> tuple[str, str]:
    arch, tag = _originals[_factory, "split_model_name_tag"](*args, **kwargs)
    if _installed and tag and _ghn_tag(arch, tag):
        tag = _NameTag(tag)
    return arch, tag


def _resolve_model_source(*args: Any, **kwargs: Any) -> tuple[str, Any, dict[str, Any]]:
    resolved: tuple[str, Any, dict[str, Any]] = _originals[_factory, "_resolve_model_source"](*args, **kwargs)
    _call.resolved = resolved
    return resolved


def _model_entrypoint(model_name: str, *args: Any, **kwargs: Any) -> Callable[..., nn.Module]:
    entrypoint: Callable[..., nn.Module] = _originals[_factory, "model_entrypoint"](model_name, *args, **kwargs)
    _, requested, recorded = vars(_call).pop("resolved", (None, _UNKNOWN, {}))
    # timm's own function comes back for timm's own calls, where that is known already, so that nothing differs in them.
    if not _installed or (requested is not _UNKNOWN and not _ghn_tag(model_name, requested)):
        return entrypoint

    def create(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        tag = _ghn_tag(model_name, pretrained_cfg)
        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        if tag is None or (pretrained and any(map(overlay.get, _SOURCE_FIELDS))):
            return entrypoint(pretrained=pretrained, pretrained_cfg=pretrained_cfg, **kwargs)
        # create_model notes its arguments on the model for export; a model loaded from that must not need this one.
        recorded.pop("ghn_kwargs", None)
        ghn_kwargs = kwargs.pop("ghn_kwargs", None) or {}
        if not isinstance(ghn_kwargs, dict):  # timm's scripts pass on as text what they cannot read
            raise TypeError(
                f"ghn_kwargs is {ghn_kwargs!r}, not a dictionary; on the command line of a timm script, write"
                """ --model-kwargs "ghn_kwargs={'head': 'keep'}", quotes included."""
            )
        if isinstance(pretrained_cfg, str):
            asked = pretrained or not isinstance(pretrained_cfg, _NameTag)
            pretrained_cfg = None
        else:
            asked = pretrained
        build = functools.partial(_build, entrypoint, model_name, tag, pretrained_cfg, kwargs)
        if not asked:
            return build()
        ghn = hub.load_ghn(tag)  # first, so that a missing one costs no time
        model, report = create_predicted(build, ghn, key=_key(entrypoint, pretrained_cfg, kwargs), **ghn_kwargs)
        logger.info("%s by %s:\n%s", model_name, tag, report)
        return model

    return create


def _key(entrypoint: Callable[..., nn.Module], pretrained_cfg: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """All that decides which graph a model has; None for one that is not timm's own, whose code may change."""
    if not entrypoint.__module__.startswith("timm.models."):
        return None
    return {
        "timm": timm.__version__,
        "entrypoint": f"{entrypoint.__module__}.{entrypoint.__qualname__}",
        "pretrained_cfg": vars(pretrained_cfg) if dataclasses.is_dataclass(pretrained_cfg) else pretrained_cfg,
        "kwargs": {name: value for name, value in kwargs.items() if name not in ("cache_dir", "device", "dtype")},
        "layers": [timm.layers.is_exportable(), timm.layers.is_scriptable(), timm.layers.use_fused_attn()],
    }


def _build(
    entrypoint: Callable[..., nn.Module], arch: str, tag: str, pretrained_cfg: Any, kwargs: dict[str, Any]
) -> nn.Module:
    """timm's model without weights, labelled as the GHN's.

    It is built under its default tag, since a few entrypoints choose the architecture by the tag.
    """
    if pretrained_cfg is not None:
        default = _registry._model_pretrained_cfgs.get(arch)
        fields = vars(pretrained_cfg) if dataclasses.is_dataclass(pretrained_cfg) else pretrained_cfg
        pretrained_cfg = {**fields, "tag": default and default.tag}
    model = entrypoint(pretrained=False, pretrained_cfg=pretrained_cfg, **kwargs)
    label(model, tag)
    return model


def label(model: nn.Module, tag: str) -> None:
    """Makes a model's cfg say that its weights are a GHN's, and nothing of those it was written for."""
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict):  # default_cfg is the same object
        for field in _WEIGHTS_FIELDS:
            cfg.pop(field, None)
        cfg.update(tag=tag, custom_load=False)


def save_config(model: nn.Module, file: Path) -> None:
    """Writes the config.json with which timm makes the model from a directory or a repository."""
    importlib.import_module("timm.models._hub").save_config_for_hf(model, file)


def _load_pretrained(model: nn.Module, pretrained_cfg: Any = None, *args: Any, **kwargs: Any) -> None:
    """Serves calls around `create_model`: ``timm.models.resnet50(pretrained=True, pretrained_cfg="ghn2")``."""
    cfg = pretrained_cfg or getattr(model, "pretrained_cfg", None)
    tag = _ghn_tag("", cfg) if _installed and isinstance(cfg, dict) else None
    if tag is None:
        _originals[_builder, "load_pretrained"](model, pretrained_cfg, *args, **kwargs)
    else:
        initialize(model, hub.load_ghn(tag))


def _expand_filter(filter: str) -> list[str]:
    expanded: list[str] = _originals[_registry, "_expand_filter"](filter)
    if not _installed:
        return expanded
    tags = hub.list_ghns()
    _update_registry(tags)
    return [_TagFilter(part) if _named_tags(part, tags) else part for part in expanded]


def _named_tags(filter: str, tags: Iterable[str]) -> list[str]:
    """The tags a filter matches by their letters, not by a bare wildcard."""
    pattern = filter.partition(".")[2]
    return fnmatch.filter(tags, pattern) if pattern.strip("*?") else []


def _filter_names(names: Iterable[str], pattern: str) -> list[str]:
    found = fnmatch.filter(names, pattern)
    # A filter that means something to timm keeps its result, whatever a GHN is called.
    if found or not isinstance(pattern, _TagFilter):
        return found
    architectures = {name.partition(".")[0] for name in names}
    tags = _named_tags(pattern, hub.list_ghns())
    return fnmatch.filter((f"{arch}.{tag}" for arch in architectures for tag in tags), pattern)


_FNMATCH = SimpleNamespace(**{**vars(fnmatch), "filter": _filter_names})
