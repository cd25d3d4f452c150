"""What a user can get wrong: one line that names the thing, and nothing half-written."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from backbone import formats
from backbone.errors import FormatError, TensorMismatch
from backbone.formats import gguf, orbax, safetensors, staging
from backbone.formats.tensors import flatten

from .conftest import TINY, equal


@pytest.fixture
def llama():
    return formats.load(TINY / 'llama')


@pytest.fixture
def directory(tmp_path):
    return shutil.copytree(TINY / 'llama', tmp_path / 'model')


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(directory, change):
    """The weights of a directory after `change` to the {name: array} of them."""
    stored = safetensors.read_header(directory / 'model.safetensors')
    tensors = {name: tensor.rows() for name, tensor in stored.items()}
    change(tensors)
    safetensors.write_file(directory / 'new', {k: ('F32', v.shape) for k, v in tensors.items()}, tensors.values(), {})
    os.replace(directory / 'new', directory / 'model.safetensors')


@pytest.mark.parametrize('changes,message', [
    ({'model_type': 'mamba'}, "unknown architecture 'mamba', one of llama, qwen2, opt, gemma"),
    ({'hidden_act': 'mish'}, "unknown activation 'mish'"),
    ({'hidden_size': 'big'}, "hidden_size is 'big', not a count"),
    ({'num_attention_heads': 0}, 'config.json: '),
    ({'num_attention_heads': 3}, 'config.json: '),
    ({'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0}}, "rope type 'yarn' is not supported"),
    ({'rope_parameters': {'rope_type': 'llama3', 'factor': 4.0}}, 'low_freq_factor is missing'),
    ({'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partial_rotary_factor is not supported'),
    ({'use_sliding_window': True, 'sliding_window': 8}, 'sliding windows'),
    ({'num_hidden_layers': 10 ** 12}, f'{10 ** 12} layers, but only 21 tensors'),
    ({'vocab_size': 10 ** 12}, f'vocabulary size {10 ** 12} exceeds'),
    ({'vocab_size': 65}, r'2 of the wrong shape: model.embed_tokens.weight is \[64, 16\], expected \[65, 16\], '),
])
def test_config(directory, changes, message):
    edit(directory / 'config.json', **changes)
    with pytest.raises(FormatError, match=message):
        formats.load(directory)


def test_missing_and_extra_tensors_are_all_listed(directory):
    def change(tensors):
        tensors['model.layers.0.mystery'] = tensors.pop('model.layers.0.mlp.up_proj.weight')
        tensors['another.weight'] = tensors.pop('model.norm.weight')

    rewrite(directory, change)
    with pytest.raises(TensorMismatch) as error:
        formats.load(directory)
    assert all(part in str(error.value) for part in (
        '2 missing: ', 'model.layers.0.mlp.up_proj.weight', 'model.norm.weight',
        '2 left over: ', 'model.layers.0.mystery', 'another.weight'))


def test_buffers_of_old_checkpoints_and_a_bare_decoder_are_accepted(directory, llama):
    def change(tensors):
        tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(2, np.float32)
        for name in list(tensors):
            tensors[name.removeprefix('model.')] = tensors.pop(name)

    rewrite(directory, change)
    equal(formats.load(directory), llama)


def test_no_such_thing(tmp_path):
    with pytest.raises(FormatError, match='nowhere: no such file or directory, .*smollm2-135m'):
        formats.load(tmp_path / 'nowhere')
    with pytest.raises(FormatError, match='is not a model'):
        formats.load('mt_bench')
    with pytest.raises(FormatError, match='no headway.json, config.json or model.bin'):
        formats.load(tmp_path)
    (tmp_path / 'x.txt').write_text('hello')
    with pytest.raises(FormatError, match='neither a GGUF file'):
        formats.load(tmp_path / 'x.txt')


def test_pytorch_pickles_are_named(directory):
    (directory / 'model.safetensors').rename(directory / 'pytorch_model.bin')
    with pytest.raises(FormatError, match=r'no .safetensors file \(pytorch_model.bin is not read\)'):
        formats.load(directory)


@pytest.mark.parametrize('index,message', [
    ('{', 'not valid JSON'), ('[]', 'no usable weight_map'),
    ('{"weight_map": {"a": "../x.safetensors"}}', 'weight_map'),
    ('{"weight_map": {"a": "x.safetensors"}}', 'x.safetensors: cannot be read'),
    ('{"weight_map": {"a": "model.safetensors"}}', 'does not match its shards at a, '),
])
def test_shard_index(directory, index, message):
    (directory / safetensors.INDEX).write_text(index)
    with pytest.raises(FormatError, match=message):
        formats.load(directory)


def test_vocabulary_mismatch(directory, tmp_path, llama):
    edit(directory / 'config.json', tie_word_embeddings=False)
    tokens = [chr(i) for i in range(33, 133)]  # 100 tokens for 64 rows
    (directory / 'tokenizer.json').write_text(json.dumps({
        'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [], 'normalizer': None,
        'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True},
        'post_processor': None, 'decoder': {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True,
                                            'use_regex': True},
        'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
                  'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
                  'vocab': {token: i for i, token in enumerate(tokens)}, 'merges': []}}))
    with pytest.raises(FormatError, match='the tokenizer has 100 tokens and the model 64'):
        formats.load(directory)


def test_unknown_gguf_architecture(tmp_path, llama):
    formats.save(llama, tmp_path / 'x.gguf', 'gguf')
    data = (tmp_path / 'x.gguf').read_bytes()
    (tmp_path / 'x.gguf').write_bytes(data.replace(b'llama', b'zebra'))
    with pytest.raises(FormatError, match="x.gguf: unknown architecture 'zebra', one of llama, qwen2, gemma"):
        formats.load(tmp_path / 'x.gguf')


def test_gguf_variants_that_cannot_be_expressed(tmp_path, llama):
    relu = formats.Loaded(llama.config.replace(mlp=llama.config.mlp.__class__(32, 'relu')), llama.params, None, 'x', '')
    with pytest.raises(FormatError, match='GGUF cannot express this variant of llama'):
        formats.save(relu, tmp_path / 'x.gguf', 'gguf')
    formats.save(relu, tmp_path / 'x', 'hf')  # transformers can
    assert formats.load(tmp_path / 'x').config == relu.config


def test_destination_is_never_overwritten_silently(tmp_path, llama):
    for kind in formats.KINDS:
        dst = tmp_path / kind
        dst.write_text('precious')
        with pytest.raises(FormatError, match=f'{kind}: exists already'):
            formats.save(llama, dst, kind)
        assert dst.read_text() == 'precious'
        formats.save(llama, dst, kind, overwrite=True)
        equal(formats.load(dst), llama)
        formats.save(llama, dst, kind, overwrite=True)
        equal(formats.load(dst), llama)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(formats.KINDS)


@pytest.mark.parametrize('kind', formats.KINDS)
def test_disk_full_leaves_nothing_and_keeps_what_was(tmp_path, llama, kind, monkeypatch):
    """The error comes after part of the data has been written."""
    dst = tmp_path / 'x'
    formats.save(llama, dst, kind)
    full = OSError(errno.ENOSPC, 'No space left on device')

    def fail(*_, **__):
        raise full

    if kind == 'headway':
        monkeypatch.setattr(orbax.json, 'dumps', fail)  # the manifest, after the parameters
    else:
        original, count = formats.tensors.Outgoing.blocks, []

        def blocks(self):
            count.append(1)
            yield from original(self) if len(count) < 5 else fail()

        monkeypatch.setattr(formats.tensors.Outgoing, 'blocks', blocks)
    with pytest.raises(FormatError, match='x: cannot be written: No space left on device'):
        formats.save(llama, dst, kind, overwrite=True)
    with pytest.raises(FormatError, match='No space left on device'):
        formats.save(llama, tmp_path / 'y', kind)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ['x']
    equal(formats.load(dst), llama)


def test_an_interrupt_between_the_renames_restores_the_old_directory(tmp_path, monkeypatch):
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x' / 'old').touch()
    rename, calls = staging.Path.rename, []

    def interrupted(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(staging.Path, 'rename', interrupted)
    with pytest.raises(KeyboardInterrupt), staging.staged(tmp_path / 'x', overwrite=True) as new:
        new.mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ['x'] and (tmp_path / 'x' / 'old').exists()


def test_destination_that_cannot_be_made(tmp_path, llama):
    (tmp_path / 'file').touch()
    with pytest.raises(FormatError, match='cannot be written'):
        formats.save(llama, tmp_path / 'file' / 'x', 'gguf')


def test_parameters_that_are_not_the_configurations(tmp_path, llama):
    del llama.params['layers']['mlp']['up']
    for kind in formats.KINDS:
        with pytest.raises(TensorMismatch, match='layers/mlp/up/kernel'):
            formats.save(llama, tmp_path / 'x', kind)
    assert not list(tmp_path.iterdir())


def test_unknown_kind_and_dtype(tmp_path, llama):
    with pytest.raises(FormatError, match='pickle: not a form that is written, one of gguf, hf, headway'):
        formats.save(llama, tmp_path / 'x', 'pickle')
    for kind, dtype in (('hf', 'q8_0'), ('gguf', 'q4_0'), ('headway', 'q8_0')):
        with pytest.raises(FormatError, match=f'dtype {dtype}: '):
            formats.save(llama, tmp_path / 'x', kind, dtype)


def test_damaged_headway_checkpoint(tmp_path, llama):
    formats.save(llama, tmp_path / 'sane', 'headway')
    files = [p for p in (tmp_path / 'sane' / 'params').rglob('*') if p.is_file()]
    assert files
    refused = 0
    for i, file in enumerate(files):
        copy = shutil.copytree(tmp_path / 'sane', tmp_path / f'{i}')
        damaged = copy / file.relative_to(tmp_path / 'sane')
        damaged.write_bytes(bytes(b ^ 0x55 for b in damaged.read_bytes()))
        try:
            equal(formats.load(copy), llama)  # a file that only describes the store may be ignored by its reader
        except FormatError as error:
            assert str(copy) in str(error) and '\n' not in str(error)
            refused += 1
    assert refused


@pytest.mark.parametrize('changes,message', [
    ({'format': 'x'}, 'not a Headway checkpoint'), ({'version': 2}, 'version 2 is not read, only 1'),
    ({'params_hash': '0' * 64}, 'parameters hash to'), ({'config': {'family': 'llama'}}, 'missing config key'),
    ({'config': None}, 'headway.json'),
])
def test_headway_manifest(tmp_path, llama, changes, message):
    formats.save(llama, tmp_path / 'x', 'headway')
    edit(tmp_path / 'x' / 'headway.json', **changes)
    with pytest.raises(FormatError, match=message):
        formats.load(tmp_path / 'x')


def test_headway_config_of_another_model(tmp_path, llama):
    formats.save(llama, tmp_path / 'x', 'headway')
    config = llama.config.replace(tie_embeddings=True, vocab_size=65).to_dict()
    edit(tmp_path / 'x' / 'headway.json', config=config)
    with pytest.raises(TensorMismatch, match=r'embed/tokens is \[64, 16\], expected \[65, 16\], lm_head'):
        formats.load(tmp_path / 'x')


PEAK = textwrap.dedent("""
    import resource, sys
    import jax, numpy as np
    import backbone.formats.gguf, backbone.model
    from backbone.config import AttentionConfig, MlpConfig, ModelConfig
    from backbone.formats import Loaded, load, save
    from backbone.formats.tensors import leaf_shapes, unflatten

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    task, path, kind, dtype, layers = sys.argv[1:]
    cfg = ModelConfig('llama', 32768, 1024, int(layers), 64, AttentionConfig(8, 8, 128), MlpConfig(2560))
    leaf_shapes(cfg)
    before = peak()
    if task == 'write':
        tree = unflatten({p: np.ones(s, np.float16) for p, s in leaf_shapes(cfg).items()})
        save(Loaded(cfg, tree, None, 'x', ''), path, kind, dtype)
    else:
        tree = load(path, dtype).params
    print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
""")


def peak_and_size(*args) -> tuple[int, int]:
    """Bytes a process takes beyond its imports to read or write a model, and the size of that model in memory."""
    out = subprocess.run([sys.executable, '-c', PEAK, *map(str, args)], capture_output=True, text=True, check=True,
                         env={**os.environ, 'JAX_PLATFORMS': 'cpu'}).stdout
    peak, size = map(int, out.split())
    print(*args, f'{peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB')
    return peak, size


def test_peak_memory(tmp_path):
    """A second copy of the model, in any dtype, would show."""
    peak, size = peak_and_size('write', tmp_path / 'x', 'gguf', 'f16', 4)
    assert size > 230_000_000 and peak < size + 180_000_000
    peak, size = peak_and_size('read', tmp_path / 'x', 'gguf', 'bfloat16', 4)
    assert peak < size + 180_000_000


@pytest.mark.slow
@pytest.mark.parametrize('kind', formats.KINDS)
def test_peak_memory_of_600_mb(tmp_path, kind):
    peak, size = peak_and_size('write', tmp_path / 'x', kind, 'f16', 24)
    assert size > 600_000_000 and peak < size + 300_000_000
    for dtype in ('float32', 'bfloat16'):
        peak, size = peak_and_size('read', tmp_path / 'x', kind, dtype, 24)
        assert peak < size + (500_000_000 if kind == 'headway' else 300_000_000)


def test_reading_reports_what_it_takes(llama):
    """The tree has exactly the model's leaves, each of its own memory."""
    leaves = flatten(llama.params)
    assert all(leaf.flags.c_contiguous and leaf.flags.writeable for leaf in leaves.values())
    assert gguf.table('gguf', 'llama') and sum(leaf.size for leaf in leaves.values()) == sum(
        int(np.prod(shape)) for shape in formats.tensors.leaf_shapes(llama.config).values())
