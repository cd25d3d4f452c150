"""Keys and values of the layers that a token skipped, made from what is known where it left.

The token left after N layers with h (slow) and p (fast); the input of layer l > N is taken to be

    lerp     h + (l - 1 - N) / (L - N) (p - h)        copy_h   h, as CALM does (Schuster et al., 2022)
    copy_p   p                                        drop     nothing: the slot is masked at those layers

'defer' is the exact one: it runs the skipped layers later, see m2r2/exit_state.py. What the paper (Bhendawade et al.,
2025, arXiv 2502.02040) does is not public; these are our choices to compare.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from backbone.config import ModelConfig
from backbone.layers import Context, norm, qkv, read_write
from backbone.model import run_layers

Array = jax.Array
FILLS = ('defer', 'lerp', 'copy_h', 'copy_p', 'drop')
COPIES = ('lerp', 'copy_h', 'copy_p')


def fill(cfg: ModelConfig, base: dict, kind: str, left: Array, h: Array, p: Array, kv: Any, ctx: Context, lo: int,
         hi: int) -> Any:
    """Writes layers lo+1..hi of tokens h, p [B, 1, d] that left after left [B] <= lo layers; rows whose ctx.pos lies
    past the cache are not written. kind: one of COPIES. kv, and what is returned: the cache's layers."""
    behind = jnp.arange(cfg.num_layers)[:, None] - left  # [L, B]: from where it left to the input of each layer
    share = {'lerp': behind / (cfg.num_layers - left), 'copy_h': 0.0 * behind, 'copy_p': 1.0 + 0.0 * behind}[kind]
    _, kv, _ = run_layers(cfg, base, (h, p), kv, ctx, lo=lo, hi=hi, layer_fn=_keys_and_values,
                          extra=share.astype(h.dtype)[..., None, None])
    return kv


def _keys_and_values(cfg, p, streams, state, ctx, share):
    slow, fast = streams
    _, k, v = qkv(cfg, p['attn'], norm(cfg, p['attn_norm'], slow + share * (fast - slow)), ctx)
    _, _, state = read_write(state, k, v, ctx)
    return streams, state, {}


def visible(ctx: Context, filled: Array, begin: int) -> Context:
    """What layers begin+1.. may read under 'drop': slots filled past `begin` layers (filled [B, C]), and the
    block's own. begin 0: everything."""
    if begin == 0:
        return ctx
    own = jnp.arange(filled.shape[1]) >= ctx.positions[:, :1]
    return ctx.replace(mask=ctx.mask & ((filled > begin) | own)[:, None])
