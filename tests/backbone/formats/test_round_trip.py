"""What is written reads back: bit for bit in float32, within the format's step otherwise, by other readers too."""

import dataclasses
import json

import gguf as gguf_package
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from backbone import formats
from backbone.config import AttentionConfig, MlpConfig, ModelConfig
from backbone.errors import FormatError
from backbone.formats import dequantised, gguf, safetensors
from backbone.formats.tensors import flatten, leaf_shapes, unflatten

from .conftest import TINY, equal, logits

WIDE = ModelConfig('llama', 96, 64, 2, 128, AttentionConfig(4, 2, 16), MlpConfig(96))


def random_model(cfg: ModelConfig, seed: int = 0) -> formats.Loaded:
    rng = np.random.default_rng(seed)
    params = unflatten({path: rng.normal(size=shape).astype(np.float32) for path, shape in leaf_shapes(cfg).items()})
    return formats.Loaded(cfg, params, None, 'random', formats.params_hash(params))


def has_gguf(loaded) -> bool:
    return loaded.config.family not in ('opt', 'mixtral', 'olmoe')


@pytest.mark.parametrize('kind', ['hf', 'headway', 'gguf'])
def test_float32_is_bit_exact(tiny, kind, tmp_path):
    _, loaded, _, _ = tiny
    if kind == 'gguf' and not has_gguf(loaded):
        with pytest.raises(FormatError, match=f'{loaded.config.family}: no gguf form'):
            formats.save(loaded, tmp_path / 'x', kind)
        assert not list(tmp_path.iterdir())
        return
    formats.save(loaded, tmp_path / 'x', kind)
    assert formats.sniff(tmp_path / 'x') == kind
    equal(formats.load(tmp_path / 'x'), loaded)
    assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_every_direction_in_a_row(tiny, tmp_path):
    _, loaded, tokens, expected = tiny
    kinds = ['gguf', 'headway', 'gguf', 'hf', 'headway', 'hf', 'gguf']
    kinds = kinds if has_gguf(loaded) else ['hf', 'headway', 'hf']
    found = loaded
    for i, kind in enumerate(kinds):
        formats.save(found, tmp_path / f'{i}', kind)
        found = formats.load(tmp_path / f'{i}')
    equal(found, loaded)
    assert np.abs(logits(found, tokens) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_llama3_scaling_travels_as_frequency_factors(tmp_path):
    loaded = formats.load(TINY / 'llama3')
    formats.save(loaded, tmp_path / 'x.gguf', 'gguf')
    tensors = {t.name: t for t in gguf_package.GGUFReader(tmp_path / 'x.gguf').tensors}
    factors = tensors['rope_freqs.weight'].data
    # transformers' formula, written out: wavelengths 2 pi theta^(2i/d) against 32/1 and 32/4.
    wavelength = 2 * np.pi * 100.0 ** (np.arange(4) / 4)
    smooth = (32 / wavelength - 1) / 3
    expected = np.where(wavelength > 32, 4.0, np.where(wavelength < 8, 1.0, 1 / ((1 - smooth) / 4 + smooth)))
    assert sorted(set(np.sign(expected - 1) + np.sign(expected - 4))) == [-1, 0, 1]  # all three ranges
    np.testing.assert_allclose(factors, expected, rtol=1e-5)


def test_released_llama3_scaling_needs_no_key_of_ours(tmp_path):
    scaling = dataclasses.replace(formats.load(TINY / 'llama3').config.attention.rope_scaling, factor=32.0,
                                  original_max_seq_len=8192)
    cfg = WIDE.replace(attention=AttentionConfig(2, 1, 64, rope_theta=500_000.0, rope_scaling=scaling))
    formats.save(random_model(cfg), tmp_path / 'x.gguf', 'gguf')
    header = gguf.read_header(tmp_path / 'x.gguf')
    plain = {key: value for key, value in header.metadata.items() if not key.startswith('headway.')}
    assert len(plain) < len(header.metadata)
    assert gguf.from_metadata(plain, header.tensors, 'x') == cfg
    plain['llama.rope.freq_base'] = 1e6  # no longer the frequencies those factors were made for
    with pytest.raises(FormatError, match='rope_freqs.weight is not a Llama-3 scaling'):
        gguf.from_metadata(plain, header.tensors, 'x')


def test_gguf_rows_are_in_llama_cpp_order(tmp_path):
    """The permutation that llama.cpp's own converter applies to Hugging Face weights."""
    def permute(w, n):
        return w.reshape(n, 2, w.shape[0] // n // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

    loaded = random_model(WIDE)
    formats.save(loaded, tmp_path / 'x.gguf', 'gguf')
    reader = gguf_package.GGUFReader(tmp_path / 'x.gguf')
    tensors = {t.name: t.data for t in reader.tensors}
    attention = loaded.params['layers']['attn']
    for layer in range(2):
        for name, heads in (('q', 4), ('k', 2)):
            expected = permute(attention[name]['kernel'][layer].T, heads)
            assert np.array_equal(tensors[f'blk.{layer}.attn_{name}.weight'], expected)
        assert np.array_equal(tensors[f'blk.{layer}.attn_v.weight'], attention['v']['kernel'][layer].T)
    assert reader.fields['general.architecture'].contents() == 'llama'
    assert reader.fields['llama.attention.head_count_kv'].contents() == 2


def test_gguf_float16(tmp_path):
    loaded = random_model(WIDE)
    formats.save(loaded, tmp_path / 'x.gguf', 'gguf', 'f16')
    found = flatten(formats.load(tmp_path / 'x.gguf').params)
    for path, leaf in flatten(loaded.params).items():
        vector = path.endswith('scale')
        assert np.array_equal(found[path], leaf if vector else leaf.astype(np.float16)), path


def test_gguf_q8_0(tmp_path, monkeypatch):
    monkeypatch.setenv('HEADWAY_CACHE', str(tmp_path / 'cache'))
    loaded = random_model(WIDE)
    formats.save(loaded, tmp_path / 'x.gguf', 'gguf', 'q8_0')
    kinds = {t.tensor_type.name for t in gguf_package.GGUFReader(tmp_path / 'x.gguf').tensors}
    assert kinds == {'Q8_0', 'F32'}
    found = formats.load(tmp_path / 'x.gguf')
    assert found.base_hash != loaded.base_hash
    found = flatten(found.params)
    for path, leaf in flatten(loaded.params).items():
        if path.endswith('scale'):
            assert np.array_equal(found[path], leaf)
            continue
        along = leaf if path == 'embed/tokens' else leaf.swapaxes(-1, -2)  # blocks run along the file's rows
        got = found[path] if path == 'embed/tokens' else found[path].swapaxes(-1, -2)
        blocks, error = along.reshape(-1, 32), np.abs(got - along).reshape(-1, 32)
        # Half a step of the block's maximum / 127, and the step itself rounded to float16.
        bound = np.abs(blocks).max(-1, keepdims=True) / 127 * (0.5 + 127 * 2.0 ** -11)
        assert (error <= bound).all() and error.max() > 0, path


def test_q8_0_falls_back_to_float16_where_rows_do_not_divide(tmp_path, monkeypatch):
    monkeypatch.setenv('HEADWAY_CACHE', str(tmp_path / 'cache'))
    loaded = random_model(WIDE.replace(hidden_size=48))
    formats.save(loaded, tmp_path / 'x.gguf', 'gguf', 'q8_0')
    kinds = {t.name: t.tensor_type.name for t in gguf_package.GGUFReader(tmp_path / 'x.gguf').tensors}
    assert kinds['token_embd.weight'] == 'F16' and kinds['blk.0.ffn_down.weight'] == 'Q8_0'
    formats.load(tmp_path / 'x.gguf')


@pytest.mark.parametrize('encoding', ['Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q4_K', 'Q6_K', 'BF16'])
def test_every_encoding_is_unpacked_as_the_package_does(encoding, tmp_path, monkeypatch):
    """Whole tensors through gguf.dequantize against ours, which goes by pieces, transposes and permutes."""
    monkeypatch.setenv('HEADWAY_CACHE', str(tmp_path / 'cache'))
    cfg = ModelConfig('llama', 300, 512, 1, 64, AttentionConfig(4, 2, 128), MlpConfig(256), tie_embeddings=False)
    rng = np.random.default_rng(0)
    kind = gguf_package.GGMLQuantizationType[encoding]
    writer = gguf_package.GGUFWriter(tmp_path / 'x.gguf', 'llama')
    for key, value in gguf.to_metadata(cfg, 'x').items():
        if key != 'general.architecture':
            gguf._add(writer, key, value)
    whole = {}
    for tensor in formats.tensors.outgoing(cfg, gguf.table('gguf', 'llama'), random_model(cfg).params, 'x'):
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, np.ones(tensor.shape, np.float32))
            continue
        # The package cannot write every kind: random blocks with finite scales serve as well.
        packed = rng.integers(0, 100, gguf_package.quant_shape_to_byte_shape(tensor.shape, kind), np.uint8)
        whole[tensor.name] = gguf_package.quants.dequantize(packed, kind)
        writer.add_tensor(tensor.name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    params = formats.load(tmp_path / 'x.gguf').params
    assert np.array_equal(params['embed']['tokens'], whole['token_embd.weight'])
    assert np.array_equal(params['lm_head']['kernel'], whole['output.weight'].T)
    assert np.array_equal(params['layers']['mlp']['down']['kernel'][0], whole['blk.0.ffn_down.weight'].T)
    k = whole['blk.0.attn_k.weight'].reshape(2, 64, 2, 512).swapaxes(1, 2).reshape(256, 512)
    assert np.array_equal(params['layers']['attn']['k']['kernel'][0], k.T)


def test_blocks_smaller_than_a_tensor_change_nothing(tiny, monkeypatch, tmp_path):
    _, loaded, _, _ = tiny
    monkeypatch.setattr(formats.tensors, 'BLOCK', 64)
    formats.save(loaded, tmp_path / 'x', 'hf')
    equal(formats.load(tmp_path / 'x'), loaded)


def test_shards_and_bfloat16_as_the_safetensors_library_sees_them(tmp_path):
    loaded = random_model(WIDE)
    safetensors.write(loaded, tmp_path / 'x', 'bf16', max_shard_bytes=30_000)
    index = json.loads((tmp_path / 'x' / 'model.safetensors.index.json').read_text())
    files = sorted(set(index['weight_map'].values()))
    assert len(files) > 2 and files[0] == f'model-00001-of-{len(files):05}.safetensors'
    seen = {}
    for file in files:
        seen |= load_file(tmp_path / 'x' / file)
    kernel = loaded.params['layers']['mlp']['up']['kernel'].astype(ml_dtypes.bfloat16)
    assert np.array_equal(seen['model.layers.1.mlp.up_proj.weight'], kernel[1].T)
    found = formats.load(tmp_path / 'x')
    rounded = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), loaded.params)
    jax.tree.map(np.testing.assert_array_equal, found.params, jax.tree.map(lambda a: a.astype(np.float32), rounded))
    assert found.base_hash == formats.params_hash(rounded)
    narrow = formats.load(tmp_path / 'x', ml_dtypes.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, narrow.params, rounded)
    assert narrow.base_hash == found.base_hash


def test_loading_in_bfloat16_keeps_the_hash_of_the_file(tmp_path):
    loaded = random_model(WIDE)
    formats.save(loaded, tmp_path / 'x', 'hf')
    narrow = formats.load(tmp_path / 'x', ml_dtypes.bfloat16)
    assert narrow.base_hash == loaded.base_hash
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.params)} == {np.dtype(ml_dtypes.bfloat16)}


def test_too_large_for_float16(tmp_path):
    loaded = random_model(WIDE)
    loaded.params['lm_head']['kernel'][3, 4] = 1e5
    for kind in ('gguf', 'hf', 'headway'):
        with pytest.raises(FormatError, match='too large for float16'):
            formats.save(loaded, tmp_path / 'x', kind, 'f16')
        assert not list(tmp_path.iterdir())


def test_stories(stories_dir, tmp_path):
    """llama2.c's interleaved rotation and raw layout: a trained model is only a good one if all of it is right."""
    loaded = formats.load(stories_dir)
    ids = loaded.tokenizer.encode('Once upon a time, there was a little girl named Lily. She loved to play outside in '
                                  'the park with her friends. One day, she saw a big red ball.')
    found = logits(loaded, np.array([ids]))[0]
    law = np.asarray(jax.nn.log_softmax(found))
    loss = -law[np.arange(len(ids) - 1), ids[1:]].mean()
    assert loss < 1.2, loss
    formats.save(loaded, tmp_path / 'x', 'headway')
    found = formats.load(tmp_path / 'x')
    equal(found, loaded)
    assert found.tokenizer.encode('Lily saw a ball.') == loaded.tokenizer.encode('Lily saw a ball.')


def test_smollm2_with_its_tokenizer(smollm2, tmp_path):
    formats.save(smollm2, tmp_path / 'x', 'hf')
    found = formats.load(tmp_path / 'x')
    equal(found, smollm2)
    for text in ('The capital of France is 1234', '<|im_start|>user\nhi<|im_end|>\n'):
        assert found.tokenizer.encode(text) == smollm2.tokenizer.encode(text)
    assert (found.tokenizer.bos_id, found.tokenizer.eos_ids) == (1, (2,))


def test_gguf_keeps_the_tokenizer(smollm2, tmp_path):
    """On one layer, to stay small: metadata do not depend on the depth."""
    cfg = smollm2.config.replace(num_layers=1)
    params = smollm2.params | {'layers': jax.tree.map(lambda a: a[:1], smollm2.params['layers'])}
    cut = formats.Loaded(cfg, params, smollm2.tokenizer, 'cut', formats.params_hash(params))
    formats.save(cut, tmp_path / 'x.gguf', 'gguf')
    found = formats.load(tmp_path / 'x.gguf')
    equal(found, cut)
    metadata = gguf.read_header(tmp_path / 'x.gguf').metadata
    assert metadata['tokenizer.ggml.pre'] == 'smollm'
    assert len(metadata['tokenizer.ggml.tokens']) == cfg.vocab_size
    text = 'def f(x1):\n  return 42 # <|im_end|>'
    assert found.tokenizer.encode(text) == smollm2.tokenizer.encode(text)
    assert found.tokenizer.chat_template == smollm2.tokenizer.chat_template


def test_dequantised_entry_is_made_once_used_and_mended(tmp_path, monkeypatch):
    monkeypatch.setenv('HEADWAY_CACHE', str(tmp_path / 'cache'))
    formats.save(random_model(WIDE), tmp_path / 'x.gguf', 'gguf', 'q8_0')
    first = formats.load(tmp_path / 'x.gguf')
    # A copy: the arrays are views of the entry that is damaged below.
    first = dataclasses.replace(first, params=jax.tree.map(np.array, first.params))
    entry = dequantised.entry_path(tmp_path / 'x.gguf')
    made = entry.read_bytes()
    monkeypatch.setattr(dequantised, '_make', lambda *_: pytest.fail('made twice'))
    equal(formats.load(tmp_path / 'x.gguf'), first)
    monkeypatch.undo()
    monkeypatch.setenv('HEADWAY_CACHE', str(tmp_path / 'cache'))
    rng = np.random.default_rng(0)
    for damage in (lambda b: b[:-10], lambda b: b[:40], lambda b: b'', lambda b: b'\xff' * 8 + b[8:],
                   *(lambda b, at=at: b[:at] + bytes([b[at] ^ 16]) + b[at + 1:]
                     for at in rng.integers(0, len(made), 5))):
        entry.write_bytes(damage(made))
        equal(formats.load(tmp_path / 'x.gguf'), first)
        assert entry.read_bytes() == made


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, caplog):
    formats.save(random_model(WIDE), tmp_path / 'x.gguf', 'gguf', 'q8_0')
    monkeypatch.setenv('HEADWAY_CACHE', str(tmp_path / 'cache'))
    with_cache = formats.load(tmp_path / 'x.gguf')
    (tmp_path / 'file').write_text('not a directory')
    monkeypatch.setenv('HEADWAY_CACHE', str(tmp_path / 'file'))
    equal(formats.load(tmp_path / 'x.gguf'), with_cache)
    assert 'going on without the cache' in caplog.text
