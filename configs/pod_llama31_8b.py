"""Llama-3.1-8B's shape trained from scratch on a TPU v5e pod slice.

    headway-rehearse --config=configs/pod_llama31_8b.py --topology=v5e:16x16       # 256 chips
    headway-rehearse --config=configs/pod_llama31_8b.py:4x4 --topology=v5e:4x4     # 16 chips, a smaller batch
    headway-train --distributed --config=configs/pod_llama31_8b.py --workdir=/mnt/share/llama31_8b \\
        --config.data.manual_dir=DIR --config.data.tokenizer=DIR                   # on every host; see docs/pods.md

bfloat16 compute, float32 master weights and AdamW, split over every chip (FSDP), every layer computed again in the
backward pass. What the TPU compiler says of memory and time is tabled in docs/pods.md.
"""

from ml_collections import ConfigDict

from configs import training


def get_config(variant: str = ''):
    config = training.defaults()
    # One row a chip: its logits fit at once, and the vocabulary's weights are gathered once a step, not once a chunk.
    config.task.kwargs = ConfigDict({'model': 'llama-3.1-8b', 'overrides': {'num_layers': 32}, 'remat': 'full',
                                     'loss_chunk': 0, 'query_chunk': 512})
    config.data.update({'dataset': 'c4', 'tokenizer': 'llama31_tokenizer', 'seq_len': 4096, 'batch_size': 256})
    config.optimizer.update({'learning_rate': 3e-4, 'warmup_steps': 2000})
    config.num_steps = 100_000
    config.compute_dtype = 'bfloat16'
    config.mesh.data = -1  # every chip
    config.eval.update({'every': 1000, 'batches': 16})
    config.checkpoint.update({'every': 500, 'keep_every': 10_000})
    config.rehearse.update({'decode_batch': 64, 'mesh': {'data': -1, 'model': 8}})
    if variant == '4x4':
        config.data.batch_size = 16
        config.rehearse.decode_batch = 8
    elif variant:
        raise ValueError(f'unknown variant {variant!r}, known: 4x4')
    return config
