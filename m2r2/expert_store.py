"""Where experts lie: all of them in host memory, a few in slots on the device, and copies on their way between.

A copy is begun by `start` and lands in its slot by `land`. Until it lands its bytes are in an array of their own: a
slot buffer is one array, and an update of it that waits for the link would make every expert in it wait. So nothing but
the expert itself ever waits for a copy. The price: one more copy within the device's memory, and room for those in
flight.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backbone.config import ModelConfig
from backbone.errors import ConfigError

Array = jax.Array
Weights = dict[str, Any]  # of one expert: {'gate', 'up' [d, f], 'down' [f, d]}


def host_sharding(device: jax.Device) -> jax.sharding.Sharding | None:
    """Page-locked host memory of a device, which it copies from by itself; None where the platform has none."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    return jax.sharding.SingleDeviceSharding(device, memory_kind='pinned_host') if 'pinned_host' in kinds else None


class HostExperts:
    """Every expert by itself, [layer][expert], in pinned host memory, or as numpy arrays where there is none.

    pinned: None takes what the device offers. Errors: ConfigError for a model without experts, or pinned=True without.
    """

    def __init__(self, cfg: ModelConfig, device: jax.Device | None = None, pinned: bool | None = None):
        if cfg.moe is None:
            raise ConfigError('expert runtime: the model has no experts (its config has no moe)')
        self.cfg, self.device = cfg, device or jax.devices()[0]
        found = host_sharding(self.device)
        if pinned and found is None:
            raise ConfigError(f'expert runtime: {self.device} has no memory of kind pinned_host')
        self.sharding = None if pinned is False else found
        self.kind = 'numpy' if self.sharding is None else 'pinned_host'
        self.experts: list[list[Weights]] = [[{} for _ in range(cfg.moe.num_experts)] for _ in range(cfg.num_layers)]

    def put(self, layer: int, expert: int, weights: Weights) -> None:
        """Keeps one expert; weights on any device or in numpy."""
        numpy = self.sharding is None
        self.experts[layer][expert] = {name: np.asarray(a) if numpy else jax.device_put(a, self.sharding)
                                       for name, a in weights.items()}

    @classmethod
    def of(cls, cfg: ModelConfig, layers: Any, device: jax.Device | None = None,
           pinned: bool | None = None) -> HostExperts:
        """From a model's `layers`, stacked or a tuple, taken an expert at a time."""
        store = cls(cfg, device, pinned)
        for l in range(cfg.num_layers):
            experts = layers[l]['moe']['experts'] if isinstance(layers, (tuple, list)) else layers['moe']['experts']
            for e in range(cfg.moe.num_experts):
                at = e if isinstance(layers, (tuple, list)) else (l, e)
                store.put(l, e, {name: a[at] for name, a in experts.items()})
        return store

    @property
    def expert_bytes(self) -> int:
        return sum(a.nbytes for a in self.experts[0][0].values())


def without_experts(cfg: ModelConfig, base: dict, device: jax.Device) -> dict:
    """Base parameters on the device, layers as a tuple, the experts left where they are."""
    layers = base['layers']
    if isinstance(layers, (tuple, list)):
        split = [_thin(p) for p in layers]
    else:
        thin = _thin(layers)
        split = [jax.tree.map(lambda a: a[l], thin) for l in range(cfg.num_layers)]
    return jax.device_put({k: v for k, v in base.items() if k != 'layers'} | {'layers': tuple(split)}, device)


def _thin(p: dict) -> dict:
    return p | {'moe': {name: part for name, part in p['moe'].items() if name != 'experts'}}


@functools.partial(jax.jit, donate_argnames='slots')
def _write(slots: dict[str, Array], slot: Array, weights: Weights) -> dict[str, Array]:
    return {name: a.at[slot].set(weights[name].astype(a.dtype)) for name, a in slots.items()}


@functools.partial(jax.jit, donate_argnames='slots')
def _poison(slots: dict[str, Array], slot: Array) -> dict[str, Array]:
    return {name: a.at[slot].set(jnp.nan) for name, a in slots.items()}


class Slots:
    """Slot buffers {'gate', 'up' [n, d, f], 'down' [n, f, d]} on the device, and the copies on their way to them.

    poison: a slot that is given away is filled with NaN first, so that whatever still reads it is found out.
    moved: bytes that were sent to the device.
    """

    def __init__(self, store: HostExperts, count: int, poison: bool = False):
        self.store, self.poison, self.moved = store, poison, 0
        self.on_the_way: dict[int, Weights] = {}
        fill = np.nan if poison else 0
        self.buffers = jax.device_put({name: jnp.full((count, *a.shape), fill, a.dtype)
                                       for name, a in store.experts[0][0].items()}, store.device)

    def start(self, slot: int, layer: int, expert: int) -> None:
        """Begins a copy; returns at once."""
        if self.poison:
            self.buffers = _poison(self.buffers, slot)
        weights = self.store.experts[layer][expert]
        self.on_the_way[slot] = jax.device_put(weights, jax.sharding.SingleDeviceSharding(self.store.device))
        self.moved += self.store.expert_bytes

    def arrived(self) -> list[int]:
        """Slots whose copies are there; asks, does not wait."""
        return [slot for slot, weights in self.on_the_way.items() if all(a.is_ready() for a in weights.values())]

    def land(self, slots: Iterable[int]) -> None:
        """Writes these copies into their slots, in order with what reads them; the device waits, not the caller."""
        for slot in slots:
            self.buffers = _write(self.buffers, slot, self.on_the_way.pop(slot))
