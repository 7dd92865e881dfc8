"""Our histograms against prometheus_client's own."""

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily

from server.histogram import Histogram
from server.metrics import BETWEEN, TOKENS, WHOLE

VALUES = st.floats(0, 1e6) | st.sampled_from([*BETWEEN, *WHOLE, *map(float, TOKENS)])


@given(st.lists(VALUES), st.sampled_from([BETWEEN, WHOLE, TOKENS]))
def test_the_same_values_make_the_same_samples(
    values: list[float], bounds: tuple[float, ...]
) -> None:
    registry = CollectorRegistry()
    theirs = prometheus_client.Histogram("h", "about", ["x"], buckets=bounds, registry=registry)
    ours, family = Histogram(bounds), HistogramMetricFamily("h", "about", labels=["x"])
    theirs.labels("1")
    for value in values:
        theirs.labels("1").observe(value)
        ours.observe(value)
    ours.tell(family, ["1"])
    said = {(one.name, *one.labels.items()): one.value for one in family.samples}
    (collected,) = registry.collect()
    wanted = {(one.name, *one.labels.items()): one.value for one in collected.samples}
    assert said == {name: value for name, value in wanted.items() if name[0] != "h_created"}
