"""Early exit in numpy, float64, one row and one token at a time: what the tests hold the real one to.

Written from the rules and not from the code. A row keeps, layer by layer, the keys and values of the positions that
have any; a token that leaves gives its rule the rest. 'defer' is what it stands for: keys and values of every position
at every layer, computed at once.
"""

from __future__ import annotations

import numpy as np

from tests.stagformer.reference import at, attention, embedded, head, linear, mlp, norm, turned, widened


class Row:
    """cfg, m: ModelConfig, M2R2Config (stream 'fast', no low-rank queries). kind: kv_fill. pending: positions that may
    be owed; a token goes through when so many are."""

    def __init__(self, cfg, m, params, kind, pending=2):
        self.cfg, self.m, self.kind, self.pending = cfg, m, kind, pending
        params = widened({'base': params['base'], 'm2r2': params['m2r2']})
        self.base = params['base']
        self.layers = [at(self.base['layers'], l) for l in range(cfg.num_layers)]
        self.mine = [at(params['m2r2']['layers'], l) for l in range(m.exits[-1])]
        self.seen = [{} for _ in self.layers]
        self.position, self.through = 0, 0  # positions before `through` owe nothing

    def step(self, token, leave=0, thresholds=None):
        """-> (logits [V], exit layer). leave: the layer to leave at; 0: where the likeliest word of p has at least the
        exit's threshold."""
        x = p = embedded(self.cfg, self.base, token, self.position)
        total, exit_ = self.cfg.num_layers, 0
        full = self.kind == 'defer' and self.position - self.through >= self.pending
        for l in range(total):
            if l in self.m.starts:
                p = x
            before = x
            x = self._layer(l, x, write=True)
            if l < len(self.mine):
                p = self._layer(l, before if l in self.m.starts else p, accelerator=self.mine[l]['adapter'])
            if l + 1 in self.m.exits and not full:
                said = head(self.cfg, self.base, p)
                chosen = leave == l + 1 if leave else softmax(said).max() >= thresholds[self.m.exits.index(l + 1)]
                if chosen:
                    exit_ = l + 1
                    break
        if not exit_:
            said, self.through = head(self.cfg, self.base, x), self.position + 1
        for l in range(exit_ or total, total):
            share = {'lerp': (l - exit_) / (total - exit_), 'copy_h': 0, 'copy_p': 1}.get(self.kind)
            if self.kind == 'defer':
                x = self._layer(l, x, write=True)
            elif share is not None:
                self._remember(l, norm(self.cfg, self.layers[l]['attn_norm'], x + share * (p - x)))
        self.position += 1
        return said, exit_ or total

    def _remember(self, l, y):
        k, v = (linear(self.layers[l]['attn'][n], y).reshape(-1, self.cfg.attention.head_dim) for n in 'kv')
        self.seen[l][self.position] = turned(self.cfg, k, self.position), v

    def _layer(self, l, x, write=False, accelerator=None):
        p, cfg = self.layers[l], self.cfg
        y = norm(cfg, p['attn_norm'], x)
        if write:
            self._remember(l, y)
        keys, values = zip(*(self.seen[l][t] for t in sorted(self.seen[l])), strict=True)
        q = turned(cfg, linear(p['attn']['q'], y).reshape(-1, cfg.attention.head_dim), self.position)
        x = x + linear(p['attn']['o'], attention(q, keys, values))
        y = norm(cfg, p['mlp_norm'], x)
        x = x + mlp(cfg, p['mlp'], y)
        if accelerator is None:
            return x
        inner = linear(accelerator['a'], y)
        return x + linear(accelerator['b'], inner / (1 + np.exp(-inner)))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()
