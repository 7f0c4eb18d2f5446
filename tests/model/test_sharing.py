"""What surrounds a call: threads that share a model, interrupts, and JAX's settings of one thread."""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from conftest import light_config, make_model
from flax import nnx

import hourglass_jax as hg
from hourglass_jax import generation
from hourglass_jax.evaluation import accuracy
from hourglass_jax.generation import Sampler

KEY = jax.random.key(0)
TEXT = np.random.default_rng(0).integers(0, 11, 40)
N_THREADS = 8


@pytest.fixture(scope="module")
def model():
    return make_model(light_config(d_model=8))


@pytest.fixture
def two_cores(monkeypatch):
    """So that many rows go in two parts, in threads."""
    monkeypatch.setattr(generation.os, "cpu_count", lambda: 2)


def compiled_score(model, tokens):
    graph, params = nnx.split(model)
    return jit_score(graph, params, tokens)


jit_score = jax.jit(lambda graph, params, tokens: hg.score(nnx.merge(graph, params), tokens))

READERS = [
    lambda model: hg.generate(model, [[1, 2, 3]], max_tokens=4, key=KEY),
    lambda model: hg.generate(model, [[1, 2, 3]] * 8, max_tokens=4, key=KEY),
    lambda model: hg.evaluate(model, TEXT, block_size=8).loss,
    lambda model: hg.evaluate_sliding(model, TEXT, window=8, step=4).loss,
    lambda model: accuracy(model, [(TEXT[None, :9], np.ones((1, 8)))]),
    lambda model: hg.causality.influence(model, TEXT[:6]),
    lambda model: hg.check_causality(model),
    lambda model: compiled_score(model, TEXT[None, :9]),
    lambda model: (hg.at_shorten_factor(model, 2).config, hg.summary(model)),
]
EAGER = [lambda model: hg.score(model, TEXT[None, :9])]


@pytest.mark.slow
@pytest.mark.parametrize("readers, n_calls", [(READERS, 9), (READERS + EAGER, 200)])
def test_threads_that_share_a_model_generate_the_same_tokens(two_cores, readers, n_calls):
    options = {"shortening": "average", "upsampling": "attention"}  # one model at several factors, too
    model = make_model(light_config(d_model=8, **options))
    alone = [reader(model) for reader in readers]

    def work(thread):
        chosen = [(thread + call) % len(readers) for call in range(n_calls)]
        return [(number, readers[number](model)) for number in chosen]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(N_THREADS) as pool:
            results = [result for results in pool.map(work, range(N_THREADS)) for result in results]
    finally:
        sys.setswitchinterval(interval)
    assert len(results) == N_THREADS * n_calls
    for number, result in results:
        jax.tree.map(np.testing.assert_array_equal, result, alone[number])


@pytest.mark.parametrize("n_rows", [1, 8])
def test_an_interrupt_ends_generation_within_two_blocks(model, two_cores, monkeypatch, n_rows):
    """Of 40 blocks a part: the signal comes in the third, and blocks take their time from then on."""
    n_parts, blocks, extend = max(n_rows // 4, 1), [], generation._extend

    def interrupted(*args, **options):
        blocks.append(threading.get_ident())
        if len(blocks) == 3 * n_parts:
            os.kill(os.getpid(), signal.SIGINT)
        if len(blocks) >= 3 * n_parts:
            time.sleep(0.2)
        return extend(*args, **options)

    monkeypatch.setattr(generation, "_extend", interrupted)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            hg.generate(model, [[1, 2]] * n_rows, max_tokens=40 * generation.BLOCK, key=KEY)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(set(blocks)) == n_parts and (threading.get_ident() in blocks) == (n_parts == 1)
    assert len(blocks) <= (3 + 2) * n_parts


def test_an_error_in_one_part_ends_the_others(model, two_cores, monkeypatch):
    blocks, extend = [], generation._extend

    def failing(*args, **options):
        blocks.append(args)
        if len(blocks) == 4:
            raise MemoryError
        time.sleep(0.05)
        return extend(*args, **options)

    monkeypatch.setattr(generation, "_extend", failing)
    with pytest.raises(MemoryError):
        hg.generate(model, [[1, 2]] * 8, max_tokens=40 * generation.BLOCK, key=KEY)
    assert len(blocks) < 80


CONTEXTS = {
    "float64": (lambda: jax.enable_x64(True), lambda logits: logits.dtype),
    "precision": (
        lambda: jax.default_matmul_precision("highest"),
        lambda logits: jax.config.jax_default_matmul_precision,
    ),
    "device": (lambda: jax.default_device(jax.devices()[0]), lambda logits: jax.config.jax_default_device),
}


@pytest.mark.parametrize("n_rows", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("name", CONTEXTS)
def test_thread_local_jax_settings_apply_to_generation(two_cores, monkeypatch, name, n_rows):
    context, seen_by = CONTEXTS[name]
    seen = []

    class Watched(Sampler):
        def __call__(self, logits, keys):
            seen.append(seen_by(logits))
            return super().__call__(logits, keys)

    monkeypatch.setattr(generation, "Sampler", Watched)
    options = {"max_tokens": 3, "key": KEY}
    with context():
        model = make_model(light_config(d_model=8, dtype="float64" if name == "float64" else "float32"))
        hg.generate(model, [[1, 2]] * n_rows, **options)
        expected = seen_by(np.zeros(1))
    assert seen and set(seen) == {expected}
    if name != "float64":
        seen.clear()
        hg.generate(model, [[1, 2]] * n_rows, **options)
        assert seen and expected not in seen  # so would it be noticed
