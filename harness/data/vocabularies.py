"""The tokenizer a config names: raw bytes, byte pairs trained on the dataset itself, or a model's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from backbone import catalogue, formats
from backbone import tokenizer as tokenizer_lib
from backbone.errors import ConfigError, DataError
from backbone.formats.gguf_header import read_header
from backbone.tokenizer import Tokenizer
from harness.data import once
from harness.data.rows import Source


def make_tokenizer(data: Mapping[str, Any]) -> Tokenizer:
    """data['tokenizer']: 'bytes' (257 ids); 'bpe:N' (N ids, trained once on the train split); else a catalogue key or
    path of a model, of a directory with tokenizer files, or of a training run.

    Errors: ConfigError, TokenizerError, FormatError, DataError, FetchError.
    """
    name = str(data['tokenizer'])
    if name == 'bytes':
        return tokenizer_lib.of_bytes()
    kind, _, size = name.partition(':')
    if kind == 'bpe':
        if not size.isdigit() or int(size) < 258:
            raise ConfigError(f'data.tokenizer: {name!r} should be bpe:N with N of at least 258 (256 bytes, the end of '
                              'text, and merges)')
        return _trained(data, int(size))
    return _of_model(name)


def target_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """[vocab] int32, the bytes of text each token stands for; special tokens stand for none.

    Bits per byte are nats of the targets / ln 2 / the sum of this over them, for any vocabulary.
    """
    return np.array([0 if i in tokenizer.special_ids else len(piece) for i, piece in enumerate(tokenizer.pieces)],
                    np.int32)


def _trained(data: Mapping[str, Any], size: int) -> Tokenizer:
    source = Source.of(data)
    folder = source.data_dir / 'tokenizers' / f'bpe{size}-{source.dataset.name}-{source.identity[:16]}'

    def make(temporary: Path) -> dict[str, Any]:
        made = train_bpe((piece.content for example in source.examples('train')
                          for piece in source.dataset.pieces(example, tokenizer_lib.of_bytes())
                          if isinstance(piece.content, bytes)), size)
        made.save(temporary)
        return {'vocab_size': made.vocab_size}

    once.made_once(folder, f'training a vocabulary of {size} byte pairs on {source.dataset.name}/train', make)
    return tokenizer_lib.from_hf_directory(folder)


def train_bpe(texts: Iterator[bytes], size: int) -> Tokenizer:
    """Byte-level BPE of `size` ids: 0..255 are the bytes in order, 256 ends a text, then the merges, best first.

    The same texts give the same ids. Errors: DataError where the texts have too few different pairs.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    backend.train_from_iterator((text.decode('utf-8', errors='replace') for text in texts), trainer)
    model = json.loads(backend.to_str())['model']
    merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]
    if len(model['vocab']) != size - 1:
        raise DataError(f'the text has pairs for {len(model["vocab"]) + 1} ids, fewer than bpe:{size}')
    single = byte_ids_first()
    return tokenizer_lib.from_merges([*single, *(merge.replace(' ', '') for merge in merges)], merges)


def byte_ids_first() -> list[str]:
    """The ids that every vocabulary made here begins with."""
    made = tokenizer_lib.of_bytes()
    return [made.token(i) for i in range(made.vocab_size)]


def _of_model(name: str) -> Tokenizer:
    """Of the model only what tells of its vocabulary is read, where the file allows."""
    path = Path(name)
    if not path.exists() and name in catalogue.ENTRIES and catalogue.ENTRIES[name].kind == 'model':
        path = catalogue.fetch(name)
    for folder in (path / 'tokenizer', path):
        if (folder / 'tokenizer.json').is_file() or (folder / 'merges.txt').is_file():
            return tokenizer_lib.from_hf_directory(folder)
    if formats.sniff(path) == 'gguf':
        return tokenizer_lib.from_gguf_metadata(read_header(path).metadata)
    made = formats.load(name).tokenizer
    if made is None:
        raise ConfigError(f'data.tokenizer: {name} has no tokenizer')
    return made
