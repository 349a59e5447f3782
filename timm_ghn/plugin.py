"""The hook in timm: the only file that touches timm's private names, but for the arguments that tracing reads.

`create_model` itself is left alone, because code that imported it earlier holds the function. What is replaced are
names that timm's functions look up in their own modules when they run, and only calls that name a GHN's tag are
treated differently. The tags live in timm's registry as ``architecture.tag``; listings show them to a filter that asks.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
import importlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import timm
from torch import nn

from .checkpoints.catalog import CATALOG
from .checkpoints.load import load_ghn, stated_config
from .errors import CheckpointError, GHNError, RequestError
from .evaluation.adaptation import adapt
from .hypernet import Images
from .predictor import Predictor, initialize
from .pretrained_cfg import WEIGHTS_FIELDS, label, prepared

logger = logging.getLogger("timm_ghn.plugin")

_TESTED = "1.0.22 to 1.0.31"
_factory = importlib.import_module("timm.models._factory")
_builder = importlib.import_module("timm.models._builder")
_registry = importlib.import_module("timm.models._registry")

_SOURCE_FIELDS = ("url", "file", "state_dict", "hf_hub_id", "source")
_GHN_KWARGS = [*(name for name in inspect.signature(initialize).parameters if name not in ("model", "ghn")), "data"]

_STATE = "_timm_ghn"
_lock = threading.RLock()


@dataclasses.dataclass(eq=False)
class _State:
    """What the hook has changed in timm.

    It is kept in timm's registry for as long as there is a change, and found there by whatever copy of this module
    comes next: notebooks reload it, or drop it from `sys.modules` and import it again.

    Attributes:
        hooks: By the name that each serves; empty while uninstalled, when calls are only passed on.
        placed: Replaced name of a module -> what was there, what is there now. While uninstalled, only what somebody
            else has patched since: their patch leads to ours.
        entries: Name in timm's registry -> the architecture's default cfg that the entry was derived from.
        withdraw: Undoes what `install` did outside of timm.
    """

    hooks: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    placed: dict[tuple[ModuleType, str], tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    entries: dict[str, Any] = dataclasses.field(default_factory=dict)
    withdraw: Callable[[], None] = lambda: None


def _state() -> _State:
    """The one in timm, or an empty one."""
    state: _State = getattr(_registry, _STATE, None) or _State()
    return state


class _NameTag(str):
    """A GHN's tag that came with the model's name and so, unlike the argument, means weights only if pretrained."""


class _Request(str):
    """The name of a model that a GHN is to predict, on its way through ``create_model``.

    Attributes:
        noted: What ``create_model`` will note on the model as its arguments.
    """

    noted: dict[str, Any]


class _TagFilter(str):
    """A filter of `list_models` that spells out a GHN's tag."""


def install() -> None:
    """Makes ``pretrained_cfg="ghn2"`` and the names ``*.ghn2`` known to timm; does nothing if that is so already.

    Raises:
        GHNError: If this timm lacks one of the names the hook stands on, or has a tag with a GHN's name.
    """
    with _lock:
        places = _places()
        state = _state()
        if state.hooks == _HOOKS and all(getattr(*place) is now for place, (_, now) in state.placed.items()):
            return
        for tag in CATALOG.list_ghns():
            _refuse_timm_tag(tag)
        _retire(state)  # another copy of this module may have been here
        setattr(_registry, _STATE, state)
        for module, name in places:
            current = getattr(module, name)
            # Whoever patched the name on top of ours keeps their patch, which leads to ours. A module of timm's that
            # was reloaded has its own function back.
            if (module, name) not in state.placed or _is_timms(current):
                replacement = _replacement(state, name, current)
                state.placed[module, name] = current, replacement
                setattr(module, name, replacement)
        state.hooks.update(_HOOKS)
        CATALOG.on_register.append(_on_register)
        state.withdraw = functools.partial(_forget, CATALOG.on_register, _on_register)
        _update_registry(CATALOG.list_ghns())


def uninstall() -> None:
    """Leaves timm exactly as it was before `install`; does nothing if it is not installed."""
    with _lock:
        state = _state()
        _retire(state)
        for (module, name), (original, replacement) in list(state.placed.items()):
            if getattr(module, name) is replacement:
                setattr(module, name, original)
            if getattr(module, name) is original:
                del state.placed[module, name]
        if not state.placed and hasattr(_registry, _STATE):
            delattr(_registry, _STATE)


def _retire(state: _State) -> None:
    """Undoes an installation, up to the names that are replaced: they only pass calls on."""
    state.hooks.clear()
    state.withdraw()
    _remove_entries(state.entries)


def _forget(callbacks: list[Any], callback: Any) -> None:
    if callback in callbacks:
        callbacks.remove(callback)


def _is_timms(function: Any) -> bool:
    return function is fnmatch or getattr(function, "__module__", "").startswith("timm.")


def _replacement(state: _State, name: str, original: Any) -> Any:
    """What stands in timm for `original`; it holds nothing of this module but the state."""
    function = original.filter if name == "fnmatch" else original

    def replacement(*args: Any, **kwargs: Any) -> Any:
        hook = state.hooks.get(name)
        return hook(function, *args, **kwargs) if hook else function(*args, **kwargs)

    return SimpleNamespace(**{**vars(original), "filter": replacement}) if name == "fnmatch" else replacement


def _places() -> list[tuple[ModuleType, str]]:
    """The names to replace.

    Raises:
        GHNError: If timm has no such name.
    """
    places = [
        (_factory, "split_model_name_tag"),
        (_factory, "model_entrypoint"),
        (_builder, "load_pretrained"),
        (_registry, "_expand_filter"),
        (_registry, "fnmatch"),
    ]
    # timm has had this one since 1.0.31; before that it did not record create_model's arguments on the model.
    if hasattr(_factory, "_resolve_model_source"):
        places.append((_factory, "_resolve_model_source"))
    data = ("_model_entrypoints", "_deprecated_models", "_model_pretrained_cfgs", "_model_has_pretrained")
    needed = [*places, *((_registry, name) for name in data)]
    missing = [f"{module.__name__}.{name}" for module, name in needed if not hasattr(module, name)]
    code = getattr(_factory.create_model, "__code__", None)
    if code and "model_entrypoint" not in code.co_names:
        missing.append("the use of model_entrypoint in create_model")
    if missing:
        raise GHNError(f"timm {timm.__version__} lacks {', '.join(missing)}; timm-ghn is tested with timm {_TESTED}.")
    return places


def _on_register(tag: str) -> None:
    with _lock:
        _refuse_timm_tag(tag)
        _remove_entries([entry for entry in _state().entries if entry.endswith(f".{tag}")])  # another GHN's until now
        _update_registry([tag])


def _remove_entries(entries: Iterable[str]) -> None:
    for entry in list(entries):
        _registry._model_pretrained_cfgs.pop(entry, None)
        _registry._model_has_pretrained.discard(entry)
        _state().entries.pop(entry)


def _refuse_timm_tag(tag: str) -> None:
    suffix = f".{tag}"
    for name in _registry._model_pretrained_cfgs:
        if name.endswith(suffix) and name not in _state().entries:
            raise CheckpointError(f"The tag {tag!r} is timm's own ({name} exists): register the GHN under another one.")


def _update_registry(tags: Iterable[str]) -> None:
    """Adds ``architecture.tag`` for every architecture that does not have it, or has a newer cfg since."""
    with _lock:
        entries = _state().entries
        cfgs = _registry._model_pretrained_cfgs
        images = {tag: prepared(_images(tag)) for tag in tags}
        for arch in _registry._model_entrypoints.keys() - _registry._deprecated_models.keys():
            default = cfgs.get(arch)
            for tag in images:
                entry = f"{arch}.{tag}"
                if entry in cfgs and (entry not in entries or entries[entry] is default):
                    continue
                blank = dict.fromkeys(WEIGHTS_FIELDS)
                fields = {**blank, "custom_load": False, "architecture": arch, "tag": tag, **images[tag]}
                cfgs[entry] = dataclasses.replace(default or timm.models.PretrainedCfg(), **fields)
                _registry._model_has_pretrained.add(entry)
                entries[entry] = default


def _images(tag: str) -> Images | None:
    """How the images of a GHN's training were prepared, if that is known before it is loaded."""
    try:
        config = stated_config(tag)
    except (CheckpointError, OSError):  # whoever loads it is told
        return None
    return None if config is None else config.images


def _ghn_tag(arch: str, pretrained_cfg: Any) -> str | None:
    """The GHN's tag that a `pretrained_cfg` argument of timm's asks for, if it does.

    Raises:
        CheckpointError: If it looks like a GHN's tag, but there is none of that name.
    """
    if isinstance(pretrained_cfg, str):
        tag = str(pretrained_cfg)
        if f"{arch}.{tag}" in _registry._model_pretrained_cfgs and f"{arch}.{tag}" not in _state().entries:
            return None
        if tag not in CATALOG.list_ghns():
            if tag.lower().startswith("ghn"):
                CATALOG.find(tag)
            return None
        return tag
    if dataclasses.is_dataclass(pretrained_cfg):
        pretrained_cfg = vars(pretrained_cfg)
    # A whole cfg is what timm's scripts pass on; one with a source describes weights that exist, a fine-tuned model's.
    if isinstance(pretrained_cfg, dict) and not any(map(pretrained_cfg.get, _SOURCE_FIELDS)):
        return pretrained_cfg["tag"] if pretrained_cfg.get("tag") in CATALOG.list_ghns() else None
    return None


def _split_model_name_tag(original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, str]:
    arch, tag = original(*args, **kwargs)
    if tag and _ghn_tag(arch, tag):
        tag = _NameTag(tag)
    return arch, tag


def _resolve_model_source(original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, Any, dict[str, Any]]:
    name, pretrained_cfg, model_args = original(*args, **kwargs)
    if _ghn_tag(name, pretrained_cfg):
        name = _Request(name)
        name.noted = model_args
    return name, pretrained_cfg, model_args


def _model_entrypoint(
    original: Callable[..., Any], model_name: str, *args: Any, **kwargs: Any
) -> Callable[..., nn.Module]:
    entrypoint: Callable[..., nn.Module] = original(model_name, *args, **kwargs)
    # timm's own function comes back for timm's own calls, where that is known already, so that nothing differs in them.
    if hasattr(_factory, "_resolve_model_source") and not isinstance(model_name, _Request):
        return entrypoint

    def create(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        tag = _ghn_tag(model_name, pretrained_cfg)
        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        if tag is None or (pretrained and any(map(overlay.get, _SOURCE_FIELDS))):
            return entrypoint(pretrained=pretrained, pretrained_cfg=pretrained_cfg, **kwargs)
        if isinstance(model_name, _Request):  # a model that is made from what is noted on this one must not need a GHN
            model_name.noted.pop("ghn_kwargs", None)
        ghn_kwargs = copy.copy(kwargs.pop("ghn_kwargs", None) or {})
        if not isinstance(ghn_kwargs, dict):  # timm's scripts pass on as text what they cannot read
            raise TypeError(
                f"ghn_kwargs is {ghn_kwargs!r}, not a dictionary; on the command line of a timm script, write"
                """ --model-kwargs "ghn_kwargs={'head': 'keep'}", quotes included."""
            )
        for name in ghn_kwargs.keys() - set(_GHN_KWARGS):
            raise TypeError(f"ghn_kwargs has the key {name!r}; those it may have are {', '.join(_GHN_KWARGS)}.")
        if isinstance(pretrained_cfg, str):
            asked = pretrained or not isinstance(pretrained_cfg, _NameTag)
            pretrained_cfg = None
        else:
            asked = pretrained
        build = functools.partial(_build, entrypoint, model_name, tag, pretrained_cfg, kwargs)
        if not asked:
            return build(_images(tag))
        ghn = load_ghn(tag)  # first, so that a missing one costs no time
        data, preparation = ghn_kwargs.pop("data", None), ghn_kwargs.pop("finetune", None)
        if data is not None:
            if ghn_kwargs.get("head") == "predict":
                raise RequestError('ghn_kwargs has data, to which a head is fitted, and head="predict"; leave one out.')
            ghn_kwargs["head"] = "keep"  # it will be theirs
        build = functools.partial(build, ghn.config.images, ghn_kwargs.get("head") != "keep")
        model, report = Predictor(ghn, preparation=preparation, **ghn_kwargs).create(build)
        logger.info("%s by %s:\n%s", model_name, tag, report)
        if data is not None:
            logger.info("%s: %s", model_name, adapt(model, data))
        return model

    return create


def _build(
    entrypoint: Callable[..., nn.Module],
    arch: str,
    tag: str,
    pretrained_cfg: Any,
    kwargs: dict[str, Any],
    images: Images | None,
    has_head: bool = False,
) -> nn.Module:
    """timm's model without weights, labelled as the GHN's.

    It is built under its default tag, since a few entrypoints choose the architecture by the tag.
    """
    if pretrained_cfg is not None:
        default = _registry._model_pretrained_cfgs.get(arch)
        fields = vars(pretrained_cfg) if dataclasses.is_dataclass(pretrained_cfg) else pretrained_cfg
        pretrained_cfg = {**fields, "tag": default and default.tag}
    model = entrypoint(pretrained=False, pretrained_cfg=pretrained_cfg, **kwargs)
    # What input it takes; create_model notes this, with the rest, when it has the model.
    if told := {name: kwargs[name] for name in ("img_size", "in_chans") if name in kwargs}:
        vars(model)["_model_args"] = {**getattr(model, "_model_args", {}), **told}
    label(model, tag, images, has_head)
    if isinstance(cfg := getattr(model, "pretrained_cfg", None), dict):
        cfg.update(kwargs.get("pretrained_cfg_overlay") or {})  # the caller's word is the last
    return model


def _load_pretrained(
    original: Callable[..., Any], model: nn.Module, pretrained_cfg: Any = None, *args: Any, **kwargs: Any
) -> None:
    """Serves calls around `create_model`: ``timm.models.resnet50(pretrained=True, pretrained_cfg="ghn2")``."""
    cfg = pretrained_cfg or getattr(model, "pretrained_cfg", None)
    tag = _ghn_tag("", cfg) if isinstance(cfg, dict) else None
    if tag is None:
        original(model, pretrained_cfg, *args, **kwargs)
    else:
        initialize(model, load_ghn(tag))


def _expand_filter(original: Callable[..., Any], filter: str) -> list[str]:
    expanded: list[str] = original(filter)
    tags = CATALOG.list_ghns()
    _update_registry(tags)
    return [_TagFilter(part) if _named_tags(part, tags) else part for part in expanded]


def _named_tags(filter: str, tags: Iterable[str]) -> list[str]:
    """The tags a filter matches by their letters, not by a bare wildcard."""
    pattern = filter.partition(".")[2]
    return fnmatch.filter(tags, pattern) if pattern.strip("*?") else []


def _filter_names(original: Callable[..., Any], names: Iterable[str], pattern: str) -> list[str]:
    found: list[str] = original(names, pattern)
    # A filter that means something to timm keeps its result, whatever a GHN is called.
    if found or not isinstance(pattern, _TagFilter):
        return found
    architectures = {name.partition(".")[0] for name in names}
    tags = _named_tags(pattern, CATALOG.list_ghns())
    return fnmatch.filter((f"{arch}.{tag}" for arch in architectures for tag in tags), pattern)


_HOOKS: dict[str, Callable[..., Any]] = {
    "split_model_name_tag": _split_model_name_tag,
    "model_entrypoint": _model_entrypoint,
    "load_pretrained": _load_pretrained,
    "_expand_filter": _expand_filter,
    "fnmatch": _filter_names,
    "_resolve_model_source": _resolve_model_source,
}
