"""Training a CP head: on a frozen base, beside low-rank adapters of its last layers, or with its trunk from scratch.

The loss of a position is the negative log of the head's joint law of the next n tokens, each factor's share weighed
by `discount`; where a document ends the rest of the window is marginalised, which the CP form does exactly.
Basharin et al., 2024 (arXiv 2410.17765); the conditional form of the distillation loss as in arXiv 2511.11346.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backbone import formats, lora
from backbone import losses as token_losses
from backbone.config import ModelConfig
from backbone.draft_vocabulary import read_ids
from backbone.errors import ConfigError
from backbone.language_model import REMAT, layer_for_training
from backbone.layers import ATTENTION
from backbone.mesh import constrain
from backbone.model import PlainTarget, hidden_states, init_params, unembed
from backbone.presets import preset
from tensorhead import cp, losses
from tensorhead import head as heads
from tensorhead.config import TensorHeadConfig
from tensorhead.marginal import MarginalTarget

Array = jax.Array
LOSSES = ('joint', 'discounted', 'distill')
BALANCE = ('', 'switch', 'cv2', 'neg_entropy')


@dataclasses.dataclass(frozen=True)
class HeadTask:
    """A Task (backbone/contract.py).

    base: catalogue key or path of the frozen model; '' trains the trunk too, from scratch. frozen: whether the trunk
    stays as it is, None for whether there is a base; a frozen one that is random tries sizes. cached: hidden states are
    computed once and kept (docs/training.md); frozen bases without adapters only.
    loss: 'joint' (every factor counts alike), 'discounted' (factor k weighs discount^(k-1)), 'distill' (beta of the
    forward KL to the base's own next-token law, the rest discounted NLL). first: weight of factor 1 in 'discounted';
    0 makes it evidence only: drafting conditions on the pending token and never draws it.
    bernoulli: the KL over {gold, not gold} alone. balance, balance_coef: the term that keeps components in use.
    positions: so many random positions of each row a step; 0 all. chunk: words of the vocabulary at a time, 0 all.
    draft_ids: .npy file of the draft vocabulary's ids; '' takes the first `head.draft_vocab` ids, which a byte-pair
    tokenizer numbers by frequency.
    lora_rank, lora_last, lora_alpha, next_weight: adapters on the last layers' attention, trained together with the
    head; the base's next-token loss is added with next_weight. The base that is decoded is then another one.
    attention, query_chunk: of the trunk, as in LanguageModel. loss_chunk: positions at a time through the base's
    vocabulary for that next-token loss, 0 all.
    """

    cfg: ModelConfig
    head: TensorHeadConfig
    base: str = ''
    cached: bool = False
    loss_kind: str = 'discounted'
    discount: float = 0.9
    first: float = 1.0
    beta: float = 0.9
    bernoulli: bool = False
    balance: str = ''
    balance_coef: float = 0.01
    positions: int = 0
    chunk: int = 0
    draft_ids: str = ''
    lora_rank: int = 0
    lora_last: int = 4
    lora_alpha: float = 16.0
    next_weight: float = 1.0
    loss_chunk: int = 0
    query_chunk: int = 0
    attention: str = 'dense'
    remat: str = 'none'
    frozen: bool | None = None

    def __post_init__(self):
        for name, value, known in (('loss', self.loss_kind, LOSSES), ('balance', self.balance, BALANCE),
                                   ('attention', self.attention, ATTENTION), ('remat', self.remat, ('none', *REMAT))):
            if value not in known:
                raise ConfigError(f'task.kwargs.{name}: unknown {value!r}, one of {", ".join(map(repr, known))}')
        self.head.check_base(self.cfg)
        if self.cached and (not self.frozen_unembedding or self.lora_rank):
            raise ConfigError('task.kwargs.cached: hidden states are kept of a frozen base without adapters only')
        if not 0 < self.discount <= 1 or self.first < 0:
            raise ConfigError(f'discount must be in (0, 1] and first >= 0, got {self.discount} and {self.first}')
        if self.cfg.embed_size is not None:
            raise ConfigError('a base that projects its hidden state before the vocabulary has no unembedding to share')

    @property
    def trainable(self) -> tuple[str, ...]:
        mine = ('tensorhead/(gate|factors|pending)/.*',)
        return mine + (('base/.*',) if not self.frozen_unembedding else ('lora/.*',) if self.lora_rank else ())

    @property
    def frozen_unembedding(self) -> bool:
        return bool(self.base) if self.frozen is None else self.frozen

    @property
    def target(self) -> Any:
        """What decodes the parameters in training, for samples. From scratch the head is the only vocabulary layer."""
        if not self.frozen_unembedding and not self.head.draft_vocab:
            return MarginalTarget(self.cfg, self.head)
        return PlainTarget(self.cfg)

    @property
    def feature_name(self) -> str:
        return 'hidden:last'

    def init(self, rng: Array) -> dict:
        base_rng, head_rng, lora_rng = jax.random.split(rng, 3)
        base = init_params(self.cfg, base_rng)
        ids = jnp.arange(self.head.draft_vocab, dtype=jnp.int32) if self.head.draft_vocab else None
        params = {'base': base, 'tensorhead': heads.init(self.head, head_rng, ids)}
        if self.lora_rank:
            params['lora'] = lora.init(base, lora_rng, self.lora_rank, last=self.lora_last)
        return params

    def load(self) -> dict:
        """The frozen base, and the draft vocabulary where a file names it. Errors: those of formats.load."""
        found: dict[str, Any] = {}
        if self.base:
            loaded = formats.load_shaped(self.base, self.cfg)
            found['base'] = loaded.params
        if self.draft_ids:
            found['tensorhead'] = {'draft_ids': read_ids(self.draft_ids, self.head.words, self.head.vocab_size)}
        return found

    def merged(self, params: dict) -> dict:
        """The base that is decoded, with its adapters in it."""
        return lora.merge(params['base'], params['lora'], self.lora_alpha) if 'lora' in params else params['base']

    def drafter(self) -> dict[str, Any]:
        """What drafts with the trained head: a factory by dotted path and its arguments (harness/artefacts.py)."""
        return {'factory': 'tensorhead.drafter.build', 'kwargs': {'head': self.head.to_dict()}, 'params': 'tensorhead'}

    def features(self, base: dict, batch: Mapping[str, Array]) -> dict[str, Array]:
        """{'hidden': [B, S, d]}: the trunk's final hidden states."""
        return {'hidden': hidden_states(self.cfg, base, batch['tokens'], segments=batch['segments'],
                                        positions=batch['positions'], layer_fn=layer_for_training(self.remat),
                                        attention=self.attention, query_chunk=self.query_chunk)}

    def train_flops(self, batch: int, seq_len: int) -> float:
        """FLOPs of one step: the trunk (forward, and backward where it is trained) and the head's vocabulary rows."""
        head = self.head
        rows = batch * (self.positions or seq_len) * head.horizon * head.rank
        # Forward and one backward product; a frozen unembedding's second forward product stands for its backward.
        vocabulary = (4 if self.frozen_unembedding else 6) * rows * head.words * head.hidden_size
        trunk_weights = sum(a.size for a in jax.tree.leaves(
            jax.eval_shape(lambda: init_params(self.cfg, jax.random.key(0)))['layers']))
        trunk = 0 if self.cached else (2 if self.frozen_unembedding else 6) * batch * seq_len * trunk_weights
        return float(vocabulary + trunk)

    def loss(self, params: dict, batch: Mapping[str, Array], rng: Array) -> tuple[Array, dict[str, Array]]:
        """Mean over windows in nats. Metrics: docs/tensorhead.md."""
        base, head = self.merged(params), params['tensorhead']
        hidden = batch['hidden'] if self.cached else self.features(base, batch)['hidden']
        wide = jnp.promote_types(base['embed']['tokens'].dtype, hidden.dtype)
        hidden = hidden.astype(wide)
        future, valid, weight = losses.windows(batch['targets'], batch['segments'], batch['weights'], self.head.horizon)
        whole = (hidden, batch['targets'], batch['weights'])
        e, future, valid, weight, at = self.choose(hidden, future, valid, weight, rng)
        index, valid = known_suffix(head, future, valid)
        unembedding = heads.unembedding(base, head)
        x_1 = base['embed']['tokens'][future[..., 0]] if self.head.pending_size else None
        factors = heads.factors(self.head, head, e, x_1 if x_1 is None else x_1.astype(wide))
        logp = losses.gold_logp(self.head, head, factors, unembedding, index, valid, self.chunk,
                                self.frozen_unembedding)
        log_w = factors.log_w
        loss = losses.discounted_nll(log_w, logp, weight, self.weights_of_factors())
        if self.loss_kind == 'distill':
            loss = (1 - self.beta) * loss + self.beta * self.divergence(
                head, factors, unembedding, whole[0], at, logp, index, valid, weight)
        if self.balance:
            loss = loss + self.balance_coef * losses.balance(log_w, weight, self.balance)
        metrics = self.metrics(log_w, logp, valid, weight)
        if self.lora_rank:
            sums = token_losses.next_token_chunked(
                lambda h: constrain(unembed(self.cfg, base, h), 'batch', None, 'vocab'), *whole, self.loss_chunk)
            loss = loss + self.next_weight * sums.mean('nll')
            metrics['base_nll'] = sums.mean('nll')
        return loss, metrics

    def weights_of_factors(self) -> np.ndarray:
        """c [n], summing to 1 so that neither n nor the discount moves the learning rate; joint: all ones."""
        if self.loss_kind == 'joint':
            return np.ones(self.head.horizon, np.float32)
        weights = self.discount ** np.arange(self.head.horizon)
        weights[0] *= self.first if self.head.horizon > 1 else 1
        return (weights / weights.sum()).astype(np.float32)

    def choose(self, hidden: Array, future: Array, valid: Array, weight: Array, rng: Array) -> tuple[Array, ...]:
        """`positions` random ones of each row that count -> the same arrays at those, and their places [B, P]."""
        batch, size = weight.shape
        if not 0 < self.positions < size:
            return hidden, future, valid, weight, jnp.broadcast_to(jnp.arange(size), (batch, size))
        at = token_losses.some_positions(weight, self.positions, rng)
        return tuple(token_losses.at_positions(a, at) for a in (hidden, future, valid, weight)) + (at,)

    def divergence(self, head, factors, unembedding, hidden, at, logp, index, valid, weight) -> Array:
        """Discounted KL from the base's own law of each token of the window to the head's conditional of it."""
        later = jnp.minimum(at[..., None] + jnp.arange(self.head.horizon), hidden.shape[1] - 1)
        teacher = jax.vmap(lambda row, i: row[i])(hidden, later)  # [B, P, n, d]: what the base knew at each of them
        kl = losses.kl_bernoulli if self.bernoulli else losses.kl_full
        return kl(self.head, head, factors, unembedding, teacher, logp, index, valid, weight,
                  self.weights_of_factors(), self.chunk)

    def metrics(self, log_w: Array, logp: Array, valid: Array, weight: Array) -> dict[str, Array]:
        """joint_nll over whole windows, nll_s of each factor given those before it (nats), and component usage."""
        log_w, logp = jax.lax.stop_gradient((log_w, logp))
        whole = weight * valid.all(-1)
        pre = cp.prefix_log(log_w, logp)
        ahead = cp.log_prefix(pre)
        nll = -jnp.diff(ahead, axis=-1)
        found = {f'nll_{s + 1}': _mean(nll[..., s], weight * valid[..., s]) for s in range(self.head.horizon)}
        found['joint_nll'] = _mean(-ahead[..., -1], whole)
        found['whole_windows'] = _mean(valid.all(-1), weight)
        found['weight'] = weight.sum()
        if not self.head.draft_vocab and not self.positions:
            found['nll'] = found['nll_1']
        return found | losses.usage(log_w, pre[..., -1, :], weight)


def known_suffix(head: dict, future: Array, valid: Array) -> tuple[Array, Array]:
    """Ids [..., n] -> (draft words, valid): a window ends before its first unknown word, which no draft can pass.

    Factor 1 alone may be unknown: the pending token then says nothing of the component, and factors 2.. still draft.
    """
    index, known = heads.index_of(head, future)
    later = jnp.cumprod((valid & known)[..., 1:], axis=-1).astype(bool)
    return index, jnp.concatenate([(valid & known)[..., :1], later], axis=-1)


def _mean(values: Array, weight: Array) -> Array:
    return (values * weight).sum() / jnp.maximum(weight.sum(), 1e-9)


def build(model: str | Mapping[str, Any] = '', overrides: Mapping[str, Any] | None = None, base: str = '',
          head: Mapping[str, Any] | None = None, loss: str = 'discounted', **options: Any) -> HeadTask:
    """From a config. model: a preset's name or the fields of a ModelConfig, with `overrides`; not needed with `base`
    (catalogue key or path), which brings its own. head: fields of TensorHeadConfig; hidden_size and vocab_size come
    from the model. Errors: ConfigError names what is unknown."""
    unknown = [key for key in options if key not in {f.name for f in dataclasses.fields(HeadTask)} - {'cfg'}]
    if unknown or bool(model) == bool(base):
        raise ConfigError(f'task.kwargs: unknown {", ".join(unknown)}' if unknown else
                          'task.kwargs: give either base (a trained model) or model (a shape to train from scratch)')
    if base:
        cfg = formats.load(base).config
    else:
        fields = preset(model).to_dict() if isinstance(model, str) else dict(model)
        cfg = ModelConfig.from_dict(fields | dict(overrides or {}))
    sizes = {'hidden_size': cfg.hidden_size, 'vocab_size': cfg.vocab_size}
    return HeadTask(cfg, TensorHeadConfig.from_dict(sizes | dict(head or {})), base, loss_kind=loss, **options)
