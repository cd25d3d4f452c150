"""The catalogue against real clients (pip, npm) and a registry of toys on the loopback interface."""

import contextlib
import errno
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from backbone import catalogue, registries
from backbone.catalogue import Entry, File, Package
from backbone.errors import FetchError

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND = b'first part, ' * 1000, 'second part, ü'.encode() * 1000
BRING = registries.bring
needs_npm = pytest.mark.skipif(shutil.which('npm') is None, reason='npm is not installed')


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(name: str, members: dict[str, bytes]) -> bytes:
    info = f'{name.replace("-", "_")}-1.0.dist-info'
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as box:
        for member, data in members.items():
            box.writestr(member, data)
        box.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
        box.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        box.writestr(f'{info}/RECORD', '')
    return out.getvalue()


def tarball(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as box:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            box.addfile(info, io.BytesIO(data))
    return out.getvalue()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def registry(tmp_path_factory):
    """A package index: toy wheels, an sdist (its setup.py fails, as it must never run), an npm package."""
    root = tmp_path_factory.mktemp('registry')
    files = {'toy_part1-1.0-py3-none-any.whl': wheel('toy-part1', {'toy/a.bin': FIRST, 'toy/b.txt.gz':
                                                                   gzip.compress(SECOND)}),
             'toy_part2-1.0-py3-none-any.whl': wheel('toy-part2', {'toy/a.bin': SECOND}),
             'toy_source-1.0.tar.gz': tarball({'toy_source-1.0/setup.py': b'raise SystemExit("never run")',
                                               'toy_source-1.0/data.gz': gzip.compress(SECOND)}),
             'toy_broken-1.0.tar.gz': tarball({'toy_broken-1.0/data.gz': gzip.compress(SECOND)})[:-900]}
    for name, data in files.items():
        package = name.split('-')[0].replace('_', '-')
        folder = root / 'simple' / package
        folder.mkdir(parents=True)
        (folder / name).write_bytes(data)
        (folder / 'index.html').write_text(f'<html><body><a class="x" href="{name}#sha256={sha(data)}">{name}</a>')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=root))
    url = f'http://127.0.0.1:{server.server_port}'
    packed = tarball({'package/package.json': b'{"name": "toy-npm", "version": "1.0.0"}',
                      'package/data.bin': FIRST + SECOND})
    (root / 'toy-npm.tgz').write_bytes(packed)
    (root / 'npm').mkdir()
    dist = {'tarball': f'{url}/toy-npm.tgz', 'shasum': hashlib.sha1(packed).hexdigest()}
    (root / 'npm' / 'toy-npm').write_text(json.dumps({
        'name': 'toy-npm', 'dist-tags': {'latest': '1.0.0'},
        'versions': {'1.0.0': {'name': 'toy-npm', 'version': '1.0.0', 'dist': dist}}}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield url, root
    server.shutdown()
    server.server_close()


def use(monkeypatch, url: str) -> None:
    for name in [name for name in os.environ if name.startswith('PIP_')]:
        monkeypatch.delenv(name)
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_INDEX_URL', f'{url}/simple')
    monkeypatch.setenv('npm_config_registry', f'{url}/npm/')
    monkeypatch.setenv('no_proxy', '127.0.0.1')


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('HEADWAY_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture
def toys(monkeypatch, registry, cache):
    """Toy entries over every kind of package, their archives copied rather than downloaded; the cache folder."""
    def copy(kind, name, version, folder, progress):
        files = list((registry[1] / 'simple' / name).glob(f'*-{version}*'))
        return Path(shutil.copy(files[0], folder / f'{name}-{version}{"".join(files[0].suffixes[-2:])}'))

    monkeypatch.setattr(registries, 'bring', copy)
    one, two = Package('wheel', 'toy-part1', '1.0', 500), Package('wheel', 'toy-part2', '1.0', 500)
    source, npm = Package('sdist', 'toy-source', '1.0', 500), Package('npm', 'toy-npm', '1.0.0', 500)
    both = FIRST + SECOND
    added = {
        'toy': Entry('text', 'toy', 'MIT', (one,), (File('a', len(FIRST), sha(FIRST), ('toy/a.bin',)),)),
        'toy_sibling': Entry('text', 'toy', 'MIT', (one,), (File('b', len(SECOND), sha(SECOND), ('toy/b.txt.gz',)),)),
        'toy_parts': Entry('model', 'toy', 'MIT', (one, two),
                           (File('ab', len(both), sha(both), ('toy/a.bin', 'toy/a.bin')),)),
        'toy_source': Entry('text', 'toy', 'MIT', (source,),
                            (File('data', len(SECOND), sha(SECOND), ('toy_source-1.0/data.gz',)),)),
        'toy_npm': Entry('text', 'toy', 'MIT', (npm,),
                         (File('head', 100, sha(both[:100]), ('package/data.bin',), 0, 100),
                          File('rest', len(both) - 100, sha(both[100:]), ('package/data.bin',), 100, len(both)))),
        'toy_wrong': Entry('text', 'toy', 'MIT', (two,), (File('a', len(SECOND), sha(FIRST), ('toy/a.bin',)),)),
        'toy_lost': Entry('text', 'toy', 'MIT', (two,), (File('a', 1, sha(b''), ('toy/none.bin',)),)),
        'toy_broken': Entry('text', 'toy', 'MIT', (Package('sdist', 'toy-broken', '1.0', 500),),
                            (File('data', len(SECOND), sha(SECOND), ('toy_broken-1.0/data.gz',)),)),
        'toy_absent': Entry('text', 'toy', 'MIT', (Package('wheel', 'toy-part1', '9.9', 500),),
                            (File('a', 1, sha(b''), ('a',)),)),
        'toy_absent_source': Entry('text', 'toy', 'MIT', (Package('sdist', 'toy-source', '9.9', 500),),
                                   (File('a', 1, sha(b''), ('a',)),)),
    }
    # toy_wrong and toy_lost share a package; each is looked at alone.
    for key, entry in added.items():
        monkeypatch.setitem(catalogue.ENTRIES, key, entry)
    return cache


@pytest.fixture
def clients(toys, registry, monkeypatch):
    """The same, through pip, npm and the index."""
    monkeypatch.setattr(registries, 'bring', BRING)
    use(monkeypatch, registry[0])
    return toys


def leftovers(cache: Path) -> list[Path]:
    """Whatever a failure may have left: temporary names, or files of an entry."""
    return [path for path in cache.rglob('*') if path.is_file() and path.name != '.lock'] if cache.exists() else []


def error_of(key: str) -> str:
    with pytest.raises(FetchError) as caught:
        catalogue.fetch(key)
    message = str(caught.value)
    assert message.startswith(f'{key}: ') and '\n' not in message and '://' not in message
    return message


def test_wheel_and_its_siblings(clients):
    path = catalogue.fetch('toy')
    assert path == clients / 'toy' / 'a' and path.read_bytes() == FIRST
    assert (clients / 'toy_sibling' / 'b').read_bytes() == SECOND  # one download served both


def test_parts_are_joined_in_order(toys):
    assert catalogue.fetch('toy_parts').read_bytes() == FIRST + SECOND


def test_source_archive_is_never_run(clients):
    assert catalogue.fetch('toy_source').read_bytes() == SECOND


def test_source_archive_from_a_json_index(clients, monkeypatch):
    page = json.dumps({'files': [{'filename': 'toy_source-1.0.tar.gz', 'url': '../toy-source/toy_source-1.0.tar.gz'}]})
    real = registries._open

    @contextlib.contextmanager
    def answer(url, cert, accept):
        with real(url, cert, accept) as response:
            if url.endswith('/'):
                assert 'json' in accept
                response.read = lambda: page.encode()
            yield response

    monkeypatch.setattr(registries, '_open', answer)
    assert catalogue.fetch('toy_source').read_bytes() == SECOND


@needs_npm
def test_npm_slices(clients):
    folder = catalogue.fetch('toy_npm')
    assert folder == clients / 'toy_npm'
    assert (folder / 'head').read_bytes() + (folder / 'rest').read_bytes() == FIRST + SECOND


def test_second_fetch_neither_downloads_nor_hashes(toys, monkeypatch):
    path = catalogue.fetch('toy')
    monkeypatch.setattr(registries, 'bring', lambda *_: pytest.fail('downloaded again'))
    monkeypatch.setattr(catalogue.hashlib, 'file_digest', lambda *_: pytest.fail('hashed again'))
    assert catalogue.fetch('toy') == path


def test_touched_file_is_hashed_again_but_not_downloaded(toys, monkeypatch):
    path = catalogue.fetch('toy')
    os.utime(path, ns=(1, 1))
    monkeypatch.setattr(registries, 'bring', lambda *_: pytest.fail('downloaded again'))
    assert catalogue.fetch('toy') == path
    monkeypatch.setattr(catalogue.hashlib, 'file_digest', lambda *_: pytest.fail('hashed twice'))
    assert catalogue.fetch('toy') == path


@pytest.mark.parametrize('damage', [b'', FIRST[:-1], FIRST + b'x', b'X' + FIRST[1:]])
def test_damaged_cache_is_noticed_and_mended(toys, damage, capsys):
    path = catalogue.fetch('toy')
    path.write_bytes(damage)
    os.utime(path, ns=(1, 1))  # a coarse clock would hide a change of the same size
    assert catalogue.fetch('toy').read_bytes() == FIRST
    assert 'fetching it again' in capsys.readouterr().err


def test_damage_under_an_unchanged_time_is_found_by_verify(toys):
    path = catalogue.fetch('toy')
    stat = path.stat()
    path.write_bytes(b'X' + FIRST[1:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert catalogue.verify('toy') == {'a': f'has sha256 {sha(b"X" + FIRST[1:])}, not {sha(FIRST)}'}


def test_damaged_cache_without_network_names_both(toys, monkeypatch):
    path = catalogue.fetch('toy')
    path.write_bytes(FIRST[:10])
    monkeypatch.setattr(registries, 'bring', BRING)
    use(monkeypatch, closed_port())
    message = error_of('toy')
    assert f'{path} has 10 bytes, not {len(FIRST)}' in message and 'no network' in message


def test_wrong_hash_names_both(toys, monkeypatch):
    monkeypatch.delitem(catalogue.ENTRIES, 'toy_lost')
    assert f'a has sha256 {sha(SECOND)}, the catalogue says {sha(FIRST)}' in error_of('toy_wrong')
    assert leftovers(toys) == []


def test_a_sibling_with_a_wrong_hash_is_not_kept(toys, monkeypatch):
    entry = catalogue.ENTRIES['toy_sibling']
    bad = File('b', len(SECOND), sha(b'?'), entry.files[0].members)
    monkeypatch.setitem(catalogue.ENTRIES, 'toy_sibling', Entry('text', 'toy', 'MIT', entry.packages, (bad,)))
    assert catalogue.fetch('toy').read_bytes() == FIRST
    assert not (toys / 'toy_sibling').exists()


def test_missing_member(toys, monkeypatch):
    monkeypatch.delitem(catalogue.ENTRIES, 'toy_wrong')
    assert 'has no member toy/none.bin' in error_of('toy_lost')
    assert leftovers(toys) == []


def test_truncated_archive(toys):
    assert 'toy-broken-1.0.tar.gz is damaged' in error_of('toy_broken')
    assert leftovers(toys) == []


def test_no_such_version(clients):
    assert '9.9' in error_of('toy_absent')
    assert 'no source archive of version 9.9' in error_of('toy_absent_source')


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return f'http://127.0.0.1:{probe.getsockname()[1]}'


@pytest.mark.parametrize('key', ['toy', 'toy_source', pytest.param('toy_npm', marks=needs_npm)])
def test_no_network(clients, monkeypatch, key):
    use(monkeypatch, closed_port())
    assert 'no network: the package registry cannot be reached' in error_of(key)
    assert leftovers(clients) == []


def test_no_npm(clients, monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert '`npm` is not installed' in error_of('toy_npm')


def test_unknown_key():
    with pytest.raises(FetchError, match="unknown catalogue key 'smollm3'; known: smollm2-135m, "):
        catalogue.fetch('smollm3')


def test_disk_full(toys, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(catalogue._Sink, 'write', full)
    assert 'disk full while writing' in error_of('toy')
    assert leftovers(toys) == []


@pytest.mark.parametrize('code', [errno.EROFS, errno.EACCES])
def test_cache_not_writable(toys, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, 'mkdir', refuse)
    message = error_of('toy')
    assert f'cannot write the cache {toys}' in message and 'set HEADWAY_CACHE' in message


def test_read_only_cache_still_serves(toys, monkeypatch):
    path = catalogue.fetch('toy')
    catalogue._stamp_path(path).unlink()

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, 'write_text', refuse)
    assert catalogue.fetch('toy') == path


def test_cache_path_is_a_file(toys, monkeypatch, tmp_path):
    (tmp_path / 'plain').write_text('')
    monkeypatch.setenv('HEADWAY_CACHE', str(tmp_path / 'plain'))
    assert 'plain' in error_of('toy')


def test_leftovers_of_a_killed_process_are_removed(toys):
    left = toys / '.partial-killed'
    left.mkdir(parents=True)
    (left / 'half').write_bytes(b'half')
    catalogue.fetch('toy')
    assert not left.exists() and not list(toys.glob('.partial-*'))


def test_two_processes_at_once(clients):
    code = ("import sys; from backbone import catalogue as c, registries\n"
            "e = c.Entry('text', 'toy', 'MIT', (c.Package('wheel', 'toy-part1', '1.0', 5),),\n"
            f"            (c.File('a', {len(FIRST)}, '{sha(FIRST)}', ('toy/a.bin',)),))\n"
            "c.ENTRIES['toy'] = e; print(c.fetch('toy'))\n")
    running = [subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert sum('fetching toy' in err for _, err in outputs) == 1, outputs
    assert (clients / 'toy' / 'a').read_bytes() == FIRST


def test_command_line(toys, capsys):
    assert catalogue.main(['fetch', 'toy', 'stdlib']) == 0
    assert f'toy: {toys / "toy" / "a"}' in capsys.readouterr().out
    assert catalogue.main(['verify']) == 0
    assert 'toy: ok' in capsys.readouterr().out
    (toys / 'toy' / 'a').write_bytes(b'x')
    assert catalogue.main(['verify', 'toy']) == 2
    assert catalogue.main(['list']) == 0
    lines = capsys.readouterr().out
    assert all(key in lines for key in catalogue.ENTRIES)
    assert catalogue.main(['fetch', 'nothing']) == 2
    assert capsys.readouterr().err.startswith("headway: error: unknown catalogue key 'nothing'")


def test_entries_are_complete():
    """Every file has a whole sha256 and a size, and as many members as its entry has packages."""
    for key, entry in catalogue.ENTRIES.items():
        assert bool(entry.local) != bool(entry.packages), key
        assert entry.kind in ('model', 'eval', 'text') and entry.licence, key
        for file in entry.files:
            assert len(file.sha256) == 64 and int(file.sha256, 16) and file.size > 0, key
            assert len(file.members) == len(entry.packages), key
    assert (catalogue.fetch('stdlib') / 'heapq.py').exists()


def test_a_real_entry():
    """Whatever the registries hold today, the questions the suite decodes are the pinned ones."""
    try:
        path = catalogue.fetch('mt_bench')
    except FetchError as error:
        pytest.skip(f'mt_bench: {error}')
    lines = path.read_text().splitlines()
    assert len(lines) == 80 and all(len(json.loads(line)['turns']) == 2 for line in lines)
    assert catalogue.verify('mt_bench') == {}
