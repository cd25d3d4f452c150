"""Writes tests/golden/tokenizer_*.json: token ids by Hugging Face transformers (extra `[oracle]`).

    python scripts/golden_tokenizer.py

smollm2: transformers reads the GGUF file with its own converter, which leaves out the digit splitting of the published
tokenizer.json (it shows on "½ ²"), so that one is put in here. qwen2, gpt2: transformers' own classes on a small
vocabulary trained here (kept in the file), so that the pre-tokenisers are compared, not only the merges.
"""

import json
import random
import sys
from pathlib import Path

import tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from backbone import catalogue, vocabulary  # noqa: E402 - the path is set above

CODE = '''def fib(n: int = 10) -> list[int]:
    """Fibonacci numbers."""
    a, b = 0, 1
\tif n >= 1_000: raise ValueError(f"too large: {n!r}")
    return [x**2 for x in (a, b)]  # O(n)
'''
TEXTS = [
    '', ' ', '  ', '\n', '\n\n\n', '\t\t x', ' leading', 'trailing ', 'a  b   c    d',
    'The capital of France is Paris.', "I'm sure they'd say we've won; IT'S HERS, isn't it?",
    '0 1 12 123 1234 12345 3.14159 1,000,000 2026-11-22 10:30', 'x86_64 v1.2.3-rc4 0xDEADBEEF',
    CODE, '{"key": [1, 2.5e-3, null], "nested": {"a": "b\\n"}}', '<p class="x">a &amp; b</p>\r\n<br/>',
    'naïve café Ångström — “quotes” … ½ ²', 'Zażółć gęślą jaźń', 'Привет, мир! Как дела?', '日本語のテキスト、テスト。',
    '안녕하세요 세계', 'مرحبا بالعالم', 'हिन्दी में पाठ', 'ไทย', 'e\u0301 is not é, \u212b',
    '🙂 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ✈️', 'a\u00a0b\u2003c\u200bd\ufeffe', '\u0000\u0007\u001b[31m', '𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈',
    '<|im_start|>user\nhi<|im_end|>\n', 'text<|endoftext|>more', '<|im_start', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaa',
    '!!!???...---===', "'s 's 'LL ''", 'https://example.org/a/b?c=d&e=%20#f', 'UPPER lower CamelCase snake_case',
]


def varied(seed: int, count: int) -> list[str]:
    """Random strings that mix scripts, digits, spaces and marks, as no person would write."""
    rng = random.Random(seed)
    atoms = [*' \t\n', '  ', '\r\n', *'abcXYZ', 'word', ' word', "'s", "n't", *'0123456789', *'.,;:!?-_()[]{}"\'', 'é',
             'ß', '日', '本', 'я', 'ا', '🙂', '\u00a0', '½', '\u0301']
    return [''.join(rng.choices(atoms, k=rng.randint(1, 24))) for _ in range(count)]


def write(name: str, **data) -> None:
    path = ROOT / 'tests' / 'golden' / f'tokenizer_{name}.json'
    path.write_text(json.dumps(data, ensure_ascii=True, indent=None, separators=(',', ':')) + '\n')
    print(path, path.stat().st_size, 'bytes')


def tiny_vocabulary(kind: str) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE of 700 tokens trained on this file's own texts."""
    base = tokenizers.Tokenizer(tokenizers.models.BPE())
    base.pre_tokenizer = vocabulary._pre_tokenizer(kind)[0]
    base.train_from_iterator((TEXTS + varied(7, 400)) * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=['<|endoftext|>']))
    model = json.loads(base.to_str())['model']
    return sorted(model['vocab'], key=model['vocab'].get), [' '.join(pair) for pair in model['merges']]


def main() -> None:
    texts = TEXTS + varied(0, 60)
    path = catalogue.fetch('smollm2-135m')
    oracle = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    oracle.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    chat = [{'role': 'user', 'content': 'What is 2+2?'}]
    write('smollm2', cases=[[text, oracle.encode(text)] for text in texts],
          chat=oracle.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)['input_ids'])
    for kind, cls in (('qwen2', Qwen2Tokenizer), ('gpt-2', GPT2Tokenizer)):
        tokens, merges = tiny_vocabulary(kind)
        oracle = cls(vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(m.split(' ')) for m in merges])
        cases = [[text, oracle.encode(text)] for text in texts]
        write(kind.replace('-', ''), tokens=tokens, merges=merges, cases=cases)


if __name__ == '__main__':
    main()
