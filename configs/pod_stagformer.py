"""The setting of the StagFormer paper, for rehearsals and for a pod: 36 layers, or two stacks of 18, on the Pile.

    headway-rehearse --config=configs/pod_stagformer.py --topology=v5e:4x4              # 16 chips: two stages of 8
    headway-rehearse --config=configs/pod_stagformer.py:separate/2x2 --topology=v5e:2x2
    headway-train --distributed --config=configs/pod_stagformer.py --workdir=/mnt/share/stagformer \\
        --config.data.manual_dir=DIR --config.data.tokenizer=DIR                   # on every host; see docs/pods.md

A variant is MODEL or MODEL/2x2; models are those of configs/stagformer.py (dense, half, separate, shared, w128, ...).
Shapes as there, but for 16 heads of 96 in place of 12 of 128: whole heads on 4, 8 and 16 chips, as many parameters.
Training: FSDP over every chip, 20 microbatches a step. Decoding: one row; plain models over all chips, stacks on two
stages. What the TPU compiler says of it is tabled in docs/stagformer_pods.md.
"""

from configs import stagformer


def get_config(variant: str = 'separate'):
    model, _, chips = variant.partition('/')
    if chips not in ('', '2x2'):
        raise ValueError(f'unknown variant {variant!r}: MODEL or MODEL/2x2')
    config = stagformer.get_config(f'paper/{model}')
    kwargs = config.task.kwargs
    staggered = 'base' in kwargs
    shape = kwargs.base if staggered else kwargs.model
    shape.attention.update({'num_heads': 16, 'num_kv_heads': 16, 'head_dim': 96})
    kwargs.overrides = {'num_layers': shape.num_layers}
    config.optimizer.accumulate = 20
    model_axis = 4 if chips else 16
    mesh = {'stage': 2, 'model': model_axis // 2} if staggered else {'model': model_axis}
    config.rehearse.update({'mesh': mesh, 'decode_batch': 1, 'prompt': 1024, 'context': 1024, 'unrolled': True})
    return config
