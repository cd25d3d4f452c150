"""Drafters by name, for the command line: a baseline, what was trained (zoo, working directory), or a dotted path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from backbone.config import ModelConfig
from backbone.contract import Drafter
from backbone.errors import RequestError
from backbone.formats.tensors import Loaded
from harness import artefacts, baselines, components, zoo

SHORT = {
    'none': 'harness.baselines.Autoregressive',
    'prompt_lookup': 'harness.baselines.PromptLookup',
    'lookahead': 'harness.baselines.Lookahead',
    'early_exit': 'harness.baselines.EarlyExit',
}


def load(name: str, loaded: Loaded, arguments: list[str]) -> tuple[Drafter, Callable[[Any, Any], dict[str, Any]]]:
    """(drafter, ready): ready(base packed for decoding, dtype) -> its parameters beside params['base'].

    Errors: as `make`; FormatError where a trained one belongs to another base; RequestError where it drafts with the
    layers of a plain model and this one is not.
    """
    if artefacts.is_artefact(name):
        return artefacts.find(name, loaded.config, loaded.base_hash, dict(map(_argument, arguments)))
    made = make(name, loaded.config, arguments)
    check(made, loaded)
    return made, lambda base, dtype: made.init_params(jax.random.key(0))


def check(drafter: Drafter, loaded: Loaded) -> None:
    """Errors: RequestError for a drafter that runs a plain model's layers on a model that is more than that."""
    if loaded.decodes is not None and isinstance(drafter, baselines.EarlyExit):
        raise RequestError(f'{type(drafter).__name__} drafts with the layers of a plain model, and {loaded.name} is '
                           f'decoded by {loaded.decodes["factory"]}')


def make(name: str, cfg: ModelConfig, arguments: list[str]) -> Drafter:
    """A drafter by short name or dotted path, with arguments like ['block=4', 'layer=20'].

    Errors: RequestError for an unknown name or argument that is not name=integer; ConfigError for wrong ones.
    """
    if name not in SHORT and '.' not in name:
        raise RequestError(f'unknown drafter {name!r}: one of {", ".join([*SHORT, *zoo.names()])}, '
                           'a working directory, or a dotted path')
    given: dict[str, Any] = {'cfg': cfg}
    if name == 'early_exit':
        given['layer'] = max(1, 2 * cfg.num_layers // 3)  # untrained exits below that guess little
    return components.build(SHORT.get(name, name), dict(map(_argument, arguments)), given, 'drafter')


def _argument(text: str) -> tuple[str, int]:
    name, _, value = text.partition('=')
    try:
        return name, int(value)
    except ValueError:
        raise RequestError(f'drafter argument {text!r} is not name=integer') from None
