"""Every key of a training config with its default. A config file starts from here and changes what it is about."""

from ml_collections import ConfigDict


def defaults() -> ConfigDict:
    return ConfigDict({
        # What is trained: dotted path of a factory and its arguments (backbone/contract.py, Task).
        'task': {'factory': 'backbone.language_model.build', 'kwargs': {}},
        # Which text, and how it becomes batches (docs/data.md). batch_size counts rows of the whole mesh;
        # loss_on: 'all' or 'answer', '' for what suits the dataset.
        'data': {'dataset': 'enwik8', 'split': 'train', 'eval_split': 'validation', 'tokenizer': 'bytes',
                 'seq_len': 256, 'batch_size': 32, 'loss_on': '', 'data_dir': '', 'manual_dir': ''},
        # AdamW (harness/optimizer.py). accumulate: microbatches a step; clip_norm 0: no clipping.
        'optimizer': {'learning_rate': 1e-3, 'schedule': 'cosine', 'warmup_steps': 100, 'decay_steps': 0,
                      'end_fraction': 0.1, 'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.1,
                      'clip_norm': 1.0, 'accumulate': 1, 'no_decay': (r'.*/(scale|bias)',)},
        'num_steps': 1000,
        'seed': 0,  # of the parameters, the order of the rows, and whatever a task draws
        'compute_dtype': 'float32',  # parameters and optimiser stay float32
        'ema_decay': 0.0,  # 0: no moving average; else evaluation, samples and exports use it
        'max_bad_steps': 10,  # so many non-finite steps in a row end the run
        'mesh': {'stage': 1, 'data': 1, 'expert': 1, 'model': 1, 'fsdp': True},
        'log_every': 10,
        'eval': {'every': 200, 'batches': 16},  # every 0: only at the end
        'samples': {'every': 0, 'prompts': (), 'max_new_tokens': 128, 'temperature': 0.8, 'top_p': 0.95},
        'checkpoint': {'every': 200, 'max_to_keep': 3, 'keep_every': 0},  # steps; keep_every 0: only the newest
        # What headway-rehearse decodes with: rows, prompt bucket and cache slots.
        'rehearse': {'decode_batch': 8, 'prompt': 1024, 'context': 2048},
    })


def llama(vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, max_seq_len: int,
          tied: bool = True, theta: float = 10_000.0) -> dict:
    """The fields of a Llama-shaped ModelConfig."""
    return {'family': 'llama', 'vocab_size': vocab, 'hidden_size': hidden, 'num_layers': layers,
            'max_seq_len': max_seq_len, 'tie_embeddings': tied, 'mlp': {'intermediate_size': intermediate},
            'attention': {'num_heads': heads, 'num_kv_heads': kv_heads, 'head_dim': hidden // heads,
                          'rope_theta': theta}}
