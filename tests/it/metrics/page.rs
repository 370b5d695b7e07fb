//! The page of metrics as Prometheus reads it.

use std::collections::BTreeMap;

use crate::harness::{TestServer, eventually};

/// The labels of a series.
pub type Labels = BTreeMap<String, String>;

/// What a server shows at one moment.
pub struct Page {
    /// The name of each metric with its type.
    pub types: BTreeMap<String, String>,
    /// The name, as it stands, the labels and the value of each series.
    pub series: Vec<(String, Labels, f64)>,
    pub text: String,
}

impl Page {
    /// What this server shows now.
    pub async fn of(server: &TestServer) -> Self {
        let answer = server.management().get("/metrics").send().await.expect(200);
        let text = String::from_utf8(answer.body.to_vec()).expect("text");
        let (mut types, mut series) = (BTreeMap::new(), Vec::new());
        for line in text.lines() {
            if let Some(about) = line.strip_prefix("# TYPE ") {
                let (name, kind) = about.split_once(' ').expect("a name and a type");
                types.insert(name.to_owned(), kind.to_owned());
            } else if !line.starts_with('#') {
                series.push(parse(line));
            }
        }
        Self { types, series, text }
    }

    /// The value of the series with this name and, among others, these labels, all added up.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let has = |series: &Labels| labels.iter().all(|(name, value)| series.get(*name).is_some_and(|is| is == value));
        self.series.iter().filter(|(is, series, _)| is == name && has(series)).map(|(_, _, value)| value).sum()
    }
}

/// `name{label="value",…} number`
fn parse(line: &str) -> (String, Labels, f64) {
    let (series, value) = line.rsplit_once(' ').expect("a series and a value");
    let value = value.parse().expect("a number");
    let Some((name, labels)) = series.split_once('{') else { return (series.to_owned(), Labels::new(), value) };
    let labels = labels.strip_suffix('}').expect("an end").split("\",").filter(|label| !label.is_empty());
    let label = |text: &str| {
        let (name, value) = text.split_once("=\"").expect("a label and a value");
        (name.to_owned(), value.trim_end_matches('"').to_owned())
    };
    (name.to_owned(), labels.map(label).collect(), value)
}

/// What these nodes show, added up.
pub async fn sum(nodes: &[&TestServer], name: &str, labels: &[(&str, &str)]) -> u64 {
    let mut sum = 0.0;
    for node in nodes {
        sum += Page::of(node).await.sum(name, labels);
    }
    sum as u64
}

/// Connections of clients: how many this server let in so far, and how many of them are open.
pub async fn connections(server: &TestServer) -> (u64, u64) {
    let page = Page::of(server).await;
    let of_clients = |name| page.sum(name, &[("port", "api")]) as u64;
    (of_clients("obscura_listener_accepted_total"), of_clients("obscura_listener_connections"))
}

/// Waits until so many more connections than `before` have come to this server, and no more are open than then.
pub async fn came_and_went(server: &TestServer, count: u64, before: (u64, u64)) {
    eventually("the connections to come and go", async || {
        let (accepted, open) = connections(server).await;
        accepted == before.0 + count && open <= before.1
    })
    .await;
}
