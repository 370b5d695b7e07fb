//! The push providers: each takes a push for one device and says what became of it. A push carries no content.

mod apns;
mod endpoints;
mod fcm;
mod http;
pub(super) mod names;
mod sealing;
mod vapid;
mod webpush;

use std::fmt;
use std::time::Duration;

use crate::clock::Clock;
use crate::config::Config;
use crate::model::push::PushTarget;
use crate::push::PushError;
use crate::push::providers::apns::Apns;
use crate::push::providers::fcm::Fcm;
use crate::push::providers::webpush::WebPush;
use crate::telemetry::metrics::PushOutcome;

pub use vapid::VapidKey;

/// What became of a push.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PushResult {
    /// The provider has it.
    Accepted,
    /// The provider says that the token will never work again.
    TokenGone,
    /// A Web Push service says that it doesn't know the subscription. A proxy in front of it may say the same.
    Missing,
    /// This push was not taken; others may be.
    Refused {
        /// The status of the answer, if there was one.
        status: Option<u16>,
        /// How long the provider asks to wait, if it does.
        retry_after: Option<Duration>,
    },
    /// The token can't be one of the provider's, so the provider was not asked.
    InvalidTarget,
    /// The provider takes no pushes from us at the moment, or doesn't answer.
    Unavailable {
        /// What it said, in words of ours.
        cause: Cause,
        /// How long it asks to wait, if it does.
        retry_after: Option<Duration>,
    },
}

impl PushResult {
    /// What it counts as. `is_over` when it is not tried again; only a provider that rings a phone is real.
    pub fn outcome(&self, is_configured: bool, is_over: bool) -> PushOutcome {
        match self {
            Self::Accepted if !is_configured => PushOutcome::Logged,
            Self::Accepted => PushOutcome::Accepted,
            Self::TokenGone => PushOutcome::TokenGone,
            Self::Missing | Self::Refused { .. } | Self::InvalidTarget if is_over => PushOutcome::GivenUp,
            Self::Missing | Self::Refused { .. } | Self::InvalidTarget => PushOutcome::Refused,
            Self::Unavailable { .. } => PushOutcome::Unavailable,
        }
    }

    /// How long the provider asks to wait.
    pub fn asked_to_wait(&self) -> Duration {
        match self {
            Self::Refused { retry_after, .. } | Self::Unavailable { retry_after, .. } => {
                retry_after.unwrap_or_default()
            }
            Self::Accepted | Self::TokenGone | Self::Missing | Self::InvalidTarget => Duration::ZERO,
        }
    }

    /// The status with which this push alone was refused.
    pub fn refused_with(&self) -> Option<u16> {
        match self {
            Self::Missing => Some(404),
            Self::Refused { status, .. } => *status,
            Self::Accepted | Self::TokenGone | Self::InvalidTarget | Self::Unavailable { .. } => None,
        }
    }

    /// What a trace calls it. That no push was sent, or that it was the last attempt, only the metrics tell apart.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::TokenGone => "token_gone",
            Self::Missing | Self::Refused { .. } | Self::InvalidTarget => "refused",
            Self::Unavailable { .. } => "unavailable",
        }
    }
}

/// Why a provider takes no pushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It can't be reached, or answers too slowly.
    NoAnswer,
    /// It doesn't accept our credentials, or doesn't know the project or app.
    Credentials,
    /// It has a problem of its own, or too much to do.
    Busy,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoAnswer => "it does not answer",
            Self::Credentials => "it refuses our credentials or settings",
            Self::Busy => "it is busy or has a problem of its own",
        })
    }
}

/// Whom a push is handed to.
pub enum Provider {
    /// Firebase Cloud Messaging.
    Fcm(Fcm),
    /// The Apple Push Notification service.
    Apns(Box<Apns>),
    /// Web Push and UnifiedPush.
    WebPush(WebPush),
    /// None: there are no credentials, so that a push was due is all that happens.
    Log,
}

impl Provider {
    /// Firebase Cloud Messaging, if there are credentials.
    pub fn fcm(config: &Config, clock: &Clock) -> Result<Self, PushError> {
        Ok(Fcm::open(config, clock)?.map_or(Self::Log, Self::Fcm))
    }

    /// The Apple Push Notification service, if there is a key.
    pub fn apns(config: &Config, clock: &Clock) -> Result<Self, PushError> {
        Ok(Apns::open(config, clock)?.map_or(Self::Log, |apns| Self::Apns(Box::new(apns))))
    }

    /// Web Push, which needs no permission.
    pub fn web_push(config: &Config, clock: &Clock, key: VapidKey) -> Result<Self, PushError> {
        Ok(Self::WebPush(WebPush::open(config, clock, key)?))
    }

    /// Wakes a device, or gives up after `patience`.
    pub async fn push(&self, target: &PushTarget, patience: Duration) -> PushResult {
        match tokio::time::timeout(patience, self.try_to_push(target)).await {
            Ok(pushed) => pushed,
            // One endpoint that hangs says nothing about others.
            Err(_) if matches!(self, Self::WebPush(_)) => PushResult::Refused { status: None, retry_after: None },
            Err(_) => PushResult::Unavailable { cause: Cause::NoAnswer, retry_after: None },
        }
    }

    async fn try_to_push(&self, target: &PushTarget) -> PushResult {
        match (self, target) {
            (Self::Fcm(fcm), PushTarget::Fcm(token)) => fcm.push(token).await,
            (Self::Apns(apns), PushTarget::Apns(token)) => apns.push(token).await,
            (Self::WebPush(web_push), PushTarget::WebPush(subscription)) => web_push.push(subscription).await,
            _ => PushResult::Accepted,
        }
    }
}
