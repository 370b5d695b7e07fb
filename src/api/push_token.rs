//! Push tokens: register one.

use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;

use crate::api::error::ApiError;
use crate::api::extract::{Caller, Json};
use crate::app::App;

/// Bytes that a push token may have.
const MAX_TOKEN_BYTES: usize = 4096;

/// `PUT /v1/push-token`
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PushTokenRequest {
    /// The push provider's name for this device.
    pub token: String,
}

/// Registers the device's push token; the last one wins.
pub async fn put(
    State(app): State<App>,
    caller: Caller,
    Json(request): Json<PushTokenRequest>,
) -> Result<StatusCode, ApiError> {
    let token = checked(&request.token)?;
    if !app.store.set_push_token(caller.no, caller.token_expires_at, token).await? {
        return Err(ApiError::Unauthorized);
    }
    Ok(StatusCode::NO_CONTENT)
}

/// The token without the white space around it.
fn checked(token: &str) -> Result<&str, ApiError> {
    let token = token.trim();
    if token.is_empty() {
        return Err(ApiError::bad_request("The push token must not be empty"));
    }
    if token.len() > MAX_TOKEN_BYTES {
        return Err(ApiError::bad_request("The push token must have at most 4096 bytes"));
    }
    if token.contains('\0') {
        return Err(ApiError::bad_request("The push token must not contain a NUL character"));
    }
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_trimmed_and_then_measured() {
        assert_eq!(checked(" \n token\t ").unwrap(), "token");
        let longest = "x".repeat(MAX_TOKEN_BYTES);
        assert_eq!(checked(&format!("  {longest} ")).unwrap(), longest);
        for bad in ["", " \t\n", "a\0b", &format!("{longest}x"), &"ä".repeat(2049)] {
            assert!(matches!(checked(bad), Err(ApiError::BadRequest(_))));
        }
    }
}
