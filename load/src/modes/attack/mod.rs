//! Attacks on a server with default limits, beside ten honest clients: what do they feel, and what does the server need?

mod accounts;
mod attacker;
mod bodies;
mod connections;
mod frames;
mod honest;
mod inbox;
mod keys;
mod list;
mod pipelines;
mod push;
mod record;
mod report;
mod scene;
mod witness;

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use tokio::sync::{Barrier, watch};
use tokio::time::timeout;

use crate::database::now_millis;
use crate::job::Job;
use crate::options::{Options, Subject};
use crate::proc;
use crate::server::Server;
use attacker::{Attacker, Thread};
use honest::Clients;
use report::{Outcome, Ran, Row};
use scene::Scene;

pub use list::{ATTACKS, Attack};

/// How long the preparation of an attack may take.
const PREPARING: Duration = Duration::from_secs(120);
/// How long the end of a run may take beside the honest clients' own patience.
const SETTLING: Duration = Duration::from_secs(60);

/// Runs all attacks that were asked for, each on a fresh server. Returns an error if one is outside of the limits aimed at.
pub async fn run(job: &Job) -> Result<()> {
    let options = &job.options;
    let [subject @ Subject::Program(_)] = &options.subjects[..] else {
        bail!("attacks need one server of their own; leave --target out")
    };
    let is_wanted =
        |attack: &&Attack| options.attacks.is_empty() || options.attacks.iter().any(|name| name == attack.name);
    let mut rows = Vec::new();
    println!("{}", report::heading());
    for attack in ATTACKS.iter().filter(is_wanted) {
        // An attack that can't be run is a failure, but the others run all the same.
        let outcome = attempt(job, subject, attack).await;
        let outcome = outcome.unwrap_or_else(|error| Outcome::Skipped(format!("{error:#}")));
        let row = Row { name: attack.name, what: attack.what, outcome };
        println!("{}", row.line(options.is_timed));
        rows.push(row);
    }
    give(options, &rows)?;
    let missed: Vec<_> = rows.iter().filter(|row| !row.is_met(options.is_timed)).map(|row| row.name).collect();
    ensure!(missed.is_empty(), "{} of {} attacks miss their reach: {}", missed.len(), rows.len(), missed.join(", "));
    Ok(())
}

/// Writes what machines and documents want.
fn give(options: &Options, rows: &[Row]) -> Result<()> {
    if let Some(path) = &options.markdown {
        std::fs::write(path, report::markdown(rows)).with_context(|| format!("can't write {}", path.display()))?;
    }
    let Some(path) = &options.json else { return Ok(()) };
    let line = json!({
        "tool": concat!("obscura-load ", env!("CARGO_PKG_VERSION")),
        "ended_at": now_millis() as u64 / 1000,
        "machine": proc::machine(&options.parent),
        "options": options.json(),
        "attacks": report::json(rows, options.is_timed),
    });
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    Ok(writeln!(file, "{line}")?)
}

/// One attack on a server of its own, which ends with it.
async fn attempt(job: &Job, subject: &Subject, attack: &Attack) -> Result<Outcome> {
    let resolver = if attack.is_without_dns {
        match push::SilentResolver::start() {
            Ok(resolver) => Some(resolver),
            Err(error) => return Ok(Outcome::Skipped(format!("{error:#}"))),
        }
    } else {
        None
    };
    let mut options = (*job.options).clone();
    options.resolver = resolver.as_ref().map(push::SilentResolver::file);
    let server = Server::start(&options, subject).await?;
    let ran = one(&options, &server, attack).await;
    let stopped = server.stop().await;
    let ran = ran?;
    job.put_away(stopped?);
    Ok(Outcome::Ran(Box::new(ran)))
}

async fn one(options: &Options, server: &Server, attack: &Attack) -> Result<Ran> {
    let scene = Arc::new(Scene::prepare(server).await?);
    let mut clients = Clients::connect(&scene).await?;
    let start = Arc::new(Barrier::new(2));
    let attacker = Attacker::new(scene.clone(), start.clone());
    let mut witness = attack.witness.prepare(&scene).await?;
    let thread = Thread::start((attack.strike)(attacker.clone()))?;

    let preparing = async {
        tokio::select! {
            _ = start.wait() => Ok(()),
            () = ended(&thread) => bail!("the attacker could not prepare itself"),
        }
    };
    if let Err(error) = timeout(PREPARING, preparing).await.context("the attack was not prepared in time").flatten() {
        thread.stop().await?;
        return Err(error);
    }
    let is_peak_known = server.forget_peak();
    let began = Instant::now();
    let (over, ending) = watch::channel(false);
    clients.begin(&scene, options.duration, &ending);
    witness.begin(&scene, &ending);
    tokio::time::sleep(options.duration).await;
    let _ = over.send(true);
    // The attack goes on until everything that was begun under it is done.
    timeout(SETTLING, clients.end(&scene)).await.context("the honest clients did not come to an end")?;
    timeout(SETTLING, witness.pause()).await.context("the witness did not come to an end")?;
    let seconds = began.elapsed().as_secs_f64();
    let peak_mib = server.peak_mib().filter(|_| is_peak_known);
    ensure!(server.resident_kib().is_some(), "the server is gone");
    let report = attacker.report(seconds);
    thread.stop().await?;
    let mut found = timeout(SETTLING, witness.end(&scene)).await.context("no end of what is checked afterwards")??;
    found.violations.extend(attack.limit.and_then(|limit| limit.violation(&attacker, seconds)));
    Ok(Ran {
        honest: scene.record.honest(),
        attacker: report,
        peak_mib,
        note: found.note,
        violations: found.violations,
    })
}

/// Waits until the thread has ended by itself.
async fn ended(thread: &Thread) {
    while !thread.has_ended() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
