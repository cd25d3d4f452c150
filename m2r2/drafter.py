"""Lossless self-speculation: the first layers draft through the fast stream, verification resumes above them.

A draft step runs slow layers 1..k on one token, which writes their part of the cache and leaves h_k, with the fast
stream beside them; the exit's words after p_k are the draft. Verification then runs layers k+1..L over the whole block,
from the h_k that are there (`Draft.resume`): no layer runs twice on a token, and there is one cache. Our reading of
Bhendawade et al., 2025 (arXiv 2502.02040); the re-use is that of Elhoushi et al., 2024 (LayerSkip).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from backbone import cache as caches
from backbone.cache import Cache
from backbone.config import ModelConfig
from backbone.contract import Draft, Output, Resume
from backbone.draft_vocabulary import DraftedLaw
from backbone.errors import ConfigError
from backbone.model import cache_context, embed, run_layers
from backbone.sampling import Sampling, choose, draw, fold_in, law
from m2r2 import exits, gates, streams
from m2r2.config import M2R2Config
from m2r2.gates import GateConfig
from m2r2.streams import Ending

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class M2R2Drafter:
    """Drafts K = block tokens with params['m2r2'] from the first exit.

    doubt: percent. Drafting stops before a token of which the gate is less confident than this: the row's draft is then
    that short, and once every row has stopped no more draft steps are run. 0: the gate is never asked.
    gate: what is asked, of any kind of m2r2/gates.py. Those that read the exit's logits read the unwarped ones: what is
    meant must not depend on the temperature. The others have parameters, params['m2r2']['gate'].
    The gate sees the token that is run and the law of the next one, never the word that is drawn from it: a draft that
    stops at some words and not at others would not have the law that it reports.
    State: with a carry {'e': [B, d]}, the last hidden state behind the last token kept; with a gate over tokens
    {'memory': ...}: it attends over those that drafting has run, not over the prompt, nor over a round's last token
    where all drafts were kept.
    """

    cfg: ModelConfig
    m2r2: M2R2Config
    block: int = 4
    doubt: float = 0
    gate: GateConfig = GateConfig('max_prob')

    def __post_init__(self):
        if self.block < 1 or not 0 <= self.doubt <= 100:
            raise ConfigError(f'M2R2Drafter needs block >= 1 and doubt in 0..100 (percent), got block {self.block}, '
                              f'doubt {self.doubt}')

    @property
    def needs(self) -> tuple[str, ...]:
        return ('hidden:last',) if self.m2r2.carry else ()

    @property
    def remembers(self) -> bool:
        """Whether the gate keeps something of earlier tokens."""
        return self.doubt > 0 and self.gate.kind == 'arla_tokens'

    def init_params(self, rng: Array) -> dict:
        gate = self._init_gate(rng)
        return streams.init_params(self.m2r2, self.cfg, rng) | ({'gate': gate} if gate else {})

    def _init_gate(self, rng: Array) -> dict:
        return gates.init_params(self.gate, self.m2r2, jax.random.fold_in(rng, 1))['exit_1']

    def init_state(self, batch: int, max_len: int) -> dict[str, Any]:
        state: dict[str, Any] = {'e': jnp.zeros((batch, self.m2r2.hidden_size))} if self.m2r2.carry else {}
        if self.remembers:
            state['memory'] = gates.init_memory(self.gate, self.m2r2, batch, max_len)
        return state

    def prefill(self, params: Any, state: dict[str, Any], output: Output, n: Array) -> dict[str, Any]:
        return self.commit(params, state, output, n)

    def commit(self, params: Any, state: dict[str, Any], output: Output, n: Array) -> dict[str, Any]:
        """The gate's memory needs no roll-back: what it holds of a rejected token lies past `pos`."""
        if not self.m2r2.carry:
            return state
        new = jnp.take_along_axis(output.taps['hidden:last'], jnp.maximum(n, 0)[:, None, None], axis=1)[:, 0]
        return state | {'e': jnp.where(n[:, None] >= 0, new.astype(state['e'].dtype), state['e'])}

    def ready(self, mine: dict, base: dict, dtype: Any = jnp.float32) -> dict:
        """params['m2r2'] as it decodes beside params['base'] (exits.pack). Errors: ConfigError where the gate is asked
        and has no parameters there, or those of another gate."""
        wanted = jax.eval_shape(self._init_gate, jax.random.key(0))
        shapes = lambda tree: jax.tree.map(lambda a: a.shape or (1,), tree)  # the zoo stores no scalars
        if self.doubt and wanted and shapes(mine.get('gate', {})) != shapes(wanted):
            has = 'those of another gate' if 'gate' in mine else 'no gate'
            raise ConfigError(f'gate {self.gate.kind} of size {self.gate.size}: these accelerators have {has} (params '
                              f"['m2r2']['gate']); scripts/m2r2_artefact.py adds a trained one, and "
                              f'{", ".join(gates.HEAD)} need none')
        return exits.pack(self.m2r2, mine, base, dtype) if isinstance(base['layers'], tuple) else mine

    def draft(self, params: Any, cache: Cache, state: dict[str, Any], rng: Array,
              sampling: Sampling) -> tuple[Draft, Cache, dict[str, Any]]:
        """The loop runs until K tokens are there or all rows doubt; then the last token's layers, for the bonus."""
        base, mine = params['base'], self.ready(params['m2r2'], params['base'], params['base']['embed']['tokens'].dtype)
        batch, size, k = cache.pos.shape[0], self.block, self.m2r2.exits[0]
        hidden_dtype = jax.eval_shape(lambda: embed(self.cfg, base, cache.pending[:, None], cache.pos[:, None])).dtype
        start = {
            'i': jnp.int32(0), 'layers': cache.layers, 'token': cache.pending, 'sure': jnp.ones(batch, bool),
            'before': state['e'].astype(hidden_dtype) if self.m2r2.carry else jnp.zeros((batch, 0), hidden_dtype),
            'tokens': jnp.zeros((batch, size), jnp.int32), 'length': jnp.zeros(batch, jnp.int32),
            'hidden': jnp.zeros((batch, size + 1, self.cfg.hidden_size), hidden_dtype),
            'memory': state.get('memory', ())}
        if not sampling.greedy:
            wide = jnp.promote_types(base['embed']['tokens'].dtype, jnp.float32)
            start['probs'] = jnp.zeros((batch, size, self.m2r2.words), wide)

        def step(s: dict) -> dict:
            i = s['i']
            ctx = cache_context(self.cfg, caches.ahead(cache, i), 1)
            x = embed(self.cfg, base, s['token'][:, None], ctx.positions)
            carry = streams.read_carry(self.m2r2, mine, x, s['before'][:, None])
            end = streams.run_interval(self.cfg, self.m2r2, base, mine, 0, x, s['layers'], ctx,
                                       start=streams.start(mine, x, carry),
                                       path=self.doubt > 0 and self.gate.needs_path)
            last = streams.end(self.cfg, base, mine, end.fast, carry)
            logits = exits.words(self.cfg, base, mine, last)
            sure, memory = self.is_sure(mine, end, logits, s['memory'], cache.pos + i)
            sure &= s['sure']
            word, probs = self.propose(logits[:, 0], fold_in(rng, i), sampling)
            token = mine['draft_ids'][word] if 'draft_ids' in mine else word
            new = {'i': i + 1, 'layers': end.state, 'token': token, 'sure': sure,
                   'before': last[:, 0] if self.m2r2.carry else s['before'],
                   'tokens': s['tokens'].at[:, i].set(token), 'length': s['length'] + sure,
                   'hidden': s['hidden'].at[:, i].set(end.slow[:, 0]), 'memory': memory}
            if probs is not None:
                new['probs'] = s['probs'].at[:, i].set(probs)
            return new

        more = lambda s: (s['i'] < size) & s['sure'].any()
        s = jax.lax.while_loop(more, step, step(start))

        def last_one(s: dict) -> tuple[Any, Array]:
            ctx = cache_context(self.cfg, caches.ahead(cache, size), 1)
            x = embed(self.cfg, base, s['token'][:, None], ctx.positions)
            x, layers, _ = run_layers(self.cfg, base, x, s['layers'], ctx, hi=k)
            return layers, s['hidden'].at[:, size].set(x[:, 0])

        # The last token drafted has not been run: its h_k is needed where all K drafts may be kept.
        layers, hidden = jax.lax.cond(s['sure'].any(), last_one, lambda s: (s['layers'], s['hidden']), s)
        drafted = None
        if not sampling.greedy:
            words = s['tokens'] if 'draft_ids' not in mine else jnp.searchsorted(mine['draft_ids'], s['tokens'])
            gold = jnp.take_along_axis(s['probs'], words[..., None], axis=-1)[..., 0]
            drafted = DraftedLaw(s['probs'], gold, mine.get('draft_ids'), self.cfg.vocab_size)
        if self.remembers:
            state = state | {'memory': s['memory']}
        return Draft(s['tokens'], s['length'], drafted, Resume(hidden, k)), cache.replace(layers=layers), state

    def is_sure(self, mine: dict, end: Ending, logits: Array, memory: Any, pos: Array) -> tuple[Array, Any]:
        """(bool [B]: is the row sure enough of its next word? the gate's memory), from the token at slot pos [B]: both
        its streams at the exit [B, 1, d] and the law's logits [B, 1, W]."""
        if not self.doubt:
            return jnp.ones(pos.shape, bool), memory
        confidence, memory = gates.score(self.gate, self.m2r2, mine.get('gate', {}), 0, end, logits, memory, pos)
        return confidence[:, 0] >= self.doubt / 100, memory

    def propose(self, logits: Array, rng: Array, sampling: Sampling) -> tuple[Array, Array | None]:
        """logits [B, W] -> word [B], its law [B, W] (None when greedy)."""
        if sampling.greedy:
            return choose(logits, rng, sampling), None
        probs = law(logits, sampling)
        return draw(probs, rng), probs


def build(cfg: ModelConfig, m2r2: Mapping[str, Any] | None = None, block: int = 4, doubt: float = 0,
          gate: str | Mapping[str, Any] = 'max_prob') -> M2R2Drafter:
    """From a config or an artefact's card: m2r2 holds the fields of M2R2Config, gate those of GateConfig, or is a kind
    of it. Errors: ConfigError."""
    gate = GateConfig(gate) if isinstance(gate, str) else GateConfig.of(gate)
    return M2R2Drafter(cfg, M2R2Config.of(cfg, m2r2 or {}), block, doubt, gate)


def untrained(cfg: ModelConfig, base: dict, dtype: Any) -> dict[str, Any]:
    """{'m2r2': accelerators of `build`'s defaults that change nothing}, for trying things on any model."""
    del base, dtype
    return {'m2r2': build(cfg).init_params(jax.random.key(0))}
