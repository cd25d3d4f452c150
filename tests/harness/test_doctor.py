"""The doctor: finds what is wrong, says how to mend it, and never falls over itself."""

import pytest

from backbone import catalogue
from harness import doctor


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('HEADWAY_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    return tmp_path / 'cache'


def by_name(checks):
    return {check.name: check for check in checks}


def test_every_check_runs_and_every_fault_has_a_remedy(cache, tmp_path):
    checks = doctor.examine(workdir=tmp_path / 'out')
    names = by_name(checks)
    assert {'python', 'packages', 'devices', 'memory', 'mesh', 'c compiler', 'cache', 'disk', 'compilation cache',
            'workdir', 'smollm2-135m', 'mt_bench'} == set(names)
    assert all(check.mend for check in checks if check.state != 'ok')
    assert [c for c in checks if c.state == 'wrong' and c.name != 'disk'] == []
    assert names['smollm2-135m'].state == 'note' and 'not fetched' in names['smollm2-135m'].found
    assert not (tmp_path / 'out').exists()  # looking leaves nothing behind


def test_a_damaged_file_is_wrong_and_named(cache):
    entry = catalogue.ENTRIES['mt_bench']
    path = entry.path(cache / 'mt_bench')
    path.parent.mkdir(parents=True)
    path.write_bytes(b'x' * entry.files[0].size)
    check = by_name(doctor.examine(models=('mt_bench',)))['mt_bench']
    assert check.state == 'wrong'
    assert str(path) in check.found and entry.files[0].sha256 in check.found
    assert 'fetch mt_bench' in check.mend


def test_an_unknown_model_is_wrong(cache):
    assert by_name(doctor.examine(models=('gpt-9',)))['gpt-9'].state == 'wrong'


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    blocked = tmp_path / 'file'
    blocked.write_text('a file where a folder should be')
    monkeypatch.setenv('HEADWAY_CACHE', str(blocked / 'cache'))
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    assert doctor.cache_folder().state == 'wrong' and 'HEADWAY_CACHE' in doctor.cache_folder().mend
    assert doctor.output_folder(blocked / 'out').state == 'wrong'
    assert doctor.compiled_programs().state == 'note'


def test_a_package_outside_its_bounds_is_wrong(monkeypatch):
    monkeypatch.setattr(doctor, 'NEEDED', {'jax': ('99.0', None), 'no-such-package-here': ('1', None)})
    check = doctor.packages()
    assert check.state == 'wrong'
    assert 'needed is >=99.0' in check.found and 'no-such-package-here is missing' in check.found


def test_too_little_disk_is_wrong(cache, monkeypatch):
    monkeypatch.setattr(doctor, 'MIN_FREE_GB', 1e9)
    assert doctor.disk().state == 'wrong'


def test_a_check_that_breaks_is_a_finding():
    def broken():
        raise RuntimeError('oh')
    check = doctor._guarded(broken)
    assert check.state == 'wrong' and 'oh' in check.found


def test_the_table_says_what_to_do(cache, tmp_path):
    checks = [doctor.Check('a', 'ok', 'fine'), doctor.Check('b', 'wrong', 'broken', 'mend it so')]
    text = doctor.table(checks)
    assert '-> mend it so' in text and '1 of 2 checks found a fault' in text
    assert 'everything a run needs is here' in doctor.table(checks[:1])
