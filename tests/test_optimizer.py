"""Properties of the schedule; its values are compared with transformers' in test_trainer.py."""

from hypothesis import given
from hypothesis import strategies as st

from config import OptimizerConfig
from optimizer import learning_rate

STEPS = st.integers(0, 500)
PLACES = st.floats(0, 500)


@given(step=STEPS, progress=PLACES, total=PLACES, warmup=STEPS, floor=st.floats(0, 1), peak=st.floats(1e-6, 1))
def test_the_rate_never_exceeds_its_peak(
    step: int, progress: float, total: float, warmup: int, floor: float, peak: float
) -> None:
    """Steps are fractional in a run that was resumed with another batch size."""
    config = OptimizerConfig(learning_rate=peak, min_learning_rate_ratio=floor, warmup_steps=warmup)
    rate = learning_rate(step, config, total, progress)
    assert 0 <= rate <= peak
    if step >= warmup:
        assert rate >= peak * floor * (1 - 1e-12)


@given(warmup=st.integers(1, 100), rows=st.integers(1, 64), other=st.integers(1, 64), more=st.integers(0, 100))
def test_a_warm_up_that_is_over_stays_over(warmup: int, rows: int, other: int, more: int) -> None:
    """A step of `rows` rows becomes one of `other` rows, after the warm-up, and long before the end."""
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate_ratio=0.0, warmup_steps=warmup)
    taken = warmup + more
    seen, total = taken * rows / other, 100_000 * rows / other
    assert learning_rate(taken, config, total, seen) > 0.9
