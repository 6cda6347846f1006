"""Terms under each of Linen's transformations: value and gradient of a loss written by hand."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxreg as jr

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 3))
TOKENS = jax.random.normal(KEY, (4, 5, 3))
FLAGS = jnp.array([True, False, True])
CARRY: Any = {"params": 0, "intermediates": 0}


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def layers(params):
    """Return the parameters of each of the stacked layers."""
    (length,) = {leaf.shape[0] for leaf in jax.tree.leaves(params)}
    return [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(length)]


def squares(*outputs):
    """Return the term of L2(1.0) by batch mean."""
    return sum(jnp.sum(h**2) / h.shape[0] for h in outputs)


class Block(nn.Module):
    """A layer that a rule penalizes by L2, with a value that sows its own penalty of L1."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.Dense(3, name="dense")(x)
        return jr.sow(self, "tanh", jnp.tanh(h), jr.L1(0.5)), None


def block(params, x):
    h = dense(params["dense"], x)
    y = jnp.tanh(h)
    return y, squares(h) + 0.5 * jnp.sum(jnp.abs(y)) / len(x)


class Lifted(nn.Module):
    """Runs a lifted class, and returns the last output and the sum of all others."""

    lifted: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        return sum(y.sum() for y in jax.tree.leaves(self.lifted(name="blocks")(x)))


def one_after_the_other(params, x):
    total = 0.0
    for layer in layers(params["blocks"]):
        x, term = block(layer, x)
        total += term
    return x.sum(), total


def side_by_side(params, x):
    ys, terms = zip(*(block(layer, x) for layer in layers(params["blocks"])), strict=True)
    return sum(y.sum() for y in ys), sum(terms)


def once(params, x):
    y, term = block(params["blocks"], x)
    return y.sum(), term


def scan(target=Block, axes=CARRY, **options: Any):
    options = {"variable_axes": axes, "split_rngs": {"params": True}, "length": 3} | options
    lifted = nn.scan(target, **options)
    return lambda name: lambda x: lifted(name=name)(x, None)


def ensemble(target=Block, axes=CARRY, **options: Any):
    options = {"in_axes": None, "axis_size": 3, "split_rngs": {"params": True}} | options
    return nn.vmap(target, **{"variable_axes": axes} | options)


class Inline(nn.Module):
    """Lifts a function instead of a class."""

    lift: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        return self.lift(self, x)


class Layer(nn.Module):
    """A block that returns its output alone."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(3, name="dense")(x)
        return jr.sow(self, "tanh", jnp.tanh(h), jr.L1(0.5))


def nested(params, x):
    total = 0.0
    for outer in layers(params["blocks"]):
        for inner in layers(outer):
            x, term = block(inner, x)
            total += term
    return x.sum(), total


def scan_of_vmap(module, x):
    """Scan over layers that are ensembles of two members each."""

    def body(module, x, _):
        return nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2
        )(3, name="dense", parent=module)(x), None

    options: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    return nn.scan(body, length=3, **options)(module, jnp.stack([x, -x]), None)[0].sum()


def scanned_ensembles(params, x):
    members, total = [x, -x], 0.0
    for layer in layers(params["dense"]):
        members = [dense(p, h) for p, h in zip(layers(layer), members, strict=True)]
        total += squares(*members)
    return sum(h.sum() for h in members), total


class Heads(nn.Module):
    def setup(self):
        self.a, self.b, self.c = nn.Dense(3), nn.Dense(2), nn.Dense(1)


def head(name):
    return lambda module, x: getattr(module, name)(x).sum()


class Branches(Heads):
    """Goes through branches that measure different modules, and one that measures none."""

    pick: Callable[..., Any] = lambda module, x: x

    def __call__(self, x):
        if self.is_initializing():
            return sum(head(name)(self, x) for name in "abc")
        return self.pick(self, x)


def switched(module, x):
    branches = [head("a"), head("b"), lambda module, x: x.sum(), head("c")]
    return sum(nn.switch(jnp.int32(i), branches, module, x) for i in (1, 2, 3, 1))


def conditional(module, x):
    return nn.cond(FLAGS[0], head("a"), head("b"), module, x) + nn.cond(
        FLAGS[1], head("a"), lambda module, x: x.sum(), module, x
    )


def conditional_in_scan(module, x):
    def body(module, carry, flag):
        return carry + nn.cond(flag, head("a"), head("b"), module, x), None

    return nn.scan(body, variable_broadcast="params")(module, 0.0, FLAGS)[0]


def by_heads(*names):
    def loss(params, x):
        hs = [dense(params[name], x) for name in names if name != "none"]
        y = sum(h.sum() for h in hs) + x.sum() * names.count("none")
        return y, squares(*hs)

    return loss


class Recurrent(nn.Module):
    rnn: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        return self.rnn()(x).sum()


def recurrent_states(params, x, reverse=False):
    h, states = jnp.zeros((len(x), 3)), []
    for t in range(x.shape[1])[:: -1 if reverse else 1]:
        h = jnp.tanh(dense(params["i"], x[:, t]) + h @ params["h"]["kernel"])
        states.append(h)
    return states


def recurrent(params, x):
    states = recurrent_states(params["cell"], x)
    # A cell returns its carry and its output, which are the same here.
    return sum(h.sum() for h in states), 2 * squares(*states)


def cell(name="cell"):
    return nn.SimpleCell(3, name=name)


def bidirectional(params, x):
    forward = recurrent_states(params["forward"], x)
    backward = recurrent_states(params["backward"], x, reverse=True)
    y = sum(h.sum() for h in (*forward, *backward))
    return y, 2 * squares(*forward, *backward)


def scan_over_time(*, axes=None, remat=False):
    def body(module, carry, x):
        carry = jnp.tanh(module(x) + carry)
        return carry, carry

    def run(module, x):
        inner = nn.Dense(3, name="dense")
        options: Any = {"variable_axes": axes} if axes else {}
        scanned = nn.scan(
            nn.remat(body) if remat else body,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
            **options,
        )
        return scanned(inner, jnp.zeros((4, 3)), x)[1].sum()

    return Inline(run)


def over_time(params, x):
    hs = [dense(params["dense"], x[:, t]) for t in range(x.shape[1])]
    carries = [jnp.zeros((4, 3))]
    for h in hs:
        carries.append(jnp.tanh(h + carries[-1]))
    return sum(carry.sum() for carry in carries), squares(*hs)


def per_example(**axes):
    options: Any = {"variable_axes": {"params": None} | axes, "split_rngs": {"params": False}}
    lifted: Any = nn.vmap(nn.Dense, **options)
    return Inline(lambda module, x: lifted(3, name="dense", parent=module)(x).sum())


def by_examples(params, x):
    h = dense(params["dense"], x)
    return h.sum(), jnp.sum(h**2)


class Transposed(nn.Module):
    options: Any

    @nn.compact
    def __call__(self, x):
        def transpose(tree):
            return jax.tree.map(jnp.transpose, tree)

        lifted = nn.map_variables(
            nn.Dense, "params", transpose, transpose, init=self.is_initializing(), **self.options
        )
        return lifted(2, name="dense")(x).sum()


def transposed(params, x):
    kernel, bias = params["dense"]["kernel"], params["dense"]["bias"]
    h = x @ kernel.T + bias
    return h.sum(), squares(h)


class Shares(nn.Module):
    """Has the parameters of its inner module as its own."""

    def setup(self):
        self.inner = nn.Dense(3)
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x)


def shares(params, x):
    h = dense(params["shares"], x)
    return h.sum(), squares(h)


class Halves(nn.Module):
    """Is called through several methods, with shared modules and a block that is called twice."""

    def setup(self):
        self.encoder, self.block = nn.Dense(3), Block()
        self.decoder = Decoder(self.encoder)

    def encode(self, x):
        return self.block(self.block(self.encoder(x))[0])[0]

    def decode(self, x):
        return self.decoder(x)

    def __call__(self, x):
        return self.decode(self.encode(x)).sum()


class Decoder(nn.Module):
    shared: nn.Module

    def __call__(self, x):
        return self.shared(x)


def halves(params, x):
    first = dense(params["encoder"], x)
    y, once = block(params["block"], first)
    y, twice = block(params["block"], y)
    last = dense(params["encoder"], y)
    return last.sum(), once + twice + squares(first, last)


class Derivatives(nn.Module):
    """Differentiates a submodule inside of the forward pass."""

    derive: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        return self.derive(nn.Dense(3, name="dense"), x)


def summed(module, x):
    return module(x).sum()


def derived(value):
    def loss(params, x):
        h = dense(params["dense"], x)
        return value(params["dense"], x), squares(h)

    return loss


def sum_and_gradient(params, x):
    return dense(params, x).sum() + 4 * jnp.sum(params["kernel"])


def run_vjp(module, x):
    y, pull = nn.vjp(summed, module, x)
    return y + pull(1.0)[1].sum()


def run_jvp(module, x):
    if module.is_initializing():
        return summed(module, x)
    tangents = {"params": jax.tree.map(jnp.zeros_like, module.variables["params"])}
    derive: Any = nn.jvp
    y, tangent = derive(summed, module, (x,), (jnp.ones_like(x),), tangents)
    return y + tangent


def run_value_and_grad(module, x):
    derive: Any = nn.value_and_grad
    y, (gradient,) = derive(summed, module, x)
    return y + gradient.sum()


def vjp_in_scan(**options):
    def body(module, x, _):
        return nn.vjp(summed, module, x)[1](1.0)[1] + x, None

    def run(module, x):
        inner = nn.Dense(3, name="blocks")
        if module.is_initializing():
            return summed(inner, x)
        scanned = nn.scan(body, variable_broadcast="params", length=2, **options)
        return scanned(inner, x, None)[0].sum()

    return run


def vjps_in_scan(params, x):
    first = dense(params["blocks"], x)
    x = x + params["blocks"]["kernel"].sum(1)
    second = dense(params["blocks"], x)
    return (x + params["blocks"]["kernel"].sum(1)).sum(), squares(first, second)


class SignGradient(nn.Module):
    """Passes only the sign of its parameters' gradient back."""

    penalize_outside: bool = False

    @nn.compact
    def __call__(self, x):
        def forward(module, x):
            return nn.vjp(lambda module, x: module(x), module, x)

        def backward(pull, cotangent):
            parameters, *inputs = pull(cotangent)
            return jax.tree.map(jnp.sign, parameters), *inputs

        signed = nn.custom_vjp(lambda module, x: module(x), forward, backward)
        h = signed(nn.Dense(3, name="dense"), x)
        return jr.sow(self, "h", h, jr.L2(1.0)).sum() if self.penalize_outside else h.sum()


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and its output and penalty written by hand."""

    model: nn.Module
    by_hand: Callable[[Any, Any], tuple[Any, Any]]
    rules: Any = dataclasses.field(default_factory=lambda: {"blocks/dense": jr.L2(1.0)})
    x: Any = dataclasses.field(default_factory=lambda: X)
    reduction: Any = "batch_mean"


def case(model, by_hand, *paths, x=X, reduction: Any = "batch_mean"):
    rules = dict.fromkeys(paths or ("blocks/dense",), jr.L2(1.0))
    return Case(model, by_hand, rules, x, reduction)


REMAT = nn.remat(Block)
PARAMS: Any = {"params": 0}
CASES = {
    "scan": case(Lifted(scan(axes=PARAMS)), one_after_the_other),
    "scan-listed": case(Lifted(scan()), one_after_the_other),
    "scan-remat": case(Lifted(scan(REMAT, PARAMS)), one_after_the_other),
    "scan-remat-listed": case(Lifted(scan(REMAT)), one_after_the_other),
    "remat-scan": case(Lifted(scan(Block, PARAMS, unroll=2, out_axes=1)), one_after_the_other),
    "scan-jit": case(Lifted(scan(nn.jit(Block), PARAMS)), one_after_the_other),
    "scan-fold_rngs": case(Lifted(scan(nn.fold_rngs(Block), PARAMS)), one_after_the_other),
    "vmap": case(Lifted(lambda name: ensemble(axes=PARAMS)(name=name)), side_by_side),
    "vmap-listed": case(Lifted(lambda name: ensemble(out_axes=-1)(name=name)), side_by_side),
    "vmap-remat": case(Lifted(lambda name: ensemble(REMAT, PARAMS)(name=name)), side_by_side),
    "remat-vmap": case(
        Lifted(lambda name: nn.remat(ensemble(axes=PARAMS))(name=name)), side_by_side
    ),
    "vmap-axes": case(
        Lifted(lambda name: ensemble(axes=PARAMS, out_axes=(0, None))(name=name)), side_by_side
    ),
    "remat": case(Lifted(lambda name: REMAT(name=name)), once),
    "remat-params": case(
        Lifted(lambda name: nn.remat(Block, variables=["params"])(name=name)), once
    ),
    "jit": case(Lifted(lambda name: nn.jit(Block)(name=name)), once),
    "scan-time": case(scan_over_time(), over_time, "dense", x=TOKENS),
    "scan-time-listed": case(
        scan_over_time(axes={"intermediates": 0}), over_time, "dense", x=TOKENS
    ),
    "scan-time-remat": case(scan_over_time(remat=True), over_time, "dense", x=TOKENS),
    "vmap-examples": case(per_example(), by_examples, "dense", reduction="sum"),
    "vmap-examples-listed": case(
        per_example(intermediates=0), by_examples, "dense", reduction="sum"
    ),
    "remat_scan": case(
        Inline(lambda m, x: nn.remat_scan(Layer, lengths=(2, 2))(name="blocks")(x).sum()), nested
    ),
    "scan-vmap": case(Inline(scan_of_vmap), scanned_ensembles, "dense"),
    "cond": case(Branches(conditional), by_heads("a", "none"), "a", "b"),
    "switch": case(Branches(switched), by_heads("b", "none", "c", "b"), "a", "b", "c"),
    "cond-in-scan": case(Branches(conditional_in_scan), by_heads("a", "b", "a"), "a", "b"),
    "rnn": case(Recurrent(lambda: nn.RNN(cell(), name="rnn")), recurrent, "cell", x=TOKENS),
    "rnn-listed": case(
        Recurrent(lambda: nn.RNN(cell(), variable_axes={"intermediates": 0}, name="rnn")),
        recurrent,
        "cell",
        x=TOKENS,
    ),
    "bidirectional": case(
        Recurrent(
            lambda: nn.Bidirectional(
                nn.RNN(cell(name="forward")), nn.RNN(cell(name="backward")), name="rnn"
            )
        ),
        bidirectional,
        "forward",
        "backward",
        x=TOKENS,
    ),
    "map_variables": case(Transposed({}), transposed, "dense"),
    "map_variables-mutable": case(Transposed({"mutable": True}), transposed, "dense"),
    "share_scope": case(Inline(lambda module, x: Shares(name="shares")(x).sum()), shares, "shares"),
    "several-methods": case(Halves(), halves, "encoder", "block/dense"),
    "vjp": case(Derivatives(run_vjp), derived(sum_and_gradient), "dense"),
    "jvp": case(Derivatives(run_jvp), derived(sum_and_gradient), "dense"),
    "vjp-in-scan": case(
        Inline(vjp_in_scan(variable_axes={"intermediates": 0})), vjps_in_scan, "blocks"
    ),
    "value_and_grad": case(Derivatives(run_value_and_grad), derived(sum_and_gradient), "dense"),
}


@pytest.mark.parametrize("bound", [False, True], ids=["apply", "bind"])
def test_several_methods_in_one_apply(bound):
    model, rules = Halves(), {"encoder": jr.L2(1.0), "block/dense": jr.L2(1.0)}
    variables = model.init(KEY, X)

    def both(module, x):
        return module.decode(module.encode(x))

    def ours(variables):
        if bound:
            return jr.activity(rules)(lambda x: both(model.bind(variables), x))(X)[1].total
        return jr.activity(rules)(model.apply)(variables, X, method=both)[1].total

    chex.assert_trees_all_close(
        jax.jit(jax.value_and_grad(ours))(variables),
        jax.jit(jax.value_and_grad(lambda v: halves(v["params"], X)[1]))(variables),
        rtol=1e-5,
        atol=1e-6,
    )


MEND = r'cannot carry the term "{}.*Add "intermediates": 0 to its `variable_axes`'


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_a_loss_written_by_hand(name):
    check(CASES[name])


def test_without_jit_where_scans_are_loops():
    with jax.disable_jit():
        check(CASES["scan-remat"])


def check(case):
    shapes = jax.eval_shape(case.model.init, KEY, case.x)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "f"), shapes)
    forward = jr.activity(case.rules, reduction=case.reduction)(case.model.apply)

    def ours(variables, x):
        y, terms = forward(variables, x)
        return y**2 / 9 + terms.total, (y, terms.total)

    def theirs(variables, x):
        y, term = case.by_hand(variables["params"], x)
        return y**2 / 9 + term, (y, term)

    @jax.jit
    def both(variables, x):
        return [
            jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables, x)
            for loss in (ours, theirs)
        ]

    got, expected = both(variables, case.x)
    assert float(expected[0][1][1]) > 0
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def total(model, rules, x=X):
    variables = jax.eval_shape(model.init, KEY, x)
    return jax.eval_shape(lambda v: jr.activity(rules)(model.apply)(v, x)[1].total, variables)


def stacked(make, **options):
    return lambda module, x: make("blocks", **options)(x)[0].sum()


def scanned(name, **options):
    return scan(**{"axes": PARAMS} | options)(name)


def mapped(name, **options):
    return ensemble(**{"axes": PARAMS} | options)(name=name)


def nested_remat_scan(module, x):
    options: Any = {"variable_axes": PARAMS, "split_rngs": {"params": True}}
    return nn.remat_scan(Layer, lengths=(2, 2), **options)(name="blocks")(x).sum()


REFUSED: dict[str, Callable[..., Any]] = {
    "vmap-out-axis": stacked(mapped, out_axes=1),
    "vmap-last-axis": stacked(mapped, out_axes=-1),
    "vmap-not-stacked": stacked(mapped, axes=PARAMS | {"intermediates": None}),
    "scan-broadcast": stacked(scanned, variable_broadcast="intermediates"),
    "scan-carry": stacked(scanned, variable_carry="intermediates"),
    "scan-last-axis": stacked(scanned, axes=PARAMS | {"intermediates": -1}),
    "remat_scan": nested_remat_scan,
    "vjp-in-scan": vjp_in_scan(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_carry_a_term_says_which_argument_mends_it(name):
    """Each names `variable_axes`; the cases that are listed above show that it mends them."""
    with pytest.raises((ValueError, TypeError), match=MEND.format("blocks")):
        total(Inline(REFUSED[name]), {"blocks/dense": jr.L2(1.0), "blocks": jr.L1(1.0)})


def mends(error):
    return [note for note in error.__notes__ if "Unless the model itself is at fault" in note]


def test_the_mend_is_said_once():
    """However many modules the error passes through."""
    refused = REFUSED["vmap-not-stacked"]
    model = Inline(lambda module, x: Inline(refused, name="inner")(x))
    with pytest.raises(ValueError, match=MEND.format("inner/blocks")) as caught:
        total(model, {"**/dense": jr.L2(1.0)})
    assert len(mends(caught.value)) == 1


def fail(module):
    if not module.is_initializing():
        raise RuntimeError("from the model")


class Fails(nn.Module):
    @nn.compact
    def __call__(self, x):
        fail(self)


def after_a_term_beside(module, x):
    scan(axes=PARAMS)("blocks")(x)
    fail(module)


def in_another_module(module, x):
    scan()("blocks")(x)
    Fails()(x)


def after_a_module(module, x):
    Lifted(scan(), name="inner")(x)
    fail(module)


@pytest.mark.parametrize("run", [after_a_term_beside, in_another_module, after_a_module])
def test_an_error_once_terms_have_left_is_the_models(run):
    with pytest.raises(RuntimeError, match="from the model") as caught:
        total(Inline(run), {"**/dense": jr.L2(1.0)})
    assert not mends(caught.value)


@pytest.mark.parametrize("axes", [{"params": 0}, CARRY], ids=["beside", "sown"])
def test_layers_are_no_microbatches(axes):
    """The axis of a scan over layers must not be taken for that of a scan over microbatches."""
    model = Lifted(scan(axes=axes))
    variables = model.init(KEY, X)
    forward = jr.activity({"blocks/dense": jr.L2(1.0)})(model.apply)
    _, terms = forward(variables, X)
    with pytest.raises(ValueError, match="got one of a single batch"):
        jr.combine(terms)
    _, stacked = jax.lax.scan(lambda _, x: (None, forward(variables, x)[1]), None, X[:, None])
    np.testing.assert_allclose(jr.combine(stacked).total, terms.total, rtol=1e-5)
    parts = [forward(variables, x)[1] for x in (X[:1], X[1:])]
    np.testing.assert_allclose(jr.combine(parts).total, terms.total, rtol=1e-5)


def test_a_term_that_a_scan_does_not_stack_is_an_error():
    """It is the same in each turn, so that Flax itself has no objection."""

    def body(module, carry, _):
        return carry + module(X).sum(), None

    def run(module, x):
        inner = nn.Dense(3, name="dense")
        if module.is_initializing():
            return summed(inner, X)
        scanned = nn.scan(body, variable_broadcast=["params", "intermediates"], length=3)
        return scanned(inner, 0.0, None)[0]

    with pytest.raises(ValueError, match=r'the term "dense".*not in `variable_broadcast`'):
        total(Inline(run), {"dense": jr.L2(1.0)})


def loop(*, outside):
    def body(module, carry):
        return carry[0] + 1, jnp.tanh(module.a(carry[1]))

    def run(module, x):
        h = nn.while_loop(lambda module, carry: carry[0] < 3, body, module, (0, x))[1]
        return jr.sow(module, "h", h, jr.L2(1.0)).sum() if outside else h.sum()

    return Branches(run)


def test_a_term_in_a_while_loop_is_an_error_and_one_of_what_it_returns_is_not():
    with pytest.raises(ValueError, match=r'the term "a" out of the `nn.while_loop`.*`nn.scan`'):
        total(loop(outside=False), {"a": jr.L2(1.0)})
    model = loop(outside=True)
    params = model.init(KEY, X)["params"]

    def ours(params):
        return jr.activity({"a": None})(model.apply)({"params": params}, X)[1].total

    def theirs(params):
        h = X
        for _ in range(3):
            h = jnp.tanh(dense(params["a"], h))
        return squares(h)

    # No reverse mode goes through a loop of unknown length.
    direction = jax.tree.map(jnp.ones_like, params)
    chex.assert_trees_all_close(
        *(jax.jvp(loss, (params,), (direction,)) for loss in (ours, theirs)), rtol=1e-5
    )


def test_a_pass_inside_of_a_while_loop_is_over_in_each_turn():
    def body(module, carry):
        h, terms = jr.activity({"a": jr.L2(1.0)}, strict=False)(module.a)(carry[1])
        return carry[0] + 1, jnp.tanh(h), terms.total

    def run(module, x):
        start = 0, x, jnp.zeros(())
        return nn.while_loop(lambda module, carry: carry[0] < 3, body, module, start)[2]

    model = Branches(run)
    variables = model.init(KEY, X)
    h = X
    for _ in range(3):
        last = dense(variables["params"]["a"], h)
        h = jnp.tanh(last)
    chex.assert_trees_all_close(model.apply(variables, X), squares(last), rtol=1e-5)


def test_a_term_in_a_custom_vjp_is_an_error_and_one_of_what_it_returns_is_not():
    """The backward function never sees a cotangent of the term: its gradient would be zero."""
    with pytest.raises(ValueError, match=r'"dense" out of the `nn.custom_vjp`.*`jaxreg.sow`'):
        total(SignGradient(), {"dense": jr.L2(1.0)})
    model = SignGradient(penalize_outside=True)
    variables = model.init(KEY, X)

    def lost(variables):
        return jr.activity({"dense": jr.L2(1.0)})(SignGradient().apply)(variables, X)[1].total

    # Uncompiled, it has no trace of its own; differentiated, `nn.vjp` takes the term out of it.
    for run in (lost, jax.grad(lost), jax.jit(jax.grad(lost))):
        with pytest.raises(ValueError, match=r'"dense" out of the `nn.custom_vjp`'):
            run(variables)
    forward = jr.activity({"dense": None})(model.apply)
    value, gradient = jax.value_and_grad(lambda v: forward(v, X)[1].total)(variables)
    params = variables["params"]["dense"]
    expected = jax.value_and_grad(lambda p: squares(dense(p, X)))(params)
    chex.assert_trees_all_close(
        (value, gradient["params"]["dense"]),
        (expected[0], jax.tree.map(jnp.sign, expected[1])),
        rtol=1e-5,
    )


def policies():
    """Return every policy that JAX has for `remat`, those with names given the name of the term."""
    policies = jax.checkpoint_policies
    found = {
        "everything": policies.everything_saveable,
        "nothing": policies.nothing_saveable,
        "dots": policies.dots_saveable,
        "dots_without_batch": policies.dots_with_no_batch_dims_saveable,
        "anything_except": policies.save_anything_except_these_names("tanh"),
        "any_names_but": policies.save_any_names_but_these("tanh"),
        "only": policies.save_only_these_names("tanh"),
        "both": policies.save_from_both_policies(
            policies.dots_saveable, policies.save_only_these_names("tanh")
        ),
        "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
        "save_and_offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=["tanh"],
            names_which_can_be_offloaded=[],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    return {"none": None} | found


def test_every_policy_of_remat_gives_one_gradient():
    class Named(nn.Module):
        policy: Any

        @nn.compact
        def __call__(self, x):
            h = nn.remat(Layer, policy=self.policy)(name="block")(x)
            return checkpoint_name(h, "tanh")

    variables = Named(None).init(KEY, X)

    @jax.jit
    def gradients(variables):
        return {
            name: jax.grad(
                lambda v, policy=policy: (
                    jr.activity({"block/dense": jr.L2(1.0)})(Named(policy).apply)(v, X)[1].total
                )
            )(variables)["params"]["block"]
            for name, policy in policies().items()
        }

    expected = jax.grad(lambda params: block(params, X)[1])(variables["params"]["block"])
    for name, gradient in gradients(variables).items():
        chex.assert_trees_all_close(gradient, expected, rtol=1e-5, custom_message=name)


def test_the_branch_that_is_not_taken_is_worth_nothing():
    """Its statistics are those of an empty batch, and its strength is there for `combine`."""
    penalty = jr.KLSparsity(1.0, target=0.3)

    class Model(Heads):
        def __call__(self, x, flag):
            if self.is_initializing():
                return head("a")(self, x) + head("b")(self, x)
            branches: Any = (
                lambda m, x: nn.sigmoid(m.a(x)),
                lambda m, x: nn.sigmoid(m.a(x) - m.a(x)),
            )
            sown: Any = [
                lambda m, x, f=f, i=i: jr.sow(m, f"branch{i}", f(m, x), penalty).sum()
                for i, f in enumerate(branches)
            ]
            return nn.cond(flag, *sown, self, x)

    variables = Model().init(KEY, X, True)
    forward = jax.jit(
        lambda v, flag: jr.activity({"a": None, "b": None}, strict=False)(Model().apply)(v, X, flag)
    )
    taken, other = (forward(variables, flag)[1] for flag in (True, False))
    h = nn.sigmoid(dense(variables["params"]["a"], X))
    expected = {"branch0": penalty(h), "branch1": penalty(jnp.full_like(h, 0.5))}
    chex.assert_trees_all_close(taken.as_dict(), expected | {"branch1": 0.0}, rtol=1e-5)
    chex.assert_trees_all_close(other.as_dict(), expected | {"branch0": 0.0}, rtol=1e-5)
    for order in ((taken, other), (other, taken)):
        chex.assert_trees_all_close(jr.combine(order).as_dict(), expected, rtol=1e-5)


def sown(penalty, name="code"):
    return lambda module, x: jr.sow(module, name, nn.sigmoid(x), penalty).sum()


def test_branches_sow_different_penalties_under_one_name():
    """Also twice, and under a name that is sown outside of them."""
    statistic, groups = jr.KLSparsity(1.0, target=0.3), jr.L1(0.5) + jr.GroupLasso(0.1)
    penalties: list[jr.Penalty] = [statistic, groups, jr.L1(0.1), jr.L1(0.2)]
    branches: list[Any] = [*map(sown, penalties), head("a")]

    def model(i):
        def pick(module, x):
            first = sown(jr.L1(0.4))(module, x) + nn.cond(i > 1, *branches[1:3], module, x)
            return first + nn.switch(i, branches, module, x)

        return Branches(pick)

    variables = Heads().init(KEY, X, method=lambda module, x: module.a(x))
    terms = jax.jit(lambda i: jr.activity({})(model(i).apply)(variables, X)[1])
    values = [jr.penalize(nn.sigmoid(X), penalty) for penalty in penalties]
    for i, value in enumerate([*values, jnp.zeros(())]):
        expected = 4 * values[2] + values[1 if i > 1 else 2] + value
        np.testing.assert_allclose(terms(i)["code"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("penalties", "sizes"),
    [
        ([jr.KLSparsity(1.0, target=0.3)] * 2, [1, 2]),
        ([jr.L1(0.3), jr.L1(jnp.bfloat16(0.5))], [3, 3]),
    ],
    ids=["moments", "strengths"],
)
def test_branches_sow_other_types_under_one_name(penalties, sizes):
    branches = [
        lambda module, x, penalty=penalty, size=size: sown(penalty)(module, x[:, :size])
        for penalty, size in zip(penalties, sizes, strict=True)
    ]
    for i, (penalty, size) in enumerate(zip(penalties, sizes, strict=True)):
        model = Inline(lambda module, x, i=i: nn.switch(i, branches, module, x))
        _, terms = jr.activity({})(model.apply)({}, X)
        expected = jr.penalize(nn.sigmoid(X[:, :size]), penalty)
        np.testing.assert_allclose(terms["code"], expected, rtol=1e-5)


def test_branches_hold_branches_and_scans():
    """Also strengths of several types."""
    narrow = jr.L1(jnp.bfloat16(0.5))

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + 0 * sown(jr.L1(0.3))(self, x), None

    class Model(nn.Module):
        def setup(self):
            self.layers = nn.scan(Layer, length=3)()

        def __call__(self, i, x):
            def inner(module, x):
                return nn.cond(i > 0, sown(narrow), sown(jr.L2(0.2)), module, x)

            def layers(module, x):
                return module.layers(x, None)[0].sum()

            return nn.switch(i, [inner, inner, layers, sown(jr.GroupLasso(1))], self, x)

    total = jax.jit(lambda i: jr.activity({})(Model().apply)({}, i, X)[1].total)
    a = nn.sigmoid(X)
    for i, (penalty, layers) in enumerate(
        [(jr.L2(0.2), 1), (jr.L1(0.5), 1), (jr.L1(0.3), 3), (jr.GroupLasso(1.0), 1)]
    ):
        expected = layers * jr.penalize(a, penalty)
        np.testing.assert_allclose(total(i), expected, rtol=1e-5)


def test_parameters_with_penalties_of_their_own_are_scanned_inside_of_a_branch():
    """They count whichever branch is taken, once, also where the strength is an array."""

    class Layer(nn.Module):
        strength: Any

        @nn.compact
        def __call__(self, x, _):
            return jr.linen.Dense(3, kernel_regularizer=jr.L2(self.strength))(x), None

    class Model(nn.Module):
        strength: Any

        def setup(self):
            axes: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            self.layers = nn.scan(Layer, length=3, **axes)(self.strength)

        def __call__(self, x, flag):
            if self.is_initializing():
                return self.layers(x, None)[0].sum()
            branches = lambda m, x: m.layers(x, None)[0].sum(), lambda m, x: x.sum()
            return nn.cond(flag, *branches, self, x)

    variables = Model(0.2).init(KEY, X, True)
    kernel = variables["params"]["layers"]["Dense_0"]["kernel"]

    @functools.partial(jax.jit, static_argnums=0)
    def by_strength(array, strength, flag):
        def penalty(strength, variables):
            model = Model(strength if array else 0.2)
            return jr.activity({})(model.apply)(variables, X, flag)[1].total

        return jax.value_and_grad(penalty, argnums=(0, 1))(strength, variables)

    for array in (False, True):
        for flag in (False, True):
            value, gradients = by_strength(array, jnp.float32(0.2), flag)
            np.testing.assert_allclose(value, 0.2 * jnp.sum(kernel**2), rtol=1e-5)
            np.testing.assert_allclose(gradients[0], array * jnp.sum(kernel**2), rtol=1e-5)
            gradient = gradients[1]["params"]["layers"]["Dense_0"]["kernel"]
            np.testing.assert_allclose(gradient, 0.4 * kernel, rtol=1e-5)


THROUGH: dict[str, Callable[[Any, Any], Any]] = {
    "cond": lambda m, x: nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: x, m, x),
    "vmap": lambda m, x: nn.vmap(lambda m, x: m(x), variable_axes={True: None})(m, x),
    "scan": lambda m, x: nn.scan(lambda m, x, _: (m(x), None), length=2, variable_broadcast=True)(
        m, x, None
    )[0],
}


@pytest.mark.parametrize("name", THROUGH)
def test_what_a_model_sows_for_no_one_is_no_matter_of_its_transformations(name):
    class Sower(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(3)(x)
            self.sow("intermediates", "hidden", h)
            return h

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            sower, head = Sower(), nn.Dense(2, name="head")
            return head(sower(x) if self.is_initializing() else THROUGH[name](sower, x))

    variables = {"params": Model().init(KEY, X)["params"]}
    expected: Any = Model().apply(variables, X)
    out, terms = jr.activity({"head": jr.L2(1.0)})(Model().apply)(variables, X)
    chex.assert_trees_all_close(out, expected, rtol=1e-6)
    np.testing.assert_allclose(terms["head"], jnp.sum(expected**2) / len(X), rtol=1e-5)


SETTINGS: dict[str, Callable[[Any], jr.Penalty]] = {
    "number and array": lambda s: jr.L1(0.1) + jr.L2(s),
    "array and number": lambda s: jr.L2(s) + jr.L1(0.1),
    "NumPy's": lambda s: jr.L1(np.array(0.1)) + jr.L2(s),  # type: ignore[arg-type, unused-ignore]
    "threshold": lambda s: jr.Huber(0.1, delta=s),
    "reference": lambda s: jr.L2To(0.1, reference=s * jnp.ones((3, 3))),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stacked", [True, False])
def test_parameters_penalties_of_numbers_and_arrays_are_scanned(name, stacked):
    """Layers of their own, stacked twice, or one that runs several times."""
    axes: Any = {"variable_broadcast": "params", "split_rngs": {"params": False}}
    if stacked:
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}

    class Layer(nn.Module):
        strength: Any

        @nn.compact
        def __call__(self, x, _):
            penalty = SETTINGS[name](self.strength)
            return jr.linen.Dense(3, use_bias=False, kernel_regularizer=penalty)(x), None

    class Layers(nn.Module):
        strength: Any

        @nn.compact
        def __call__(self, x, _):
            return nn.scan(Layer, length=3, **axes)(self.strength)(x, None)

    def total(strength, variables):
        model = nn.scan(Layers, length=2, **axes)(strength)
        return jr.activity({})(model.apply)(variables, X, None)[1].total

    variables = nn.scan(Layers, length=2, **axes)(0.3).init(KEY, X, None)
    (kernel,) = jax.tree.leaves(variables)

    def by_hand(strength):
        return sum(SETTINGS[name](strength)(k) for k in kernel.reshape(-1, 3, 3))

    expected = jax.value_and_grad(by_hand)(0.3)
    got = jax.jit(jax.value_and_grad(total))(0.3, variables)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


def test_a_strength_that_is_made_inside_of_a_branch_is_an_error_of_jax():
    def learned(module, x):
        return sown(jr.L1(jnp.mean(x) ** 2))(module, x)

    model = Branches(lambda module, x: nn.cond(FLAGS[0], learned, head("b"), module, x))
    forward = jax.jit(lambda v: jr.activity({})(model.apply)(v, X)[1].total)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        forward(model.init(KEY, X))


def test_an_error_of_the_models_own_in_a_branch_is_the_models():
    def broken(module, x):
        raise RuntimeError("from the model")

    model = Branches(lambda module, x: nn.cond(FLAGS[0], head("a"), broken, module, x))
    with pytest.raises(RuntimeError, match=r"^from the model"):
        total(model, {"a": jr.L2(1.0)})


def test_a_jitted_module_in_a_function():
    """A trace of it that lets its term out beside the output is never run by JAX's fast path."""
    model = nn.jit(Block)()
    variables = model.init(KEY, X)
    forward = jr.activity({"dense": jr.L2(1.0)})(lambda v, x: model.apply(v, x)[0])
    jitted = jax.jit(lambda v, x: forward(v, x)[1].total)
    for _ in range(3):
        expected = block(variables["params"], X)[1]
        np.testing.assert_allclose(jitted(variables, X), expected, rtol=1e-6)
        with pytest.raises(ValueError, match=r'"dense" out of an `nn.jit`.*Put one around'):
            forward(variables, X)


def test_a_jitted_module_whose_term_was_sown_is_not_replayed_in_a_function():
    model = nn.jit(Block)()
    variables = model.init(KEY, X)
    activity = jr.activity({"dense": jr.L2(1.0)})
    activity(model.apply)(variables, X)
    with pytest.raises(ValueError, match=r'"dense" out of an `nn.jit`'):
        # As a set: that is how the pass above asks for them.
        activity(lambda v: model.apply(v, X, mutable={"intermediates"}))(variables)


def test_batch_statistics_dropout_and_the_users_own_intermediates_alongside():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            h = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(3, name="dense")(x))
            self.sow("intermediates", "own", h)
            return nn.Dropout(0.5, deterministic=False)(h), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes: Any = {"params": 0, "batch_stats": 0, "intermediates": 0}
            lifted = nn.scan(Layer, axes, split_rngs={"params": True, "dropout": True}, length=2)
            return lifted(name="layers")(x, None)[0]

    variables = jax.jit(Model().init)({"params": KEY, "dropout": KEY}, X)
    plain = jax.jit(
        lambda v: Model().apply(
            v, X, mutable=["batch_stats", "intermediates"], rngs={"dropout": KEY}
        )
    )
    forward = jr.activity({"layers/norm": jr.L2(1.0), "layers/own": jr.L2(1.0)})(Model().apply)
    penalized = jax.jit(
        lambda v: forward(v, X, mutable=["batch_stats", "intermediates"], rngs={"dropout": KEY})
    )
    out, terms = penalized(variables)
    expected = plain(variables)
    chex.assert_trees_all_close(out, expected, rtol=1e-5)
    own = jnp.sum(expected[1]["intermediates"]["layers"]["own"][0] ** 2) / 4
    chex.assert_trees_all_close(terms.as_dict(), {"layers/norm": own, "layers/own": own}, rtol=1e-5)


class Base(nn.Module):
    @nn.remat
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


class Doubled(Base):
    def __call__(self, x):
        return super().__call__(x) * 2


class LiftedBase(nn.remat(Block)):  # type: ignore[misc]
    def __call__(self, x):
        return super().__call__(x)[0] * 2


class Sharing(nn.Module):
    inner: nn.Module

    def setup(self):
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x)[0] * 2


class Top(nn.Module):
    module: Callable[[], nn.Module]

    def setup(self):
        self.m = self.module()

    def __call__(self, x):
        return self.m(x)


@pytest.mark.parametrize(
    "module",
    [
        Doubled,
        LiftedBase,
        lambda: Sharing(Block()),
        lambda: Sharing(nn.remat(Block)()),
        lambda: Sharing(nn.jit(Block)()),
    ],
    ids=["super", "lifted-super", "share_scope", "share_scope-remat", "share_scope-jit"],
)
def test_of_calls_within_one_scope_the_outermost_output_counts(module):
    variables = Top(module).init(KEY, X)
    y, terms = jr.activity({"m": jr.L2(1.0)})(Top(module).apply)(variables, X)
    np.testing.assert_allclose(terms["m"], squares(y), rtol=1e-6)


@pytest.mark.parametrize("activity", [{}, {"sown/h": jr.L2(1.0)}], ids=["bare", "own"])
def test_what_a_model_sows_goes_to_an_activity_inside_another_too(activity):
    class Sown(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "h", x)
            return x

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            _, terms = jr.activity({"sown/h": jr.L2(0.5)})(Sown(name="sown"))(x)
            return terms.as_dict()

    inner, outer = jr.activity(activity)(Model().apply)({}, X)
    chex.assert_trees_all_close(inner, {"sown/h": 0.5 * squares(X)}, rtol=1e-6)
    assert outer.keys() == activity.keys()


class Weighted(nn.Module):
    @nn.compact
    def __call__(self, x, constant):
        weight = nn.Dense(3, name="dense")(constant)
        return x * weight, weight


@pytest.mark.parametrize(
    "lift",
    [
        functools.partial(
            nn.vmap, variable_axes={"params": None}, in_axes=(0, None), out_axes=(0, None)
        ),
        functools.partial(
            nn.scan,
            variable_broadcast="params",
            in_axes=nn.broadcast,
            out_axes=nn.broadcast,
            length=3,
        ),
    ],
    ids=["vmap", "scan"],
)
def test_a_term_beside_an_output_that_is_not_stacked_is_an_error(lift):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lift(Weighted, split_rngs={"params": False})(name="m")(x, X[0])

    variables = Model().init(KEY, X)
    with pytest.raises(ValueError, match=r'term "m/dense".*Add "intermediates": 0'):
        jr.activity({"m/dense": jr.L2(1.0)})(Model().apply)(variables, X)


def test_an_activity_inside_another_measures_beside_it():
    """Linen's modules put out into both."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            lifted = scan(axes=PARAMS)("blocks")
            return jr.activity({"blocks/dense": jr.L1(1.0)})(lambda: lifted(x)[0].sum())()

    variables = Model().init(KEY, X)
    (y, inner), outer = jr.activity({"blocks/dense": jr.L2(1.0)})(Model().apply)(variables, X)
    x, expected = X, []
    for layer in layers(variables["params"]["blocks"]):
        h = dense(layer["dense"], x)
        x = jnp.tanh(h)
        expected.append([jnp.sum(h**2) / 4, jnp.sum(jnp.abs(h)) / 4, jnp.sum(jnp.abs(x)) / 8])
    l2, l1, own = (sum(values) for values in zip(*expected, strict=True))
    chex.assert_trees_all_close(
        inner.as_dict(), {"blocks/dense": l1, "blocks/tanh": own}, rtol=1e-5
    )
    chex.assert_trees_all_close(outer.as_dict(), {"blocks/dense": l2}, rtol=1e-5)
    np.testing.assert_allclose(y, x.sum(), rtol=1e-5)
