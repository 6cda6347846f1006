"""Patterns over paths, and the errors of rules that win nothing."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxreg as jr
from jaxreg.rules import Rules, matches

PARAMS = {
    "conv_1": {"kernel": jnp.ones(1), "bias": jnp.ones(1)},
    "head": {"kernel": jnp.ones(1)},
}


def has_two_segments(path):
    return path.count("/") == 1


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("kernel", "kernel", True),
        ("kernel", "dense/kernel", False),
        ("*", "kernel", True),
        ("*", "dense/kernel", False),
        ("*/kernel", "dense/kernel", True),
        ("*/kernel", "kernel", False),
        ("*/kernel", "block/dense/kernel", False),
        ("conv_*/kernel", "conv_12/kernel", True),
        ("conv_*/kernel", "conv_1/sub/kernel", False),
        ("conv_?/kernel", "conv_1/kernel", True),
        ("conv_?/kernel", "conv_12/kernel", False),
        ("**", "kernel", True),
        ("**", "a/b/c", True),
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/b/kernel", True),
        ("**/kernel", "a/b/subkernel", False),
        ("a/**", "a", True),
        ("a/**", "a/b/c", True),
        ("a/**", "ab/c", False),
        ("a/**/c", "a/c", True),
        ("a/**/c", "a/b/b/c", True),
        ("a/**/c", "a/b/b/d", False),
        ("**/b/**", "a/b/c", True),
        ("**/b/**", "b", True),
        ("**/b/**", "a/c", False),
        ("Kernel", "kernel", False),
        (".", ".", True),
        ("**", ".", True),
        ("*", ".", False),
        (".", "kernel", False),
        (re.compile("a|b"), "a", True),
        (re.compile("a"), "ab", False),
        (re.compile("a"), "ba", False),
        (re.compile(r".*/kernel"), "x/y/kernel", True),
        (has_two_segments, "a/b", True),
        (has_two_segments, "a", False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_pattern_matches_the_whole_path(pattern, path, expected):
    assert matches(pattern, path) is expected


def test_first_rule_that_matches_wins():
    rules = Rules.of({"head/*": None, "*/kernel": 1, "**": 2}, int, strict=True, owner="f")
    assert [rules.find(path) for path in ("head/kernel", "a/kernel", "a/bias")] == [0, 1, 2]
    assert Rules.of({"head": 1}, int, strict=True, owner="f").find("tail") is None


def test_order_of_the_mapping_decides():
    narrow_first = jr.kernel({"head/*": jr.L1(1.0), "**": jr.L1(10.0)})
    assert narrow_first(PARAMS) == 21.0
    exempt_first = jr.kernel({"head/*": None, "**": jr.L1(10.0)})
    assert exempt_first(PARAMS) == 20.0


@pytest.mark.parametrize(
    ("pattern", "shown"),
    [
        ("conv_1/kernl", '"conv_1/kernl"'),
        (re.compile("conv_1/kernl"), 're.compile("conv_1/kernl")'),
    ],
    ids=["glob", "regex"],
)
def test_rule_that_wins_nothing_is_named_with_the_nearest_paths(pattern, shown):
    message = (
        f"The rule {shown} wins none of the 3 leaves of the parameter tree."
        ' Nearest: "conv_1/kernel"'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jr.kernel({pattern: jr.L1(1.0)})(PARAMS)


def test_leaves_of_one_path_are_one_path_of_the_error():
    params = {"a/kernel": jnp.ones(2), "a": {"kernel": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r'none of the 1 leaves .* Nearest: "a/kernel"\. `strict'):
        jr.kernel({"b": jr.L1(1.0)})(params)


def test_predicate_that_wins_nothing_is_named():
    def is_missing(path):
        return False

    rules: Any = {is_missing: jr.L1(1.0)}
    with pytest.raises(ValueError, match="The rule is_missing wins none of the 3 leaves"):
        jr.kernel(rules)(PARAMS)


def test_exemption_that_wins_nothing_is_an_error_too():
    with pytest.raises(ValueError, match=r'The rule "tail/\*\*" wins none'):
        jr.kernel({"tail/**": None, "**": jr.L1(1.0)})(PARAMS)


def test_every_idle_rule_is_named():
    with pytest.raises(ValueError, match=r'The rule "x" wins none(.|\n)*The rule "y" wins none'):
        jr.kernel({"x": jr.L1(1.0), "**": jr.L1(1.0), "y": jr.L1(1.0)})(PARAMS)


def test_shadowed_rule_names_the_earlier_rule():
    message = (
        'The rule "head/kernel" wins none of the 3 leaves of the parameter tree: it matches'
        ' "head/kernel", but the earlier rule "**/kernel" wins that. Put the narrower rule first.'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jr.kernel({"**/kernel": jr.L2(1.0), "head/kernel": None})(PARAMS)


def test_not_strict_allows_idle_rules():
    kernel = jr.kernel({"missing": jr.L1(1.0), "head/*": jr.L1(1.0)}, strict=False)
    assert kernel(PARAMS) == 1.0


@pytest.mark.parametrize("pattern", [3, None, ("head", "kernel"), b"head", nnx.LoRAParam], ids=str)
@pytest.mark.parametrize("owner", ["kernel", "activity"])
def test_pattern_of_another_type_is_an_error(owner, pattern):
    message = (
        f"`jaxreg.{owner}` takes rules from a glob, a compiled regular expression or a predicate;"
        f" got the pattern {pattern!r}"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        getattr(jr, owner)({pattern: jr.L1(1.0)})


@pytest.mark.parametrize("value", [1e-3, "l2", jr.L1], ids=str)
def test_value_that_is_no_penalty_is_an_error(value):
    message = f"`jaxreg.kernel` takes a Penalty, or None to exempt; got {value!r} for '**'"
    with pytest.raises(TypeError, match=re.escape(message)):
        jr.kernel({"**": value})


def test_rules_are_a_pytree_of_their_values():
    mapping: Any = {"a": jr.L1(0.5), "b": None, re.compile("c"): jr.L1L2(1.0, 2.0)}
    rules = jr.kernel(mapping).rules
    assert jax.tree.leaves(rules) == [0.5, 1.0, 2.0]
    doubled = jax.tree.map(lambda s: 2 * s, rules)
    assert doubled.patterns == rules.patterns
    assert doubled.values == (jr.L1(1.0), None, jr.L1L2(2.0, 4.0))


def test_the_three_nearest_paths_are_named():
    params = {name: jnp.ones(2) for name in ("kernel1", "kernel2", "kernel3", "other")}
    nearest = r'Nearest: ("kernel\d", ){2}"kernel\d"\. '
    with pytest.raises(ValueError, match=nearest):
        jr.kernel({"kernel": jr.L1(1.0)})(params)
