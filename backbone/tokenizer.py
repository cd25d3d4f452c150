"""Text to token ids and back: from GGUF metadata, a Hugging Face directory, or llama2.c's tokenizer.bin.

A token is bytes, not text: one character may span several tokens, so `decode_bytes` is exact, `decode` replaces what
is not UTF-8, and `Stream` gives characters only when they are whole.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import tokenizers

from backbone import vocabulary
from backbone.errors import TokenizerError

END_OF_TEXT = '<|endoftext|>'
PADDING_ROWS = 1024  # published models pad their embedding table by up to some hundred rows


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with its special ids.

    vocab_size: one more than the largest id. eos_ids: every id that ends an answer. add_bos: `encode` begins with bos.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_ids: tuple[int, ...]
    unk_id: int | None = None
    pad_id: int | None = None
    add_bos: bool = False
    chat_template: str | None = None

    @functools.cached_property
    def vocab_size(self) -> int:
        return 1 + max(self.backend.get_vocab().values())

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """pieces[i] are the bytes of token i."""
        return vocabulary.pieces(self.backend, self.vocab_size)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids; with `add_special` the bos id comes first where the model was trained so.

        Errors: TokenizerError for text that is not Unicode (a lone surrogate, as `surrogateescape` makes).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f'the text is not valid Unicode at character {error.start}') from error
        return self.backend.encode(text, add_special_tokens=add_special).ids

    @functools.cached_property
    def byte_ids(self) -> np.ndarray | None:
        """[256] int32, the token of each byte, of a vocabulary that only has those (and special ones); else None."""
        ids = {piece: i for i, piece in enumerate(self.pieces) if i not in self.special_ids}
        single = [ids.get(bytes([byte])) for byte in range(256)]
        whole = None not in single and len(ids) == 256 and vocabulary.merges_nothing(self.backend)
        return np.array(single, np.int32) if whole else None

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Token ids [n] int32 of raw text: exact for a vocabulary of bytes, at the speed of a copy.

        Nothing is added, and in a vocabulary of bytes nothing stands for a special token. Any other vocabulary reads
        bytes that are not UTF-8 as U+FFFD.
        """
        if self.byte_ids is not None:
            return self.byte_ids[np.frombuffer(data, np.uint8)]
        return np.array(self.encode(data.decode('utf-8', errors='replace'), add_special=False), np.int32)

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """The exact bytes. Errors: TokenizerError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        self._check_ids(ids)
        return b''.join(self.pieces[i] for i in ids if not (skip_special and i in self.special_ids))

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of a whole sequence; bytes that are not UTF-8 become U+FFFD.

        Where the vocabulary puts a space before every text (SentencePiece), that one is taken off again; use `Stream`
        for a continuation, whose first space belongs to it.
        """
        ids = [int(i) for i in ids]
        text = self.decode_bytes(ids, skip_special=skip_special).decode('utf-8', errors='replace')
        return text.removeprefix(' ') if vocabulary.strips_first_space(self.backend) else text

    def _check_ids(self, ids: Sequence[int]) -> None:
        bad = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise TokenizerError(f'token id {bad} is outside the vocabulary of {self.vocab_size}')

    def check_model(self, model_vocab_size: int) -> None:
        """Errors: TokenizerError where this vocabulary cannot belong to a model of that many embedding rows."""
        if not 0 <= model_vocab_size - self.vocab_size <= PADDING_ROWS:
            raise TokenizerError(f'the tokenizer has {self.vocab_size} tokens and the model {model_vocab_size}: '
                                 'they do not belong together')

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Messages [{'role', 'content'}, ...] through the model's own chat template.

        Errors: TokenizerError where there is none, or where it refuses the messages.
        """
        if self.chat_template is None:
            raise TokenizerError('this model has no chat template; give it plain text')
        try:
            return _environment().from_string(self.chat_template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt,
                **{f'{name}_token': self.token(i) for name, i in self._special().items()})
        except (jinja2.TemplateError, KeyError, TypeError) as error:
            raise TokenizerError(f'the chat template refuses these messages: {error}') from error

    def chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""
        return self.encode(self.render(messages, add_generation_prompt=add_generation_prompt), add_special=False)

    def token(self, i: int) -> str:
        """The vocabulary's own spelling of a token id."""
        spelling = self.backend.id_to_token(i)
        if spelling is None:
            raise TokenizerError(f'token id {i} is outside the vocabulary of {self.vocab_size}')
        return spelling

    def _special(self) -> dict[str, int]:
        """{'bos': id, ...} of those there are."""
        ids = {'bos': self.bos_id, 'eos': self.eos_ids[0] if self.eos_ids else None, 'unk': self.unk_id,
               'pad': self.pad_id}
        return {name: i for name, i in ids.items() if i is not None}

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        special = {f'{name}_token': self.token(i) for name, i in self._special().items()}
        config = special | {'tokenizer_class': 'PreTrainedTokenizerFast', 'add_bos_token': self.add_bos,
                            'clean_up_tokenization_spaces': False, 'eos_token_ids': list(self.eos_ids)}
        if self.chat_template is not None:
            config['chat_template'] = self.chat_template
        _write(folder / 'tokenizer.json', self.backend.to_str(pretty=False))
        _write(folder / 'tokenizer_config.json', json.dumps(config, indent=2, ensure_ascii=False))
        _write(folder / 'special_tokens_map.json', json.dumps(special, indent=2, ensure_ascii=False))

    def gguf_metadata(self) -> dict[str, Any]:
        """The `tokenizer.*` keys of a GGUF file; `from_gguf_metadata` is its inverse.

        Errors: TokenizerError where llama.cpp has no name for the pre-tokeniser.
        """
        tokens = [self.backend.id_to_token(i) for i in range(self.vocab_size)]
        added = self.backend.get_added_tokens_decoder()
        model = json.loads(self.backend.to_str())['model']
        merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]
        byte_level = vocabulary.is_byte_level(self.backend)

        def kind(i: int) -> int:
            if tokens[i] is None:
                return vocabulary.UNUSED
            if i in added:
                return vocabulary.CONTROL if added[i].special else vocabulary.USER_DEFINED
            is_byte = not byte_level and len(tokens[i]) == 6 and tokens[i].startswith('<0x')
            return vocabulary.BYTE if is_byte else vocabulary.NORMAL

        out = {'tokenizer.ggml.model': 'gpt2' if byte_level else 'llama',
               'tokenizer.ggml.pre': vocabulary.pre_name(self.backend) if byte_level else 'default',
               'tokenizer.ggml.tokens': [f'[PAD{i}]' if token is None else token for i, token in enumerate(tokens)],
               'tokenizer.ggml.token_type': [kind(i) for i in range(len(tokens))],
               'tokenizer.ggml.add_bos_token': self.add_bos}
        if byte_level:
            out['tokenizer.ggml.merges'] = merges
        else:
            # A piece is as good as the best merge that makes it; what no merge makes is never preferred.
            rank = {}
            for i, merge in enumerate(merges):
                rank.setdefault(merge.replace(' ', ''), i)
            out['tokenizer.ggml.scores'] = [-float(rank.get(token, len(merges))) for token in tokens]
            out['tokenizer.ggml.add_space_prefix'] = vocabulary.strips_first_space(self.backend)
        names = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}
        out |= {f'tokenizer.ggml.{names[name]}_token_id': i for name, i in self._special().items()}
        if len(self.eos_ids) > 1:
            out['tokenizer.ggml.eot_token_id'] = self.eos_ids[1]
        if self.chat_template is not None:
            out['tokenizer.chat_template'] = self.chat_template
        return out


class Stream:
    """Text of a growing sequence: `push` returns what has become whole characters, `flush` the rest."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """Ends the text: an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b'', final=True)


@functools.cache
def _environment() -> jinja2.Environment:
    """Templates come with checkpoints, so they run in a sandbox; set up as in transformers."""
    def refuse(message: str):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                               extensions=[jinja2.ext.loopcontrols])
    environment.globals['raise_exception'] = refuse
    environment.filters['tojson'] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    return environment


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile('w', dir=path.parent, prefix='.', delete=False, encoding='utf-8') as sink:
        try:
            sink.write(text)
            sink.close()
            os.replace(sink.name, path)
        except BaseException:
            os.unlink(sink.name)
            raise


def from_merges(tokens: Sequence[str], merges: Sequence[str]) -> Tokenizer:
    """Byte-level BPE of GPT-2's kind that ends a text with `END_OF_TEXT`, which must be one of the tokens."""
    types = [vocabulary.CONTROL if token == END_OF_TEXT else vocabulary.NORMAL for token in tokens]
    return Tokenizer(vocabulary.byte_level(tokens, merges, types, 'gpt-2'), None, (tokens.index(END_OF_TEXT),))


def of_bytes() -> Tokenizer:
    """A vocabulary of 257: id b is byte b, 256 ends a text."""
    return from_merges([*vocabulary.byte_tokens(), END_OF_TEXT], [])


def from_gguf_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """From the `tokenizer.*` keys of a GGUF file: models 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE).

    Errors: TokenizerError for another kind, a missing key, lists of unequal length, ids outside the vocabulary.
    """
    def get(name: str, default: Any = None, required: bool = False):
        if required and f'tokenizer.ggml.{name}' not in metadata:
            raise TokenizerError(f'the GGUF metadata lack tokenizer.ggml.{name}')
        return metadata.get(f'tokenizer.ggml.{name}', default)

    tokens = list(get('tokens', required=True))
    types = list(get('token_type', [vocabulary.NORMAL] * len(tokens)))
    kind = get('model', required=True)
    if len(types) != len(tokens):
        raise TokenizerError(f'the GGUF metadata hold {len(tokens)} tokens and {len(types)} token types')
    ids = {name: get(f'{name}_token_id') for name in ('bos', 'eos', 'eot', 'unknown', 'padding')}
    for name, i in ids.items():
        if i is not None and not 0 <= i < len(tokens):
            raise TokenizerError(f'{name}_token_id {i} is outside the vocabulary of {len(tokens)}')
    if kind == 'gpt2':
        backend = vocabulary.byte_level(tokens, get('merges', required=True), types, get('pre', 'default'))
    elif kind == 'llama':
        scores = list(get('scores', required=True))
        if len(scores) != len(tokens):
            raise TokenizerError(f'the GGUF metadata hold {len(tokens)} tokens and {len(scores)} scores')
        unknown = ids['unknown'] or 0
        backend = vocabulary.sentencepiece(tokens, scores, types, unknown=unknown,
                                           add_space_prefix=bool(get('add_space_prefix', True)))
    else:
        raise TokenizerError(f'GGUF tokenizer model {kind!r} is not read here (gpt2 and llama are)')
    # llama.cpp's default: SentencePiece models begin with bos, byte-level ones do not.
    add_bos = bool(get('add_bos_token', kind == 'llama')) and ids['bos'] is not None
    if add_bos:
        vocabulary.prepend_bos(backend, tokens[ids['bos']], ids['bos'])
    ends = tuple(dict.fromkeys(i for i in (ids['eos'], ids['eot']) if i is not None))
    return Tokenizer(backend, ids['bos'], ends, ids['unknown'], ids['padding'], add_bos,
                     metadata.get('tokenizer.chat_template'))


def from_hf_directory(path: str | os.PathLike) -> Tokenizer:
    """From tokenizer.json (or vocab.json and merges.txt) with tokenizer_config.json and generation_config.json.

    Errors: TokenizerError for a missing or damaged file.
    """
    path = Path(path)
    config = _read_json(path / 'tokenizer_config.json')
    if (path / 'tokenizer.json').exists():
        try:
            backend = tokenizers.Tokenizer.from_file(str(path / 'tokenizer.json'))
        except Exception as error:  # the library raises bare Exceptions
            raise TokenizerError(f'{path / "tokenizer.json"} is damaged: {error}') from error
    else:
        backend = _from_gpt2_files(path, config)
    names = {name: _spelling(config.get(f'{name}_token')) for name in ('bos', 'eos', 'unk', 'pad')}
    ids = {name: None if spelling is None else backend.token_to_id(spelling) for name, spelling in names.items()}
    more = config.get('eos_token_ids', _read_json(path / 'generation_config.json').get('eos_token_id'))
    ends = tuple(dict.fromkeys([*([] if ids['eos'] is None else [ids['eos']]),
                                *([more] if isinstance(more, int) else more or [])]))
    probe = backend.encode('a', add_special_tokens=True).ids
    template_file = path / 'chat_template.jinja'
    template = template_file.read_text() if template_file.exists() else config.get('chat_template')
    if isinstance(template, list):  # several named templates
        template = next((t['template'] for t in template if t.get('name') == 'default'), None)
    return Tokenizer(backend, ids['bos'], ends, ids['unk'], ids['pad'],
                     ids['bos'] is not None and probe[:1] == [ids['bos']], template)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise TokenizerError(f'{path} is damaged: {error}') from error


def _spelling(token: str | dict | None) -> str | None:
    return token.get('content') if isinstance(token, dict) else token


def _from_gpt2_files(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The older pair vocab.json + merges.txt, as OPT is published."""
    if not ((path / 'vocab.json').exists() and (path / 'merges.txt').exists()):
        raise TokenizerError(f'{path} holds neither tokenizer.json nor vocab.json and merges.txt')
    vocab = _read_json(path / 'vocab.json')
    tokens = sorted(vocab, key=vocab.get)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise TokenizerError(f'{path / "vocab.json"} leaves out token ids')
    merges = [line for line in (path / 'merges.txt').read_text(encoding='utf-8').splitlines()
              if line and not line.startswith('#version')]
    special = {_spelling(config.get(f'{name}_token')) for name in ('bos', 'eos', 'unk', 'pad')}
    types = [vocabulary.CONTROL if token in special else vocabulary.NORMAL for token in tokens]
    backend = vocabulary.byte_level(tokens, merges, types, 'gpt-2')
    bos = _spelling(config.get('bos_token'))
    if config.get('add_bos_token') and bos in vocab:
        vocabulary.prepend_bos(backend, bos, vocab[bos])
    return backend


def from_llama2c(data: bytes) -> Tokenizer:
    """From the bytes of llama2.c's tokenizer.bin: int32 max_len, then (float32 score, int32 length, bytes) a piece.

    Ids 0..2 are unk, bos, eos; ids 3..258 are the raw bytes. They are named <0xNN> here: under their own spelling they
    would hide the one-character pieces further on (a trained model then reads every text as noise).
    Errors: TokenizerError for a file that ends inside a piece.
    """
    tokens, scores, offset = [], [], 4
    while offset < len(data):
        if offset + 8 > len(data):
            raise TokenizerError(f'tokenizer.bin ends inside piece {len(tokens)}')
        score, length = struct.unpack_from('<fi', data, offset)
        offset += 8 + length
        if length < 0 or offset > len(data):
            raise TokenizerError(f'tokenizer.bin ends inside piece {len(tokens)}')
        try:
            tokens.append(data[offset - length:offset].decode().replace(' ', '\u2581'))
        except UnicodeDecodeError:  # only raw bytes may be that, and they are renamed below
            tokens.append('')
        scores.append(score)
    if len(tokens) < 259:
        raise TokenizerError(f'tokenizer.bin holds {len(tokens)} pieces; 256 raw bytes and 3 marks come first')
    tokens[:3] = '<unk>', '<s>', '</s>'
    tokens[3:259] = [f'<0x{byte:02X}>' for byte in range(256)]
    return from_gguf_metadata({
        'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.tokens': tokens, 'tokenizer.ggml.scores': scores,
        'tokenizer.ggml.token_type': [vocabulary.CONTROL] * 3 + [vocabulary.BYTE] * 256
        + [vocabulary.NORMAL] * (len(tokens) - 259),
        'tokenizer.ggml.bos_token_id': 1, 'tokenizer.ggml.eos_token_id': 2, 'tokenizer.ggml.unknown_token_id': 0})
