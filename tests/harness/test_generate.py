"""The command line of generation, in process on a tiny model and once for real on SmolLM2."""

import importlib
import json
import subprocess
import sys

import pytest
from absl import flags

from backbone.errors import ConfigError, RequestError
from harness import drafters, generation, prompts
from harness.launch import generate as cli
from tests.conftest import tiny_config


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-m', 'harness.launch.generate', *arguments], capture_output=True, text=True,
                          timeout=300)


@pytest.mark.parametrize('drafter', ['tensorhead_smollm2_r4', pytest.param('none', marks=pytest.mark.slow)])
def test_the_real_model_streams_and_reports(drafter):
    """Greedy text of a real model, the same with and without a drafter, and the figures at the end."""
    done = run('--model=smollm2-135m', '--prompt=The capital of France is', f'--drafter={drafter}',
               '--max_new_tokens=12')
    assert done.returncode == 0, done.stderr
    assert 'tokens/s' in done.stderr and 'accepted a round' in done.stderr and 'cpu' in done.stderr
    assert done.stdout.strip('\n') == ' Paris.\n\nThe answer is: 201'


@pytest.mark.parametrize(('arguments', 'named'), (
    (['--prompt=hello', '--temperature=-1'], 'temperature'),
    (['--prompt=hello', '--top_p=0'], 'top_p'),
    (['--prompt=hello', '--top_p=1.5'], 'top_p'),
    (['--prompt='], 'empty'),
    ([], '--prompt'),
    (['--prompt=a', '--batch_file=b'], 'either'),
    (['--prompt=hello', '--drafter=magic'], 'magic'),
    (['--prompt=hello', '--drafter=early_exit', '--drafter_args=layer=99'], 'layer'),
    (['--prompt=hello', '--drafter=prompt_lookup', '--drafter_args=blok=3'], 'blok'),
    (['--prompt=hello', '--drafter=prompt_lookup', '--drafter_args=block=x'], 'block=x'),
    (['--prompt=hello', '--max_new_tokens=0'], 'max_new_tokens'),
    (['--prompt=hello', '--max_new_tokens=8192'], '8192'),
    (['--model=no-such-model', '--prompt=hello'], 'no-such-model'),
    (['--prompt=hello', '--out=/proc/none/x', '--batch_file='], 'either'),
))
def test_bad_input_is_one_line_and_exit_2(arguments, named, capsys, monkeypatch):
    """In process (the same guard as the console script), because each start would cost seconds."""
    flags.FLAGS.unparse_flags()
    importlib.reload(cli)   # commands share names of flags: one that another test imported may have the last word
    monkeypatch.setattr(sys, 'argv', ['headway-generate', '--model=smollm2-135m', *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.cli()
    captured = capsys.readouterr()
    assert stop.value.code == 2
    errors = [line for line in captured.err.splitlines() if line.startswith('headway: error:')]
    assert len(errors) == 1 and named in errors[0]
    assert 'Traceback' not in captured.err


def test_an_unknown_flag_is_named():
    done = run('--promt=hello')
    assert done.returncode == 2
    assert 'promt' in done.stderr and 'Traceback' not in done.stderr


def test_batch_file(tmp_path, monkeypatch):
    source = tmp_path / 'prompts.txt'
    source.write_text('one\ntwo three\n')
    assert generation.read_prompts(None, str(source)) == ['one', 'two three']
    source.write_text(''.join(f'{i}\n' for i in range(10)))
    assert generation.read_prompts(None, str(source), 4) == ['0', '2', '5', '7'], 'spread evenly'
    assert len(generation.read_prompts(None, str(source), 11)) == 10
    with pytest.raises(RequestError, match='limit'):
        generation.read_prompts(None, str(source), -1)
    for content, named in ((b'', 'no prompt'), (b'a\n\nb\n', 'line 2'), (b'\xff\xfe', 'UTF-8')):
        source.write_bytes(content)
        with pytest.raises(RequestError, match=named):
            generation.read_prompts(None, str(source))
    with pytest.raises(RequestError, match='cannot read'):
        generation.read_prompts(None, str(tmp_path / 'absent'))


def test_first_messages_of_conversations(tmp_path):
    """Short openings by people, of a JSON list that was cut in the middle of a row."""
    def row(name, *turns):
        return json.dumps({'id': name, 'conversations': [{'from': who, 'value': text} for who, text in turns]})
    long = 'x' * (prompts.SHAREGPT_CHARACTERS + 1)
    rows = [row('a_0', ('human', ' Hello there. '), ('gpt', 'Hi.')), row('a_1', ('human', 'go on')), row('b_0'),
            row('c_0', ('gpt', 'I begin')), row('d_0', ('human', long)), row('e_0', ('human', 'Why?\nReally?'))]
    path = tmp_path / 'cut.json'
    path.write_text('[\n  ' + ',\n  '.join(rows) + ', {"id": "f_0", "conversations": [{"from": "human", "val')
    assert list(prompts._first_messages(path)) == ['Hello there.', 'Why?\nReally?']


def test_batch_output_is_whole_or_absent(tmp_path):
    source, out = tmp_path / 'prompts.txt', tmp_path / 'answers.jsonl'
    source.write_text('The capital of France is\n2 + 2 =\n')
    done = run(f'--batch_file={source}', f'--out={out}', '--max_new_tokens=4', '--drafter=prompt_lookup')
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row['prompt'] for row in rows] == ['The capital of France is', '2 + 2 =']
    assert rows[0]['text'].startswith(' Paris') and all(1 <= len(row['tokens']) <= 4 for row in rows)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []


def test_drafters_by_name():
    cfg = tiny_config()
    assert drafters.make('early_exit', cfg, ['block=2']).layer == 2
    assert drafters.make('harness.baselines.PromptLookup', cfg, ['block=5']).block == 5
    with pytest.raises(ConfigError, match='no.such'):
        drafters.make('no.such.Drafter', cfg, [])
