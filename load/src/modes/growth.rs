//! Does a send cost more when there is more of everything else?

use anyhow::Result;

use crate::audience::Audience;
use crate::database::Rows;
use crate::figures::{Figures, Step};
use crate::job::Job;
use crate::modes::{relay, send};
use crate::options::{Axis, Subject};
use crate::people::{Device, register, register_with};
use crate::server::Server;

/// Messages in each of the inboxes that are filled.
const EACH: usize = 500;
/// Accounts that are written to when each send is for several of their devices.
const ACCOUNTS: usize = 20;

impl Axis {
    fn name(self) -> &'static str {
        match self {
            Self::Users => "users",
            Self::Waiting => "waiting messages",
            Self::Devices => "devices of an account",
            Self::Group => "recipients of a send",
            Self::Nodes => "nodes",
        }
    }

    fn steps(self) -> Vec<usize> {
        match self {
            Self::Users => vec![1000, 10_000, 100_000, 1_000_000],
            Self::Waiting => vec![0, 100_000, 1_000_000, 2_000_000],
            Self::Devices => vec![1, 2, 5, 10],
            Self::Group => vec![1, 10, 50, 100],
            Self::Nodes => vec![1, 2, 3],
        }
    }
}

/// Each axis has a server of its own.
pub async fn measure(job: &Job, subject: &Subject) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut axes = job.options.axes.clone();
    if axes.is_empty() {
        // Nodes share a database; a folder is for one.
        let is_shared = job.options.postgres.is_some();
        axes.extend(Axis::ALL.into_iter().filter(|axis| is_shared || *axis != Axis::Nodes));
    }
    for axis in &axes {
        let mut server = Server::start(&job.options, subject).await?;
        let steps = job.options.steps.clone().unwrap_or_else(|| axis.steps());
        let done = along(job, &mut server, *axis, &steps, &mut figures).await;
        let stopped = server.stop().await;
        done?;
        job.put_away(stopped?);
    }
    Ok(figures)
}

async fn along(job: &Job, server: &mut Server, axis: Axis, steps: &[usize], figures: &mut Figures) -> Result<()> {
    job.phase("signing up", server);
    let senders = register(server.api, job.options.connections).await?;
    let (recipients, receivers) = match axis {
        Axis::Devices => (Vec::new(), Vec::new()),
        Axis::Group => {
            let most = steps.iter().max().copied().unwrap_or(1);
            let all = register(server.api, most.max(job.options.receivers)).await?;
            (all.clone(), all)
        }
        _ => (register(server.api, job.options.recipients).await?, register(server.api, job.options.receivers).await?),
    };
    let mut there = 0;
    for step in steps {
        let name = format!("{step} {}", axis.name());
        let (offline, online) = match axis {
            Axis::Users | Axis::Waiting => {
                job.phase(&format!("filling up to {name}"), server);
                fill(job, server, axis, step.saturating_sub(there)).await?;
                (Audience::singly(recipients.clone()), Audience::singly(receivers.clone()))
            }
            Axis::Devices => {
                let accounts = register_with(server.api, ACCOUNTS, *step).await?;
                (Audience::by_account(accounts.clone()), Audience::by_account(accounts))
            }
            Axis::Nodes => {
                server.grow_to(*step).await?;
                (Audience::singly(recipients.clone()), Audience::singly(receivers.clone()))
            }
            Axis::Group => {
                (Audience::in_groups(recipients.clone(), *step), Audience::in_groups(receivers.clone(), *step))
            }
        };
        there = *step;
        let (sends, relayed) = both(job, server, &senders, &offline, &online).await?;
        let value = |figures: &Figures, key| {
            let same = figures.list.iter().find(|figure| figure.key == key);
            same.map_or(f64::NAN, |figure| figure.value)
        };
        figures.steps.push(Step {
            axis: axis.name(),
            at: *step as f64,
            sends_per_s: value(&sends, "sends_per_s"),
            relayed_per_s: value(&relayed, "messages_per_s"),
        });
        figures.add_all(&format!("send, {name}"), sends);
        figures.add_all(&format!("relay, {name}"), relayed);
        server.add_memory(figures, &name);
    }
    Ok(())
}

/// Sends to devices that are offline, and then to such that are online and take everything.
async fn both(
    job: &Job,
    server: &Server,
    senders: &[Device],
    offline: &Audience,
    online: &Audience,
) -> Result<(Figures, Figures)> {
    let (mut sends, mut relayed) = (Figures::default(), Figures::default());
    send::load(job, server, &mut sends, senders, offline).await?;
    // Those who get both have to be empty before the counting of what came begins.
    job.phase("emptying inboxes", server);
    relay::empty(server.api, &online.devices).await?;
    relay::load(job, server, &mut relayed, senders, online).await?;
    Ok((sends, relayed))
}

async fn fill(job: &Job, server: &mut Server, axis: Axis, more: usize) -> Result<()> {
    if more == 0 {
        return Ok(());
    }
    let size = job.options.size;
    let rows = match axis {
        Axis::Waiting => Rows { users: more.div_ceil(EACH), messages_each: EACH.min(more), size },
        _ => Rows { users: more, messages_each: 0, size },
    };
    let took = server.fill(rows).await?;
    eprintln!("  filled within {:.1} s", took.as_secs_f64());
    Ok(())
}
