# make compare   decode real questions with every method, side by side
# make test      the whole suite, CPU only
# make soak      the longer forms of the tests
# make peers     the same model through other stacks, as ratios (own environment)
# Everything else here serves these. PYTHON picks the interpreter (3.11 or newer).

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
LOCK   := requirements/$(shell $(PYTHON) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt
READY  := $(VENV)/.ready

# The TPU compiler (libtpu) that rehearsals use. It lies beside the packages, not among them: JAX would try to start a TPU
# in every process that can import it.
TPU_LOCK := $(subst requirements/,requirements/tpu_,$(LOCK))
TPU      := $(VENV)/tpu-compiler
GPU      := $(VENV)/gpu-compiler

# What the suite and the comparison read; each is verified by hash and kept in ~/.cache/headway.
COMPARE_DATA := smollm2-135m mt_bench
TEST_DATA    := $(COMPARE_DATA) enwik8 lambada piqa arc_easy hellaswag gsm8k

.PHONY: setup tpu-compiler gpu-compiler compare test soak test-tpu-aot test-gpu-aot lint peers data clean
.PRECIOUS: out/tensorhead_smollm2_r%/finished out/stagformer/tiny/%_0/finished

setup: $(READY) tpu-compiler

$(READY): $(LOCK) setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Headway needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r $(LOCK)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Where it cannot be had the tests that need it are skipped, for the reason kept in unavailable.txt; next time tries again.
tpu-compiler: $(READY) $(TPU_LOCK)
	@cmp -s $(TPU_LOCK) $(TPU)/installed.txt || { mkdir -p $(TPU) && if \
	    $(PY) -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps --upgrade --target $(TPU) \
	        -r $(TPU_LOCK) 2> $(TPU)/pip.log; \
	then cp $(TPU_LOCK) $(TPU)/installed.txt && rm -f $(TPU)/unavailable.txt; \
	else tail -n 1 $(TPU)/pip.log > $(TPU)/unavailable.txt; \
	    echo "no TPU compiler: $$(cat $(TPU)/unavailable.txt)"; fi; }

# The GPU compiler (JAX's CUDA plugin, NVIDIA's assembler; 0.9 GB), for headway-rehearse --topology=h200:1.
gpu-compiler: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(GPU) \
	    $$($(PY) -c 'from harness.topology import GPU_PACKAGES; print(*GPU_PACKAGES)')

data: $(READY)
	$(PY) -m backbone.catalogue fetch $(TEST_DATA)

compare: $(READY)
	$(PY) -m backbone.catalogue fetch $(COMPARE_DATA)
	$(PY) -m harness.launch.compare --config=configs/compare.py --workdir=out/compare

# Two at a time: most tests compile, and a compilation keeps one core busy. A file's tests stay together, with what they
# share. A worker that dies ends the run: a new one would be waited for without end.
PYTEST := JAX_PLATFORMS=cpu $(PY) -m pytest -n 2 --dist loadfile --max-worker-restart=0
test: $(READY) tpu-compiler data
	$(PYTEST)

soak: $(READY) tpu-compiler data
	$(PYTEST) -m slow

# Every shape of every kernel through the compilers of devices that are not here.
test-tpu-aot: $(READY) tpu-compiler
	JAX_PLATFORMS=cpu $(PY) -m pytest tests/pallas_kernels -m 'slow or not slow' -k the_tpu_compiler

test-gpu-aot: $(READY) gpu-compiler
	JAX_PLATFORMS=cpu $(PY) -m pytest tests/pallas_kernels -m 'slow or not slow' -k the_gpu_compiler

lint: $(READY)
	$(VENV)/bin/ruff check .

peers: $(READY)
	$(PYTHON) scripts/peers/setup.py .venv-peers
	$(PY) -m harness.peers --peers_python=.venv-peers/bin/python --workdir=out/peers

# Artefacts of the zoo, made again from nothing: the base's own text, training, weights and card (docs/tensorhead.md).
TEXT     := out/text/smollm2
GENERATE := $(PY) -m harness.launch.generate --model=smollm2-135m --dtype=bfloat16
HEAD     := --config=configs/tensorhead_smollm2.py

$(TEXT)/ids.npy: | $(READY)
	$(GENERATE) --batch_file=catalogue:sharegpt --limit=1536 --chat --max_new_tokens=160 --batch_size=96 \
	    --out=$(TEXT)/chat.jsonl
	$(GENERATE) --batch_file=catalogue:stdlib --max_new_tokens=96 --batch_size=64 --out=$(TEXT)/code.jsonl
	$(GENERATE) --batch_file=catalogue:sharegpt --limit=1700 --chat --max_new_tokens=128 --batch_size=96 \
	    --temperature=0.8 --seed=1 --out=$(TEXT)/chat_sampled.jsonl
	$(PY) scripts/draft_vocabulary.py $(HEAD) --size=4096 --out=$@

out/tensorhead_smollm2_r%/finished: $(TEXT)/ids.npy
	$(PY) -m harness.launch.train $(HEAD) --config.task.kwargs.head.rank=$* --workdir=out/tensorhead_smollm2_r$*

out/tensorhead_smollm2_pending/finished: $(TEXT)/ids.npy
	$(PY) -m harness.launch.train $(HEAD):pending --workdir=out/tensorhead_smollm2_pending

# A second text, of other prompts and other samples: the pending head goes on with it.
MORE := out/text/smollm2_more

$(MORE)/ids.npy: $(TEXT)/ids.npy
	$(GENERATE) --batch_file=catalogue:sharegpt --limit=3100 --chat --max_new_tokens=160 --batch_size=96 \
	    --out=$(MORE)_all/chat_more.jsonl
	$(GENERATE) --batch_file=catalogue:stdlib --max_new_tokens=96 --batch_size=96 --temperature=0.6 --seed=2 \
	    --out=$(MORE)_all/code_sampled.jsonl
	mkdir -p $(MORE)
	head -n 2000 $(MORE)_all/chat_more.jsonl > $(MORE)/chat_more.jsonl
	head -n 600 $(MORE)_all/code_sampled.jsonl > $(MORE)/code_sampled.jsonl
	cp $(TEXT)/ids.npy $@

out/tensorhead_smollm2_more/finished: $(MORE)/ids.npy out/tensorhead_smollm2_pending/finished
	$(PY) -m harness.launch.train $(HEAD):more --workdir=out/tensorhead_smollm2_more

# Written, measured as it lies there, and written again with what was measured in its card.
ARTEFACT := $(PY) -m harness.launch.artefact --int8='(factors|pending)/(down|up|from_e|from_x)' --overwrite
zoo-tensorhead_smollm2_%: out/tensorhead_smollm2_%/finished
	$(ARTEFACT) --workdir=out/tensorhead_smollm2_$* --name=tensorhead_smollm2_$*
	$(PY) -m harness.launch.acceptance --drafters=tensorhead_smollm2_$* --sets=mt_bench,humaneval --temperatures=0,0.8 \
	    --count=24 --max_new_tokens=64 --dtype=bfloat16 --out=out/acceptance_$*.json
	$(ARTEFACT) --workdir=out/tensorhead_smollm2_$* --name=tensorhead_smollm2_$* --measured=out/acceptance_$*.json

# The small pair of docs/stagformer.md, dense and staggered, on stories that stories-15m wrote.
STORIES := out/text/stories/stories.jsonl
$(STORIES): | $(READY)
	$(PY) -m harness.launch.generate --model=stories-15m --batch_file=configs/prompts/stories.txt --samples_per_prompt=6 \
	    --temperature=1 --max_new_tokens=200 --batch_size=100 --out=$@

out/stagformer/tiny/%_0/finished: | $(STORIES)
	$(PY) scripts/stagformer_grid.py --out=out/stagformer/tiny --models=$* --seeds=0

zoo-stagformer_stories_%: out/stagformer/tiny/%_0/finished
	$(PY) -m harness.launch.artefact --overwrite --workdir=out/stagformer/tiny/$*_0 --name=stagformer_stories_$*

# The fast stream that drafts (docs/m2r2.md): trained on the text of the heads above, then on the second one.
ACCELERATE := --config=configs/m2r2_smollm2.py
out/m2r2_smollm2_draft/finished: $(TEXT)/ids.npy
	$(PY) -m harness.launch.train $(ACCELERATE) --workdir=out/m2r2_smollm2_draft

out/m2r2_smollm2_more/finished: $(MORE)/ids.npy out/m2r2_smollm2_draft/finished
	$(PY) -m harness.launch.train $(ACCELERATE):more --workdir=out/m2r2_smollm2_more

ACCELERATORS := $(PY) -m harness.launch.artefact --int8='(layers|exits|carry)/.*kernel' --overwrite
zoo-m2r2_smollm2_draft: out/m2r2_smollm2_more/finished
	$(ACCELERATORS) --workdir=out/m2r2_smollm2_more --name=m2r2_smollm2_draft
	$(PY) -m harness.launch.acceptance --drafters=m2r2_smollm2_draft --sets=mt_bench,humaneval --temperatures=0,0.8 \
	    --count=24 --max_new_tokens=64 --dtype=bfloat16 --out=out/acceptance_m2r2.json
	$(ACCELERATORS) --workdir=out/m2r2_smollm2_more --name=m2r2_smollm2_draft --measured=out/acceptance_m2r2.json

# For early exit, on SmolLM2 (with its control of equal size) and on stories-15m.
out/m2r2_smollm2_%/finished: $(TEXT)/ids.npy
	$(PY) -m harness.launch.train $(ACCELERATE):$* --workdir=out/m2r2_smollm2_$*

zoo-m2r2_smollm2_exits zoo-m2r2_smollm2_deed: zoo-m2r2_smollm2_%: out/m2r2_smollm2_%/finished
	$(ACCELERATORS) --workdir=out/m2r2_smollm2_$* --name=m2r2_smollm2_$*

out/m2r2_stories/finished: | $(STORIES)
	$(PY) -m harness.launch.train --config=configs/m2r2_stories.py --workdir=out/m2r2_stories

zoo-m2r2_stories: out/m2r2_stories/finished
	$(ACCELERATORS) --workdir=out/m2r2_stories --name=m2r2_stories

# With gates and thresholds: what --model=NAME decodes. The accelerators lie in zoo/ while their gates train.
GATES := $(PY) -m harness.launch.train --config=configs/m2r2_gates.py
EARLY := $(PY) scripts/m2r2_artefact.py --overwrite --target=0.9
zoo-m2r2_smollm2_early_exit: zoo-m2r2_smollm2_exits
	$(GATES) --workdir=out/m2r2_smollm2_gates
	$(EARLY) --workdir=out/m2r2_smollm2_gates --name=m2r2_smollm2_early_exit

zoo-m2r2_stories_early_exit: zoo-m2r2_stories
	$(GATES):stories --workdir=out/m2r2_stories_gates
	$(EARLY) --workdir=out/m2r2_stories_gates --name=m2r2_stories_early_exit

# A mixture of experts cut from stories-15m, and the predictors of its experts (docs/m2r2_moe.md). They stay in out/, where
# --model=out/moe_stories finds them: 15 MB in int8 is more than an artefact may be.
out/moe_stories_split.npz: | $(STORIES)
	$(PY) scripts/upcycle_split.py --config=configs/upcycle.py

out/moe_stories/finished: out/moe_stories_split.npz
	$(PY) -m harness.launch.train --config=configs/upcycle.py --workdir=out/moe_stories

out/moe_stories_base/headway.json: out/moe_stories/finished
	$(PY) -m harness.launch.convert out/moe_stories out/moe_stories_base --overwrite

out/prefetch_stories/finished: out/moe_stories_base/headway.json
	$(PY) -m harness.launch.train --config=configs/prefetch.py --workdir=out/prefetch_stories

zoo-moe_stories: out/prefetch_stories/finished
	$(PY) scripts/routing_trace.py --workdir=out/prefetch_stories --out=out/stories_trace.npz

# The same of SmolLM2-135M: for a GPU or a long evening, and without predictors.
out/moe_smollm2_split.npz: $(TEXT)/ids.npy
	$(PY) scripts/upcycle_split.py --config=configs/upcycle.py:smollm2

out/moe_smollm2/finished: out/moe_smollm2_split.npz
	$(PY) -m harness.launch.train --config=configs/upcycle.py:smollm2 --workdir=out/moe_smollm2

zoo-moe_smollm2: out/moe_smollm2/finished

# stories-15m with ReLU in the place of SiLU, healed (docs/sparsity.md); predictors and measurements read the converted folder.
out/relu_stories/finished: | $(STORIES)
	$(PY) -m harness.launch.train --config=configs/relufy.py --workdir=out/relu_stories

out/relu_stories_base/headway.json: out/relu_stories/finished
	$(PY) -m harness.launch.convert out/relu_stories out/relu_stories_base --overwrite

# Predictors of what matters (docs/sparsity.md), of a model of the catalogue and of the relufied one, which is another at
# every making: its predictor is an artefact of this machine. A quarter of the stories is enough to learn from.
PREDICT  := $(PY) -m harness.launch.train --config=configs/sparsity_predictor.py:stories \
            --config.data.manual_dir=out/text/stories_part
SPARSE   := $(PY) scripts/sparsity_artefact.py --overwrite --neurons=0.8
EVALUATE := $(PY) scripts/sparsity_eval.py --config=relufy --rows=24 --batch=24 --head_unit=head --block=8 \
            --methods static random --parts neurons --by share --shares 0.8 0.5
out/text/stories_part/stories.jsonl: | $(STORIES)
	mkdir -p $(@D)
	head -320 $(STORIES) > $@

out/sparsity_stories/finished: out/text/stories_part/stories.jsonl
	$(PREDICT) --workdir=out/sparsity_stories

out/sparsity_relu_stories/finished: out/relu_stories_base/headway.json out/text/stories_part/stories.jsonl
	$(PREDICT) --config.task.kwargs.base=out/relu_stories_base --workdir=out/sparsity_relu_stories

out/eval_stories/table.md: out/sparsity_stories/finished
	$(EVALUATE) --model=stories-15m --predictors ours=out/sparsity_stories --out=out/eval_stories

out/eval_relu_stories/table.md: out/sparsity_relu_stories/finished
	$(EVALUATE) --model=out/relu_stories_base --predictors ours=out/sparsity_relu_stories --out=out/eval_relu_stories

zoo-sparsity_stories zoo-sparsity_relu_stories: zoo-sparsity_%: out/eval_%/table.md
	$(PY) scripts/sparsity_predictor.py --workdir=out/sparsity_$* --out=out/sparsity_$*.json
	$(SPARSE) --workdir=out/sparsity_$* --name=sparsity_$* --measured=out/sparsity_$*.json --evaluated=out/eval_$*

zoo-relu_stories: zoo-sparsity_relu_stories

clean:
	rm -rf $(VENV) .venv-peers out
