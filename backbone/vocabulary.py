"""Vocabularies as `tokenizers` objects: byte-level BPE (GPT-2's kind) and SentencePiece BPE with byte fallback.

Only what differs between published tokenisers is here: pre-tokenisers by llama.cpp's name, and the bytes of a token.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from backbone.errors import TokenizerError

# GGUF `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_SPACE = '\u2581'  # SentencePiece writes a space as this
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r'|\s*[\r\n]+|\s+(?!\S)|\s+')


def _pre_tokenizer(name: str):
    """llama.cpp's `tokenizer.ggml.pre` -> (pre-tokeniser, normaliser or None, whole-word lookup before merges)."""
    def split(digits: str):
        return pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(_WORDS % digits), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in ('gpt-2', 'default'):
        return plain, None, False
    if name == 'smollm':
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]), None, False
    if name == 'qwen2':
        return split(''), normalizers.NFC(), False
    if name == 'llama-bpe':
        return split('{1,3}'), None, True
    raise TokenizerError(f'pre-tokeniser {name!r} is not known here; known: {", ".join(PRE_NAMES)}')


PRE_NAMES = ('gpt-2', 'smollm', 'qwen2', 'llama-bpe')


def byte_level(tokens: Sequence[str], merges: Sequence[str], types: Sequence[int], pre: str) -> tokenizers.Tokenizer:
    """Byte-level BPE. tokens[i] is token i in GPT-2's printable alphabet; merges 'left right', best first."""
    pre_tokenizer, normalizer, ignore_merges = _pre_tokenizer(pre)
    pairs = [tuple(merge.split(' ', 1)) for merge in merges]
    vocab = _ids(tokens)
    backend = tokenizers.Tokenizer(_bpe(vocab, pairs, ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    _add_special(backend, tokens, types)
    return backend


def sentencepiece(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], *, unknown: int,
                  add_space_prefix: bool) -> tokenizers.Tokenizer:
    """SentencePiece BPE with byte fallback. tokens[i] is piece i, a space written as U+2581, a byte as <0xNN>."""
    vocab = _ids(tokens)
    backend = tokenizers.Tokenizer(_bpe(vocab, _merges(tokens, scores, types, vocab), unk_token=tokens[unknown],
                                        fuse_unk=True, byte_fallback=True))
    spaces = [normalizers.Replace(' ', _SPACE)]
    strip = [decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        spaces.insert(0, normalizers.Prepend(_SPACE))
        strip.append(decoders.Strip(' ', 1, 0))
    backend.normalizer, backend.decoder = normalizers.Sequence(spaces), decoders.Sequence(strip)
    _add_special(backend, tokens, types)
    return backend


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise TokenizerError(f'the vocabulary holds the token {twice!r} twice')
    return ids


def _bpe(vocab, merges, **options) -> models.BPE:
    try:
        return models.BPE(vocab, merges, **options)
    except Exception as error:  # the library raises bare Exceptions, e.g. for a merge outside the vocabulary
        raise TokenizerError(f'the merges do not fit the vocabulary: {error}') from error


def _merges(tokens, scores, types, vocab) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours whose union scores best: as a ranked list of pairs."""
    ranked = []
    for i, token in enumerate(tokens):
        if types[i] == NORMAL:
            for cut in range(1, len(token)):
                left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
                if left is not None and right is not None and types[left] == types[right] == NORMAL:
                    ranked.append((-scores[i], left, right))
    return [(tokens[left], tokens[right]) for _, left, right in sorted(ranked)]


def _add_special(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens are found in text before anything else, as in the published tokenisers."""
    added = [tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
             for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])


def prepend_bos(backend: tokenizers.Tokenizer, bos: str, bos_id: int) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f'{bos} $A', pair=f'{bos} $A {bos} $B:1', special_tokens=[(bos, bos_id)])


def describe(part) -> dict:
    """A part of a `tokenizers.Tokenizer` as the JSON object it is saved as."""
    return {} if part is None else json.loads(part.__getstate__())


def _kinds(part) -> list[dict]:
    state = describe(part)
    return next((state[key] for key in ('decoders', 'pretokenizers', 'normalizers') if key in state), [state])


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """True for byte-level BPE, False for SentencePiece with byte fallback. Errors: TokenizerError for other kinds."""
    kinds = {kind.get('type') for kind in _kinds(backend.decoder)}
    if 'ByteLevel' in kinds:
        return True
    if 'ByteFallback' in kinds:
        return False
    raise TokenizerError(f'a tokeniser with decoder {"+".join(sorted(map(str, kinds)))} is not read here '
                         '(byte-level and byte-fallback BPE are)')


def strips_first_space(backend: tokenizers.Tokenizer) -> bool:
    return any(kind.get('type') == 'Strip' for kind in _kinds(backend.decoder))


def pre_name(backend: tokenizers.Tokenizer) -> str:
    """llama.cpp's name for a byte-level pre-tokeniser. Errors: TokenizerError where it has none known here."""
    def plain(pre_tokenizer):
        drop = {'trim_offsets', 'invert'}
        return [{k: v for k, v in kind.items() if k not in drop} for kind in _kinds(pre_tokenizer)]

    for name in PRE_NAMES:
        if plain(_pre_tokenizer(name)[0]) == plain(backend.pre_tokenizer):
            return name
    raise TokenizerError('this pre-tokeniser has no GGUF name known here')


@functools.cache
def _alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte (Radford et al. 2019, `bytes_to_unicode`)."""
    kept = [*range(ord('!'), ord('~') + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def byte_tokens() -> list[str]:
    """Token b of 256: byte b in that alphabet."""
    return sorted(_alphabet(), key=_alphabet().get)


def merges_nothing(backend: tokenizers.Tokenizer) -> bool:
    """True where each byte of a text is a token of its own, whatever stands beside it."""
    model = json.loads(backend.to_str())['model']
    return is_byte_level(backend) and backend.normalizer is None and not model.get('merges')


def pieces(backend: tokenizers.Tokenizer, size: int) -> list[bytes]:
    """The bytes each id stands for; ids no token has are empty."""
    found = [b''] * size
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    as_bytes = _from_alphabet if is_byte_level(backend) else _from_sentencepiece
    for token, i in backend.get_vocab().items():
        found[i] = token.encode() if i in added else as_bytes(token)
    return found


def _from_alphabet(token: str) -> bytes:
    alphabet = _alphabet()
    if all(char in alphabet for char in token):
        return bytes(alphabet[char] for char in token)
    return token.encode()


def _from_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith('<0x') and token.endswith('>'):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, ' ').encode()
