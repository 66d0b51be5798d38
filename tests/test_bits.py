"""The same bits in every mode and on every instruction set, as the documentation promises."""

import pytest
from sweeps import processors, sweep

import numbaloss as nl
from numbaloss.bench import bits


@pytest.mark.parametrize("dtype", sweep(["float32", "float64"], "float32"))
@pytest.mark.parametrize("loss", sweep(nl.registry, "mse_loss"))
@pytest.mark.more
def test_every_mode_has_the_same_bits(loss, dtype):
    for call, ways in bits.digests([loss], (dtype,)).items():
        assert not bits.differing(ways), call


@pytest.mark.parametrize("processor", processors())
def test_other_processors_have_the_same_bits(processor):
    """Those of elementwise losses are this processor's too, where both fuse products with sums."""
    names = ["huber_loss", "cross_entropy"]
    own, other = bits.digests(names), bits.on_processor(processor, names)
    for call, ways in other.items():
        assert not bits.differing(ways), call
        if processor != "nehalem" and call.startswith("huber"):
            assert ways[bits.PLAIN] == own[call][bits.PLAIN], call


def test_a_difference_is_seen():
    made = {"value_and_grad": ["a", ["b", "c"]], "value": ["a", None], "jit": ["a", ["b"]]}
    assert bits.differing(made) == []
    assert bits.differing(made | {"grad": [None, ["b", "d"]]}) == ["grad"]
    assert bits.differing(made | {"value": ["e", None]}) == ["value"]
    own = bits.table({"here": {"a x": made}, "there": {"a x": {"value_and_grad": ["f", ["b", "c"]]}}})
    assert own == [["a", "equal", "equal; own bits"]]
