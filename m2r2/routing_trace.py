"""Real text through a model with experts: which it chose, and what every predictor said, as m2r2/expert_traces.py lays
it out, for the simulator (m2r2/expert_sim.py) and the recall table (m2r2/recall.py).

Tokens of one row follow each other, rows follow rows: the first token of a row has no token before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from backbone.config import ModelConfig
from backbone.model import sequence_context
from m2r2 import prefetch
from m2r2.expert_traces import NONE
from m2r2.prefetch import PREDICTORS, PrefetchConfig


def record(cfg: ModelConfig, shape: PrefetchConfig, params: dict, tokens: np.ndarray, count: int,
           names: Sequence[str] = PREDICTORS, segments: np.ndarray | None = None
           ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(ids [B * S, L, K], by predictor [B * S, L, leads, count]) int32 of tokens [B, S].

    params: {'base', 'prefetch'}. predictions[t, l, i], best first: made after the attention of layer l, about layer
    l + i + 1; -1 where none was made, and of `previous` and `frequency` where so many had not been seen yet.
    """
    leads = shape.leads(cfg.num_layers)

    @jax.jit
    def run(params: dict, row: jax.Array, segment: jax.Array, rng: jax.Array) -> tuple:
        ctx = sequence_context(cfg, row.shape, segment)
        seen = prefetch.observe(cfg, shape, params['base'], params['prefetch'], row, ctx)
        found = {}
        for name in names:
            rows = jnp.full((cfg.num_layers, max(leads), row.shape[1], count), NONE)
            for lead, layers in leads.items():
                guess = prefetch.scores(cfg, shape, name, params['base'], params['prefetch'], seen, lead, layers, rng)
                best, ids = jax.lax.top_k(guess[:, 0], count)
                known = best > 0 if name in ('previous', 'frequency') else True
                rows = rows.at[jnp.asarray(layers), lead - 1].set(jnp.where(known, ids, NONE))
            found[name] = rows.transpose(2, 0, 1, 3)
        return seen.ids[:, 0].transpose(1, 0, 2), found

    segments = np.zeros_like(tokens) if segments is None else segments
    parts = [jax.tree.map(np.asarray, run(params, tokens[i:i + 1], segments[i:i + 1], jax.random.key(i)))
             for i in range(len(tokens))]
    return jax.tree.map(lambda *a: np.concatenate(a).astype(np.int32), *parts)
