"""What a CP head weighs beside Llama-3.1-8B and what a round of drafting with it must cost, by arithmetic alone.

    python scripts/tensorhead_cost.py [--model=llama-3.1-8b --device=tpu-v5e --chips=8 --batch=1 --context=2048]

Prints the tables of docs/tensorhead_cost.md, in Markdown. Counted are the bfloat16 weights a draft reads and the FLOPs
of its products, from the shapes of the trees that decode (tensorhead/packed.py); a time is the larger of bytes over the
memory's bandwidth and FLOPs over the peak of all chips, as harness/roofline.py has it for the trunk: weights split
evenly, links, logits and other activations not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone.config import ModelConfig
from backbone.model import init_params
from backbone.presets import preset
from harness import roofline
from tensorhead import head as heads
from tensorhead import packed
from tensorhead.config import TensorHeadConfig

ITEM = 2  # bytes of a bfloat16


@dataclasses.dataclass(frozen=True)
class HeadCost:
    """params: trained scalars. read: bytes of weights one draft reads. flops: of one draft, all rows."""

    params: int
    read: float
    flops: float


def sizes(tree) -> int:
    return sum(math.prod(a.shape) for a in jax.tree.leaves(tree))


@functools.cache
def abstract_base(cfg: ModelConfig) -> dict:
    base = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    return {k: v for k, v in base.items() if k != 'layers'}


def cost(cfg: ModelConfig, head: TensorHeadConfig, batch: int = 1) -> HeadCost:
    """All components draft. At rank 1 factor 1 has nothing to say: the drafter leaves it out."""
    ids = jnp.arange(head.draft_vocab, dtype=jnp.int32) if head.draft_vocab else None
    tree = jax.eval_shape(lambda: heads.init(head, jax.random.key(0), ids))
    ready = jax.eval_shape(lambda t, base: packed.pack(head, t, base, jnp.bfloat16), tree, abstract_base(cfg))
    factors = sizes(ready['later']) + (sizes(ready['first']) if head.rank > 1 else 0)
    rows = head.rank * (head.horizon - (head.rank == 1))
    shared = sizes(ready.get('unembed', {}))
    gate = sizes(ready['gate'])
    return HeadCost(sizes({k: v for k, v in tree.items() if k != 'draft_ids'}), 4 * gate + (factors + shared) * ITEM,
                    2.0 * batch * (gate + factors + rows * shared))


def seconds(found: HeadCost, device: roofline.Device) -> float:
    """Of one chip that had it all."""
    return max(found.read / device.memory_bytes_per_s, found.flops / device.flops['bfloat16'])


def count(n: float) -> str:
    unit, scale = next((u, s) for u, s in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)) if n >= s)
    return f'{n / scale:.3g} {unit}'


def table(title: str, first: list[str], ranks: list[int], rows: list[list[str]]) -> None:
    print(f'\n{title}\n\n| {" | ".join([*first, *(f"r = {r}" for r in ranks)])} |\n|{"---|" * len(rows[0])}')
    for row in rows:
        print(f'| {" | ".join(row)} |')


def main(model: str, device: str, chips: int, batch: int, context: int, inner_rank: int, modes: list[str],
         words: list[int], horizons: list[int], ranks: list[int]) -> None:
    cfg, chip = preset(model), roofline.DEVICES[device]
    step = lambda k: roofline.step_time(cfg, chip, batch=batch, k_tokens=k, dtype='bfloat16', context=context)
    plain = step(1).seconds
    total = sizes(jax.eval_shape(lambda: init_params(cfg, jax.random.key(0))))
    print(f'{model}: {count(total)} parameters, {count(total * ITEM)}B. Plain decoding on {chips} x {device}, batch '
          f'{batch}, {context} tokens cached: {count(step(1).cost.bytes)}B and {1e3 * plain / chips:.2f} ms a token; '
          'a pass over n tokens: ' + ', '.join(f'n = {n} {1e3 * step(n).seconds / chips:.2f} ms' for n in horizons))

    def row(names, mode, count_words, n, show):
        make = functools.partial(TensorHeadConfig, cfg.hidden_size, cfg.vocab_size, n, mode=mode, inner_rank=inner_rank,
                                 draft_vocab=count_words)
        return [*names, str(n), *(show(cost(cfg, make(rank=r), batch), n) for r in ranks)]

    def weight(found, n):
        return f'{count(found.params)}, {count(ITEM * found.params)}B'

    def time(found, n):
        draft = seconds(found, chip)
        return f'{1e3 * draft / chips:.2g} ms, {(draft + step(n).seconds) / plain:.2f}'

    name = lambda w: f'{w or cfg.vocab_size:,}'
    table('Trained parameters, and their bytes in bfloat16', ['mode', 'words', 'n'], ranks, [
        row([m, name(w) if m == 'full' else 'any'], m, w, n, weight)
        for m in modes for w in (words if m == 'full' else words[:1]) for n in horizons])
    table('A draft, and the round (draft and verification) in plain steps', ['mode', 'words', 'n'], ranks, [
        row([m, name(w)], m, w, n, time) for m in modes for w in words for n in horizons])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='llama-3.1-8b', help='a preset (backbone/presets.py)')
    parser.add_argument('--device', default='tpu-v5e', choices=roofline.DEVICES)
    parser.add_argument('--chips', type=int, default=8, help='so many share the weights evenly')
    parser.add_argument('--batch', type=int, default=1, help='rows decoded at once')
    parser.add_argument('--context', type=int, default=2048, help='tokens in the cache of each')
    parser.add_argument('--inner_rank', type=int, default=64, help='of lowrank_shared')
    parser.add_argument('--modes', nargs='+', default=['lowrank_shared', 'linear_shared', 'full'])
    parser.add_argument('--words', nargs='+', type=int, default=[0, 16384], help='draft vocabularies; 0 is all')
    parser.add_argument('--horizons', nargs='+', type=int, default=[2, 4, 8])
    parser.add_argument('--ranks', nargs='+', type=int, default=[1, 2, 4, 8, 16])
    main(**vars(parser.parse_args()))
