"""What a user may look for: every penalty is exported, tested, documented and described."""

import contextlib
import inspect
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxreg as jr
from tests.registry import CASES
from tests.registry.constraints import CASES as CONSTRAINTS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PENALTIES = sorted(
    name
    for name, value in vars(jr).items()
    if inspect.isclass(value) and issubclass(value, jr.Penalty) and not inspect.isabstract(value)
)
SAMPLES = {type(case.penalty): (case.penalty, case.sample) for case in CASES}
SAMPLES |= {type(case.constraint): (case.constraint, case.sample) for case in CONSTRAINTS}
every_penalty = pytest.mark.parametrize("name", PENALTIES)


def test_penalties_are_exported_from_both_places():
    below = {n for n, v in vars(jr.penalties).items() if inspect.isclass(v)}
    above = {n for n, v in vars(jr).items() if inspect.isclass(v)}
    assert below <= above
    assert len(PENALTIES) > 50


@every_penalty
def test_penalty_is_in_the_registry(name):
    assert getattr(jr, name) in SAMPLES


@every_penalty
def test_penalty_is_documented(name):
    if name == "Sum":
        return
    text = getattr(jr, name).__doc__
    for part in ("$$", "Gradient:", "Raises:", "Example:", ">>> ", "References:"):
        assert part in text, f"{name} lacks {part}"
    assert f"`{name}" in README


@every_penalty
def test_describe_shows_the_penalty(name):
    penalty, sample = SAMPLES[getattr(jr, name)]
    table = jr.kernel({"w": penalty}).describe({"w": jnp.asarray(sample, jnp.float32)})
    row = table.splitlines()[1]
    assert (" + " if name == "Sum" else f"{name}(") in row
    value = row.split()[-1]
    assert value == "-" if isinstance(penalty, jr.Constraint) else float(value) >= 0


@pytest.fixture
def ranks_are_not_promoted():
    with jax.numpy_rank_promotion("raise"):
        yield


@every_penalty
def test_ranks_are_not_promoted(name, ranks_are_not_promoted):
    """JAX then refuses to add axes, also for a user who asked for that in all of a program."""
    penalty, sample = SAMPLES[getattr(jr, name)]
    x = jnp.asarray(sample, jnp.float32)
    if isinstance(penalty, jr.Constraint):
        jax.eval_shape(penalty.project, x)
        return
    jax.eval_shape(jax.value_and_grad(penalty), x)
    jax.eval_shape(partial(jr.penalize, penalty=penalty), x)
    with contextlib.suppress(NotImplementedError):
        jax.eval_shape(partial(penalty.prox, step=0.5), x)


def test_ranks_are_not_promoted_of_references_and_in_functions(ranks_are_not_promoted):
    x, kernel, bias = jnp.ones((4, 3)), jnp.ones((3, 2)), jnp.ones(2)
    row, labels = jnp.ones(3), jnp.zeros(4, int)
    functions = (
        jr.L2To(1.0, reference=row, weight=row),
        partial(jr.L2To(1.0, reference=row, weight=row).prox, step=0.5),
        jr.KLTo(1.0, reference=row),
        jr.Cosine(1.0, reference=row),
        jr.Box(-row, row).project,
        partial(jr.Nuclear(1.0, method="polar").prox, step=0.5),
        lambda x: jr.functional.contractive(jnp.tanh, x, kernel, bias),
        lambda x: jr.functional.jacobian_norm(lambda x: x @ kernel, x),
        lambda x: jr.functional.jacobian_norm(lambda x: x @ kernel, x, key=jax.random.key(0)),
        lambda x: jr.ops.dense(x, kernel, bias, activation=jnp.tanh, penalty=jr.L1(1.0)),
        lambda x: jr.ops.mlp(
            x, kernel, bias, kernel.T, row, activation=jnp.tanh, penalty=jr.L1(1.0)
        ),
        jax.grad(
            lambda x: (
                jr.ops.linear_cross_entropy(
                    x, kernel, labels, bias=bias, label_smoothing=0.1, soft_cap=3.0, z_loss=1e-3
                ).loss
            )
        ),
    )
    for function in functions:
        jax.eval_shape(function, x)
