"""The published setting of RAD, for rehearsals and for a pod: Llama-3.1-8B teaches Llama-3.2-3B, 14 of 28 layers.

    headway-rehearse --config=configs/rad_pod.py --topology=v5e:16x16              # 256 chips
    headway-rehearse --config=configs/rad_pod.py:4x4 --topology=v5e:4x4            # 16 chips, a smaller batch
    headway-train --distributed --config=configs/rad_pod.py --workdir=/mnt/share/rad_3b \\
        --config.task.kwargs.base=DIR --config.task.kwargs.model= --config.task.kwargs.teacher=DIR \\
        --config.task.kwargs.layers=set.json --config.data.manual_dir=DIR --config.data.tokenizer=DIR
                                                                               # on every host; see docs/pods.md

Sizes of teacher and student are those of the paper's opening (Hoshino et al., 2025, arXiv 2505.22135) and of second
hands; the number of layers, batch, length, steps and learning rate are ours, for none could be read. `/self` leaves the
teacher out, `/all` trains everything, as the hybrids it is compared with are (Wang et al., 2024, arXiv 2408.15237).
bfloat16 compute, float32 mixers and AdamW, all split over every chip (FSDP), every layer computed again in the backward
pass; the laws of both models meet 256 positions at a time. What the TPU compiler says of it: docs/rad.md.
"""

from ml_collections import ConfigDict

from configs import training


def get_config(variant: str = ''):
    options = set(variant.split('/')) - {''}
    if unknown := options - {'4x4', 'self', 'all'}:
        raise ValueError(f'unknown variant {", ".join(sorted(unknown))!r}, known: 4x4, self, all, joined by /')
    config = training.defaults()
    config.task.factory = 'rad.task.build'
    config.task.kwargs = ConfigDict({
        'model': 'llama-3.2-3b', 'base': '', 'teacher': '' if 'self' in options else 'llama-3.1-8b',
        'layers': 'evenly', 'count': 14, 'train': 'all' if 'all' in options else 'ssm_only', 'remat': 'full',
        'loss_chunk': 256, 'query_chunk': 512, 'rad': {'ssm': {'chunk': 128}}})
    config.data.update({'dataset': 'c4', 'tokenizer': 'llama31_tokenizer', 'seq_len': 2048, 'batch_size': 256})
    config.optimizer.update({'learning_rate': 2e-4, 'warmup_steps': 500, 'weight_decay': 0.01,
                             'no_decay': (r'.*/(scale|bias|A_log|dt_bias|D)',)})
    config.num_steps = 40_000
    config.compute_dtype = 'bfloat16'
    config.mesh.data = -1  # every chip
    config.eval.update({'every': 1000, 'batches': 16})
    config.checkpoint.update({'every': 500})
    config.rehearse.update({'decode_batch': 64, 'mesh': {'data': -1, 'model': 8}})
    if '4x4' in options:
        config.data.batch_size = 16
        config.rehearse.decode_batch = 8
    return config
