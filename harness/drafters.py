"""Drafters by name, for the command line. A dotted path names any other drafter."""

from __future__ import annotations

from typing import Any

from backbone.config import ModelConfig
from backbone.contract import Drafter
from backbone.errors import RequestError
from harness import components

SHORT = {
    'none': 'harness.baselines.Autoregressive',
    'prompt_lookup': 'harness.baselines.PromptLookup',
    'lookahead': 'harness.baselines.Lookahead',
    'early_exit': 'harness.baselines.EarlyExit',
}


def make(name: str, cfg: ModelConfig, arguments: list[str]) -> Drafter:
    """A drafter by short name or dotted path, with arguments like ['block=4', 'layer=20'].

    Errors: RequestError for an unknown name or argument that is not name=integer; ConfigError for wrong ones.
    """
    if name not in SHORT and '.' not in name:
        raise RequestError(f'unknown drafter {name!r}: one of {", ".join(SHORT)}, or a dotted path')
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
