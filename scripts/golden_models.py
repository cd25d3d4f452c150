"""Writes tests/golden/tiny/* and tests/golden/smollm2-135m.npz by Hugging Face transformers (extra `[oracle]`).

    python scripts/golden_models.py

tiny: random checkpoints of a few thousand parameters, one a variant of an architecture, with the logits of a fixed
block of tokens. smollm2-135m: transformers unpacks the GGUF file with its own code; kept are the 512 tokens of text,
every argmax, 32 fixed columns of the logits at every position and the best 32 at every sixteenth.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Qwen2Config,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from backbone import catalogue  # noqa: E402 - the path is set above

GOLDEN = ROOT / 'tests' / 'golden'
# Biases and norm scales are drawn too (transformers starts them at 0 and 1), so that a lost one shows.
_GQA = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.25)
_OPT = dict(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, init_std=0.25)
TINY = {
    'llama': LlamaConfig(**_GQA),
    # A head size of its own, a head of its own, and frequencies in all three of the scaling's ranges.
    'llama3': LlamaConfig(**{**_GQA, 'hidden_size': 24}, head_dim=8, tie_word_embeddings=True, rope_theta=100.0,
                          rope_scaling={'rope_type': 'llama3', 'factor': 4.0, 'low_freq_factor': 1.0,
                                        'high_freq_factor': 4.0, 'original_max_position_embeddings': 32}),
    'llama_bias': LlamaConfig(**_GQA, attention_bias=True, mlp_bias=True),
    'qwen2': Qwen2Config(**_GQA, tie_word_embeddings=True, rope_theta=1e6),
    'opt': OPTConfig(**_OPT),
    'opt_post': OPTConfig(**_OPT, do_layer_norm_before=False, word_embed_proj_dim=8),
    'gemma': GemmaConfig(**{**_GQA, 'num_key_value_heads': 1}, head_dim=8),
    # A window that the 24 tokens outgrow.
    'mixtral': MixtralConfig(**{**_GQA, 'intermediate_size': 12}, num_local_experts=4, num_experts_per_tok=2,
                             sliding_window=9, rope_theta=1e6),
    'olmoe': OlmoeConfig(**{**_GQA, 'intermediate_size': 12, 'num_key_value_heads': 4}, num_experts=5,
                         num_experts_per_tok=3, bos_token_id=None, eos_token_id=None, pad_token_id=None),
}


def logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def write_tiny(name: str, config) -> None:
    torch.manual_seed(0)
    config.dtype = 'float32'
    model = AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    folder = GOLDEN / 'tiny' / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / 'generation_config.json').unlink(missing_ok=True)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)).astype(np.int32)
    np.savez_compressed(folder / 'golden.npz', tokens=tokens, logits=logits(model, tokens))
    print(name, sum(file.stat().st_size for file in folder.iterdir()), 'bytes')


def write_smollm2() -> None:
    path = catalogue.fetch('smollm2-135m')
    text = (catalogue.fetch('gutenberg') / 'carroll-alice.txt').read_text()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32,
                                                 attn_implementation='eager').eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens = np.array([tokenizer(text[:4000])['input_ids'][:512]], np.int32)
    found = logits(model, tokens)[0]
    columns = np.arange(11, found.shape[1], found.shape[1] // 32)[:32].astype(np.int32)
    positions = np.arange(0, 512, 16).astype(np.int32)
    best = np.argsort(-found[positions], axis=-1)[:, :32].astype(np.int32)
    np.savez_compressed(GOLDEN / 'smollm2-135m.npz', tokens=tokens, argmax=found.argmax(-1).astype(np.int32),
                        columns=columns, at_columns=found[:, columns], positions=positions, best=best,
                        at_best=np.take_along_axis(found[positions], best, -1))


if __name__ == '__main__':
    for key, tiny in TINY.items():
        write_tiny(key, tiny)
    write_smollm2()
