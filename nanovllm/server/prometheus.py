"""An engine's metrics in the text format of Prometheus."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest

from nanovllm.reports.metrics import GAUGES, HELP, HISTOGRAMS, PREFIX, Metric


class Collector:
    """What prometheus_client asks for the metrics."""

    def __init__(self, metrics: list[Metric], model: str) -> None:
        """Of an engine that serves `model`."""
        self.metrics = metrics
        self.model = model

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily]:
        """Each metric, with the model's name for a label, as vLLM has it."""
        for name, text in HELP.items():
            samples = [metric for metric in self.metrics if metric.name == PREFIX + name]
            labels = ["model_name", *samples[0].labels]
            kind = CounterMetricFamily
            if name in GAUGES:
                kind = GaugeMetricFamily
            elif name in HISTOGRAMS:
                kind = HistogramMetricFamily
            family = kind(PREFIX + name, text, labels=labels)
            for sample in samples:
                values = [self.model, *sample.labels.values()]
                if name in HISTOGRAMS:
                    family.add_metric(values, list(sample.buckets.items()), sample.sum)
                else:
                    family.add_metric(values, sample.value)
            yield family


def exposition(metrics: list[Metric], model: str) -> bytes:
    """The text that a Prometheus server reads."""
    return generate_latest(Collector(metrics, model))
