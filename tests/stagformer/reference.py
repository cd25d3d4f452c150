"""A plain and a staggered transformer in numpy, float64, one token at a time: what the tests hold the real one to.

Written from the paper's definition and not from the code: every position is a step of its own, every stack keeps lists
of what it has said, and nothing is masked because nothing is there that should not be read. It reads the same parameter
tree, and knows neither jax nor the package. Only RMSNorm/LayerNorm, rotary/learned positions, gated/plain MLPs.
"""

from __future__ import annotations

import zlib

import numpy as np


def random_params(shapes, seed: int = 0):
    """Parameters like a tree of shapes, far from what training starts with: no norm is 1, no bias and no mix is 0.
    float32, so that models of every dtype have the same numbers."""

    def fill(name, like):
        if isinstance(like, dict):
            return {sub: fill(f'{name}/{sub}', leaf) for sub, leaf in like.items()}
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(like.shape)
        kind = name.rpartition('/')[2]
        if kind == 'kernel':
            noise *= 1.5 / np.sqrt(like.shape[-2])
        elif kind == 'scale':
            noise = 1 + 0.3 * noise
        elif kind == 'bias':
            noise *= 0.3
        return noise.astype(np.float32)

    return fill('', shapes)


def widened(tree):
    return {k: widened(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree, np.float64)


def at(tree, *index):
    """tree[index] leaf by leaf."""
    return {k: at(v, *index) for k, v in tree.items()} if isinstance(tree, dict) else tree[index]


# --- one vector at a time ---------------------------------------------------------------------------------------------


def linear(p, x):
    return x @ p['kernel'] + p.get('bias', 0)


def norm(base, p, x):
    if base.norm == 'layer':
        x = x - x.mean()
    return x / np.sqrt((x * x).mean() + base.norm_eps) * p['scale'] + p.get('bias', 0)


def turned(base, x, position):
    """Heads [n, hd] rotated by their position: the pair (i, i + hd/2) by position * theta^(-2i/hd)."""
    if base.attention.position != 'rope':
        return x
    half = base.attention.head_dim // 2
    angle = position * base.attention.rope_theta ** (-np.arange(half) / half)
    pair = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([pair.real, pair.imag], -1)


def attention(query, keys, values):
    """query [H, hd] over lists of keys and values [KH, hd] -> [H * hd]; over nothing it is 0."""
    heads = np.zeros_like(query)
    if not keys:
        return heads.ravel()
    for h in range(len(query)):
        mine = h * len(keys[0]) // len(query)
        scores = np.array([query[h] @ k[mine] for k in keys]) / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max())
        heads[h] = sum(w * v[mine] for w, v in zip(weights / weights.sum(), values, strict=True))
    return heads.ravel()


def activation(kind, x):
    return {'silu': lambda: x / (1 + np.exp(-x)), 'relu': lambda: np.maximum(x, 0)}[kind]()


def mlp(base, p, x):
    if not base.mlp.gated:
        return linear(p['down'], activation(base.mlp.activation, linear(p['up'], x)))
    return linear(p['down'], activation(base.mlp.activation, linear(p['gate'], x)) * linear(p['up'], x))


def embedded(base, params, token, position):
    x = params['embed']['tokens'][token] * (base.embed_scale or 1)
    if base.attention.position == 'learned':
        x = x + params['embed']['positions'][position + base.position_offset]
    return x


def head(base, params, x):
    x = norm(base, params['final_norm'], x)
    return params['embed']['tokens'] @ x if base.tie_embeddings else linear(params['lm_head'], x)


# --- models -----------------------------------------------------------------------------------------------------------


class Layer:
    """Self-attention of one layer, with all it has seen; `read` is what a cross-attention sees, or None."""

    def __init__(self, base, p):
        self.base, self.p, self.keys, self.values = base, p, [], []

    def step(self, x, position, read=None):
        base, p, hd = self.base, self.p, self.base.attention.head_dim
        y = norm(base, p['attn_norm'], x)
        q, k, v = (linear(p['attn'][n], y).reshape(-1, hd) for n in 'qkv')
        self.keys.append(turned(base, k, position))
        self.values.append(v)
        seen = base.attention.window or len(self.keys)
        x = x + linear(p['attn']['o'], attention(turned(base, q, position), self.keys[-seen:], self.values[-seen:]))
        if read is not None:
            x = x + read(x, position)
        return x + mlp(base, p['mlp'], norm(base, p['mlp_norm'], x))


def plain(base, params, tokens):
    """Logits [S, V] of one sequence. params: the tree of a plain model."""
    params = widened(params)
    layers = [Layer(base, at(params['layers'], k)) for k in range(base.num_layers)]
    rows = []
    for position, token in enumerate(tokens):
        x = embedded(base, params, token, position)
        for layer in layers:
            x = layer.step(x, position)
        rows.append(head(base, params, x))
    return np.array(rows)


class Staggered:
    """One sequence of a staggered model. cfg: any object with the fields of StagFormerConfig."""

    def __init__(self, cfg, params):
        self.cfg, self.params = cfg, widened(params)
        self.stacks, first = [], 0
        for depth in cfg.depths:
            self.stacks.append([Layer(cfg.base, at(self.params['base']['layers'], first + k)) for k in range(depth)])
            first += 0 if cfg.shared else depth
        self.said = [[] for _ in cfg.depths]  # [stack][position]: outputs, as others read them
        self.position = 0

    def step(self, token, recurrent=False):
        """-> logits [V], outputs of all stacks. recurrent: of the last one only, which then is what the pass below
        would have been to it."""
        cfg, base = self.cfg, self.cfg.base
        last, position = len(self.stacks) - 1, self.position
        self.position += 1
        x0 = embedded(base, self.params['base'], token, position)
        outputs = []
        for s, layers in enumerate(self.stacks):
            if recurrent and s != last:
                continue
            x = x0
            for k, layer in enumerate(layers):
                x = layer.step(x, position, self._reader(s, k) if s else None)
            outputs.append(x)
            source = last - 1 if recurrent else s
            if source < last:
                self.said[source].append(norm(base, at(self.params['stagformer']['context_norm'], source), x)
                                         if cfg.context_norm else x)
        if cfg.mix:
            x = sum(a * h for a, h in zip(self.params['stagformer']['mix'], outputs, strict=True))
        return head(base, self.params['base'], x), outputs

    def _reader(self, s, k):
        """The cross-attention of layer k of stack s > 0."""
        cfg, base, p = self.cfg, self.cfg.base, self.params['stagformer']['cross']
        below = list(range(s)) if cfg.context_from == 'all_prev' else [s - 1]
        counts = [1 if cfg.context_from == 'prev' else i for i in range(s)]  # stacks that stack i reads; none for 0
        mine = sum(cfg.depths[1:s]) + k
        first = sum(n * d for n, d in zip(counts[1:], cfg.depths[1:s], strict=True))
        rotate = turned if cfg.cross_rope else lambda base, x, position: x

        def read(x, position):
            latest = position - cfg.lag
            earliest = 0 if cfg.window is None else max(0, latest - cfg.window + 1)
            keys, values = [], []
            for nth, source in enumerate(below):
                here = first + nth * cfg.depths[s] + k
                for j in range(earliest, latest + 1):
                    c = self.said[source][j]
                    keys.append(rotate(base, linear(at(p['k'], here), c).reshape(cfg.kv_heads, -1), j))
                    values.append(linear(at(p['v'], here), c).reshape(cfg.kv_heads, -1))
            q = linear(at(p['q'], mine), norm(base, at(p['norm'], mine), x)).reshape(-1, base.attention.head_dim)
            return linear(at(p['o'], mine), attention(rotate(base, q, position), keys, values))

        return read


def staggered(cfg, params, tokens):
    """(logits [S, V], outputs [p, S, d]) of one sequence."""
    model = Staggered(cfg, params)
    logits, outputs = zip(*map(model.step, tokens), strict=True)
    return np.array(logits), np.array(outputs).swapaxes(0, 1)
