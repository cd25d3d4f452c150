"""The house rules that a parser can hold: who may import whom, and how long an entrypoint may be."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
METHODS = {'stagformer', 'm2r2', 'tensorhead', 'rad', 'sparsity'}
ROOMS = {'backbone', 'harness', 'pallas_kernels', 'configs'} | METHODS


def allowed(room: str) -> set[str]:
    if room == 'backbone':
        return {'backbone', 'pallas_kernels'}
    if room == 'pallas_kernels':
        return {'pallas_kernels'}
    if room == 'harness':
        return {'harness', 'backbone', 'pallas_kernels'}
    if room in METHODS:
        return {room, 'backbone', 'pallas_kernels'}
    return {room, 'configs'}  # a config names what it needs by dotted path


def imports(source: str) -> set[str]:
    """Top-level packages a module imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition('.')[0])
    return names


def modules():
    return [path for room in sorted(ROOMS) for path in sorted((ROOT / room).rglob('*.py'))]


@pytest.mark.parametrize('path', modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    forbidden = (imports(path.read_text()) & (ROOMS | {'tests', 'scripts'})) - allowed(room)
    assert not forbidden, f'{room} must not import {", ".join(sorted(forbidden))}'


def test_the_rule_would_catch_a_wrong_import():
    assert imports('import os\ndef f():\n    from harness.decode import generate') == {'os', 'harness'}
    assert 'harness' not in allowed('backbone') and 'm2r2' not in allowed('tensorhead')


@pytest.mark.parametrize('path', sorted((ROOT / 'harness' / 'launch').glob('*.py')), ids=lambda p: p.stem)
def test_entrypoints_are_short(path):
    if path.stem not in ('common', '__init__'):
        assert len(path.read_text().splitlines()) <= 60
