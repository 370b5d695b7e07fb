//! Honest clients that an attack is aimed at: what they see during it and afterwards.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::attacker::elsewhere;
use super::honest::{Ending, fetch_bundle, log_in, put};
use super::record::PATIENCE;
use super::scene::Scene;
use crate::http::Connection;
use crate::socket::{LARGE_BUFFER, Socket};
use crate::wire::{DeviceMessage, Label};

/// Messages that a friend has queued before an attack.
const BEFORE: u32 = 200;
/// How many of them come from one address, so that no limit matters.
const FROM_ONE_ADDRESS: u32 = 10;
/// Between two things that they do.
const PAUSE: Duration = Duration::from_secs(1);
/// Between two messages to the group: more often than the one in a second that a flooded target takes of each sender.
const GROUP_PAUSE: Duration = Duration::from_millis(400);
/// After this without mail an inbox counts as empty.
const QUIET: Duration = Duration::from_secs(2);
/// Who sends, in labels.
const FRIEND: u32 = 9001;
const GROUP: u32 = 9002;
/// Clients that are in a group with the target.
const MEMBERS: [usize; 5] = [1, 2, 3, 4, 5];

/// Who is looked at beside the ten clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Witness {
    /// No further client.
    None,
    /// A friend of the target writes to it, before and during the attack.
    Friend,
    /// The target logs in.
    Owner,
    /// A friend fetches the target's prekeys.
    Prekeys,
    /// A friend writes to a group that the target is in.
    Group,
}

/// A witness at work.
pub struct Watching {
    witness: Witness,
    tasks: JoinSet<()>,
    seen: Arc<Seen>,
}

/// How often something was tried, and went as hoped.
#[derive(Default)]
struct Seen {
    tried: AtomicU32,
    hoped: AtomicU32,
}

/// What is known at the end.
#[derive(Default)]
pub struct Found {
    pub note: String,
    pub violations: Vec<String>,
}

impl Witness {
    /// Does what has to be done before the attack.
    pub async fn prepare(self, scene: &Scene) -> Result<Watching> {
        if self == Self::Friend {
            for number in 0..BEFORE {
                let origin = elsewhere(30_000 + (number / FROM_ONE_ADDRESS) as usize);
                let mut connection = Connection::open_from(scene.api, &origin).await?;
                ensure!(
                    write(scene, &mut connection, number).await?,
                    "a friend's message was refused before the attack"
                );
            }
        }
        Ok(Watching { witness: self, tasks: JoinSet::new(), seen: Arc::default() })
    }
}

impl Watching {
    /// Begins what goes on during the attack.
    pub fn begin(&mut self, scene: &Arc<Scene>, ending: &Ending) {
        let witness = self.witness;
        if witness == Witness::None {
            return;
        }
        let (scene, seen, mut ending) = (scene.clone(), self.seen.clone(), ending.clone());
        self.tasks.spawn(async move {
            let mut ticks = interval(if witness == Witness::Group { GROUP_PAUSE } else { PAUSE });
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    biased;
                    _ = ending.wait_for(|is_over| *is_over) => return,
                    _ = ticks.tick() => {}
                }
                let number = seen.tried.fetch_add(1, Ordering::Relaxed);
                if turn(witness, &scene, number).await {
                    seen.hoped.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }

    /// Waits until nothing is under way any more.
    pub async fn pause(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }

    /// Looks at what is left when the attack is over.
    pub async fn end(self, scene: &Scene) -> Result<Found> {
        let (tried, hoped) = (self.seen.tried.load(Ordering::Relaxed), self.seen.hoped.load(Ordering::Relaxed));
        let mut found = Found::default();
        match self.witness {
            Witness::None => {}
            Witness::Owner => found.note = format!("the owner logged in {hoped} of {tried} times"),
            Witness::Prekeys => found.note = format!("{hoped} of {tried} honest bundles had a one-time key"),
            Witness::Group => found.note = format!("{hoped} of {tried} group sends reached the other members"),
            Witness::Friend => {
                let numbers = inbox(scene).await?;
                let before = numbers.iter().filter(|number| **number < BEFORE).count();
                let during = numbers.len() - before;
                found.note = format!(
                    "a friend's mail: {before} of {BEFORE} from before came; during it {hoped} of {tried} were accepted"
                );
                if before < BEFORE as usize {
                    found.violations.push(format!("{} accepted messages were deleted", BEFORE as usize - before));
                }
                if during < hoped as usize {
                    found.violations.push(format!("{} messages accepted meanwhile are gone", hoped as usize - during));
                }
            }
        }
        Ok(found)
    }
}

/// What a witness does once in a while. True if it went as hoped; failures of honest operations are recorded.
async fn turn(witness: Witness, scene: &Scene, number: u32) -> bool {
    match witness {
        Witness::None => true,
        Witness::Friend => {
            // Whether it is accepted is reported, and is no failure: contacts can't prove themselves yet.
            let writing = async {
                let mut connection = scene.friend.connect(scene.api).await?;
                write(scene, &mut connection, BEFORE + number).await
            };
            matches!(timeout(PATIENCE, writing).await, Ok(Ok(true)))
        }
        Witness::Owner => {
            let logging_in = async { log_in(&mut scene.target.connect(scene.api).await?, &scene.target).await };
            scene.record.operation("owner's log-in", logging_in).await.is_ok()
        }
        Witness::Prekeys => {
            let fetching = async {
                let mut connection = scene.friend.connect(scene.api).await?;
                fetch_bundle(&mut connection, &scene.friend, &scene.target).await
            };
            scene.record.operation("target's prekeys", fetching).await.unwrap_or_default()
        }
        Witness::Group => scene.record.operation("group send", group_send(scene, number)).await.is_ok(),
    }
}

/// One message of the friend to the target. Answers whether it was accepted.
async fn write(scene: &Scene, connection: &mut Connection, number: u32) -> Result<bool> {
    let label = Label { sender: FRIEND, number, ..Label::default() };
    let device_message = DeviceMessage::to(&scene.target.device, label);
    Ok(put(connection, &scene.friend, "", &[device_message]).await?.0 == 200)
}

/// One message of the friend to the target and five others, who have to get it.
async fn group_send(scene: &Scene, number: u32) -> Result<()> {
    let label = Label { sender: GROUP, number, ..Label::default() };
    let members = MEMBERS.map(|n| &scene.clients[n].device.device);
    let devices = std::iter::once(&scene.target.device).chain(members);
    let device_messages: Vec<DeviceMessage<'_>> = devices.map(|device| DeviceMessage::to(device, label)).collect();
    MEMBERS.iter().for_each(|n| scene.record.expect(*n, GROUP, number));
    let mut connection = scene.friend.connect(scene.api).await?;
    // A client that accepts a partial answer gets 200. Other clients get 429, and the other members have their messages.
    let is_lenient = number.is_multiple_of(2);
    let preference = if is_lenient { "prefer: handling=lenient\r\n" } else { "" };
    let (status, said) = put(&mut connection, &scene.friend, preference, &device_messages).await?;
    ensure!(status == 200 || (status == 429 && !is_lenient), "the server answered {status} instead of 200");
    ensure!(said.device_mismatches.is_empty() && said.invalid_device_ids.is_empty(), "mismatches");
    Ok(())
}

/// The numbers of the friend's messages in the target's inbox.
async fn inbox(scene: &Scene) -> Result<HashSet<u32>> {
    let mut connection = scene.target.connect(scene.api).await?;
    log_in(&mut connection, &scene.target).await?;
    let mut socket = Socket::open(&mut connection, scene.api, &scene.target.current(), LARGE_BUFFER).await?;
    let mut numbers = HashSet::new();
    while let Ok(mail) = timeout(QUIET, socket.mail()).await {
        let mail = mail?;
        let labels = mail.iter().filter_map(|mail| Label::of(&mail.message));
        numbers.extend(labels.filter(|label| label.sender == FRIEND).map(|label| label.number));
        socket.ack(mail).await?;
    }
    Ok(numbers)
}
