"""transformers and torch, where they are installed (extra `[oracle]`), on what is written here and on whole logits."""

import jax
import numpy as np
import pytest

from backbone import formats

from .conftest import TINY, logits

torch = pytest.importorskip('torch', reason='the live oracle needs the extra [oracle]')
transformers = pytest.importorskip('transformers', reason='the live oracle needs the extra [oracle]')


def oracle(folder, tokens, **options) -> np.ndarray:
    """Float32 logits [B, S, V] by transformers; fails on a tensor it misses or does not know."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True, **options)
    assert not (info['missing_keys'] or info['unexpected_keys'] or info['mismatched_keys']), info
    with torch.no_grad():
        return model.eval()(torch.from_numpy(np.asarray(tokens)).long()).logits.numpy()


def test_exported_directories_of_every_architecture(tiny, tmp_path):
    name, loaded, tokens, expected = tiny
    formats.save(loaded, tmp_path / 'x', 'hf')
    assert np.array_equal(oracle(tmp_path / 'x', tokens), expected), name


@pytest.mark.parametrize('name', ['llama', 'qwen2'])
def test_exported_gguf(name, tmp_path):
    """transformers' own GGUF reader. Left out is what it cannot do: Gemma, frequency factors, llama's biases."""
    pytest.importorskip('accelerate', reason="transformers' GGUF reader needs accelerate")
    loaded, golden = formats.load(TINY / name), np.load(TINY / name / 'golden.npz')
    formats.save(loaded, tmp_path / 'x.gguf', 'gguf')
    assert np.abs(oracle(tmp_path, golden['tokens'], gguf_file='x.gguf') - golden['logits']).max() < 1e-5


def test_smollm2_all_logits(smollm2, tmp_path):
    """Every logit of 512 tokens, through the exported directory, with the exported tokenizer."""
    formats.save(smollm2, tmp_path / 'x', 'hf')
    tokens = np.load(TINY.parent / 'smollm2-135m.npz')['tokens']
    found, expected = logits(smollm2, tokens), oracle(tmp_path / 'x', tokens)
    print(f'max logit difference {np.abs(found - expected).max():.2e}')
    assert np.abs(found - expected).max() <= 5e-4
    assert np.array_equal(found.argmax(-1), expected.argmax(-1))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'x')
    text = 'In 1984, "it" cost $3.50 - naïve?\n\n<|im_start|>user\n'
    assert theirs(text)['input_ids'] == smollm2.tokenizer.encode(text)
    messages = [{'role': 'user', 'content': 'Hello'}]
    assert theirs.apply_chat_template(messages, tokenize=False) == smollm2.tokenizer.render(
        messages, add_generation_prompt=False)


def test_gguf_with_tokenizer_as_transformers_reads_it(smollm2, tmp_path):
    """Q8_0 with metadata and tokenizer, cut to two layers, against our own reading of the same file."""
    pytest.importorskip('accelerate', reason="transformers' GGUF reader needs accelerate")
    params = smollm2.params | {'layers': jax.tree.map(lambda a: a[:2], smollm2.params['layers'])}
    cut = formats.Loaded(smollm2.config.replace(num_layers=2), params, smollm2.tokenizer, 'cut', '')
    formats.save(cut, tmp_path / 'x.gguf', 'gguf', 'q8_0')
    tokens = np.load(TINY.parent / 'smollm2-135m.npz')['tokens'][:, :64]
    found = logits(formats.load(tmp_path / 'x.gguf', cache=False), tokens)
    expected = oracle(tmp_path, tokens, gguf_file='x.gguf')
    assert np.abs(found - expected).max() <= 5e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file='x.gguf')
    text = 'The quick brown fox <|im_end|>'
    assert tokenizer(text)['input_ids'] == smollm2.tokenizer.encode(text)
