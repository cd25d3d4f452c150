"""The evaluator against plain numpy on a tiny random model, and its prompts against rows written out by hand."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from backbone import catalogue, model, tokenizer, vocabulary
from backbone.config import AttentionConfig, MlpConfig, ModelConfig
from backbone.contract import Output
from backbone.errors import ConfigError, FetchError, RequestError, TokenizerError
from harness import evaluate, provenance, scoring
from harness.launch import common
from harness.scoring import Row, Score, Scorer
from harness.tasks import generation, multiple_choice, perplexity
from harness.tasks.multiple_choice import Question

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def bytes_tokenizer():
    """Every byte is a token, after bos 0 and eos 1."""
    alphabet = sorted(vocabulary._alphabet(), key=vocabulary._alphabet().get)
    return tokenizer.from_gguf_metadata({
        'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.tokens': ['<s>', '</s>', *alphabet],
        'tokenizer.ggml.merges': [], 'tokenizer.ggml.token_type': [vocabulary.CONTROL] * 2 + [vocabulary.NORMAL] * 256,
        'tokenizer.ggml.bos_token_id': 0, 'tokenizer.ggml.eos_token_id': 1})


@pytest.fixture(scope='module')
def tiny():
    """(config, base parameters) of a two-layer model of 258 tokens and context 96."""
    cfg = ModelConfig('llama', 258, 32, 2, 96, AttentionConfig(4, 2, 8), MlpConfig(64), tie_embeddings=True)
    params = jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0))
    return cfg, jax.tree.map(lambda a: a * 6 if a.ndim == 3 else a, params)  # far from the uniform law


@pytest.fixture(scope='module')
def scorer(tiny, bytes_tokenizer):
    return Scorer(tiny[0], {'base': tiny[1]}, bytes_tokenizer, batch_size=4, progress=False)


@functools.partial(jax.jit, static_argnums=0)
def run_model(cfg, params, tokens):
    return model.forward(cfg, params, tokens)


def logits_of(tiny, tokens) -> np.ndarray:
    """Logits [n, V] of one sequence, in float64. Its padding differs from the scorer's, and must not matter."""
    padded = np.full((1, tiny[0].max_seq_len), 257, np.int32)
    padded[0, :len(tokens)] = tokens
    return np.asarray(run_model(*tiny, padded), np.float64)[0, :len(tokens)]


def reference(tiny, row: Row, temperature: float = 1.0) -> Score:
    logits = logits_of(tiny, row.tokens)[:-1] / temperature
    shifted = logits - logits.max(-1, keepdims=True)
    table = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    gold = np.array(row.tokens[1:])
    picked = table[np.arange(len(gold)), gold][row.start - 1:]
    return Score(picked, bool((table.argmax(-1) == gold)[row.start - 1:].all()))


def rows_of(lengths, seed=0) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [Row(tuple(rng.integers(0, 258, n).tolist()), int(rng.integers(1, n))) for n in lengths]


@pytest.mark.parametrize('batch_size', [1, 3, 16])
def test_scores_of_uneven_rows(tiny, bytes_tokenizer, batch_size):
    scorer = Scorer(tiny[0], {'base': tiny[1]}, bytes_tokenizer, batch_size, progress=False)
    rows = rows_of([2, 96, 33, 32, 31, 7, 64, 65, 95, 3, 3])
    for row, score in zip(rows, scorer.score(rows), strict=True):
        expected = reference(tiny, row)
        np.testing.assert_allclose(score.logprobs, expected.logprobs, atol=2e-5)
        assert score.greedy == expected.greedy and score.total == pytest.approx(expected.total, abs=1e-3)


def test_greedy_rows_are_recognised(tiny, scorer):
    tokens = [5]
    for _ in range(6):
        tokens.append(int(logits_of(tiny, tokens)[-1].argmax()))
    wrong = (*tokens[:-1], (tokens[-1] + 1) % 258)
    assert [score.greedy for score in scorer.score([Row(tuple(tokens), 1), Row(wrong, 1), Row(wrong, 6)])
            ] == [True, False, False]
    assert scorer.score([Row(tokens[:-1] + [7], 1)])[0].greedy is False


def test_the_head_in_small_chunks(tiny, scorer, monkeypatch):
    rows = rows_of([40, 50, 60])
    whole = scorer.score(rows)
    monkeypatch.setattr(scoring, 'LOGIT_BYTES', 4 * 258 * 7)  # 7 positions at a time, which divides nothing here
    scoring._token_logprobs.clear_cache()
    for one, other in zip(whole, scorer.score(rows), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-6)
    scoring._token_logprobs.clear_cache()


@dataclasses.dataclass(frozen=True)
class Other:
    """A Target that is not the plain model: temperature 2."""

    plain: model.PlainTarget
    exact: bool = False
    reference: object = None

    vocab_size = property(lambda self: self.plain.vocab_size)
    max_seq_len = property(lambda self: self.plain.max_seq_len)

    def init_cache(self, batch, max_len, block):
        return self.plain.init_cache(batch, max_len, block)

    def forward(self, params, tokens, cache, **options) -> Output:
        output = self.plain.forward(params, tokens, cache, **options)
        return output.replace(logits=output.logits / 2)


def test_another_target_is_measured_as_it_is(tiny, bytes_tokenizer):
    cfg, base = tiny
    scorer = Scorer(cfg, {'base': base}, bytes_tokenizer, target=Other(model.PlainTarget(cfg)), progress=False)
    rows = rows_of([20, 40])
    for row, score in zip(rows, scorer.score(rows), strict=True):
        np.testing.assert_allclose(score.logprobs, reference(tiny, row, temperature=2).logprobs, atol=2e-5)


def test_few_compilations(tiny, bytes_tokenizer):
    scoring._token_logprobs.clear_cache()
    scorer = Scorer(tiny[0], {'base': tiny[1]}, bytes_tokenizer, batch_size=4, progress=False)
    scorer.score(rows_of(range(2, 96)))
    assert scoring._token_logprobs._cache_size() == 3  # lengths 32, 64, 96


def test_rows_a_call_follow_memory(tiny, bytes_tokenizer):
    big = dataclasses.replace(tiny[0], max_seq_len=8192)
    scorer = Scorer(big, {'base': tiny[1]}, bytes_tokenizer, batch_size=64, progress=False)
    assert [scorer._rows_at(size) for size in (32, 512, 2048, 8192)] == [64, 16, 4, 1]
    wide = Scorer(big, {'base': tiny[1]}, bytes_tokenizer, 64, Other(model.PlainTarget(big)), progress=False)
    object.__setattr__(wide.config, 'vocab_size', 49152)  # logits of 512 tokens are then 100 MB a row
    assert wide._rows_at(512) == 5


@pytest.mark.parametrize('row', [Row((5,), 1), Row((5, 6), 0), Row((5, 6), 2), Row((5,) * 97, 1)])
def test_rows_that_cannot_be_scored(scorer, row):
    with pytest.raises(RequestError, match='does not fit the context of 96'):
        scorer.score([row])


def test_pairs_are_split_as_in_lm_eval(scorer):
    def ids(text):
        return tuple(byte + 2 for byte in text.encode())

    assert scorer.pair('a b', ' c') == Row(ids('a b c'), 3)
    assert scorer.pair('a b ', 'c') == Row(ids('a b c'), 3)  # the space goes with what is scored
    assert scorer.pair('', 'xy') == Row((0, *ids('xy')), 1)
    long = scorer.pair('x' * 200, 'yz')
    assert long == Row(ids('x' * 94 + 'yz'), 94)
    assert scorer.pair('x', 'y' * 200) == Row(ids('y' * 96), 1)


def test_perplexity_by_hand(tiny, scorer, tmp_path):
    text = ('The cat sat on the mat. ' * 20).encode() + b'\xff\xfe'
    (tmp_path / 'text.txt').write_bytes(text)
    found = perplexity.run(scorer, f'ppl:{tmp_path / "text.txt"}', None)
    ids = scorer.tokenizer.encode(text.decode(errors='replace'))
    rows = [Row(tuple(ids[i:i + 96]), 1) for i in range(0, len(ids) - 95, 96)]  # windows of the context, full ones only
    nats = np.array([-reference(tiny, row).total for row in rows])
    assert found['n'] == len(rows) == 5 and found['tokens'] == found['bytes'] == 95 * 5
    assert found['perplexity'] == pytest.approx(math.exp(nats.sum() / (95 * 5)), rel=1e-5)
    assert found['bits_per_byte'] == pytest.approx(math.log2(found['perplexity']), rel=1e-6)
    error = (nats / 95).std(ddof=1) / math.sqrt(5)  # windows of one length: the plain standard error of the mean
    assert found['perplexity_stderr'] == pytest.approx(found['perplexity'] * error, rel=1e-3)
    first = perplexity.run(scorer, f'ppl:{tmp_path / "text.txt"}', 2)
    assert first['n'] == 2
    assert first['perplexity'] == pytest.approx(math.exp(nats[:2].sum() / 190), rel=1e-5)


def test_short_and_empty_texts(scorer, tmp_path):
    (tmp_path / 'short').write_text('abc')
    found = perplexity.run(scorer, f'ppl:{tmp_path / "short"}', None)
    assert found['n'] == 1 and found['tokens'] == 2 and math.isnan(found['perplexity_stderr'])
    (tmp_path / 'empty').write_text('')
    with pytest.raises(ConfigError, match='fewer than two tokens'):
        perplexity.run(scorer, f'ppl:{tmp_path / "empty"}', None)


@dataclasses.dataclass
class Told:
    """A scorer whose log-probabilities are given: {(context, continuation): total}."""

    table: dict

    def pair(self, context, continuation):
        return context, continuation

    def score(self, rows, name=''):
        return [Score(np.array([self.table[row]]), self.table[row] > -1) for row in rows]


def test_multiple_choice_by_hand():
    questions = [Question('p', ('aa', 'bbbb'), 1), Question('q', ('a', 'b'), 0), Question('r', ('a', 'bbb'), 0)]
    told = Told({('p', ' aa'): -2.0, ('p', ' bbbb'): -3.0,  # total says aa, per character (-1, -0.75) bbbb
                 ('q', ' a'): -1.0, ('q', ' b'): -2.0, ('r', ' a'): -5.0, ('r', ' bbb'): -6.0})
    found = multiple_choice.measure(told, questions, 'x')
    third = 1 / 3
    assert found == {'acc': pytest.approx(2 / 3), 'acc_norm': pytest.approx(2 / 3), 'n': 3,
                     'acc_stderr': pytest.approx(math.sqrt(third * 2 * third / 2)),
                     'acc_norm_stderr': pytest.approx(math.sqrt(third * 2 * third / 2))}
    only = multiple_choice.measure(told, questions[:1], 'x')
    assert (only['acc'], only['acc_norm']) == (0, 1) and math.isnan(only['acc_stderr'])


def test_prompts_are_those_of_lm_eval():
    assert multiple_choice.piqa({'goal': 'G?', 'sol1': 'one', 'sol2': 'two', 'label': 1}) == Question(
        'Question: G?\nAnswer:', ('one', 'two'), 1)
    assert multiple_choice.arc({'question': 'Q', 'choices': {'text': ['x', 'y'], 'label': ['1', '2']},
                                'answerKey': '2'}) == Question('Question: Q\nAnswer:', ('x', 'y'), 1)
    row = {'ctx_a': 'A man sits.', 'ctx_b': 'he', 'activity_label': 'Roof work', 'label': '1',
           'endings': [' Begin [title] Do [x]it.  Now', 'stands.']}
    assert multiple_choice.hellaswag(row) == Question('Roof work: A man sits. He',
                                                      ('Begin. Do it. Now', 'stands.'), 1)
    assert generation.few_shot([{'question': 'q', 'answer': 'a'}], 'r') == (
        'Question: q\nAnswer: a\n\nQuestion: r\nAnswer:')


@pytest.mark.parametrize('text,number', [
    ('so 3 + 4 = 7\n#### 7', '7'), ('#### -1,234', '-1234'), ('#### $18.00', '18'), ('It costs $5.', '5'),
    ('1 and 2.50', '2.50'), ('none', None), ('#### 5\nthen 6', '5'), ('', None)])
def test_final_number(text, number):
    assert generation.final_number(text) == number


def test_generation_is_greedy_and_cut(tiny, scorer):
    prompts = ['ab', 'the quick brown fox', 'x']
    texts = []
    for prompt in prompts:
        ids = [byte + 2 for byte in prompt.encode()]
        for _ in range(8):
            ids.append(int(logits_of(tiny, ids)[-1].argmax()))
            if ids[-1] == 1:
                break
        texts.append(scorer.tokenizer.decode(ids[len(prompt):], skip_special=True))
    assert scorer.generate(prompts, max_new_tokens=8) == texts
    assert len(texts[0]) > 2
    stop = texts[0][2]
    assert scorer.generate(prompts[:1], max_new_tokens=8, until=(stop,)) == [texts[0][:texts[0].index(stop)]]


def test_stop_strings_over_several_tokens(scorer):
    assert scoring._cut('one\n\ntwo Question: x', ('Question:', '\n\n')) == 'one'
    assert scoring._cut('one', ('\n\n',)) == 'one'
    assert scorer._tokens_with(('a',)) == [2 + ord('a')] and scorer._tokens_with(('ab',)) == []


def test_evaluate_gives_every_task(tiny, bytes_tokenizer, tmp_path):
    (tmp_path / 'text').write_text('x y ' * 100)
    name = f'ppl:{tmp_path / "text"}'
    found = evaluate.evaluate(*tiny, bytes_tokenizer, [name], limit=2, batch_size=2, progress=False)
    assert set(found) == {name} and found[name]['n'] == 2


@pytest.mark.parametrize('tasks,limit,error,message', [
    (['pica'], 1, ConfigError, "unknown task 'pica'; known: ppl:enwik8"),
    ([], 1, ConfigError, 'no task given'),
    (['piqa'], 0, RequestError, 'limit must be at least 1, got 0'),
    (['ppl:no-such-file'], 1, ConfigError, 'neither a file nor one of enwik8'),
])
def test_bad_requests(tiny, bytes_tokenizer, tasks, limit, error, message):
    with pytest.raises(error, match=message):
        evaluate.evaluate(*tiny, bytes_tokenizer, tasks, limit=limit, progress=False)


def test_bad_batch_size(tiny, bytes_tokenizer):
    with pytest.raises(RequestError, match='batch_size must be at least 1'):
        evaluate.evaluate(*tiny, bytes_tokenizer, ['piqa'], batch_size=0)


def test_tokenizer_of_another_model(tiny, bytes_tokenizer):
    other = tiny[0].replace(vocab_size=49152)
    with pytest.raises(TokenizerError, match='has 258 tokens and the model 49152'):
        evaluate.evaluate(other, tiny[1], bytes_tokenizer, ['piqa'])


def run_command(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-m', 'harness.launch.evaluate', *args], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)


@pytest.mark.parametrize('args,message', [
    (('--no_such_flag=1',), "Unknown command line flag 'no_such_flag'"),
    (('--limit=many',), 'flag --limit=many'),
    (('--tasks=pica',), "unknown task 'pica'"),
    (('extra',), "unexpected argument 'extra'"),
    (('--model=no/such/model',), 'no/such/model: no such file'),
])
def test_command_refuses_in_one_line(args, message):
    done = run_command(*args)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith('headway: error: ') and message in lines[0]


def test_results_file(tmp_path):
    target = tmp_path / 'deep' / 'results.json'
    common.write_json(target, {'a': math.nan, 'b': [1.5, {'c': math.inf}]})
    assert json.loads(target.read_text()) == {'a': None, 'b': [1.5, {'c': None}]}
    assert [path.name for path in target.parent.iterdir()] == ['results.json']
    (tmp_path / 'file').write_text('')
    with pytest.raises(RequestError, match='cannot write'):
        common.write_json(tmp_path / 'file' / 'results.json', {})


def test_provenance(monkeypatch, tmp_path):
    class Config:
        def to_dict(self):
            return {'a': (1, 2), 'b': {'c': Path('x')}}

    found = provenance.collect(Config())
    assert found['config'] == {'a': [1, 2], 'b': {'c': 'x'}}
    assert found['versions']['jax'] == jax.__version__
    assert found['device']['platform'] == jax.devices()[0].platform and found['device']['cores'] >= 1
    json.dumps(found)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert provenance.collect({})['git'] == {'revision': None, 'dirty': None}


class Instance:
    """What lm-eval hands over, as far as an LM looks at it."""

    def __init__(self, *args):
        self.args = args


def test_lm_eval_adapter(tiny, scorer, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip('lm_eval', reason='lm-eval (extra [eval]) is not installed')
    monkeypatch.setenv('HF_HOME', str(tmp_path))
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
    from harness.lm_eval_adapter import HeadwayLM
    lm = HeadwayLM(scorer=scorer, max_gen_toks=4)
    assert isinstance(lm, lm_eval.api.model.LM)
    (found, greedy), = lm.loglikelihood([Instance('ab', ' c')])
    assert found == pytest.approx(reference(tiny, scorer.pair('ab', ' c')).total, abs=1e-4) and not greedy
    ids = [0, *(byte + 2 for byte in b'x' * 250)]
    rolled, = lm.loglikelihood_rolling([Instance('x' * 250)])
    # Every token once; each later window begins with the last token of the one before, the last looks back fully.
    windows = [Row(tuple(ids[:96]), 1), Row(tuple(ids[95:191]), 1), Row(tuple(ids[155:]), 36)]
    assert sum(len(row.tokens) - row.start for row in windows) == 250
    assert rolled == pytest.approx(sum(reference(tiny, row).total for row in windows), abs=1e-2)
    assert lm.generate_until([Instance('ab', {'until': ['\n\n']}), Instance('x', {'max_gen_toks': 2})]) == [
        *scorer.generate(['ab'], max_new_tokens=4, until=('\n\n',)), *scorer.generate(['x'], max_new_tokens=2)]
    with pytest.raises(RequestError, match='decodes greedily'):
        lm.generate_until([Instance('ab', {'do_sample': True, 'temperature': 0.7})])
    questions = [Question('ab', ('cd', 'e'), 0), Question('x', ('y', 'zz z'), 1)]
    (tmp_path / 'test.jsonl').write_text('\n'.join(json.dumps(
        {'q': question.context, 'choices': list(question.choices), 'gold': question.gold}) for question in questions))
    task = {'task': 'local', 'dataset_path': 'json', 'dataset_kwargs': {'data_files': {
        'test': str(tmp_path / 'test.jsonl')}}, 'test_split': 'test', 'output_type': 'multiple_choice',
        'doc_to_text': '{{q}}', 'doc_to_choice': '{{choices}}', 'doc_to_target': '{{gold}}',
        'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}]}
    theirs = lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0)['results']['local']
    ours = multiple_choice.measure(scorer, questions, 'local')
    assert (theirs['acc,none'], theirs['acc_norm,none']) == (ours['acc'], ours['acc_norm'])


@pytest.fixture(scope='module')
def smollm2():
    from backbone import formats
    try:
        return formats.load('smollm2-135m')
    except FetchError as error:
        pytest.skip(f'smollm2-135m: {error}')


def measure(smollm2, task, limit):
    return evaluate.evaluate(smollm2.config, smollm2.params, smollm2.tokenizer, [task], limit=limit,
                             progress=False)[task]


@pytest.mark.parametrize('windows,perplexity,bits_per_byte', [
    (3, 20.725, 1.0388), pytest.param(12, 21.967, 1.0934, marks=pytest.mark.slow)])
def test_smollm2_perplexity(smollm2, windows, perplexity, bits_per_byte):
    """enwik8 from byte 90M, the first windows of 512 tokens, as transformers in float32 has them."""
    found = measure(smollm2, 'ppl:enwik8', windows)
    assert found['tokens'] == windows * 511
    assert found['perplexity'] == pytest.approx(perplexity, rel=1e-3)
    assert found['bits_per_byte'] == pytest.approx(bits_per_byte, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('task,limit,name,expected', [('lambada', 150, 'acc', 0.31), ('piqa', 100, 'acc_norm', 0.68)])
def test_smollm2_figures(smollm2, task, limit, name, expected):
    found = measure(smollm2, task, limit)
    assert abs(found[name] - expected) <= found[f'{name}_stderr']


def test_catalogue_has_what_the_tasks_read():
    assert set(multiple_choice.QUESTIONS) | {'lambada', 'gsm8k', 'enwik8', 'stdlib', 'gutenberg'} <= set(
        catalogue.ENTRIES)
