"""Small trained artefacts: `zoo/<name>/` holds weights.safetensors and card.json.

    params, card = zoo.load('m2r2_smollm2', base_hash=loaded.base_hash)

Large matrices may lie in int8 with a float32 scale a column, `<path>.scale` beside `<path>`: four times smaller, and a
drafter's mistakes cost time, never output. They are loaded as float32.

An artefact belongs to one base model, named by the `params_hash` of its parameters: weights trained on one base
are noise on another, so the two are held against each other before anything runs. Or it is a model of its own: its card
then has 'model' (harness/artefacts.py), and its folder the tokenizer where that is not bytes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

from backbone.errors import FormatError
from backbone.formats.safetensors import read_json
from backbone.formats.staging import staged
from backbone.formats.tensors import flatten, params_hash, unflatten

ROOT = Path(__file__).resolve().parent.parent / 'zoo'
MAX_BYTES = 10_000_000  # one artefact, weights and card
MAX_TOTAL_BYTES = 24_000_000  # the whole zoo, as it is kept in the repository
WEIGHTS, CARD, TOKENIZER, SCALE = 'weights.safetensors', 'card.json', 'tokenizer', '.scale'

# What a card must say. metrics: measured on held-out data.
FIELDS = {'base': str, 'base_hash': str, 'params_hash': str, 'config': dict, 'data': str, 'steps': int, 'seed': int,
          'command': str, 'metrics': dict}


def names(root: Path | None = None) -> list[str]:
    """The artefacts there are."""
    return sorted(path.parent.name for path in (root or ROOT).glob(f'*/{CARD}'))


def read_card(name: str, root: Path | None = None) -> dict[str, Any]:
    """The card alone. Errors: FormatError for an unknown name, and a card that lacks a field."""
    root = root or ROOT
    if name not in names(root):
        raise FormatError(f'{name}: no such artefact in {root}, there are: {", ".join(names(root)) or "none"}')
    card = read_json(root / name / CARD)
    _check_card(card, str(root / name / CARD))
    return card


def load(name: str, base_hash: str | None = None, root: Path | None = None, limit: int | None = MAX_BYTES
         ) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameter tree of numpy arrays, card) of an artefact trained on the base with this `params_hash` (None: any).
    limit: bytes it may have; None outside of the zoo.

    Errors: FormatError for an unknown name, another base (names both), a card that lacks a field, damaged or
    oversized weights.
    """
    folder, card = (root or ROOT) / name, read_card(name, root)
    if base_hash not in (None, card['base_hash']):
        raise FormatError(f'{name}: trained on {card["base"]} with parameters {card["base_hash"]}, '
                          f'the base given has {base_hash}')
    _check_size(folder, limit)
    params = _read_weights(folder / WEIGHTS)
    if params_hash(params) != card['params_hash']:
        raise FormatError(f'{folder / WEIGHTS}: hashes to {params_hash(params)}, the card says {card["params_hash"]}')
    return params, card


def save(name: str, params: Mapping[str, Any], card: Mapping[str, Any], root: Path | None = None,
         overwrite: bool = False, int8: tuple[str, ...] = (), tokenizer: Path | None = None,
         limit: int | None = MAX_BYTES) -> None:
    """Writes an artefact; `params_hash`, of what `load` will give, is added to the card.

    int8: regexes of the matrices that are stored so. tokenizer: a folder that goes with it. Errors: FormatError when a
    field is missing, it is over the limit, it exists already, or the disk refuses.
    """
    leaves = quantise({path: np.ascontiguousarray(leaf) for path, leaf in flatten(params).items()}, int8)
    card = {**card, 'params_hash': params_hash(unflatten(dequantise(leaves)))}
    _check_card(card, name)
    if not name.replace('_', '').replace('-', '').replace('.', '').isalnum() or name.startswith('.'):
        raise FormatError(f'{name}: not a name for an artefact (letters, digits, - _ .)')
    with staged((root or ROOT) / name, overwrite) as folder:
        folder.mkdir()
        (folder / CARD).write_text(json.dumps(card, indent=2) + '\n')
        save_file(leaves, folder / WEIGHTS)
        if tokenizer is not None:
            shutil.copytree(tokenizer, folder / TOKENIZER)
        _check_size(folder, limit, name)


def quantise(leaves: Mapping[str, np.ndarray], patterns: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Leaves [..., in, out] whose path matches a pattern as int8, with the scale [..., 1, out] of each column."""
    stored: dict[str, np.ndarray] = {}
    for path, leaf in leaves.items():
        if leaf.ndim < 2 or not any(re.fullmatch(pattern, path) for pattern in patterns):
            stored[path] = leaf
            continue
        wide = leaf.astype(np.float32)
        scale = np.maximum(np.abs(wide).max(-2, keepdims=True), np.finfo(np.float32).tiny) / 127
        stored |= {path: np.round(wide / scale).astype(np.int8), path + SCALE: scale}
    return stored


def dequantise(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `quantise` stored, its int8 matrices as float32."""
    return {path: leaf.astype(np.float32) * stored[path + SCALE] if path + SCALE in stored else leaf
            for path, leaf in stored.items() if not path.endswith(SCALE)}


def _read_weights(path: Path) -> dict[str, Any]:
    try:
        return unflatten(dequantise(load_file(path)))
    except OSError as error:
        raise FormatError(f'{path}: cannot be read: {error.strerror}') from None
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f'{path}: damaged: {error}') from None


def _check_card(card: Any, where: str) -> None:
    if not isinstance(card, Mapping):
        raise FormatError(f'{where}: not a card')
    missing = [field for field in FIELDS if field not in card]
    if missing:
        raise FormatError(f'{where}: the card lacks {", ".join(missing)}')
    wrong = [f'{field} is not {kind.__name__}' for field, kind in FIELDS.items() if not isinstance(card[field], kind)]
    if wrong:
        raise FormatError(f'{where}: {", ".join(wrong)}')


def _check_size(folder: Path, limit: int | None, name: str | None = None) -> None:
    size = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
    if limit is not None and size > limit:
        raise FormatError(f'{name or folder.name}: {size} bytes, an artefact may have {limit}')
