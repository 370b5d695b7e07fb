//! What is drawn: latency by percentile, and throughput over time; for `growth` speed over size.

use crate::chart::{Line, Panel, Scale, document};
use crate::figures::{Figures, Step};
use crate::watch::Curve;

/// Percentiles: where they are on the axis (how many times rarer than everything), and what they are called.
const PERCENTILES: [(f64, &str); 6] =
    [(1.0, "0"), (2.0, "50"), (10.0, "90"), (100.0, "99"), (1000.0, "99.9"), (10_000.0, "99.99")];
/// Points on each curve between two marks of the axis.
const POINTS: i32 = 60;

/// The SVG document for the runs of each subject.
pub fn draw(title: &str, names: &[String], runs: &[Vec<Figures>]) -> String {
    let names: Vec<&str> = names.iter().map(|name| name.rsplit('/').next().unwrap_or(name)).collect();
    let steps = runs.iter().flatten().any(|figures| !figures.steps.is_empty());
    let panels = if steps { growth(&names, runs) } else { vec![latencies(&names, runs), throughput(&names, runs)] };
    document(title, &panels)
}

/// Each subject's curves, with its number and name. Only the first of them is named in the legend.
fn curves<'a>(names: &'a [&'a str], runs: &'a [Vec<Figures>]) -> impl Iterator<Item = (usize, &'a str, &'a Curve)> {
    names.iter().zip(runs).enumerate().flat_map(|(color, (name, runs))| {
        let curves = runs.iter().filter_map(|figures| figures.curve.as_ref());
        curves.enumerate().map(move |(n, curve)| (color, if n == 0 { *name } else { "" }, curve))
    })
}

fn latencies(names: &[&str], runs: &[Vec<Figures>]) -> Panel {
    let points = |curve: &Curve| {
        // So far that the last point still stands for several.
        let end = (curve.latencies.len() as f64 / 2.0).clamp(2.0, 10_000.0).log10();
        let at = |n: i32| {
            let rarity = 10_f64.powf(end * f64::from(n) / f64::from(POINTS));
            (rarity, curve.latencies.value_at_quantile(1.0 - 1.0 / rarity) as f64 / 1000.0)
        };
        (0..=POINTS).map(at).collect()
    };
    let line =
        |(color, name, curve): (usize, &str, &Curve)| Line { name: name.to_owned(), color, points: points(curve) };
    let with_latencies = curves(names, runs).filter(|(_, _, curve)| !curve.latencies.is_empty());
    Panel {
        title: "Latency, ms, at each percentile".to_owned(),
        x: Scale::Logarithmic,
        y: Scale::Logarithmic,
        marks: PERCENTILES.iter().map(|(at, name)| (*at, (*name).to_owned())).collect(),
        lines: with_latencies.map(line).collect(),
    }
}

fn throughput(names: &[&str], runs: &[Vec<Figures>]) -> Panel {
    let points = |curve: &Curve| {
        let seconds = curve.seconds.iter().enumerate();
        seconds.map(|(n, second)| (n as f64 + 1.0, second.per_second)).collect()
    };
    let line =
        |(color, name, curve): (usize, &str, &Curve)| Line { name: name.to_owned(), color, points: points(curve) };
    Panel {
        title: "Done per second, over seconds".to_owned(),
        x: Scale::Linear,
        y: Scale::Linear,
        marks: Vec::new(),
        lines: curves(names, runs).map(line).collect(),
    }
}

/// A panel for each thing that grew.
fn growth(names: &[&str], runs: &[Vec<Figures>]) -> Vec<Panel> {
    let mut axes: Vec<&'static str> = Vec::new();
    for step in runs.iter().flatten().flat_map(|figures| &figures.steps) {
        if !axes.contains(&step.axis) {
            axes.push(step.axis);
        }
    }
    axes.into_iter().map(|axis| growth_along(axis, names, runs)).collect()
}

fn growth_along(axis: &'static str, names: &[&str], runs: &[Vec<Figures>]) -> Panel {
    let mut lines = Vec::new();
    let mut marks: Vec<f64> = Vec::new();
    for (subject, (name, runs)) in names.iter().zip(runs).enumerate() {
        for (n, figures) in runs.iter().enumerate() {
            let steps: Vec<&Step> = figures.steps.iter().filter(|step| step.axis == axis).collect();
            marks.extend(steps.iter().map(|step| step.at));
            let named = |what: &str| if n == 0 { format!("{name}, {what}") } else { String::new() };
            let line = |what: &str, color: usize, value: fn(&Step) -> f64| Line {
                name: named(what),
                color,
                // Nothing has no place on a logarithmic axis.
                points: steps.iter().map(|step| (step.at.max(1.0), value(step))).collect(),
            };
            lines.push(line("sends", 2 * subject, |step| step.sends_per_s));
            lines.push(line("relayed messages", 2 * subject + 1, |step| step.relayed_per_s));
        }
    }
    marks.sort_by(f64::total_cmp);
    marks.dedup();
    let mark = |at: &f64| (at.max(1.0), crate::chart::number(*at));
    Panel {
        title: format!("Done per second, by {axis}"),
        x: Scale::Logarithmic,
        y: Scale::Linear,
        marks: marks.iter().map(mark).collect(),
        lines,
    }
}
