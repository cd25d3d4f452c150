"""Llama-3.2-1B's shape trained from scratch on one TPU v5e host of eight chips, or on more of them.

    headway-rehearse --config=configs/pod_llama32_1b.py --topology=v5e:2x4
    headway-train --config=configs/pod_llama32_1b.py --workdir=out/llama32_1b \\
        --config.data.manual_dir=DIR --config.data.tokenizer=DIR

bfloat16 compute, float32 master weights and AdamW split over the chips (FSDP), every layer computed again in the
backward pass, eight microbatches of one row a chip in a step.
"""

from configs import pod_llama31_8b


def get_config(variant: str = ''):
    if variant:
        raise ValueError(f'unknown variant {variant!r}, there is none')
    config = pod_llama31_8b.get_config()
    config.task.kwargs.update({'model': 'llama-3.2-1b', 'overrides': {'num_layers': 16}})
    config.data.update({'seq_len': 4096, 'batch_size': 64})
    config.optimizer.update({'learning_rate': 6e-4, 'accumulate': 8})
    config.rehearse.update({'decode_batch': 16, 'mesh': {'data': -1, 'model': 4}})
    return config
