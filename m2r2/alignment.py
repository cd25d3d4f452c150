"""How fast the slow stream moves, how near the fast one comes to its end, and what gates say: from whole sequences.

Of layer l of the slow stream: speed 1 - cos(h_l, h_{l-1}), and the relative step |h_l - h_{l-1}| / |h_{l-1}|. Of exit
j: cos of what the head reads of p_{N_j} and of h_L, agreement of their first choices, and overlap sum min(P_L, P_j),
the rate at which a draft sampled there is kept. Our reading of Bhendawade et al., 2025 (arXiv 2502.02040).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from backbone.config import ModelConfig
from backbone.model import embed, finish, run_layers, sequence_context, unembed
from m2r2 import exits, gates, streams
from m2r2.config import M2R2Config
from m2r2.gates import GateConfig
from m2r2.task import cosine

Array = jax.Array


def velocity(cfg: ModelConfig, base: dict, tokens: Array) -> dict[str, Array]:
    """{'speed', 'step'} [L, B, S] of the slow stream of whole sequences [B, S]."""
    ctx = sequence_context(cfg, tokens.shape)
    taps = tuple(f'hidden:{l}' for l in range(cfg.num_layers + 1))
    _, _, seen = run_layers(cfg, base, embed(cfg, base, tokens, ctx.positions), None, ctx, taps=taps)
    h = jnp.stack([seen[tap] for tap in taps])
    h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
    size = jnp.sqrt((h * h).sum(-1))
    moved = h[1:] - h[:-1]
    return {'speed': 1 - (h[1:] * h[:-1]).sum(-1) / jnp.maximum(size[1:] * size[:-1], 1e-9),
            'step': jnp.sqrt((moved * moved).sum(-1)) / jnp.maximum(size[:-1], 1e-9)}


def at_exits(cfg: ModelConfig, m: M2R2Config, base: dict, mine: dict, tokens: Array,
             trained: Mapping[GateConfig, dict]) -> dict[str, Array]:
    """{'align', 'agreement' (bool), 'overlap'} [J, B, S], and 'score:<kind>' for each gate, of whole sequences [B, S].

    trained: gates and their parameters ({} for those that read the head). Accelerators without a carry, all words.
    """
    ctx = sequence_context(cfg, tokens.shape)
    slow = start = embed(cfg, base, tokens, ctx.positions)
    last = finish(cfg, base, run_layers(cfg, base, start, None, ctx)[0])
    teacher = unembed(cfg, base, last)
    law, word = jax.nn.softmax(teacher), teacher.argmax(-1)
    found: dict[str, list[Array]] = {}
    for j in range(len(m.exits)):
        end = streams.run_interval(cfg, m, base, mine, j, slow, None, ctx, together=False,
                                   path=any(gate.needs_path for gate in trained))
        slow = end.slow
        hidden = finish(cfg, base, end.fast)
        logits = exits.words(cfg, base, mine, hidden)
        new = {'align': cosine(hidden, last), 'agreement': logits.argmax(-1) == word,
               'overlap': jnp.minimum(jax.nn.softmax(logits), law).sum(-1)}
        for gate, params in trained.items():
            new[f'score:{gate.kind}'] = gates.score(gate, m, params.get(f'exit_{j + 1}', {}), j, end, logits,
                                                    mask=ctx.mask)[0]
        for name, value in new.items():
            found.setdefault(name, []).append(value)
    return {name: jnp.stack(values) for name, values in found.items()}

