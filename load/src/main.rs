//! Puts load on a relay of the obscura.v1 protocol and tells what it did.
//!
//! It knows the protocol only, so any relay that speaks it can be measured, also two beside each other. The tool shares
//! the machine with the server, so it tells its own CPU time too. See load/README.md.

mod audience;
mod chart;
mod database;
mod figures;
mod grammar;
mod http;
mod job;
mod leftovers;
mod meter;
mod modes;
mod options;
mod origin;
mod output;
mod pace;
mod people;
mod plot;
mod proc;
mod sender;
mod server;
mod socket;
mod tally;
mod watch;
mod wire;

#[path = "../../tests/it/harness/signer.rs"]
mod signer;

use anyhow::{Context, Result, anyhow, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};

use figures::Figures;
use job::Job;
use options::{Mode, Options, Subject};
use server::Server;

// One thread: the tool should leave the other cores to the server.
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let job = Job::new(Options::parse());
    let mut termination = TerminationSignals::listen()?;
    if job.options.mode == Mode::Attack {
        return tokio::select! {
            outcome = modes::attack::run(&job) => outcome,
            () = termination.wait() => bail!("interrupted"),
        };
    }
    let subjects = &job.options.subjects;
    let mut runs: Vec<Vec<Figures>> = subjects.iter().map(|_| Vec::new()).collect();
    for run in 1..=job.options.runs {
        // In turn, and each second time in the other order, so that a machine that gets slower favours neither.
        let mut order: Vec<usize> = (0..subjects.len()).collect();
        if run % 2 == 0 {
            order.reverse();
        }
        for subject in order {
            let name = subjects[subject].name();
            eprintln!("run {run} of {}, {name}, load average {:.2}", job.options.runs, proc::load_average());
            let measured = measure(&job, &subjects[subject], &mut termination).await;
            let figures = measured.with_context(|| format!("while measuring {name}"))?;
            runs[subject].push(figures);
        }
    }
    output::give(&job.options, &runs)
}

/// One run on one subject. Our own server ends with it, also on Ctrl-C and when the tool is told to end.
async fn measure(job: &Job, subject: &Subject, termination: &mut TerminationSignals) -> Result<Figures> {
    if job.options.mode == Mode::Growth {
        return tokio::select! {
            figures = modes::growth::measure(job, subject) => figures,
            () = job.watch.report() => bail!("the clock has stopped"),
            () = termination.wait() => bail!("interrupted"),
        };
    }
    let mut server = tokio::select! {
        server = Server::start(&job.options, subject) => server?,
        () = termination.wait() => bail!("interrupted"),
    };
    let figures = tokio::select! {
        figures = once(job, &mut server) => figures,
        () = job.watch.report() => Err(anyhow!("the clock has stopped")),
        () = termination.wait() => Err(anyhow!("interrupted")),
    };
    let stopped = server.stop().await;
    // Why it failed says more than what failed because of that.
    let figures = figures?;
    job.put_away(stopped?);
    Ok(figures)
}

/// Ctrl-C, and the signal of a process manager. What is said between two runs is heard at the next.
struct TerminationSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl TerminationSignals {
    fn listen() -> Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

async fn once(job: &Job, server: &mut Server) -> Result<Figures> {
    match job.options.mode {
        Mode::Register => modes::register::measure(job, server).await,
        Mode::Send | Mode::Growth => modes::send::measure(job, server).await,
        Mode::Relay | Mode::Open => modes::relay::measure(job, server).await,
        Mode::Drain => modes::drain::measure(job, server).await,
        Mode::Idle => modes::idle::measure(job, server).await,
        Mode::Attachments => modes::attachments::measure(job, server).await,
        Mode::Mixed => modes::mixed::measure(job, server).await,
        Mode::Start => modes::start::measure(job, server).await,
        Mode::Attack => bail!("attacks have no figures of this kind"),
    }
}
