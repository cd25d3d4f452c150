"""Decoding with experts in host memory and a bounded number of them on the device; Python drives it layer by layer.

    for each layer:  attention, router and the predictor's stream, one program -> its ids, guesses for later layers
                     ids reach the host (the only wait of a layer); copies of what is missing begin
                     the experts, K at a time, out of their slots; then copies of what is guessed begin

Copies are begun and never waited for: what runs an expert is queued behind the arrival of that expert's bytes, by data
dependence. Guesses come from at least one layer before the one they are for, and only move bytes: the output is the
same to the bit for every number of slots, eviction and predictor. Our reading of the ahead-of-time loading of
Bhendawade et al., 2025 (arXiv 2502.02040), whose text is not public in full.

This is the one exception to the decode loop of one jit, and no Target: a pass cannot be traced, for the host decides in
the middle of it which bytes move. It has a `generate` of its own, with the arguments of the harness's where they apply.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from backbone import cache as caches
from backbone.config import ModelConfig
from backbone.errors import ConfigError, RequestError
from backbone.sampling import GREEDY, Sampling, fold_in
from m2r2 import expert_steps as steps
from m2r2.expert_cache import Copy, ExpertCache, Future
from m2r2.expert_guess import Predictor
from m2r2.expert_slots import CacheConfig
from m2r2.expert_store import HostExperts, Slots, without_experts

Array = jax.Array
SPARE = 2  # slots that may be written while the experts of a layer are read
SMALLEST, ROUND = 16, 64  # prompts are padded to powers of two from here, key-value slots to multiples of this


@dataclasses.dataclass(frozen=True)
class Generation:
    """tokens: new ids a row, a stop token included. Seconds. prefill, decode: what moved, by the fields of
    expert_cache.Counts and 'bytes', which were sent to the device. passes: of the decoding loop. routed: ids
    [L, B, C, K] by position, -1 where nothing ran, if they were asked for."""

    tokens: list[list[int]]
    prefill_s: float
    decode_s: float
    prefill: dict[str, int]
    decode: dict[str, int]
    passes: int
    routed: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed: the first token of each row belongs to prefill."""
        return (self.num_tokens - len(self.tokens)) / self.decode_s if self.decode_s > 0 else 0.0


class ExpertRuntime:
    """A model whose experts are in `store`, with `slots` of them on the device (all of them where it is None).

    params: {'base': ..., 'prefetch': the predictor's}; base may still hold the experts, they are left behind.
    eviction, per_layer, future: of expert_cache. predictor None: no guesses (LRU or on demand). extra: guesses a layer
    beyond experts_per_token. in_flight: guessed copies begun at once (default experts_per_token): a link hands over in
    order, so they are what a demand may have to wait for. least: a guess that the predictor gives less (in tokens) is
    not worth its bytes. keep False: nothing is kept from one layer to the next (on
    demand). poison: fill slots with NaN before they are reused (a check).
    Errors: ConfigError names a setting: too few slots, a model without experts, norms behind the residual.
    """

    def __init__(self, cfg: ModelConfig, params: dict, store: HostExperts | None = None, *, slots: int | None = None,
                 eviction: str = 'lru', per_layer: bool = False, predictor: Predictor | None = None, extra: int = 0,
                 in_flight: int | None = None, least: float = 1e-3, keep: bool = True, poison: bool = False,
                 future: Future | None = None, device: jax.Device | None = None, cache_dtype: str = 'float32'):
        if cfg.moe is None:
            raise ConfigError('expert runtime: the model has no experts (its config has no moe)')
        if cfg.norm_placement != 'pre':
            raise ConfigError(f'expert runtime: norm_placement must be pre, got {cfg.norm_placement}')
        k, num = cfg.moe.experts_per_token, cfg.moe.num_experts
        every = num * (1 if per_layer else cfg.num_layers)
        slots = every if slots is None else slots
        if slots < min(k + SPARE, every):
            raise ConfigError(f'expert_runtime.slots must be at least {min(k + SPARE, every)} (experts_per_token {k} '
                              f'and {SPARE} spare), got {slots}')
        if extra < 0 or (in_flight is not None and in_flight < 1):
            raise ConfigError(f'expert_runtime: extra must be >= 0 and in_flight >= 1, got {extra} and {in_flight}')
        self.cfg, self.predictor, self.extra, self.keep, self.cache_dtype = cfg, predictor, extra, keep, cache_dtype
        self.store = store or HostExperts.of(cfg, params['base']['layers'], device)
        self.base = without_experts(cfg, params['base'], self.store.device)
        self.mine = jax.device_put(params.get('prefetch'), self.store.device)
        self.in_flight, self.least = k if in_flight is None else in_flight, least
        self.cache = ExpertCache(CacheConfig(cfg.num_layers, num, k, min(slots, every), per_layer, eviction,
                                             expert_bytes=self.store.expert_bytes), future)
        self.slots = Slots(self.store, self.cache.cfg.total_slots, poison)
        self._own = [predictor.layer_params(self.mine, l) if predictor else () for l in range(cfg.num_layers)]

    def load_all(self) -> None:
        """Fills the empty slots before the first token, layer by layer, counting nothing."""
        n = self.cache.cfg.slots
        keys = [(l, e) for l in range(self.cfg.num_layers) for e in range(self.cfg.moe.num_experts)]
        keys = [key for key in keys if key[1] < n] if self.cache.cfg.per_layer else keys[:n]
        for copy in self.cache.preload(keys):
            self._start(copy)
            self.slots.land([copy.slot])
        self.slots.moved = 0

    def counts(self) -> dict[str, int]:
        return dataclasses.asdict(self.cache.counts) | {'bytes': self.slots.moved}

    def reset_counts(self) -> None:
        self.cache.reset_counts()
        self.slots.moved = 0

    # --- one pass -----------------------------------------------------------------------------------------------

    def init_state(self, batch: int, capacity: int) -> tuple[list, list]:
        """Keys and values, and the predictor's memory, one entry a layer."""
        kv = caches.init_kv(self.cfg, batch, capacity, self.cache_dtype, stacked=False)
        nothing = ((),) * self.cfg.num_layers
        return list(kv), list(self.predictor.init(self.cfg, self.mine, batch, capacity) if self.predictor else nothing)

    def forward(self, tokens: np.ndarray, pos: np.ndarray, live: np.ndarray, state: tuple[list, list],
                forced: np.ndarray | None = None) -> tuple[Array, Array, np.ndarray]:
        """tokens [B, S] at slots pos[b]..; live [B, S]: not padding. Writes `state`.

        Returns the residual and what is to be added to it, [B, S, d] each, and the ids [L, B, S, K] of the experts.
        forced [L, B, S, K]: these instead of the router's choice.
        """
        kv, memory = state
        slow, add = steps.begin(self.cfg, self.base, tokens, pos)
        stream, chosen = (), []
        self.cache.begin_token()
        for l in range(self.cfg.num_layers):
            wanted = self.predictor.targets(l, self.cfg.num_layers) if self.predictor else ()
            if self.predictor and self.predictor.restarts(l):
                stream = None
            # The last layers, which have nothing to look ahead to, score themselves: one program serves all.
            targets = tuple((self._target(t), memory[t], np.int32(t)) for t in wanted or (l,) if self.predictor)
            count = min(self.cfg.moe.experts_per_token * len(tokens) + self.extra, self.cfg.moe.num_experts)
            routed, kv[l], stream, memory[l] = steps.attend_and_route(
                self.cfg, self.predictor, count, self.base['layers'][l], self.mine, self._own[l], slow, add, stream,
                kv[l], memory[l], targets, pos, live, None if forced is None else forced[l])
            jax.tree.map(lambda a: a.copy_to_host_async(), (routed.ids, routed.predicted))
            slow, add = routed.slow, self._experts(l, routed, live, wanted)
            chosen.append(routed.ids)
        return slow, add, np.stack([np.asarray(ids) for ids in chosen])

    def _target(self, layer: int) -> dict:
        p = self.base['layers'][layer]
        return {'mlp_norm': p['mlp_norm'], 'router': p['moe']['router']}

    def _experts(self, layer: int, routed: steps.Routed, live: np.ndarray, wanted: tuple[int, ...]) -> Array:
        """Runs the layer's experts, K at a time, in the order of their ids."""
        k = self.cfg.moe.experts_per_token
        ids = np.asarray(routed.ids)
        for slot in self.slots.arrived():
            self._land(slot)
        distinct = np.unique(ids[live])
        parts = [distinct[i:i + k] for i in range(0, len(distinct), k)]
        mixed = routed.mixed
        for part in parts:
            plan = self.cache.want(layer, part)
            while (copy := self.cache.next_copy(prefetch=False)) is not None:
                self._start(copy)
            for slot in plan.waiting:
                self._land(slot)
            slots, experts = np.zeros(k, np.int32), np.full(k, -1, np.int32)
            slots[:len(part)], experts[:len(part)] = plan.slots, part
            mixed = steps.run_experts(self.cfg, self.slots.buffers, slots, experts, routed.ids, routed.weights,
                                      routed.normed, mixed)
            self.cache.used(plan.slots)
            if not self.keep:
                self.cache.forget()
        self._guess(wanted, routed.predicted)  # never before a demand
        return mixed

    def _guess(self, wanted: tuple[int, ...], predicted: tuple) -> None:
        for layer, (ids, weights) in zip(wanted, predicted, strict=False):
            likely = np.asarray(weights) >= self.least
            self.cache.predict(layer, np.asarray(ids)[likely], np.asarray(weights)[likely])
        while self.cache.in_flight < self.in_flight and (copy := self.cache.next_copy()) is not None:
            self._start(copy)

    def _start(self, copy: Copy) -> None:
        self.slots.start(copy.slot, copy.layer, copy.expert)

    def _land(self, slot: int) -> None:
        self.slots.land([slot])
        self.cache.loaded(slot)


def generate(runtime: ExpertRuntime, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
             sampling: Sampling = GREEDY, stop_tokens: Sequence[int] = (), seed: int | Array = 0,
             on_tokens: Callable[[int, list[int]], None] | None = None,
             on_logits: Callable[[Array], None] | None = None, record: bool = False,
             forced: np.ndarray | None = None) -> Generation:
    """Continues every prompt by up to max_new_tokens ids, or to the first stop token (kept).

    The experts on the device stay there for the next call. on_tokens(row, ids) streams; on_logits sees [B, V] of each
    choice. record: keep the experts' ids. forced [L, B, C, K]: replay these, by position.
    Errors: RequestError for prompts that cannot be decoded.
    """
    cfg = runtime.cfg
    _check(cfg, prompts, max_new_tokens)
    lengths = np.array([len(p) for p in prompts], np.int32)
    size = min(max(SMALLEST, 1 << (int(lengths.max()) - 1).bit_length()), cfg.max_seq_len)
    capacity = min(-(-(size + max_new_tokens) // ROUND) * ROUND, cfg.max_seq_len)
    tokens = np.zeros((len(prompts), size), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = prompt
    routed = np.full((cfg.num_layers, len(prompts), capacity, cfg.moe.experts_per_token), -1, np.int32)
    rng = seed if isinstance(seed, jax.Array) else jax.random.key(seed)
    state, new, passes = runtime.init_state(len(prompts), capacity), [[] for _ in prompts], 0
    pos, live = np.zeros(len(prompts), np.int32), np.arange(size) < lengths[:, None]
    finished = np.zeros(len(prompts), bool)

    def run(tokens: np.ndarray, live: np.ndarray, at: np.ndarray) -> np.ndarray:
        slots = np.minimum(pos[:, None] + np.arange(tokens.shape[1]), capacity - 1)
        rows = np.arange(len(tokens))[:, None]
        slow, add, ids = runtime.forward(tokens, pos, live, state, None if forced is None else forced[:, rows, slots])
        logits, chosen = steps.speak(cfg, runtime.base, slow, add, at, fold_in(rng, passes), sampling)
        if record:
            routed[:, np.nonzero(live)[0], slots[live]] = ids[:, live]
        if on_logits is not None:
            on_logits(logits)
        return np.asarray(chosen)

    runtime.reset_counts()
    begin = time.perf_counter()
    token = run(tokens, live, lengths - 1)
    pos = lengths.copy()
    middle, prefill = time.perf_counter(), runtime.counts()
    runtime.reset_counts()
    while True:
        for row in np.flatnonzero(~finished):
            new[row].append(int(token[row]))
            if on_tokens is not None:
                on_tokens(int(row), new[row][-1:])
            finished[row] = new[row][-1] in stop_tokens or len(new[row]) == max_new_tokens
        if finished.all():
            break
        passes += 1
        token = run(token[:, None], ~finished[:, None], np.zeros(len(prompts), np.int32))
        pos = pos + ~finished
    return Generation(new, middle - begin, time.perf_counter() - middle, prefill, runtime.counts(), passes,
                      routed if record else None)


def _check(cfg: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not prompts or max_new_tokens < 1:
        raise RequestError(f'expert runtime: needs a prompt and max_new_tokens >= 1, got {len(prompts)} and '
                           f'{max_new_tokens}')
    for row, prompt in enumerate(prompts):
        if not len(prompt) or min(prompt) < 0 or max(prompt) >= cfg.vocab_size:
            raise RequestError(f'prompt {row} is empty or holds a token id outside 0..{cfg.vocab_size - 1}')
        if len(prompt) + max_new_tokens > cfg.max_seq_len:
            raise RequestError(f'prompt {row}: {len(prompt)} tokens + {max_new_tokens} new ones exceed the context of '
                               f'{cfg.max_seq_len}')
