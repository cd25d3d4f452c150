"""Damaged files: each either loads or is a FormatError of one line, and none makes the reader allocate.

A few thousand broken headers go through both readers, made in two ways: blind (bits, bytes, lengths anywhere in the
header) and informed (hypothesis sets one field of a well-formed header to an absurd value).
"""

import dataclasses
import json
import resource
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backbone import formats, tokenizer
from backbone.errors import FormatError
from backbone.formats import gguf, gguf_header, safetensors

from .conftest import TINY

BLIND = 2000
INFORMED = 300
# Python objects and, rarely, the shapes of a changed configuration; a believed size would be gigabytes.
MAX_ALLOCATED = 48_000_000
ABSURD = (0, 1, 2 ** 16, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 33, 2 ** 40, 2 ** 62, 2 ** 63 - 1, 2 ** 63,
          2 ** 64 - 1)


@pytest.fixture(scope='module')
def gguf_bytes(tmp_path_factory):
    """A small file with every kind of metadata, tokenizer included, and its header's size."""
    path = tmp_path_factory.mktemp('damaged') / 'x.gguf'
    tokens = ['!', '"', '!"', *(chr(i) for i in range(35, 96))]
    small = tokenizer.from_gguf_metadata({
        'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'gpt-2', 'tokenizer.ggml.tokens': tokens,
        'tokenizer.ggml.token_type': [1] * 62 + [3] * 2, 'tokenizer.ggml.merges': ['! "'],
        'tokenizer.ggml.bos_token_id': 62, 'tokenizer.ggml.eos_token_id': 63})
    formats.save(dataclasses.replace(formats.load(TINY / 'llama'), tokenizer=small), path, 'gguf')
    data = path.read_bytes()
    return data, _header_size(data)


def _header_size(data: bytes) -> int:
    """Where the tensor descriptions end: after the last name's dims, type and offset."""
    at = data.rindex(b'output.weight') + len(b'output.weight')
    dims = struct.unpack_from('<I', data, at)[0]
    return at + 4 + 8 * dims + 4 + 8


@pytest.fixture(scope='module')
def safetensors_bytes():
    data = (TINY / 'llama' / 'model.safetensors').read_bytes()
    return data, 8 + int.from_bytes(data[:8], 'little')


def outcome(read, path) -> str:
    """'loaded' or the message. Anything else that is raised, or a large allocation, fails the test."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        read(path)
        found = 'loaded'
    except FormatError as error:
        found = str(error)
        assert '\n' not in found and str(path.parent) in found, found
    assert tracemalloc.get_traced_memory()[1] - before < MAX_ALLOCATED, found
    return found


@pytest.fixture
def allocations():
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # kB


def mutate(data: bytes, header: int, rng: np.random.Generator) -> bytes:
    """One to three faults in the header: a bit, a byte, an absurd length, a cut, a piece gone or twice."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(0, min(header, len(out)))), rng.integers(0, 7)
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            out[at] = int(rng.choice([0, 1, 9, 0x20, 0x22, 0x7f, 0xff]))
        elif kind == 2:
            out[at:at + 8] = struct.pack('<Q', int(ABSURD[rng.integers(len(ABSURD))]))
        elif kind == 3:
            out[at:at + 4] = struct.pack('<I', int(rng.integers(0, 2 ** 32)))
        elif kind == 4:
            del out[at:at + int(rng.integers(1, 40))]
        elif kind == 5:
            out[at:at] = out[at:at + int(rng.integers(1, 40))]
        elif rng.integers(0, 4) == 0:
            del out[at:]
        if len(out) < 2:
            break
    return bytes(out)


def drive(read, data, header, path, place, count: int = BLIND) -> list[str]:
    """Outcomes of `count` damaged forms of a sane file; place(bytes) puts them where `read(path)` finds them."""
    rng = np.random.default_rng(0)
    place(data)
    assert outcome(read, path) == 'loaded'
    found = []
    for _ in range(count):
        place(mutate(data, header, rng))
        found.append(outcome(read, path))
    return found


@pytest.fixture
def mapped(monkeypatch):
    """Puts bytes where both readers map their file: opening thousands of files costs more than reading them."""
    def place(data):
        for module in (gguf_header, safetensors):
            monkeypatch.setattr(module, 'map_file', lambda path: data)

    return place


def test_blind_damage_to_gguf(gguf_bytes, tmp_path, allocations, mapped):
    found = drive(gguf.read, *gguf_bytes, tmp_path / 'x.gguf', mapped)
    assert sum(message != 'loaded' for message in found) > BLIND // 2
    assert len({message.split(':')[-1][:12] for message in found}) > 30  # many different faults are told apart


def test_blind_damage_to_safetensors(safetensors_bytes, tmp_path, allocations, mapped):
    (tmp_path / 'config.json').write_bytes((TINY / 'llama' / 'config.json').read_bytes())
    path = tmp_path / 'model.safetensors'
    path.touch()
    found = drive(lambda path: safetensors.read(path.parent), *safetensors_bytes, path, mapped)
    assert sum(message != 'loaded' for message in found) > BLIND // 2


def test_blind_damage_to_config_json(tmp_path, allocations):
    path, data = tmp_path / 'config.json', (TINY / 'llama3' / 'config.json').read_bytes()
    (tmp_path / 'model.safetensors').write_bytes((TINY / 'llama3' / 'model.safetensors').read_bytes())
    found = drive(lambda path: safetensors.read(path.parent), data, len(data), path, path.write_bytes, 500)
    assert sum(message != 'loaded' for message in found) > 125


SLOW = settings(max_examples=INFORMED, deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@SLOW
@given(place=st.integers(0, 9), value=st.sampled_from(ABSURD) | st.integers(0, 2 ** 64 - 1))
def test_absurd_numbers_in_gguf(gguf_bytes, tmp_path, place, value):
    """Each count, length, dimension, type and offset of the header in turn."""
    data, _ = gguf_bytes
    name = data.index(b'token_embd.weight')
    dims = name + len(b'token_embd.weight')
    tokens = data.index(b'tokenizer.ggml.tokens') + len(b'tokenizer.ggml.tokens')
    at, code = [(8, 'Q'), (16, 'Q'), (24, 'Q'), (tokens + 4, 'I'), (tokens + 8, 'Q'), (tokens + 16, 'Q'),
                (name - 8, 'Q'), (dims, 'I'), (dims + 4, 'Q'), (dims + 4 + 16 + 4, 'Q')][place]
    value &= 2 ** 64 - 1 if code == 'Q' else 2 ** 32 - 1
    sane = struct.unpack_from('<' + code, data, at)[0]
    damaged = data[:at] + struct.pack('<' + code, value) + data[at + struct.calcsize(code):]
    path = tmp_path / 'x.gguf'
    path.write_bytes(damaged)
    tracemalloc.start()
    found = outcome(gguf.read, path)
    tracemalloc.stop()
    assert (found == 'loaded') == (value == sane), found


@SLOW
@given(field=st.sampled_from(['shape', 'data_offsets', 'dtype']),
       value=st.recursive(
           st.none() | st.booleans() | st.integers(-2 ** 70, 2 ** 70) | st.floats() | st.text(max_size=4),
           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
           max_leaves=6))
def test_absurd_fields_in_safetensors(safetensors_bytes, tmp_path, field, value):
    data, header = safetensors_bytes
    table = json.loads(data[8:header])
    sane = table['model.embed_tokens.weight'][field]
    table['model.embed_tokens.weight'][field] = value
    text = json.dumps(table).encode()
    (tmp_path / 'config.json').write_bytes((TINY / 'llama' / 'config.json').read_bytes())
    (tmp_path / 'model.safetensors').write_bytes(len(text).to_bytes(8, 'little') + text + data[header:])
    tracemalloc.start()
    found = outcome(lambda path: safetensors.read(path.parent), tmp_path / 'model.safetensors')
    tracemalloc.stop()
    assert (found == 'loaded') == (value == sane and type(value) is type(sane)), found


@SLOW
@given(size=st.sampled_from(ABSURD) | st.integers(0, 2 ** 64 - 1))
def test_absurd_header_length_in_safetensors(safetensors_bytes, tmp_path, size):
    data, header = safetensors_bytes
    path = tmp_path / 'x.safetensors'
    path.write_bytes(size.to_bytes(8, 'little') + data[8:])
    if size != header - 8:
        with pytest.raises(FormatError):
            safetensors.read_header(path)


@pytest.mark.parametrize('cut', [0, 1, 7, 8, 100, 0.5, -1])
def test_truncated(cut, gguf_bytes, safetensors_bytes, tmp_path):
    for (data, _), name, read in ((gguf_bytes, 'x.gguf', gguf.read), (safetensors_bytes, 'y', safetensors.read_header)):
        keep = int(cut * len(data)) if isinstance(cut, float) else cut
        (tmp_path / name).write_bytes(data[:keep])
        with pytest.raises(FormatError, match=name):
            read(tmp_path / name)


def test_llama2c(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / 'model.bin'
    sane = (8, 16, 2, 2, 2, 32, 16)
    count = 32 * 8 + 2 * (8 + 4 * 64 + 8 + 3 * 128) + 8 + 16 * 4
    weights = rng.normal(size=count).astype(np.float32).tobytes()
    path.write_bytes(struct.pack('<7i', *sane) + weights)
    formats.load(path)
    tracemalloc.start()
    for field in range(7):
        for value in (*(v for v in ABSURD if v < 2 ** 31), -1, -2 ** 31):
            changed = (*sane[:field], value, *sane[field + 1:])
            path.write_bytes(struct.pack('<7i', *changed) + weights)
            found = outcome(formats.load, path)
            assert found != 'loaded', (field, value)
    tracemalloc.stop()
    path.write_bytes(struct.pack('<7i', *sane) + weights[:-4])
    with pytest.raises(FormatError, match='outside the file|end at'):
        formats.load(path)
