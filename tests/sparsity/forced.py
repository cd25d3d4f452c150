"""Given tokens through a Target: the prompt at once, the others one by one, as decoding would."""

import functools

import jax
import jax.numpy as jnp

from backbone import cache as caches


@functools.partial(jax.jit, static_argnames=('target', 'first'))
def forced(target, params, tokens, first):
    """tokens [B, T], the first `first` of them the prompt -> logits after tokens first-1..T-1 [B, T-first+1, V], the
    cache."""
    batch, size = tokens.shape
    cache = target.init_cache(batch, size + 4, 0)
    last = jnp.full((batch,), first - 1)
    prompt = target.forward(params, tokens[:, :first], cache, logits_at=last)
    zeros = jnp.zeros((batch,), jnp.int32)
    following = jnp.concatenate([tokens[:, first:], tokens[:, :1]], 1)  # the last one is not run
    cache = caches.commit(prompt.cache, last, following[:, 0])

    def step(cache, following):
        output = target.forward(params, cache.pending[:, None], cache)
        return caches.commit(output.cache, zeros, following), output.logits[:, 0]

    cache, logits = jax.lax.scan(step, cache, following[:, 1:].T)
    return jnp.concatenate([prompt.logits, logits.swapaxes(0, 1)], 1), cache


def kept_units(target, cache, first, size):
    """What each row went through after the prompt, of a logged call: {'heads' [B, T, L, H'], 'neurons' ...} of 0 and 1,
    the prompt's tokens all 1; and the slots of the choices."""
    skipped, sizes = target.audit(cache)['skipped'], target.s.sizes(target.cfg)
    units = {part: [] for part in sizes}
    for row in skipped:
        now = None
        for part in sizes:
            units[part].append([])
        for slot in range(size):
            now = row[slot] if row[slot] is not None else now
            for part, n in sizes.items():
                gone = now[part] if slot >= first else [[]] * target.cfg.num_layers
                units[part][-1].append([[int(i not in layer) for i in range(n)] for layer in gone])
    slots = [[slot for slot in range(size) if row[slot] is not None] for row in skipped]
    return {part: jnp.array(a) for part, a in units.items()}, slots
