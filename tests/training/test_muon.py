"""Muon: orthogonal updates for the kernels of linear layers but the head, Adam for all other parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import light_config, make_model
from flax import nnx

import hourglass_jax as hg
from hourglass_jax.data.pipeline import consecutive_windows, random_windows
from hourglass_jax.interop.parameters import named_parameters
from hourglass_jax.training.optimizer import make_optimizer, muon_dimensions, optimizer_flops
from hourglass_jax.training.trainer import fit

TOKENS = np.tile(np.arange(3, 11), 100).astype(np.int32)
CONFIG = light_config(hierarchy="2@1 1@2 0@1")
MUON = hg.OptimizerConfig(optimizer="muon", learning_rate=1e-2, warmup_steps=0, weight_decay=0.1, clip_norm=1.0)


def train(directory, config=CONFIG, **options):
    model = make_model(config, scale=1.0)
    fit(
        model,
        random_windows(TOKENS, 16, 4, seed=0),
        consecutive_windows(TOKENS[:100], 16, 4),
        directory,
        optimizer_config=MUON,
        train_config=hg.TrainConfig(steps=6, eval_interval=2),
        **options,
    )
    return named_parameters(model)


@functools.cache
def updates(config=MUON):
    """A first update of each parameter from random gradients, the parameters, and what Muon updates."""
    params = nnx.state(make_model(CONFIG))
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    optimizer = make_optimizer(dataclasses.replace(config, weight_decay=0.0), 10)
    update = jax.jit(lambda gradients, params: optimizer.update(gradients, optimizer.init(params), params)[0])
    return update(gradients, params), params, muon_dimensions(params)


def kernels(tree, dimensions):
    pairs = jax.tree.map(lambda leaf, which: leaf if which is not None else None, tree, dimensions)
    return [matrix for leaf in jax.tree.leaves(pairs) for matrix in leaf.reshape(-1, *leaf.shape[-2:])]


def singular_value_range(matrices):
    """The second smallest and the largest singular value, each as a multiple of its matrix's mean.

    The smallest of a square random matrix may be too close to 0 for five iterations.
    """
    values = [np.linalg.svd(np.asarray(matrix), compute_uv=False) for matrix in matrices]
    return min(v[-2] / v.mean() for v in values), max(v[0] / v.mean() for v in values)


def test_updates_of_kernels_are_near_orthogonal_unlike_those_of_adam():
    low, high = singular_value_range(kernels(*updates()[::2]))
    assert low > 0.6 and high < 1.4
    changes, _, dimensions = updates(dataclasses.replace(MUON, optimizer="adamw"))
    assert singular_value_range(kernels(changes, dimensions))[0] < 0.3


def test_updates_of_kernels_are_as_large_as_those_of_adam():
    changes, _, dimensions = updates()
    sizes = [float(jnp.sqrt(jnp.mean(matrix**2))) / MUON.learning_rate for matrix in kernels(changes, dimensions)]
    assert min(sizes) > 0.1 and max(sizes) < 0.3  # Adam: 0.2 to 0.4 (arXiv:2502.16982, section 2.2)


def test_muon_updates_every_kernel_of_a_linear_layer_but_the_head():
    _, params, dimensions = updates()
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    chosen = {
        ".".join(str(getattr(key, "key", key)) for key in path if getattr(key, "key", None) is not None)
        for path, which in jax.tree_util.tree_leaves_with_path(
            dimensions, is_leaf=lambda leaf: leaf is None or hasattr(leaf, "reduction_axis")
        )
        if which is not None
    }
    assert chosen == {name for name in names if name.endswith("kernel") and not name.startswith("head")}


def test_every_parameter_moves(tmp_path):
    before, after = named_parameters(make_model(CONFIG, scale=1.0)), train(tmp_path)
    still = [name for name, value in before.items() if (np.asarray(value) == np.asarray(after[name])).all()]
    assert not still


def test_training_with_muon_resumes_bit_for_bit(tmp_path):
    config = light_config()
    whole = train(tmp_path / "whole", config)

    class Kill(hg.Hook):
        def before_step(self, step):
            if step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", config, hooks=[Kill()])
    resumed = train(tmp_path / "part", config)
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)


def test_flops_of_muon_are_those_of_its_newton_schulz_iterations():
    params = {"layer": {"kernel": jnp.zeros((3, 8, 16))}, "head": {"kernel": jnp.zeros((16, 11))}}
    assert optimizer_flops(MUON, params) == 3 * 5 * (4 * 8 * 8 * 16 + 2 * 8**3)
    assert optimizer_flops(hg.OptimizerConfig(), params) == 0


def test_muon_without_a_kernel_to_train_raises_a_one_line_error(tmp_path):
    config = dataclasses.replace(MUON, train_only="embedding")
    with pytest.raises(hg.UsageError, match=r"optimizer='muon' has no kernel .*train_only='embedding'"):
        fit(
            make_model(CONFIG),
            random_windows(TOKENS, 16, 4, seed=0),
            consecutive_windows(TOKENS[:100], 16, 4),
            tmp_path / "run",
            optimizer_config=config,
            train_config=hg.TrainConfig(steps=2, eval_interval=2),
        )
    assert not (tmp_path / "run").exists()
