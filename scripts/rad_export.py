"""What a run of distillation leaves behind, each by itself: the hybrid, and the base it was made from.

    python scripts/rad_export.py --workdir=out/rad/stories --out=out/hybrid        # headway-generate --model=out/hybrid
    python scripts/rad_export.py --workdir=out/rad/stories --base=out/base.gguf --form=gguf
    python -m harness.launch.artefact --workdir=out/rad/stories --name=rad_stories   # the mixers alone, for the zoo

--out: weights.safetensors without the attentions that were replaced, a card with the configuration, and the tokenizer.
A hybrid has no Hugging Face or GGUF form; the base has, and is the very one that was distilled from.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone import formats
from backbone.errors import RequestError
from backbone.formats.tensors import Loaded, flatten, params_hash
from harness import artefacts, models, zoo
from rad.config import RadConfig
from rad.export import restore, standalone


def main(args: argparse.Namespace) -> None:
    """Errors: RequestError; those of models.load, zoo.save and formats.save."""
    loaded = models.load(args.workdir)
    kwargs = (loaded.decodes or {}).get('kwargs', {})
    if 'rad' not in kwargs:
        raise RequestError(f'{args.workdir}: no hybrid is trained there')
    if args.base:
        base = Loaded(loaded.config, loaded.params, loaded.tokenizer, loaded.name, params_hash(loaded.params))
        formats.save(base, args.base, args.form, args.dtype, args.overwrite)
        print(f'wrote {args.base}')
    if args.out:
        tree = standalone(RadConfig.of(loaded.config, kwargs['rad']), loaded.tree)
        whole, folder = restore(tree, **kwargs), Path(args.out)
        of_bytes = models.read_config(models.split(args.workdir)[0])['config']['data']['tokenizer'] == 'bytes'
        words = None if of_bytes else models.split(args.workdir)[0] / models.TOKENIZER
        card = artefacts.card_of(args.workdir) | {
            'base': 'itself', 'base_hash': models.hash_of(whole, loaded.decodes),
            'model': {'config': loaded.config.to_dict(), 'decodes': dict(loaded.decodes),
                      'restore': 'rad.export.restore', 'tokenizer': 'bytes' if of_bytes else zoo.TOKENIZER}}
        zoo.save(folder.name, tree, card, folder.parent, args.overwrite, tuple(args.int8), words, limit=None)
        sizes = [sum(np.size(a) for a in flatten(part).values()) for part in (tree, loaded.tree)]
        print(f'wrote {folder}: {sizes[0]:,} scalars of the {sizes[1]:,} of hybrid and base together')


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True, help='the run, with or without @STEP')
    parser.add_argument('--out', default='', help='folder for the hybrid')
    parser.add_argument('--int8', nargs='*', default=[], help='regexes of its matrices stored in int8')
    parser.add_argument('--base', default='', help='file or folder for the base')
    parser.add_argument('--form', default='hf', choices=formats.KINDS, help='of the base')
    parser.add_argument('--dtype', default='f32', help='of the base')
    parser.add_argument('--overwrite', action='store_true')
    return parser.parse_args(argv)


if __name__ == '__main__':
    main(parse())
