"""What the TPU compiler says of 36 layers against two stacks of 18, in the setting of the StagFormer paper.

    python scripts/stagformer_pod_table.py --rows=out/stagformer_pods.jsonl [--topologies=v5e:4x4,v5e:2x2]
        [--programs=decode,prefill]

Compiles a decode step and a prefill of configs/pod_stagformer.py for each row of the table (resumable: a row that is in
the file is not made again) and prints the tables of docs/stagformer_pods.md from the file. A minute or two a row on two
cores, a prefill up to four. Nothing runs.

A step is estimated as: the compiler's cycles for every instruction, which count no collective, + the collectives' bytes
over the links + their latency, at least one hop (hop_s of harness/roofline.py) for every chip between the ends of a
group.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from configs import pod_stagformer
from harness import rehearse, topology

# model, head, tokens of the prompt a tick (0: all), chips: 'all', or 'half' of them, as many as a stage has
ROWS = (('dense', '', 0, 'all'), ('dense', '', 0, 'half'), ('separate', 'split', 0, 'all'), ('w128', 'split', 0, 'all'),
        ('separate', 'whole', 0, 'all'), ('separate', 'split', 256, 'all'), ('half', '', 0, 'half'),
        ('half', '', 0, 'all'))
HALVES = {'v5e:4x4': 'v5e:2x4', 'v5e:2x2': 'v5e:1x2'}
KEPT = ('cycles_s', 'memory_s', 'compute_s', 'link_s', 'latency_s', 'sent_bytes', 'collectives', 'argument_bytes',
          'peak_bytes')


def compiled(model: str, head: str, piece: int, share: str, name: str, program: str) -> dict[str, float]:
    name = HALVES[name] if share == 'half' else name
    devices, chip = topology.get(name)
    config = pod_stagformer.get_config(model)
    staggered = 'base' in config.task.kwargs
    if staggered:
        config.task.kwargs.update({'stage_head': head, 'stage_piece': piece})
    mesh = {'stage': 2, 'model': len(devices) // 2} if staggered else {'model': len(devices)}
    config.mesh.update({'data': len(devices)})
    config.data.batch_size = config.optimizer.accumulate * len(devices)
    config.rehearse.mesh = mesh
    found = rehearse.rehearse(config, name, (program,)).programs[0]
    places = rehearse.whole_mesh(mesh, devices, name, 'mesh')
    latency = sum(c.count * hops(places, c.axes) * chip.hop_s for c in found.collectives)
    return {'latency_s': latency, 'sent_bytes': sum(c.sent_bytes * c.count for c in found.collectives),
            'collectives': sum(c.count for c in found.collectives),
            **{key: getattr(found, key) for key in KEPT if hasattr(found, key) and key != 'collectives'}}


def hops(mesh, axes: tuple[str, ...]) -> int:
    """Steps on the wire between the two chips of a group that are furthest from each other."""
    group = mesh.devices[tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)].reshape(-1)
    places = np.array([device.coords for device in group])
    return int(max(np.abs(a - b).sum() for a, b in itertools.product(places, places)))


def step_s(found: dict) -> float:
    return found['cycles_s'] + found['link_s'] + found['latency_s']


def keys(names: list[str], programs: list[str]) -> list[tuple]:
    found = [(*r, name, program) for program in programs for name in names for r in ROWS]
    useless = lambda key: key[2] and key[5] == 'decode' or key[1] == 'whole' and key[5] == 'prefill'
    return [key for key in found if not useless(key)]


def words(model: str, head: str, piece: int, share: str, chips: int) -> str:
    if not head:
        layers = 18 if model == 'half' else 36
        return f'{layers} layers over {chips // 2 if share == "half" else chips} chips'
    what = {'separate': '2 x 18', 'w128': '2 x 18, window 128'}[model]
    return f'{what}, stages of {chips // 2} chips, head {head}' + (f', prompt in pieces of {piece}' if piece else '')


def table(done: dict[tuple, dict], name: str, program: str) -> None:
    chips = int(np.prod([int(n) for n in name.partition(':')[2].split('x')]))
    mine = {key: found for key, found in done.items() if key[4:] == (name, program)}
    print(f'\n{name}, {"a decode step" if program == "decode" else "a prompt of 1024 tokens"}\n')
    print('| | step | of dense, all chips | of dense, half | cycles | links | latency | memory at least | collectives '
          '| peak memory |\n|' + '---|' * 10)
    dense = [mine.get(('dense', '', 0, share, name, program)) for share in ('all', 'half')]
    for key, found in mine.items():
        beside = [f'{step_s(found) / step_s(d):.2f}' if d else '' for d in dense]
        times = [f'{found[k] * 1e3:.3f}' for k in ('cycles_s', 'link_s', 'latency_s', 'memory_s')]
        print(f'| {words(*key[:4], chips)} | {step_s(found) * 1e3:.3f} ms | {" | ".join(beside)} | '
              f'{" | ".join(times)} | {found["collectives"]:.0f} | {found["peak_bytes"] / 2**30:.2f} GiB |')


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', required=True, type=Path, help='file of finished rows, one JSON object a line')
    parser.add_argument('--topologies', default='v5e:4x4,v5e:2x2')
    parser.add_argument('--programs', default='decode,prefill')
    parser.add_argument('--print', action='store_true', help='only print what the file has')
    options = parser.parse_args(args)
    names, programs = options.topologies.split(','), options.programs.split(',')
    lines = options.rows.read_text().splitlines() if options.rows.exists() else []
    done = {tuple(line['key']): line['found'] for line in map(json.loads, lines)}
    for key in keys(names, programs):
        if key not in done and not options.print:
            print('compiling', *key, file=sys.stderr)
            done[key] = compiled(*key)
            with options.rows.open('a') as out:
                out.write(json.dumps({'key': key, 'found': done[key]}) + '\n')
    for name, program in itertools.product(names, programs):
        table({key: done[key] for key in keys([name], [program]) if key in done}, name, program)


if __name__ == '__main__':
    main()
