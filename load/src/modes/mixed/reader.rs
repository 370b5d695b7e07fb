//! Who reads: awake for a while, away for a while, and back for what came in between.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use rand::Rng as _;

use super::{Fetch, Plan};
use crate::http::Connection;
use crate::socket::{LARGE_BUFFER, Mail, Socket};
use crate::tally::Tally;
use crate::wire::Label;

/// One of so many is a phone that mostly sleeps.
const SLEEPY_SHARE: usize = 4;
/// Milliseconds awake and away. A reader is not away for less than it may take until acks are written.
const SLEEPY: [Range<u64>; 2] = [500..2000, 1500..4000];
const OTHER: [Range<u64>; 2] = [5_000..15_000, 1000..2000];

/// What one person has read.
pub struct Read {
    pub by: usize,
    pub tallies: HashMap<u32, Tally>,
    pub wakes: u64,
}

/// Comes and goes until the night.
pub async fn read(plan: &Plan, by: usize) -> Result<Read> {
    let mut read = Read { by, tallies: HashMap::new(), wakes: 0 };
    let [awake, away] = if by.is_multiple_of(SLEEPY_SHARE) { SLEEPY } else { OTHER };
    loop {
        // A connection for the ticket only: a sleeping reader holds none.
        let mut connection = Connection::open(plan.api).await?;
        let mut socket = Socket::open(&mut connection, plan.api, &plan.devices[by], LARGE_BUFFER).await?;
        drop(connection);
        let since = plan.began.elapsed();
        let rest = tokio::time::sleep(Duration::from_millis(rand::rng().random_range(awake.clone())));
        tokio::pin!(rest);
        loop {
            let mail = tokio::select! {
                mail = socket.mail() => mail?,
                () = plan.night.cancelled() => return Ok(read),
                () = &mut rest, if !plan.evening.is_cancelled() => break,
            };
            take(plan, &mut read, &mail, since).await?;
            socket.ack(mail).await?;
        }
        socket.close().await?;
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(rand::rng().random_range(away.clone()))) => {}
            // Not at once: the acks may still be on their way.
            () = plan.evening.cancelled() => tokio::time::sleep(Duration::from_millis(away.start)).await,
        }
        read.wakes += 1;
    }
}

async fn take(plan: &Plan, read: &mut Read, mail: &[Mail], since: Duration) -> Result<()> {
    let arrived = plan.began.elapsed();
    for mail in mail {
        let label = Label::of(&mail.message).context("a message that nobody sent")?;
        let is_new = read.tallies.entry(label.sender).or_default().take(label.number);
        let intended = Duration::from_micros(label.intended);
        // What waited for a sleeping device says nothing about the server.
        match intended > since {
            true => plan.job.watch.record(arrived.saturating_sub(intended)),
            false => plan.job.watch.count(1),
        }
        if is_new {
            plan.delivered.fetch_add(1, Ordering::Relaxed);
            if label.attachment != [0; 16] {
                plan.fetches.send(Fetch { reader: read.by, id: label.attachment }).await?;
            }
        }
    }
    Ok(())
}
