"""Brings one pinned package archive here: a wheel by `pip download`, an sdist by the simple index, npm by `npm pack`.

Nothing is installed or built, and no dependency comes along. Every failure is a one-line FetchError.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from backbone.errors import FetchError

Progress = Callable[[int], None]  # told how many bytes of the archive are here by now

_OFFLINE = ('connection', 'timed out', 'timeout', 'name resolution', 'name or service', 'econnrefused', 'enotfound',
            'eai_again', 'etimedout', 'network is unreachable', 'proxy')


def bring(registry: str, name: str, version: str, folder: Path, progress: Progress) -> Path:
    """Downloads NAME==VERSION from `registry` ('wheel', 'sdist' or 'npm') into the empty `folder`; the archive's path.

    Errors: FetchError (no network, no such version, no npm, disk full).
    """
    return {'wheel': _wheel, 'sdist': _sdist, 'npm': _npm}[registry](name, version, folder, progress)


def _wheel(name: str, version: str, folder: Path, progress: Progress) -> Path:
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:',
               '--ignore-requires-python', '--no-cache-dir', '--disable-pip-version-check', '--retries=1',
               '--dest', str(folder / 'done'), f'{name}=={version}']
    # pip streams into TMPDIR and moves the whole file to --dest.
    return _run(command, f'{name}=={version}', folder, progress, TMPDIR=str(folder))


def _npm(name: str, version: str, folder: Path, progress: Progress) -> Path:
    npm = shutil.which('npm')
    if npm is None:
        raise FetchError(f'{name}@{version} comes from the npm registry and `npm` is not installed: install Node.js')
    (folder / 'done').mkdir()
    command = [npm, 'pack', '--loglevel=error', '--fetch-retries=1', '--fetch-retry-mintimeout=500',
               '--pack-destination', str(folder / 'done'), f'{name}@{version}']
    return _run(command, f'{name}@{version}', folder, progress, npm_config_cache=str(folder / 'npm'),
                npm_config_update_notifier='false')


def _run(command: list[str], what: str, folder: Path, progress: Progress, **env: str) -> Path:
    """Runs a registry client that leaves one file in folder/done, watching how much has arrived below `folder`."""
    log = folder / 'log'
    with log.open('w') as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   env=os.environ | env)
        try:
            while process.poll() is None:
                progress(_bytes_below(folder))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    files = list((folder / 'done').glob('*')) if process.returncode == 0 else []
    if len(files) != 1:
        raise FetchError(f'{what}: {_reason(log.read_text(errors="replace"))}')
    progress(files[0].stat().st_size)
    return files[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob('*'):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # the client moved it meanwhile
            pass
    return total


def _reason(log: str) -> str:
    """The one line of a client's log that a person needs."""
    lower = log.lower()
    if 'no space left' in lower or 'enospc' in lower:
        return 'disk full while downloading'
    if any(word in lower for word in _OFFLINE):
        return 'no network: the package registry cannot be reached'
    lines = [line for line in log.splitlines() if re.match(r'(?i)(npm )?err(or)?\b', line)] or log.splitlines()
    return lines[-1].strip() if lines else 'the download failed and its client said nothing'


# pip resolves its own settings (files, environment), so that a mirror configured for pip serves here as well.
_SETTINGS = '''
import json
from pip._internal.commands import create_command
options, _ = create_command('download').parse_args([])
print(json.dumps({'indexes': [options.index_url, *options.extra_index_urls], 'cert': options.cert}))
'''


def _sdist(name: str, version: str, folder: Path, progress: Progress) -> Path:
    """`pip download` would build an sdist to learn its metadata; so take the file by the index itself."""
    asked = subprocess.run([sys.executable, '-c', _SETTINGS], capture_output=True, text=True)
    if asked.returncode:
        raise FetchError(f'{name}=={version}: pip is needed to find the package index: {_reason(asked.stderr)}')
    settings = json.loads(asked.stdout)
    pinned = re.compile(rf'{re.sub("[-_.]", "[-_.]", name)}-{re.escape(version)}\.tar\.gz', re.IGNORECASE)
    trouble = f'no source archive of version {version} in the package index'
    for index in settings['indexes']:
        try:
            url = _find(index.rstrip('/') + f'/{name}/', pinned, settings['cert'])
            if url:
                return _stream(url, folder / f'{name}-{version}.tar.gz', settings['cert'], progress)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            if getattr(error, 'code', None) != 404:
                trouble = _reason(f'connection: {error}')
    raise FetchError(f'{name}=={version}: {trouble}')


def _find(page: str, pinned: re.Pattern, cert: str | None) -> str | None:
    """The address of the pinned file in one index page (PEP 691 JSON, else PEP 503 HTML)."""
    if page.startswith('file:'):
        page += 'index.html'
    with _open(page, cert, 'application/vnd.pypi.simple.v1+json, text/html;q=0.1') as answer:
        text, base = answer.read().decode(), answer.geturl()
    if text.lstrip().startswith('{'):
        links = [(item['filename'], item['url']) for item in json.loads(text)['files']]
    else:
        links = [(name.strip(), url) for url, name in re.findall(r'<a[^>]*href="([^"]+)"[^>]*>([^<]+)</a>', text)]
    return next((urllib.parse.urljoin(base, url) for name, url in links if pinned.fullmatch(name)), None)


def _stream(url: str, path: Path, cert: str | None, progress: Progress) -> Path:
    with _open(url, cert, '*/*') as source, path.open('wb') as sink:
        while chunk := source.read(1 << 18):
            sink.write(chunk)
            progress(sink.tell())
    return path


def _open(url: str, cert: str | None, accept: str):
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition('@')[2])),
                                     headers={'Accept': accept, 'User-Agent': 'headway'})
    if parts.username:
        login = f'{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or "")}'
        request.add_header('Authorization', 'Basic ' + base64.b64encode(login.encode()).decode())
    return urllib.request.urlopen(request, timeout=60, context=ssl.create_default_context(cafile=cert))
