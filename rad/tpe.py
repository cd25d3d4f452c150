"""Bayesian optimisation of the set that is left out, by optuna (extra `search`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backbone.errors import ConfigError, FingerprintMismatch
from rad.search import Seen, Space, check_asked, top_k
from rad.skip import SkipConfig
from rad.table import differing

try:
    import optuna
except ImportError:
    optuna = None


class Tpe(Seen):
    """Tree-structured Parzen estimators (optuna): at fixed k one float a sublayer and `top_k`, else one choice each.

    first: sets that are tried before it has an opinion. storage: a file (sqlite) in which trials are kept; a search
    that finds it goes on. The sampler is made anew for every trial, seeded by the trial's number, and a trial that was
    cut off is finished first: so a search in two parts is the search in one.
    Errors: ConfigError where optuna is missing; FingerprintMismatch where the file belongs to another search.
    """

    def __init__(self, space: Space, trials: int, seed: int = 0, first: Sequence[SkipConfig] = (),
                 storage: str | Path | None = None):
        super().__init__(space)
        if optuna is None:
            raise ConfigError('search tpe needs optuna: pip install headway[search]')
        self._trials, self._seed, self._open = trials, seed, None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        url = None if storage is None else f'sqlite:///{Path(storage).absolute()}'
        self._study = optuna.create_study(storage=url, study_name='skip', direction='maximize', load_if_exists=True)
        mine = {'space': dataclasses.asdict(space), 'seed': seed, 'first': [skip.to_dict() for skip in first]}
        theirs = self._study.user_attrs.get('search')
        if theirs is None:
            self._study.set_user_attr('search', mine)
            for skip in first:
                self._study.enqueue_trial(self._point(skip))
        elif theirs != mine:
            raise FingerprintMismatch(f'{storage} was searched with other {differing(theirs, mine)}')
        for trial in self._of('COMPLETE'):
            self.remember(self._skip(trial.params), trial.value)

    def suggest(self) -> SkipConfig | None:
        done = len(self._of('COMPLETE'))
        if done >= self._trials:
            return None
        if self._open is None:
            self._study.sampler = optuna.samplers.TPESampler(seed=self._seed + done)
            cut_off = self._of('RUNNING')
            self._open = (optuna.trial.Trial(self._study, cut_off[0]._trial_id) if cut_off
                          else self._study.ask())
        ask = self._open.suggest_float if self.space.k else self._open.suggest_categorical
        between = (0.0, 1.0) if self.space.k else ((False, True),)
        return self._skip({name: ask(name, *between) for name in self._names()})

    def observe(self, skip: SkipConfig, score: float) -> None:
        check_asked(skip, self.suggest())
        self._study.tell(self._open.number, float(score))
        self._open = None
        self.remember(skip, score)

    def _of(self, state: str) -> list:
        return self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState[state],))

    def _names(self) -> list[str]:
        return [f'z{i}' for i in range(self.space.size)]

    def _point(self, skip: SkipConfig) -> dict[str, Any]:
        on = self.space.chosen(skip)
        return {name: float(i in on) if self.space.k else i in on for i, name in enumerate(self._names())}

    def _skip(self, values: dict[str, Any]) -> SkipConfig:
        z = [values[name] for name in self._names()]
        return self.space.skip(top_k(z, self.space.k) if self.space.k else np.flatnonzero(z).tolist())
