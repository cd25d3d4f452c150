"""A mixture's tensors as transformers 5 holds them in memory, and writes them when told to: all experts in one.

`mlp.experts.gate_up_proj` [E, 2f, d], gate first, and `mlp.experts.down_proj` [E, d, f]; released checkpoints, and what
is written here, have a tensor for each expert.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from backbone.config import ModelConfig
from backbone.formats.names import EXPERTS, table
from backbone.formats.tensors import Stored, encoded_bytes

_FUSED = re.compile(r'model\.layers\.(\d+)\.mlp\.(?:(gate)\.weight|experts\.(gate_up|down)_proj)')


def unfused(cfg: ModelConfig, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of a mixture's file, those of all experts taken apart: views of the same bytes, nothing is copied.

    What is not of the shape that `cfg` says stays as it is, for `tensors.plan` to name.
    """
    if cfg.moe is None:
        return dict(stored)
    names = {rule.leaf: rule.name for rule in table('hf', cfg.family)}
    count, d, f = cfg.moe.num_experts, cfg.hidden_size, cfg.mlp.intermediate_size
    parts = {'gate_up': (('gate', 'up'), (count, 2 * f, d)), 'down': (('down',), (count, d, f))}
    found = {}
    for name, tensor in stored.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            found[name] = tensor
        elif match[2]:
            own = names['layers/moe/router/kernel'].format(match[1])
            found[own] = dataclasses.replace(tensor, name=own)
        elif tensor.shape != parts[match[3]][1]:
            found[name] = tensor
        else:
            which = parts[match[3]][0]
            shape = (tensor.shape[1] // len(which), tensor.shape[2])
            for i, (expert, part) in enumerate((e, p) for e in range(count) for p in which):
                own = names[EXPERTS + part].format(match[1], expert)
                offset = tensor.offset + i * encoded_bytes(tensor.encoding, shape)
                found[own] = dataclasses.replace(tensor, name=own, shape=shape, offset=offset)
    return found
