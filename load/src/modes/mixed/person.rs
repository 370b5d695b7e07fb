//! Who acts: a message to one person, to a group, or with an attachment.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use rand::Rng as _;
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use uuid::Uuid;

use super::{GROUP, Plan};
use crate::http::Connection;
use crate::modes::attachments::upload_one;
use crate::pace;
use crate::sender::Sender;
use crate::wire::{DeviceMessage, Label};

/// Of a hundred actions so many are for a group, and so many have an attachment.
const TO_GROUPS: u32 = 10;
const WITH_ATTACHMENTS: u32 = 10;

/// What one person has sent.
pub struct Accepted {
    pub by: usize,
    /// How many messages to whom.
    pub to: HashMap<u32, u32>,
    pub sends: u64,
    pub group_sends: u64,
    pub refused: u64,
    pub seconds: f64,
}

impl Accepted {
    pub fn messages(&self) -> u64 {
        self.to.values().map(|count| u64::from(*count)).sum()
    }
}

/// Acts at fixed times until the day is over.
pub async fn act(plan: &Plan, by: usize) -> Result<Accepted> {
    let (me, people) = (&plan.devices[by], plan.devices.len());
    let mut sender = Sender::open(plan.api, me, plan.job.options.size).await?;
    let mut uploads = None;
    let mut chance = SmallRng::from_rng(&mut rand::rng());
    let mut accepted = Accepted { by, to: HashMap::new(), sends: 0, group_sends: 0, refused: 0, seconds: 0.0 };
    let mut device_messages = Vec::new();
    // Without a rate each goes on at once.
    let pause = plan.job.options.rate.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(people as f64 / rate));
    let mut intended = plan.began + pause.mul_f64(by as f64 / people as f64);
    loop {
        pace::until(intended).await;
        let now = Instant::now();
        if intended.max(now) >= plan.until {
            break;
        }
        let mut label = Label { sender: by as u32, ..Label::default() };
        label.intended = (intended.max(plan.began) - plan.began).as_micros() as u64;
        device_messages.clear();
        let kind = chance.random_range(0..100);
        if kind < TO_GROUPS {
            let first = by / GROUP * GROUP;
            for member in (first..people.min(first + GROUP)).filter(|member| *member != by) {
                device_messages.push(accepted.device_message(plan, member, label));
            }
            accepted.group_sends += 1;
        } else {
            if kind < TO_GROUPS + WITH_ATTACHMENTS {
                if uploads.is_none() {
                    uploads = Some(Connection::open(plan.api).await?);
                }
                let Some(connection) = &mut uploads else { continue };
                let id = upload_one(connection, &me.token, &plan.attachment).await?;
                label.attachment = id.parse::<Uuid>()?.into_bytes();
            }
            // Any other person.
            let recipient = (by + chance.random_range(1..people)) % people;
            device_messages.push(accepted.device_message(plan, recipient, label));
        }
        if !device_messages.is_empty() {
            sender.send(&device_messages).await?;
            accepted.sends += 1;
        }
        intended = if pause.is_zero() { Instant::now() } else { intended + pause };
    }
    accepted.refused = sender.refused;
    accepted.seconds = plan.began.elapsed().as_secs_f64();
    Ok(accepted)
}

impl Accepted {
    /// The next message to this person.
    fn device_message<'a>(&mut self, plan: &'a Plan, to: usize, label: Label) -> DeviceMessage<'a> {
        let count = self.to.entry(to as u32).or_default();
        let number = *count;
        *count += 1;
        DeviceMessage::to(&plan.devices[to], Label { number, ..label })
    }
}
