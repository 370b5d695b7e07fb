use std::collections::BTreeSet;
use std::sync::Weak;

use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::metrics::data::{AggregatedMetrics, MetricData, ResourceMetrics};
use opentelemetry_sdk::metrics::reader::MetricReader;
use opentelemetry_sdk::metrics::{InstrumentKind, ManualReader, Pipeline, Temporality};

use super::*;

/// Gets what an exporter of OTLP would get.
#[derive(Clone, Debug)]
struct Reader(Arc<ManualReader>);

impl MetricReader for Reader {
    fn register_pipeline(&self, pipeline: Weak<Pipeline>) {
        self.0.register_pipeline(pipeline);
    }

    fn collect(&self, metrics: &mut ResourceMetrics) -> OTelSdkResult {
        self.0.collect(metrics)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn temporality(&self, kind: InstrumentKind) -> Temporality {
        self.0.temporality(kind)
    }
}

/// Instruments, each of which has been used, and who reads them.
fn used() -> (Metrics, Reader) {
    let reader = Reader(Arc::new(ManualReader::builder().build()));
    let metrics = Metrics::with_page(SdkMeterProvider::builder().with_reader(reader.clone())).unwrap();
    metrics.requests.time("/v1/users", Method::Post, Class::Success, Duration::from_millis(7));
    metrics.group_time.time((), Duration::from_millis(7));
    metrics.group_size.number(Content::Sends, 3);
    metrics.pool_time.time(PoolName::Writer, Duration::from_millis(7));
    metrics.push_time.time(PushProvider::Fcm, Duration::from_millis(7));
    metrics.pool.set((PoolName::Writer, Use::Idle), 1);
    metrics.job_ended(Job::Room, true, 1_800_000_000);
    metrics.process(&process::Used::now().unwrap());
    let gauges = [
        &metrics.database_size,
        &metrics.sqlite_file,
        &metrics.sqlite_wal,
        &metrics.bus_connected,
        &metrics.push_queue,
        &metrics.push_queue_connected,
        &metrics.disk_free,
        &metrics.room,
        &metrics.users,
        &metrics.devices,
        &metrics.queued,
        &metrics.queued_bytes,
        &metrics.oldest,
        &metrics.attachments,
        &metrics.attachment_bytes,
        &metrics.push_tokens,
        &metrics.start_time,
        &metrics.clock_ahead,
        &metrics.disk_free_inodes,
        &metrics.uptime,
        &metrics.runtime_workers,
        &metrics.runtime_tasks,
        &metrics.runtime_queue,
    ];
    gauges.into_iter().for_each(|gauge| gauge.set((), 1));
    (metrics, reader)
}

fn kind(data: &AggregatedMetrics) -> Kind {
    fn of<T>(data: &MetricData<T>) -> Kind {
        match data {
            MetricData::Gauge(_) => Kind::Gauge,
            MetricData::Sum(_) => Kind::Counter,
            MetricData::Histogram(_) | MetricData::ExponentialHistogram(_) => Kind::Histogram,
        }
    }
    match data {
        AggregatedMetrics::F64(data) => of(data),
        AggregatedMetrics::U64(data) => of(data),
        AggregatedMetrics::I64(data) => of(data),
    }
}

#[test]
fn otlp_and_prometheus_show_all_of_the_list_and_nothing_else() {
    let (metrics, reader) = used();
    let mut exported = ResourceMetrics::default();
    reader.collect(&mut exported).unwrap();
    let exported = exported.scope_metrics().flat_map(|scope| scope.metrics());
    let exported: BTreeSet<_> = exported
        .map(|metric| (metric.name().to_owned(), metric.unit().to_owned(), format!("{:?}", kind(metric.data()))))
        .collect();
    let listed: BTreeSet<_> = catalogue()
        .iter()
        .map(|metric| (metric.name.name.to_owned(), metric.name.unit.to_owned(), format!("{:?}", metric.kind)))
        .collect();
    assert_eq!(exported, listed);

    let page = metrics.page().unwrap();
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")).map(str::to_lowercase);
    let shown: BTreeSet<_> = types.filter(|line| !line.starts_with("target_info ")).collect();
    let listed: BTreeSet<_> =
        catalogue().iter().map(|metric| format!("{} {:?}", metric.prometheus(), metric.kind).to_lowercase()).collect();
    assert_eq!(shown, listed);
}

#[test]
fn names_are_distinct_and_every_value_of_a_label_is_too() {
    let mut names = BTreeSet::new();
    for metric in catalogue() {
        assert!(names.insert(metric.prometheus()), "{} is there twice", metric.prometheus());
        assert!(metric.name.meaning.ends_with('.') && metric.series > 0, "{metric:?}");
        for label in metric.labels {
            let values: BTreeSet<_> = label.values.iter().map(|(value, _)| value).collect();
            assert_eq!(values.len(), label.values.len(), "{}", label.name);
        }
    }
}

/// Otherwise the SDK would throw series together, and would do so silently.
#[test]
fn every_combination_of_labels_has_a_series_of_its_own() {
    let (metrics, _) = used();
    metrics.pushes.increment((PushProvider::WebPush, PushOutcome::GivenUp));
    metrics.pushes.add((PushProvider::WebPush, PushOutcome::Unavailable), 2);
    let page = metrics.page().unwrap();
    for (outcome, count) in [("given_up", 1), ("unavailable", 2), ("accepted", 0)] {
        let line = format!("obscura_push_attempts_total{{outcome=\"{outcome}\",provider=\"webpush\"}} {count}\n");
        assert!(page.contains(&line), "no {line} in {page}");
    }
    assert!(!page.contains("overflow"), "{page}");
}

#[test]
fn what_is_held_counts_until_it_is_dropped() {
    let metrics = Metrics::unexported();
    let held = [metrics.sockets.hold(()), metrics.sockets.hold(())];
    assert_eq!(metrics.sockets.value(()), 2);
    drop(held);
    assert_eq!(metrics.sockets.value(()), 0);
}
