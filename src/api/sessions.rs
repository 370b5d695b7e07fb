//! Sessions: log in, refresh, log out.

use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Deserializer, Serialize, de};
use tracing::warn;

use crate::api::error::ApiError;
use crate::api::extract::{Caller, Client, Json, OptionalKey};
use crate::app::App;
use crate::auth::tokens::{Claims, RefreshToken, Tokens};
use crate::bus::Signal;
use crate::clock::Timestamp;
use crate::limits::{Guess, LimitSubject, RateLimited};
use crate::model::ids::{Address, DeviceId, UserId};
use crate::store::{Credentials, Refresh, Refreshed, SessionGrant, SessionHolder, StoreError};
use crate::telemetry::throttle::LogThrottle;

/// Longer passwords can't be set, so they need not be tried.
pub const MAX_PASSWORD_BYTES: usize = 1024;

/// `POST /v1/session`
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogInRequest {
    /// The account's name, in any case.
    pub username: String,
    /// Its password.
    pub password: String,
    /// The device that logs in.
    #[serde(deserialize_with = "device_id")]
    pub device_id: DeviceId,
    /// A live refresh token of that device. With it, wrong passwords that others try don't slow this log-in.
    pub refresh_token: Option<String>,
}

/// `POST /v1/session/refresh`
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RefreshRequest {
    /// The device's refresh token.
    pub refresh_token: String,
}

/// What a device gets that has logged in, one way or another.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AuthResponse {
    /// The access token.
    pub token: String,
    /// The refresh token.
    pub refresh_token: String,
    /// The Unix second in which the access token expires.
    pub expires_at: i64,
    /// The account.
    pub user_id: String,
    /// The device.
    pub device_id: String,
}

/// Logs in a device that the account already has. The session it had before ends, its sockets included.
pub async fn log_in(
    State(app): State<App>,
    Client(client): Client,
    Json(request): Json<LogInRequest>,
) -> Result<axum::Json<AuthResponse>, ApiError> {
    let proof = request.refresh_token.as_deref().map(|token| (token, Some(request.device_id)));
    let claim = Claim { username: &request.username, password: request.password, proof };
    let user = authenticate(&app, client, claim).await?;
    let now = app.clock.latest();
    let session = NewSession::begin(&app.tokens, now);
    let begun = app.tasks.run_to_end(begin(app.clone(), user, request.device_id, session.grant)).await?;
    let Some(device) = begun else {
        return Err(ApiError::Conflict("Device does not belong to this account".into()));
    };
    Ok(axum::Json(
        session.answer(&app.tokens, &app.tokens.claims(user, device.device, now, device.tokens_revoked_until)),
    ))
}

/// Exchanges a refresh token for new tokens.
pub async fn refresh(
    State(app): State<App>,
    OptionalKey(key): OptionalKey,
    Json(request): Json<RefreshRequest>,
) -> Result<axum::Json<AuthResponse>, ApiError> {
    let used = RefreshToken::parse(&request.refresh_token).ok_or(ApiError::Unauthorized)?;
    let (now, latest) = (app.clock.now(), app.clock.latest());
    let next = NewSession::with(app.tokens.successor(&used, key), &app.tokens, latest);
    let revoked_until = app.tokens.latest_access_expiry(latest);
    let wish = Refresh { secret_hash: used.secret_hash(), key, next: next.grant, revoked_until };
    let (next, device, exchanged_at) = match app.tasks.run_to_end(exchange(app.clone(), wish, now)).await? {
        Refreshed::Rotated(device) => (next, device, latest),
        Refreshed::Repeated { holder, used_at, secret_hash } => {
            // The answer may have been made under another signing secret. A token that the store doesn't know would end
            // the session when it is used, so it is not given away.
            let token = app.tokens.successor_known_by(&used, key, &secret_hash).ok_or(ApiError::Unauthorized)?;
            (NewSession::with(token, &app.tokens, latest), holder, used_at)
        }
        Refreshed::Refused | Refreshed::Stolen(_) => return Err(ApiError::Unauthorized),
    };
    let claims = app.tokens.claims(device.user, device.device, exchanged_at, device.tokens_revoked_until);
    Ok(axum::Json(next.answer(&app.tokens, &claims)))
}

/// Ends the session of the calling device.
pub async fn log_out(State(app): State<App>, caller: Caller) -> Result<StatusCode, ApiError> {
    let revoked_until = app.tokens.latest_access_expiry(app.clock.latest());
    app.tasks
        .clone()
        .run_to_end(async move {
            let ended = app.store.log_out(caller.no, revoked_until).await;
            // Also when it failed: it may have happened all the same.
            app.bus.notify(&[caller.address()], Signal::AuthChanged);
            ended?;
            Ok(StatusCode::NO_CONTENT)
        })
        .await
}

/// A user name and a password that a client presents.
pub struct Claim<'a> {
    /// The account's name, in any case.
    pub username: &'a str,
    /// Its password.
    pub password: String,
    /// A live refresh token of a device of the account, if the client shows one: of this device, if one is given.
    pub proof: Option<(&'a str, Option<DeviceId>)>,
}

/// The account whose name and password these are; otherwise 401, after the same work whether or not the name exists. After
/// many wrong passwords for one name, from any addresses, further tries get 429 until some time has passed, except those of a
/// client with a live refresh token, and a few of a network that had hardly any wrong one.
pub async fn authenticate(app: &App, client: LimitSubject, claim: Claim<'_>) -> Result<UserId, ApiError> {
    let Claim { username, password, proof } = claim;
    if username.contains('\0') {
        return Err(ApiError::bad_request("The username must not contain a NUL character"));
    }
    if password.len() > MAX_PASSWORD_BYTES {
        return Err(ApiError::Unauthorized);
    }
    let username = username.to_ascii_lowercase();
    let (guess, found) = match app.account_limits.guess(&username) {
        Ok(guess) => credentials_of(app, &username, guess).await?,
        Err(wait) => {
            log_guessing();
            guess_when_none_is_left(app, &username, client, proof, wait).await?
        }
    };
    let (user, hash) = found.map(|found| (found.user, found.password_hash)).unzip();
    // A password that could not be checked was no guess.
    let is_right = match app.passwords.verify(password, hash, client).await {
        Ok(is_right) => is_right,
        Err(busy) => {
            guess.refund();
            return Err(busy.into());
        }
    };
    match user.filter(|_| is_right) {
        Some(user) => {
            guess.refund();
            Ok(user)
        }
        None => {
            app.metrics.passwords_wrong.increment(());
            Err(ApiError::Unauthorized)
        }
    }
}

/// What the name's account has, for this try. When the database can't say it, that was no try.
async fn credentials_of<'a>(
    app: &App,
    username: &str,
    guess: Guess<'a>,
) -> Result<(Guess<'a>, Option<Credentials>), ApiError> {
    match app.store.credentials(username).await {
        Ok(found) => Ok((guess, found)),
        Err(error) => {
            guess.refund();
            Err(error.into())
        }
    }
}

/// A try at a name that has none left: of a client with a live refresh token of the account, or of a network that has had hardly
/// any wrong password for this name. So those who guess slow the owner down, and don't lock the owner out.
async fn guess_when_none_is_left<'a>(
    app: &'a App,
    username: &str,
    client: LimitSubject,
    proof: Option<(&str, Option<DeviceId>)>,
    wait: RateLimited,
) -> Result<(Guess<'a>, Option<Credentials>), ApiError> {
    let from_network = || app.account_limits.guess_from(username, client).map_err(|other| wait.min(other));
    let holder = match proof {
        Some((token, device)) => {
            holder_of(app, token).await?.filter(|holder| device.is_none_or(|device| device == holder.device))
        }
        None => None,
    };
    let Some(holder) = holder else {
        return credentials_of(app, username, from_network()?).await;
    };
    let found = app.store.credentials(username).await?;
    let is_of_owner = found.as_ref().is_some_and(|found| found.user == holder.user);
    let guess = if is_of_owner { app.account_limits.proven_guess(holder.user)? } else { from_network()? };
    Ok((guess, found))
}

/// The device whose live refresh token this is. A used or expired one proves nothing.
async fn holder_of(app: &App, token: &str) -> Result<Option<SessionHolder>, StoreError> {
    match RefreshToken::parse(token) {
        Some(token) => app.store.session_holder(&token.family(), &token.secret_hash(), app.clock.now()).await,
        None => Ok(None),
    }
}

/// Logs at most once a minute that passwords are guessed, without any name.
fn log_guessing() {
    static LOGGED: LogThrottle = LogThrottle::every(Duration::from_mins(1));
    if LOGGED.try_acquire() {
        warn!(
            "passwords are being guessed: there were so many wrong ones for an account that further tries at it have to \
             wait (obscura_passwords_wrong_total counts them)"
        );
    }
}

/// A session that is about to begin, or to go on, with a new refresh token.
pub struct NewSession {
    token: RefreshToken,
    /// What the store keeps of it.
    pub grant: SessionGrant,
}

impl NewSession {
    /// A session from `now` on.
    pub fn begin(tokens: &Tokens, now: Timestamp) -> Self {
        Self::with(RefreshToken::random(), tokens, now)
    }

    fn with(token: RefreshToken, tokens: &Tokens, now: Timestamp) -> Self {
        let grant = SessionGrant {
            access_expires_at: tokens.latest_access_expiry(now),
            family: token.family(),
            secret_hash: token.secret_hash(),
            expires_at: tokens.refresh_expiry(now),
        };
        Self { token, grant }
    }

    /// What the device is told, whose access token says this.
    pub fn answer(&self, tokens: &Tokens, claims: &Claims) -> AuthResponse {
        AuthResponse {
            token: tokens.issue_access_token(claims),
            refresh_token: self.token.text(),
            expires_at: claims.expires_at,
            user_id: claims.user.to_string(),
            device_id: claims.device.to_string(),
        }
    }
}

/// Logs a device in and tells the sockets of its session before, on every node, that it has ended.
async fn begin(
    app: App,
    user: UserId,
    device: DeviceId,
    grant: SessionGrant,
) -> Result<Option<SessionHolder>, StoreError> {
    let device_auth = app.store.device_auth(device).await?.filter(|device_auth| device_auth.user == user);
    let addresses: Vec<_> = device_auth.iter().map(|found| Address { user, device: found.no }).collect();
    let begun = app.store.log_in(user, device, &grant).await;
    // Also when it failed: it may have happened all the same.
    app.bus.notify(&addresses, Signal::AuthChanged);
    begun
}

async fn exchange(app: App, wish: Refresh, now: Timestamp) -> Result<Refreshed, StoreError> {
    let refreshed = app.store.refresh(&wish, now).await?;
    if let Refreshed::Stolen(address) = refreshed {
        warn!("a used refresh token came again, so somebody else has it: the session of its device was ended");
        app.bus.notify(&[address], Signal::AuthChanged);
    }
    Ok(refreshed)
}

fn device_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DeviceId, D::Error> {
    DeviceId::parse(&String::deserialize(deserializer)?).ok_or_else(|| de::Error::custom("not a UUID"))
}
