"""What a decode step costs in stacks that run at once, on one chip and on 2, 4 and 16, by arithmetic alone.

    python scripts/stagformer_cost.py [--model=llama-2-7b --chip=h200 --batch=8 --hop_us=0]

Prints the tables of docs/stagformer_cost.md, in Markdown. Counted are the bfloat16 weights and caches a step reads, its
FLOPs, and what travels between chips (harness/stages.py, harness/roofline.py); times are the least these allow. The
default shape is the one whose parameter counts fit those of the paper (StagFormer, Cutler et al., 2025, arXiv
2501.15665): 36 layers 2.8 B, 18 layers 1.6 B, two stacks of 18 2.9 B, a vocabulary of 256,000.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone.config import AttentionConfig, MlpConfig, ModelConfig
from backbone.presets import PRESETS, preset
from harness import roofline
from harness.stages import Stacks, cross_params, head_cost, kv_scalars, on_one_device, stage_costs, staggered_step

PAPER = ModelConfig('llama', 256_000, 1536, 36, 131_072, AttentionConfig(12, 12, 128), MlpConfig(12_288),
                    tie_embeddings=True)
ITEM = 2  # bytes of a bfloat16
STACKS = (2, 4)
WINDOWS = (512, 128)
CONTEXTS = tuple(1024 * k for k in (1, 4, 16, 64, 128))


HOPS_US = (0, 1, 3, 10)


def variants(layers: int, p: int, shared: bool) -> dict[str, Stacks]:
    """The ways to run `layers` layers in p stacks of equal depth. Where each has its own chips, shared weights lie on
    all of them, and a step is that of separate weights."""
    depths = (layers // p,) * p
    found = {f'{p} stacks': Stacks(depths)}
    found |= {f'{p} stacks, window {w}': Stacks(depths, w) for w in WINDOWS}
    if shared:
        found[f'{p} passes of {layers // p} shared layers'] = Stacks(depths, shared=True)
        found[f'{p} passes, window {WINDOWS[-1]}'] = Stacks(depths, WINDOWS[-1], shared=True)
    return found


def fits(cfg: ModelConfig, device: roofline.Device, stacks: Stacks, stages: int, chips: int, batch: int,
         context: int) -> bool:
    """Whether a chip can hold its share of the fullest stage: weights, embedding, head and caches."""
    table = cfg.vocab_size * (cfg.embed_size or cfg.hidden_size) * ITEM * (1 if cfg.tie_embeddings else 2)
    if stages == 1:
        weights = on_one_device(cfg, stacks).weight_bytes
        cache = ITEM * batch * kv_scalars(cfg, stacks, context)
    else:
        weights = max(cost.weight_bytes for cost in stage_costs(cfg, stacks))
        cache = max(cost.cache_bytes for cost in stage_costs(cfg, stacks, batch=batch, context=context))
    return weights + table + cache <= chips * (device.usable_bytes or device.memory_bytes)


def table(title: str, heads: list[str], rows: list[list[str]]) -> None:
    print(f'\n{title}\n\n| {" | ".join(heads)} |\n|{"---|" * len(heads)}')
    for row in rows:
        print(f'| {" | ".join(row)} |')


def shape(cfg: ModelConfig) -> None:
    matrices, vectors = roofline.layer_params(cfg)
    cross = cross_params(cfg, Stacks((1, 1)), 1)[0]
    print(f'A layer has {(matrices + vectors) / 1e6:.1f} M parameters (W), a cross block {cross / 1e6:.1f} M: '
          f'X/W = {cross / matrices:.3f}, so p chips bound by weights alone gain at most p/{1 + cross / matrices:.3f}. '
          f'The head weighs as much as {head_cost(cfg).weight_bytes / ITEM / (matrices + vectors):.2f} layers.')
    layers, rows = cfg.num_layers, []
    ways = [variants(layers, p, True) for p in STACKS if layers % p == 0]
    for name, stacks in [('plain', Stacks((layers,))), *(item for way in ways for item in way.items())]:
        weights = on_one_device(cfg, stacks).weight_bytes + head_cost(cfg).weight_bytes
        rows.append([name, f'{weights / ITEM / 1e9:.2f} G', *(
            f'{ITEM * kv_scalars(cfg, stacks, c) / 1e6:,.0f} MB, '
            f'{kv_scalars(cfg, stacks, c) / kv_scalars(cfg, Stacks((layers,)), c):.2f}x' for c in CONTEXTS)])
    table('Parameters, and the caches of one row against the plain model\'s',
          ['', 'parameters', *(f'{c // 1024}k' for c in CONTEXTS)], rows)


@dataclasses.dataclass(frozen=True)
class Place:
    """A way to use some chips."""

    name: str
    stacks: Stacks
    stages: int
    chips: int  # of each stage
    split: bool = False

    def cell(self, cfg: ModelConfig, device: roofline.Device, total: int, batch: int, context: int) -> str:
        """Milliseconds; how many times faster than the plain model on one chip, and on as many."""
        request = {'batch': batch, 'context': context}
        own = staggered_step(cfg, device, self.stacks, stages=self.stages, chips=self.chips, split_head=self.split,
                             **request).seconds
        one, same = (staggered_step(cfg, device, Stacks((cfg.num_layers,)), chips=n, **request).seconds / own
                     for n in (1, total))
        mark = '' if fits(cfg, device, self.stacks, self.stages, self.chips, batch, context) else ' †'
        return f'{1e3 * own:.3g} ms, {one:.2f}x' + (f', {same:.2f}x' if total > 1 else '') + mark


def places(cfg: ModelConfig, chips: int) -> list[Place]:
    plain = 'plain' if chips == 1 else f'plain, every layer on {chips} chips'
    found = [Place(plain, Stacks((cfg.num_layers,)), 1, chips)]
    for p in STACKS:
        if cfg.num_layers % p or (chips > 1 and chips % p):
            continue
        each = f', {chips // p} chip{"s" * (chips > p)} each'
        for name, stacks in variants(cfg.num_layers, p, chips == 1).items():
            if chips == 1:
                found.append(Place(name, stacks, 1, 1))
            else:
                found += [Place(name + each + ', head split' * split, stacks, p, chips // p, split)
                          for split in (False, True)]
    return found


def steps(cfg: ModelConfig, device: roofline.Device, chips: int, batch: int) -> None:
    """Every way to use `chips` chips, by context."""
    rows = [[place.name, *(place.cell(cfg, device, chips, batch, c) for c in CONTEXTS)] for place in places(cfg, chips)]
    table(f'A step on {chips} x {device.name}, batch {batch}, by tokens cached',
          ['', *(f'{c // 1024}k' for c in CONTEXTS)], rows)


def latency(cfg: ModelConfig, device: roofline.Device, chips: list[int], batch: int) -> None:
    """The same by what a hop takes, at the shortest context."""
    rows = [[place.name, *(place.cell(cfg, dataclasses.replace(device, hop_s=us * 1e-6), count, batch, CONTEXTS[0])
                           for us in HOPS_US)]
            for count in chips if count > 1 for place in places(cfg, count)
            if 'plain' in place.name or (place.split and place.stacks.window == WINDOWS[-1])]
    table(f'A step on {device.name}, batch {batch}, {CONTEXTS[0] // 1024}k tokens cached, by the latency of a hop',
          ['', *(f'{us} us' for us in HOPS_US)], rows)


def main(model: str, chip: str, chips: list[int], batch: int, hop_us: float | None) -> None:
    cfg, device = PAPER if model == 'paper' else preset(model), roofline.DEVICES[chip]
    if hop_us is not None:
        device = dataclasses.replace(device, hop_s=hop_us * 1e-6)
    links = 'no limit' if math.isinf(device.link_bytes_per_s) else f'{device.link_bytes_per_s / 1e9:.0f} GB/s'
    print(f'{model}: {cfg.num_layers} layers, d = {cfg.hidden_size}, MLP {cfg.mlp.intermediate_size}, '
          f'{cfg.attention.num_heads} heads of {cfg.attention.head_dim}, {cfg.attention.num_kv_heads} of keys, '
          f'{cfg.vocab_size:,} words. {device.name}: {device.memory_bytes_per_s / 1e9:,.0f} GB/s, links {links}, '
          f'{1e6 * device.hop_s:g} us a hop.\n')
    shape(cfg)
    for count in chips:
        steps(cfg, device, count, batch)
    latency(cfg, device, chips, batch)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='paper', choices=['paper', *PRESETS])
    parser.add_argument('--chip', default='tpu-v5e', choices=roofline.DEVICES)
    parser.add_argument('--chips', type=int, nargs='+', default=[1, 2, 4, 16])
    parser.add_argument('--batch', type=int, default=1, help='rows decoded at once')
    parser.add_argument('--hop_us', type=float, help="instead of what is known of the chip's links")
    main(**vars(parser.parse_args()))
