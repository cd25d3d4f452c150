"""What a step of distillation computes, and what a mixer costs beside the attention it replaces. Scalars and FLOPs."""

from __future__ import annotations

from typing import Any

from backbone.config import ModelConfig, SsmConfig


def attention_scalars(cfg: ModelConfig) -> int:
    """In the matrices of one attention."""
    att = cfg.attention
    return 2 * cfg.hidden_size * att.head_dim * (att.num_heads + att.num_kv_heads)


def mixer_scalars(cfg: ModelConfig, ssm: SsmConfig) -> int:
    """In the matrices of one mixer: more than in the attention of its shape, for it has a gate."""
    return cfg.hidden_size * (sum(ssm.parts) + ssm.inner)


def step_flops(task: Any, batch: int, seq_len: int) -> float:
    """Of the matrix products by weights in one step of a RadTask: two FLOPs a scalar and token forward, as many for the
    gradient of what goes in, and as many for the gradient of weights that are trained."""
    cfg, k = task.cfg, len(task.rad.layers)
    lo = 0 if task.train == 'all' else task.rad.first
    attention, feed = attention_scalars(cfg), cfg.feed_scalars()
    new = attention if task.in_place else mixer_scalars(cfg, task.rad.ssm)
    kept = cfg.num_layers - lo - (0 if task.rad.parallel else k)
    passes = 3 if task.train == 'all' else 2
    frozen = kept * attention + (cfg.num_layers - lo) * feed + cfg.hidden_size * cfg.vocab_size
    student = passes * frozen + 3 * k * new
    teacher = task.teacher or cfg
    given = teacher.num_layers * (attention_scalars(teacher) + teacher.feed_scalars())
    given += teacher.hidden_size * teacher.vocab_size
    if task.teacher is not None:
        given += lo * (attention + feed)  # else they are among the teacher's own
    return 2.0 * batch * seq_len * (student + given)
