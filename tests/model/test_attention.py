"""The implementations of attention: what each promises, and that they agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_model, small_config
from flax import nnx

from hourglass_jax.nn.attention.choice import choose
from hourglass_jax.nn.platform import n_devices, on_one_cpu, platform

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (3, 9)))


def make_loss(attention, **options):
    """loss(params, tokens [L]) of the nested model, and its parameters."""
    config = small_config(
        hierarchy="0@1 1@2 0@1", shortening="attention_average", upsampling="attention", attention=attention, **options
    )
    graph, params = nnx.split(make_model(config))

    def loss(params, tokens):
        log_p = jax.nn.log_softmax(nnx.merge(graph, params)(tokens[None, :-1])[0])
        return -jnp.take_along_axis(log_p, tokens[1:, None], axis=-1).mean()

    return loss, params


def dot(a, b):
    return sum(np.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def direction_like(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)


@pytest.mark.parametrize("positions", ["relative", pytest.param("rotary", marks=pytest.mark.slow)])
def test_plain_attention_supports_reverse_forward_and_second_derivatives(positions):
    with jax.enable_x64(True):
        loss, params = make_loss("plain", positions=positions, dtype="float64")
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        direction, tokens = direction_like(params), TOKENS[0]

        @jax.jit
        def derivatives(params, direction):
            gradient = jax.grad(loss)(params, tokens)
            _, slope = jax.jvp(lambda params: loss(params, tokens), (params,), (direction,))
            _, hessian_vector = jax.jvp(lambda params: jax.grad(loss)(params, tokens), (params,), (direction,))
            return gradient, slope, hessian_vector

        gradient, slope, hessian_vector = derivatives(params, direction)
        assert slope == pytest.approx(float(dot(gradient, direction)), rel=1e-9)
        ahead, behind = (
            derivatives(
                jax.tree.map(lambda p, d, step=step: np.asarray(p) + step * np.asarray(d), params, direction), direction
            )[0]
            for step in (1e-5, -1e-5)
        )
        for exact, a, b in zip(*map(jax.tree.leaves, (hessian_vector, ahead, behind)), strict=True):
            np.testing.assert_allclose((a - b) / 2e-5, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", [pytest.param("plain", marks=pytest.mark.slow), "blocked"])
def test_vmapped_gradients_equal_gradients_of_single_examples(attention):
    loss, params = make_loss(attention)
    of_each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(params, TOKENS)
    alone = jax.jit(jax.grad(loss))
    for i, tokens in enumerate(TOKENS):
        for batched, single in zip(*map(jax.tree.leaves, (of_each, alone(params, tokens))), strict=True):
            np.testing.assert_allclose(batched[i], single, rtol=1e-3, atol=1e-5)


def test_platform_follows_the_active_mesh():
    assert platform() == "cpu"
    device = jax.sharding.AbstractDevice("some GPU", None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)):
        assert (platform(), n_devices(), on_one_cpu()) == ("gpu", 2, False)
        assert choose("auto", "bfloat16", 64)[0] == "fused"
        with jax.default_device("cpu"):
            assert platform() == "gpu"
    assert choose("auto", "bfloat16", 64)[0] == "blocked"


def test_blocked_attention_has_no_forward_derivative():
    loss, params = make_loss("blocked")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda params: jax.jvp(lambda params: loss(params, TOKENS[0]), (params,), (params,))).lower(params)
