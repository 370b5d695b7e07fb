//! What is told at the end: a table for people, a line for machines, a drawing.

use std::fs::OpenOptions;
use std::io::Write;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::database::now_millis;
use crate::figures::{self, Figures, Summary};
use crate::options::Options;
use crate::{plot, proc};

/// `runs` are those of each subject.
pub fn give(options: &Options, runs: &[Vec<Figures>]) -> Result<()> {
    let names: Vec<String> = options.subjects.iter().map(|subject| subject.name()).collect();
    let named = names.iter().cloned().zip(runs.iter().map(|runs| Summary::of(runs)));
    let summaries: Vec<(String, Vec<Summary>)> = named.collect();
    println!("{}", figures::table(&summaries));
    let line = line(options, &summaries).to_string();
    match &options.json {
        Some(path) => {
            let mut file = OpenOptions::new().create(true).append(true).open(path);
            let file = file.as_mut().map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
            writeln!(file, "{line}")?;
        }
        None => println!("{line}"),
    }
    if let Some(path) = &options.plot {
        let drawing = plot::draw(&options.title(), &names, runs);
        std::fs::write(path, drawing).with_context(|| format!("can't write {}", path.display()))?;
    }
    Ok(())
}

fn line(options: &Options, subjects: &[(String, Vec<Summary>)]) -> Value {
    let subject = |(name, summaries): &(String, Vec<Summary>)| {
        // Not the folders above it, which are not ours.
        let name = name.rsplit('/').next().unwrap_or(name);
        json!({"name": name, "figures": figures::json(summaries)})
    };
    json!({
        "tool": concat!("obscura-load ", env!("CARGO_PKG_VERSION")),
        "ended_at": now_millis() as u64 / 1000,
        "machine": proc::machine(&options.parent),
        "options": options.json(),
        "subjects": subjects.iter().map(subject).collect::<Vec<_>>(),
    })
}
