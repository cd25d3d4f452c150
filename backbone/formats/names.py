"""One name table per (format, family), used in both directions.

A `Rule` ties a Headway leaf to a tensor of the file. `{}` in a name is the layer index, a second one the expert's. A
table lists
every tensor the family can have; which of them a model does have is decided by its parameter tree
(`backbone.model.abstract_params`), so a table needs no conditions.

Both formats store a matrix as [out, in]; Headway as [in, out], so every kernel is transposed.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from backbone.errors import FormatError

EXPERTS = 'layers/moe/experts/'


@dataclasses.dataclass(frozen=True)
class Rule:
    """leaf: '/'-joined path in the parameter tree. name: the file's tensor.

    heads: 'q' or 'k' where the file interleaves each head's two rotary halves (llama.cpp's order).
    shift: leaf = file + shift (Gemma stores its norm scales less one).
    """

    leaf: str
    name: str
    heads: str | None = None
    shift: float = 0.0

    @property
    def transposed(self) -> bool:
        return self.leaf.endswith('/kernel') or self.per_expert

    @property
    def stacked(self) -> bool:
        return self.leaf.startswith('layers/')

    @property
    def per_expert(self) -> bool:
        """The file has a tensor for each expert of each layer: a second `{}` in the name."""
        return self.leaf.startswith(EXPERTS)


def rotary_rows(out: int, heads: int) -> np.ndarray:
    """Row order that turns llama.cpp's interleaved rows into half-split ones: leaf row i = file row order[i].

    `heads` is the number of query heads for q and of key/value heads for k.
    """
    return np.arange(out).reshape(heads, out // heads // 2, 2).swapaxes(1, 2).reshape(out)


def _hf_llama(norm_shift: float = 0.0) -> tuple[Rule, ...]:
    layer = 'model.layers.{}.'
    return (
        Rule('embed/tokens', 'model.embed_tokens.weight'),
        Rule('layers/attn_norm/scale', layer + 'input_layernorm.weight', shift=norm_shift),
        *(Rule(f'layers/attn/{x}/{ours}', f'{layer}self_attn.{x}_proj.{theirs}')
          for x in 'qkvo' for ours, theirs in _KERNEL_BIAS),
        Rule('layers/mlp_norm/scale', layer + 'post_attention_layernorm.weight', shift=norm_shift),
        *(Rule(f'layers/mlp/{x}/{ours}', f'{layer}mlp.{x}_proj.{theirs}')
          for x in ('gate', 'up', 'down') for ours, theirs in _KERNEL_BIAS),
        Rule('final_norm/scale', 'model.norm.weight', shift=norm_shift),
        Rule('lm_head/kernel', 'lm_head.weight'),
    )


def _hf_mixture(router: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Names within a layer, those of an expert with its number as a second `{}`."""
    layer, experts = 'model.layers.{}.', {'gate': gate, 'up': up, 'down': down}
    mixture = (Rule('layers/moe/router/kernel', layer + router),
               *(Rule(f'{EXPERTS}{ours}', layer + theirs) for ours, theirs in experts.items()))
    plain = [rule for rule in _hf_llama() if not rule.leaf.startswith('layers/mlp/')]
    last = max(i for i, rule in enumerate(plain) if rule.stacked) + 1
    norms = tuple(Rule(f'layers/attn/{x}_norm/scale', f'{layer}self_attn.{x}_norm.weight') for x in 'qk')
    return (*plain[:last], *norms, *mixture, *plain[last:])


def _hf_opt() -> tuple[Rule, ...]:
    decoder, layer = 'model.decoder.', 'model.decoder.layers.{}.'
    parts = {'attn/q': 'self_attn.q_proj', 'attn/k': 'self_attn.k_proj', 'attn/v': 'self_attn.v_proj',
             'attn/o': 'self_attn.out_proj', 'mlp/up': 'fc1', 'mlp/down': 'fc2'}
    norms = {'attn_norm': 'self_attn_layer_norm', 'mlp_norm': 'final_layer_norm'}
    return (
        Rule('embed/tokens', decoder + 'embed_tokens.weight'),
        Rule('embed/positions', decoder + 'embed_positions.weight'),
        Rule('embed/project_in/kernel', decoder + 'project_in.weight'),
        Rule('embed/project_out/kernel', decoder + 'project_out.weight'),
        *(Rule(f'layers/{x}/{ours}', f'{layer}{y}.{theirs}')
          for x, y in parts.items() for ours, theirs in _KERNEL_BIAS),
        *(Rule(f'layers/{x}/{ours}', f'{layer}{y}.{theirs}')
          for x, y in norms.items() for ours, theirs in _SCALE_BIAS),
        *(Rule(f'final_norm/{ours}', f'{decoder}final_layer_norm.{theirs}') for ours, theirs in _SCALE_BIAS),
        Rule('lm_head/kernel', 'lm_head.weight'),
    )


def _gguf(interleaved: bool) -> tuple[Rule, ...]:
    layer = 'blk.{}.'
    parts = {'attn/q': 'attn_q', 'attn/k': 'attn_k', 'attn/v': 'attn_v', 'attn/o': 'attn_output',
             'mlp/gate': 'ffn_gate', 'mlp/up': 'ffn_up', 'mlp/down': 'ffn_down'}
    heads = {'attn/q': 'q', 'attn/k': 'k'} if interleaved else {}
    return (
        Rule('embed/tokens', 'token_embd.weight'),
        Rule('layers/attn_norm/scale', layer + 'attn_norm.weight'),
        *(Rule(f'layers/{x}/{ours}', f'{layer}{y}.{theirs}', heads=heads.get(x))
          for x, y in parts.items() for ours, theirs in _KERNEL_BIAS),
        Rule('layers/mlp_norm/scale', layer + 'ffn_norm.weight'),
        Rule('final_norm/scale', 'output_norm.weight'),
        Rule('lm_head/kernel', 'output.weight'),
    )


_KERNEL_BIAS = (('kernel', 'weight'), ('bias', 'bias'))
_SCALE_BIAS = (('scale', 'weight'), ('bias', 'bias'))

# llama.cpp has no OPT. It interleaves q and k for llama only, and adds Gemma's 1 when it converts.
TABLES: dict[tuple[str, str], tuple[Rule, ...]] = {
    ('hf', 'llama'): _hf_llama(),
    ('hf', 'qwen2'): _hf_llama(),
    ('hf', 'gemma'): _hf_llama(norm_shift=1.0),
    ('hf', 'opt'): _hf_opt(),
    ('hf', 'mixtral'): _hf_mixture('block_sparse_moe.gate.weight', *(
        f'block_sparse_moe.experts.{{}}.{w}.weight' for w in ('w1', 'w3', 'w2'))),
    ('hf', 'olmoe'): _hf_mixture('mlp.gate.weight', *(
        f'mlp.experts.{{}}.{w}_proj.weight' for w in ('gate', 'up', 'down'))),
    ('gguf', 'llama'): _gguf(interleaved=True),
    ('gguf', 'qwen2'): _gguf(interleaved=False),
    ('gguf', 'gemma'): _gguf(interleaved=False),
}


def table(file_format: str, family: str) -> tuple[Rule, ...]:
    """Errors: FormatError where the format cannot hold the family."""
    try:
        return TABLES[file_format, family]
    except KeyError:
        known = ', '.join(f for kind, f in TABLES if kind == file_format)
        raise FormatError(f'{family}: no {file_format} form of this architecture, one of {known}') from None
