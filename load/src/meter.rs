//! What a piece of work costs: time, and CPU time of all processes that take part in it.

use std::time::Instant;

use crate::figures::Figures;
use crate::proc::cpu_seconds;

/// Runs from its making on.
pub struct Meter {
    /// The processes of all nodes.
    server: Vec<u32>,
    others: Vec<(String, u32)>,
    began: Instant,
    before: Reading,
}

struct Reading {
    server: Option<f64>,
    others: Vec<Option<f64>>,
    own: f64,
}

/// What a piece of work cost, in seconds.
pub struct Cost {
    pub seconds: f64,
    pub server: Option<f64>,
    others: Vec<(String, f64)>,
    own: f64,
}

impl Meter {
    /// Starts to count.
    pub fn start(server: Vec<u32>, others: &[(String, u32)]) -> Self {
        let before = read(&server, others);
        Self { server, others: others.to_vec(), began: Instant::now(), before }
    }

    /// What it was from the start to now.
    pub fn read(&self) -> Cost {
        let seconds = self.began.elapsed().as_secs_f64();
        let now = read(&self.server, &self.others);
        let since = |now: Option<f64>, then: Option<f64>| Some(now? - then?);
        let others = self.others.iter().zip(now.others.iter().zip(&self.before.others));
        Cost {
            seconds,
            server: since(now.server, self.before.server),
            others: others.filter_map(|((name, _), (now, then))| Some((name.clone(), since(*now, *then)?))).collect(),
            own: now.own - self.before.own,
        }
    }
}

fn read(server: &[u32], others: &[(String, u32)]) -> Reading {
    let all = server.iter().map(|process| cpu_seconds(*process));
    Reading {
        server: all.reduce(|sum, more| Some(sum? + more?)).flatten(),
        others: others.iter().map(|(_, process)| cpu_seconds(*process)).collect(),
        own: crate::proc::own_cpu_seconds(std::process::id()).unwrap_or_default(),
    }
}

impl Cost {
    /// Adds what each of `parts` cost, to `figures`, for the case `of`.
    pub fn add_to(&self, figures: &mut Figures, of: &str, parts: u64) {
        let each = |seconds: f64| seconds * 1e6 / parts.max(1) as f64;
        if let Some(server) = self.server {
            figures.add_of("server_cores", of, server / self.seconds);
            figures.add_of("server_cpu_us_each", of, each(server));
        }
        for (name, seconds) in &self.others {
            let of = if of.is_empty() { name.clone() } else { format!("{name}, {of}") };
            figures.add_of("other_cpu_us_each", &of, each(*seconds));
        }
        if let Some(server) = self.server.filter(|_| !self.others.is_empty()) {
            let all = server + self.others.iter().map(|(_, seconds)| seconds).sum::<f64>();
            figures.add_of("all_cpu_us_each", of, each(all));
        }
        figures.add_of("tool_cpu_us_each", of, each(self.own));
    }
}
