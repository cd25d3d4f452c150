"""Builds what a config names by dotted path. No registry: importing the path is all there is."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from backbone.errors import ConfigError


def resolve(path: str, where: str) -> Callable:
    """The object at 'package.module.name'. Errors: ConfigError names the path and `where` it was given."""
    module, _, name = str(path).rpartition('.')
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f'{where}: cannot import {path!r} ({error})') from error


def build(path: str, kwargs: Mapping[str, Any], given: Mapping[str, Any], where: str) -> Any:
    """Calls the factory at `path` with kwargs, and with those of `given` that its signature asks for by name.

    Errors: ConfigError names a path that is not there and an argument the factory does not take, or lacks.
    """
    factory = resolve(path, where)
    accepted = inspect.signature(factory).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())  # it checks the names itself
    unknown = [k for k in kwargs if k not in accepted and not open_ended]
    if unknown:
        raise ConfigError(f'{where}: {path} takes no argument {", ".join(unknown)}')
    values = {k: v for k, v in given.items() if k in accepted} | dict(kwargs)
    missing = [k for k, p in accepted.items()
               if k not in values and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if missing:
        raise ConfigError(f'{where}: {path} needs {", ".join(missing)}')
    return factory(**values)
