"""Which attentions of a base give way to a recurrent mixer, and to which."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from backbone.config import ModelConfig, SsmConfig
from backbone.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RadConfig:
    """After Hoshino et al., 2025 (arXiv 2505.22135), of which only the opening could be read.

    layers: numbers of the replaced attentions, rising. May be empty: then the hybrid is its base.
    ssm: the mixer that stands in their place (Mamba-2; Dao and Gu, 2024, arXiv 2405.21060).
    parallel: a control in which the mixer is added to the attention instead of replacing it.
    """

    layers: tuple[int, ...]
    ssm: SsmConfig
    parallel: bool = False

    def __post_init__(self):
        if list(self.layers) != sorted(set(self.layers)) or (self.layers and self.layers[0] < 0):
            raise ConfigError(f'rad.layers must rise and not be negative, got {self.layers}')

    @classmethod
    def of(cls, base: ModelConfig, fields: Mapping[str, Any]) -> RadConfig:
        """fields: of this class; `ssm` holds changes to SsmConfig.like(base). Errors: ConfigError for an unknown field,
        or a base this cannot be built on."""
        if unknown := [key for key in fields if key not in {f.name for f in dataclasses.fields(cls)}]:
            raise ConfigError(f'rad: unknown field {", ".join(unknown)}')
        if 'layers' not in fields:
            raise ConfigError('rad.layers is missing')
        ssm = fields.get('ssm') or {}
        ssm = ssm if isinstance(ssm, SsmConfig) else SsmConfig.like(base, **ssm)
        made = cls(tuple(fields['layers']), ssm, bool(fields.get('parallel', False)))
        made.check(base)
        return made

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def check(self, base: ModelConfig) -> None:
        """Errors: ConfigError where the base has no such layers, or the mixer does not fit its width."""
        if self.layers and self.layers[-1] >= base.num_layers:
            raise ConfigError(f'rad.layers {self.layers} are not all in 0..{base.num_layers - 1}')
        if base.norm_placement != 'pre':
            raise ConfigError(f'rad needs a base of norm_placement pre, got {base.norm_placement}')
        att = base.attention
        if self.ssm.inner != att.num_heads * att.head_dim:
            raise ConfigError(f'rad.ssm: {self.ssm.num_heads} heads of {self.ssm.head_dim} do not fit the output '
                              f'projection of {att.num_heads} heads of {att.head_dim}, which is copied')

    @property
    def first(self) -> int | None:
        """The lowest replaced layer: what lies below is the base's."""
        return self.layers[0] if self.layers else None
