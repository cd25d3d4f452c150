"""A CP head on frozen Llama-3.1-8B, on a TPU v5e pod slice. Nobody here has the weights: the shape is for rehearsals.

    headway-rehearse --config=configs/pod_tensorhead_llama31_8b.py --topology=v5e:4x4
    headway-train --distributed --config=configs/pod_tensorhead_llama31_8b.py --workdir=/mnt/share/head_llama31_8b \\
        --config.task.kwargs.base=DIR --config.task.kwargs.model= \\
        --config.data.manual_dir=DIR --config.data.tokenizer=DIR                   # on every host; see docs/pods.md

Rank 4 over 4 tokens, factors of inner rank 64, 16,384 words: 8.4 M parameters beside 8 B. The trunk runs forward only
and keeps nothing for a backward pass; its matrices are split over every chip (FSDP). What the TPU compiler says of it:
docs/tensorhead_cost.md.
"""

from ml_collections import ConfigDict

from configs import training


def get_config():
    config = training.defaults()
    config.task.factory = 'tensorhead.task.build'
    config.task.kwargs = ConfigDict({
        'model': 'llama-3.1-8b', 'overrides': {'num_layers': 32}, 'base': '', 'frozen': True, 'remat': 'none',
        'chunk': 2048,
        'head': {'horizon': 4, 'rank': 4, 'mode': 'lowrank_shared', 'inner_rank': 64, 'draft_vocab': 16384}})
    config.data.update({'dataset': 'c4', 'tokenizer': 'llama31_tokenizer', 'seq_len': 4096, 'batch_size': 16})
    config.optimizer.update({'learning_rate': 3e-4, 'warmup_steps': 500, 'weight_decay': 0.0})
    config.num_steps = 20_000
    config.compute_dtype = 'bfloat16'
    config.mesh.data = -1  # every chip
    config.eval.update({'every': 1000, 'batches': 16})
    config.checkpoint.update({'every': 500})
    config.rehearse.update({'decode_batch': 8, 'mesh': {'data': -1, 'model': 8}})
    return config
