"""SmolLM2-135M's shape from scratch on enwik8 in its own vocabulary: the throughput run for one GPU.

    headway-train --config=configs/base_135m.py --workdir=out/base_135m

bfloat16 products, float32 parameters, fused attention of cuDNN (`--config.task.kwargs.attention=dense` elsewhere).
scripts/gpu/train_135m.py measures tokens/s and MFU of this config. `:tiny` cuts it to 2 layers of width 64, in
float32 on a CPU.
"""

from configs import training


def get_config(variant: str = ''):
    config = training.defaults()
    config.task.kwargs.update({'model': 'smollm2-135m', 'attention': 'cudnn', 'loss_chunk': 256})
    config.data.update({'tokenizer': 'smollm2-135m', 'seq_len': 1024, 'batch_size': 64})
    config.optimizer.update({'learning_rate': 1e-3, 'warmup_steps': 100})
    config.compute_dtype = 'bfloat16'
    config.num_steps = 1000
    config.eval.update({'every': 250, 'batches': 8})
    config.samples.update({'every': 500, 'prompts': ('The history of ',)})
    config.checkpoint.update({'every': 250})
    if variant == 'tiny':
        config.task.kwargs.update({
            'attention': 'dense', 'loss_chunk': 16,
            'overrides': {'hidden_size': 64, 'num_layers': 2, 'mlp': {'intermediate_size': 128},
                          'attention': {'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 16}}})
        config.data.update({'seq_len': 64, 'batch_size': 4})
        config.compute_dtype = 'float32'
        config.num_steps = 20
        config.optimizer.warmup_steps = 5
        config.eval.batches = 2
        config.samples.max_new_tokens = 16
    elif variant:
        raise ValueError(f'unknown variant {variant!r}, known: tiny')
    return config
