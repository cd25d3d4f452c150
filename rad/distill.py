"""What a hybrid is distilled towards: a teacher's law at every position, from hidden states, some positions at a time.

    loss = kl T^2 KL(teacher || student) + ce CE(next token, student) + align mean_l |mixer_l - attention_l|^2

Means over tokens: the public recipe that hybrids of this kind are trained with divides by rows only, which is a mean
times the row's length (Wang et al., 2024, arXiv 2408.15237). Of RAD's own loss (Hoshino et al., 2025, arXiv 2505.22135)
only the opening could be read; that it is a divergence alone is our reading, alignment is ours.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from backbone.errors import ConfigError

Array = jax.Array


def compare(student: Array, teacher: Array, targets: Array, temperature: float = 1.0) -> dict[str, Array]:
    """Logits [..., V] of both, targets [...] -> what each position says, [...], in at least float32:

    kl: temperature^2 KL(softmax(teacher / temperature) || softmax(student / temperature)), nats. nll, teacher_nll: of
    the target, nats. accuracy, agreement: whether the student's likeliest token is the target, the teacher's likeliest.
    greedy: whether the target is the teacher's likeliest. overlap: 1 - TV of both laws, the chance that the teacher
    keeps a draft that is drawn from the student.
    """
    student, teacher = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (student, teacher))
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    warm_p, warm_q = (log_p, log_q) if temperature == 1 else (
        jax.nn.log_softmax(a / temperature) for a in (teacher, student))
    gold = lambda a: jnp.take_along_axis(a, targets[..., None], -1)[..., 0]
    best, theirs = (jax.lax.stop_gradient(a).argmax(-1) for a in (student, teacher))
    return {'kl': temperature**2 * (jnp.exp(warm_p) * (warm_p - warm_q)).sum(-1), 'nll': -gold(log_q),
            'teacher_nll': -gold(log_p), 'accuracy': best == targets, 'agreement': best == theirs,
            'greedy': theirs == targets, 'overlap': 1 - 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(-1)}


def at_each(values_of: Callable[..., dict[str, Array]], arrays: tuple[Array, ...], chunk: int) -> dict[str, Array]:
    """values_of(*arrays) of arrays [B, S, ...] -> {name: [B, S]}, `chunk` positions at a time; 0: all at once.

    The backward pass makes each chunk again, so that [B, S, V] never exists, of neither model. Errors: ConfigError
    where chunk does not divide S.
    """
    batch, size = arrays[0].shape[:2]
    if not 0 < chunk < size:
        return values_of(*arrays)
    if size % chunk:
        raise ConfigError(f'loss_chunk {chunk} does not divide {size} tokens')
    parts = jax.tree.map(lambda a: a.reshape(batch, -1, chunk, *a.shape[2:]).swapaxes(0, 1), arrays)
    found = jax.lax.map(jax.checkpoint(lambda part: values_of(*part), prevent_cse=False), parts)
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(batch, size), found)


def drafts_kept(agreement: Array, greedy: Array, segments: Array, weights: Array, drafts: int) -> tuple[Array, Array]:
    """How many of `drafts` greedy drafts would be kept in a round that begins at a position. All arguments [B, S].

    Returns (kept [B, S] in 0..drafts, bool [B, S]: is that exact here?). A hybrid that drafts reads the text that was
    kept through its own states, so a pass over that text says what it would draft: its drafts are kept for as long as
    it agrees. That holds where the text is what the base itself goes on with, greedily, all the way; other positions,
    and those close to the end of a document, are marked False.
    """
    ahead = lambda a, by: jnp.pad(a, ((0, 0), (0, by)))[:, by:] if by else a
    kept, chain = jnp.zeros(agreement.shape, jnp.int32), jnp.ones(agreement.shape, bool)
    known = jnp.ones(agreement.shape, bool)
    for i in range(drafts):
        known &= (ahead(segments, i) == segments) & (ahead(weights, i) > 0)
        known &= ahead(greedy, i) if i < drafts - 1 else True  # nothing is drafted behind the last one
        chain &= ahead(agreement, i)
        kept += chain
    return kept, known


def replaced_share(stages: int, until: int, step: Array | int) -> Array:
    """Stepwise replacement: the share of layers that are replaced at a step (from 0 on), in `stages` equal parts.

    The first part is replaced from the start, all of them from step until * (stages - 1) / stages on. Traced.
    """
    stage = jnp.clip(jnp.asarray(step) * stages // until, 0, stages - 1) + 1
    return stage / stages


def weighted_mean(weights: Array) -> Callable[[Array], Array]:
    """Mean of [B, S] values by these weights; 0 where nothing counts."""
    def mean(values: Array) -> Array:
        by = weights.astype(jnp.promote_types(values.dtype, jnp.float32))
        return (values * by).sum() / jnp.maximum(by.sum(), 1e-9)

    return mean
