"""Gates for trained accelerators (m2r2/gate_task.py): which tokens may leave at which exit.

    headway-train --config=configs/m2r2_smollm2.py:exits --workdir=out/m2r2_smollm2_exits     # the accelerators
    python -m harness.launch.artefact --workdir=out/m2r2_smollm2_exits --name=m2r2_smollm2_exits
    headway-train --config=configs/m2r2_gates.py --workdir=out/m2r2_smollm2_gates
    headway-train --config=configs/m2r2_gates.py --config.task.kwargs.gate.kind=mlp --workdir=out/m2r2_smollm2_gates_mlp

`:deed` are gates for the control of configs/m2r2_smollm2.py, `:stories` for the accelerators of
configs/m2r2_stories.py; `:draft` is one for the drafter, to stop its drafts (scripts/m2r2_artefact.py --drafts);
`:tiny` trains on a random model in seconds. What they read: gate.kind, one of m2r2.gates.KINDS
that do not read the head. scripts/m2r2_tradeoff.py then calibrates thresholds and measures.
"""

from configs import m2r2_smollm2, m2r2_stories, training


def get_config(variant: str = ''):
    smollm2 = m2r2_smollm2.get_config('' if variant == 'draft' else 'exits')
    config = m2r2_stories.get_config() if variant == 'stories' else smollm2
    config.task.factory = 'm2r2.gate_task.build'
    base, m2r2 = config.task.kwargs.base, config.task.kwargs.m2r2
    if variant in ('', 'deed'):
        m2r2.stream = 'exit' if variant else 'fast'
        accelerators = f'zoo/m2r2_smollm2_{variant or "exits"}'
    elif variant == 'stories':
        accelerators = 'zoo/m2r2_stories'
    elif variant == 'draft':
        accelerators = 'zoo/m2r2_smollm2_draft'
    elif variant == 'tiny':
        accelerators = ''
    else:
        raise ValueError(f'unknown variant {variant!r}, known: deed, stories, draft, tiny')
    config.task.kwargs = {'base': base, 'accelerators': accelerators, 'cached': True, 'm2r2': m2r2,
                          'gate': {'kind': 'arla_depth', 'size': 32}, 'label_chunk': 64}
    config.optimizer.update({'learning_rate': 3e-3, 'warmup_steps': 20, 'weight_decay': 0.0})
    if variant == 'draft':  # in one layer there is little depth to attend over
        config.task.kwargs.gate.kind = 'mlp'
        config.data.batch_size = 8
    config.num_steps = 60  # a gate is small: its loss is flat from there
    config.eval.update({'every': 30, 'batches': 4})
    config.checkpoint.every = 30
    if variant == 'tiny':
        make_tiny(config)
    return config


def make_tiny(config) -> None:
    """A random base, bytes of source code: nothing to download."""
    config.task.kwargs = {
        'model': training.llama(vocab=257, hidden=64, layers=4, heads=2, kv_heads=2, intermediate=176, max_seq_len=256),
        'm2r2': {'exits': (1, 3), 'rank': 8}, 'gate': {'kind': 'arla_depth', 'size': 16}}
    config.data.update({'dataset': 'stdlib', 'manual_dir': '', 'tokenizer': 'bytes', 'seq_len': 64, 'batch_size': 8})
    config.compute_dtype = 'float32'
    config.num_steps = 30
    config.optimizer.warmup_steps = 5
    config.eval.update({'every': 15, 'batches': 2})
    config.checkpoint.every = 15
