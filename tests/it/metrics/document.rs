//! `docs/METRICS.md`, the alerts and the dashboard name the metrics that there are, and no others.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use obscura_server::telemetry::metrics::{Kind, Label, catalogue};
use serde_json::Value;

const BEGIN: &str = "<!-- The list is made from the code: OBSCURA_WRITE_REFERENCE=1 cargo test list_of_metrics -->\n";
const END: &str = "<!-- end of the list -->\n";

fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(file)
}

/// The list as the page shows it.
fn list() -> String {
    let mut text = String::new();
    let metrics = catalogue();
    for area in metrics.chunk_by(|one, next| one.area == next.area) {
        let _ = write!(text, "\n### {}\n\n", area[0].area);
        text += "| In OTLP | For Prometheus | Type | Unit | Labels | What it says |\n|---|---|---|---|---|---|\n";
        for metric in area {
            let kind = match metric.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            let labels: Vec<_> = metric.labels.iter().map(|label| format!("`{}`", label.name)).collect();
            let unit = metric.name.unit.trim_matches(['{', '}']);
            let (name, meaning) = (metric.name.name, metric.name.meaning);
            let (prometheus, labels) = (metric.prometheus(), labels.join(", "));
            let _ = writeln!(text, "| `{name}` | `{prometheus}` | {kind} | {unit} | {labels} | {meaning} |");
        }
        let mut labels: Vec<&Label> = Vec::new();
        for label in area.iter().flat_map(|metric| &metric.labels) {
            if !labels.contains(&label) {
                labels.push(label);
            }
        }
        text.push('\n');
        for label in labels {
            let of: Vec<_> = area.iter().filter(|metric| metric.labels.contains(label)).collect();
            let of: Vec<_> = of.iter().map(|metric| format!("`{}`", metric.name.name)).collect();
            let _ = writeln!(text, "- `{}` of {}: {}", label.name, of.join(", "), values(label));
        }
    }
    text.push('\n');
    text
}

fn values(label: &Label) -> String {
    let value = |(value, meaning): &(&str, &str)| match *meaning {
        "" => format!("`{value}`"),
        meaning => format!("`{value}` ({meaning})"),
    };
    label.values.iter().map(value).collect::<Vec<_>>().join("; ")
}

#[test]
fn the_list_of_metrics_is_what_the_instruments_are() {
    let path = path("METRICS.md");
    let page = fs::read_to_string(&path).unwrap();
    let (before, rest) = page.split_once(BEGIN).expect("the begin of the list");
    let (listed, after) = rest.split_once(END).expect("the end of the list");
    if std::env::var_os("OBSCURA_WRITE_REFERENCE").is_some() {
        fs::write(&path, format!("{before}{BEGIN}{}{END}{after}", list())).unwrap();
        return;
    }
    assert!(listed == list(), "docs/METRICS.md is out of date: run this test with OBSCURA_WRITE_REFERENCE=1");
}

/// The names in a text that look like metrics of this server.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|character: char| !character.is_ascii_alphanumeric() && character != '_');
    let is_ours = |word: &&str| ["obscura_", "http_server_", "process_"].iter().any(|start| word.starts_with(start));
    words.filter(is_ours).map(str::to_owned).collect()
}

/// Every name that a query may use.
fn queryable() -> BTreeSet<String> {
    let names = catalogue().into_iter().flat_map(|metric| {
        let name = metric.prometheus();
        match metric.kind {
            Kind::Histogram => ["_bucket", "_sum", "_count"].map(|end| format!("{name}{end}")).to_vec(),
            Kind::Counter | Kind::Gauge => vec![name],
        }
    });
    names.collect()
}

#[test]
fn alerts_and_dashboard_ask_for_metrics_that_there_are() {
    let alerts = fs::read_to_string(path("monitoring/alerts.yaml")).unwrap();
    let alerts: Value = serde_yaml_ng::from_str(&alerts).unwrap();
    let rules = alerts["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap());
    let mut asked: Vec<String> = rules.map(|rule| rule["expr"].as_str().unwrap().to_owned()).collect();
    let dashboard = fs::read_to_string(path("monitoring/dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    let targets = dashboard["panels"].as_array().unwrap().iter().filter_map(|panel| panel["targets"].as_array());
    asked.extend(targets.flatten().map(|target| target["expr"].as_str().unwrap().to_owned()));
    assert!(asked.len() > 20, "{asked:?}");
    let there = queryable();
    for query in asked {
        let named = named(&query);
        assert!(!named.is_empty() || query.starts_with("up"), "{query} asks for nothing of ours");
        assert!(named.is_subset(&there), "{query} asks for {:?}", named.difference(&there).collect::<Vec<_>>());
    }
}
