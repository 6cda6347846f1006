"""What a penalty of activations may cost, on the models of `benchmarks/activity.py`."""

from benchmarks.activity import Size, memory, same_text, temporary


def test_a_penalty_of_each_scanned_block_stores_no_activation():
    size = Size(layers=24, width=64, heads=2, batch=2, tokens=32)
    carried, stored = (row.measured for row in memory(size, temporary))
    assert carried is not None
    assert stored is not None
    assert carried["median"] <= 1.02
    # The measure would see a stored activation.
    assert stored["median"] > 1.2


def test_rules_that_match_nothing_compile_to_the_bare_model():
    assert same_text(Size(layers=2, width=8, heads=2, batch=2, tokens=4))
