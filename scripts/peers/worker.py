"""Runs another stack in an environment of its own; harness/peers.py starts it and asks it to decode by turns.

One JSON object a line on stdin, one answer a line on stdout:

    {"do": "load", "engine": "transformers" | "llama.cpp", "path": ..., "dtype": ..., "threads": n}  -> {"version": ...}
    {"do": "decode", "prompt": [ids], "max_new_tokens": n}  -> {"tokens": [ids], "prefill_s": s, "decode_s": s}
    {"do": "convert", "source": a.gguf, "target": b.gguf, "ftype": "BF16"}  -> {}

decode_s spans the new tokens after the first, as in harness/decode.py. What goes wrong is {"error": one line}.
Imports nothing of Headway: it is not installed there.
"""

import json
import os
import sys
import time


class Transformers:
    """Greedy generate() with a static cache, as its documentation recommends for speed."""

    def __init__(self, path, dtype, threads):
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        self.version = f'transformers {transformers.__version__}, torch {torch.__version__}'
        self.torch, self.base = torch, transformers.generation.streamers.BaseStreamer
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    def decode(self, prompt, count):
        stamps = []

        class Stamps(self.base):
            def put(self, value):
                stamps.append(time.perf_counter())

            def end(self):
                pass

        ids = self.torch.tensor([prompt])
        start = time.perf_counter()
        with self.torch.inference_mode():
            out = self.model.generate(ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=count,
                                      min_new_tokens=count, do_sample=False, cache_implementation='static',
                                      eos_token_id=None, pad_token_id=0, streamer=Stamps())
        # The streamer sees the prompt first, then every token as it is chosen.
        return out[0, len(prompt):].tolist(), stamps[1] - start, stamps[-1] - stamps[1]


class LlamaCpp:
    """llama.cpp through its Python binding, driven token by token; argmax is taken in numpy."""

    def __init__(self, path, dtype, threads):
        import llama_cpp
        import numpy

        self.version, self.numpy, self.api = f'llama-cpp-python {llama_cpp.__version__}', numpy, llama_cpp
        self.llama = llama_cpp.Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False,
                                     logits_all=False)
        self.vocab = self.llama.n_vocab()

    def best(self):
        logits = self.api.llama_get_logits_ith(self.llama._ctx.ctx, -1)
        return int(self.numpy.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())

    def decode(self, prompt, count):
        self.llama.reset()
        start = time.perf_counter()
        self.llama.eval(prompt)
        tokens = [self.best()]
        middle = time.perf_counter()
        while len(tokens) < count:
            self.llama.eval(tokens[-1:])
            tokens.append(self.best())
        return tokens, middle - start, time.perf_counter() - middle


def convert(source, target, ftype):
    """Rewrites a GGUF in another type by llama.cpp's own converter."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f'LLAMA_FTYPE_MOSTLY_{ftype}')
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings) != 0:
        raise RuntimeError(f'llama.cpp could not write {target}')
    return {}


ENGINES = {'transformers': Transformers, 'llama.cpp': LlamaCpp}


def main():
    # The stacks print; the protocol keeps the real stdout to itself and everything else goes to stderr.
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)
    engine = None
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            do = asked.pop('do')
            if do == 'load':
                engine = ENGINES[asked.pop('engine')](**asked)
                answer = {'version': engine.version}
            elif do == 'decode':
                tokens, prefill_s, decode_s = engine.decode(asked['prompt'], asked['max_new_tokens'])
                answer = {'tokens': tokens, 'prefill_s': prefill_s, 'decode_s': decode_s}
            elif do == 'convert':
                answer = convert(**asked)
            else:
                raise ValueError(f'unknown request {do!r}')
        except Exception as error:  # the other side decides what an error means
            answer = {'error': f'{type(error).__name__}: {error}'.splitlines()[0]}
        answers.write(json.dumps(answer) + '\n')


if __name__ == '__main__':
    main()
