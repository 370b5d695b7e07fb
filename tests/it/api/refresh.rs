//! Exchanging refresh tokens, lost answers and theft.

use std::time::Duration;

use futures_util::future::join_all;
use obscura_server::config::{Config, Secret};
use serde_json::{Value, json};
use uuid::Uuid;

use super::strictness::assert_strict;
use crate::harness::{Client, Device, Event, Request, TestServer};

const SECOND: Duration = Duration::from_secs(1);

fn refresh(client: &Client, token: &str) -> Request {
    client.post("/v1/session/refresh").json(&json!({"refreshToken": token}))
}

fn refresh_with_key(client: &Client, token: &str, key: Uuid) -> Request {
    refresh(client, token).header("idempotency-key", key.to_string())
}

/// The device with the tokens of this answer.
fn renewed(device: &Device, answer: &Value) -> Device {
    Device::from_answer(&device.client, device.identity.clone(), device.username.clone(), answer)
}

async fn rotate(device: &Device) -> Device {
    renewed(device, &refresh(&device.client, &device.refresh_token).send().await.expect(200).json())
}

#[tokio::test]
async fn a_refresh_gives_a_complete_new_session() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    server.clock.advance(Duration::from_mins(20));
    alice.request("GET", "/v1/devices").send().await.expect(401);

    let answer = refresh(&alice.client, &alice.refresh_token).send().await.expect(200).json();
    let members: Vec<&String> = answer.as_object().unwrap().keys().collect();
    assert_eq!(members, ["deviceId", "expiresAt", "refreshToken", "token", "userId"]);
    let lifetime = answer["expiresAt"].as_i64().unwrap() - server.clock.now().seconds();
    assert!((895..=900).contains(&lifetime), "{lifetime}");
    let next = renewed(&alice, &answer);
    assert_eq!((next.user, next.id, next.refresh_token.len()), (alice.user, alice.id, 43));
    assert_ne!(next.refresh_token, alice.refresh_token);
    next.request("GET", "/v1/devices").send().await.expect(200);
}

#[tokio::test]
async fn no_access_token_is_needed_or_looked_at() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    refresh(&alice.client, &alice.refresh_token).token("nonsense").send().await.expect(200);
}

#[tokio::test]
async fn what_is_no_living_refresh_token_is_unauthorized() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let good = &alice.refresh_token;
    let flipped = if good.starts_with('A') { "B" } else { "A" };
    for bad in [
        "",
        "nonsense",
        &good[..42],
        &format!("{good}="),
        &format!("{good}A"),
        &format!(" {good}"),
        &format!("{flipped}{}", &good[1..]),
        &"A".repeat(43),
        &"A".repeat(10_000),
        "\0",
        alice.token.as_str(),
    ] {
        let response = refresh(&alice.client, bad).send().await.expect(401);
        assert_eq!(response.error(), "Unauthorized");
    }
    rotate(&alice).await;
}

#[tokio::test]
async fn refresh_reads_json_strictly() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let good = json!({"refreshToken": alice.refresh_token});
    assert_strict(|| alice.client.post("/v1/session/refresh"), &good, &["refreshToken"]).await;
    rotate(&alice).await;
}

#[tokio::test]
async fn a_client_that_races_itself_loses_nothing() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let mut socket = alice.connect().await;
    let next = rotate(&alice).await;
    refresh(&alice.client, &alice.refresh_token).send().await.expect(401);
    server.clock.advance(4 * SECOND);
    refresh(&alice.client, &alice.refresh_token).send().await.expect(401);
    refresh_with_key(&alice.client, &alice.refresh_token, Uuid::new_v4()).send().await.expect(401);
    next.request("GET", "/v1/devices").send().await.expect(200);
    assert_eq!(socket.until_pong().await, []);
    rotate(&next).await;
}

#[tokio::test]
async fn of_many_refreshes_at_once_exactly_one_succeeds() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let answers = join_all((0..10).map(|_| refresh(&alice.client, &alice.refresh_token).send())).await;
    let (good, bad): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.status == 200);
    assert_eq!(good.len(), 1);
    assert!(bad.iter().all(|answer| answer.status == 401));
    rotate(&renewed(&alice, &good[0].json())).await;
}

#[tokio::test]
async fn a_used_token_that_comes_again_later_ends_the_session() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.request("PUT", "/v1/push-token").json(&json!({"token": "phone"})).send().await.expect(204);
    let next = rotate(&alice).await;
    let (mut socket, mut other) = (next.connect().await, bob.connect().await);
    server.clock.advance(11 * SECOND);
    refresh(&alice.client, &alice.refresh_token).send().await.expect(401);

    assert_eq!(socket.until_end().await, [Event::Close(None), Event::End]);
    for device in [&alice, &next] {
        device.request("GET", "/v1/devices").send().await.expect(401);
        refresh(&device.client, &device.refresh_token).send().await.expect(401);
    }
    assert_eq!(server.database().await.number("SELECT count(*) FROM push_tokens").await, 0);
    assert_eq!(other.until_pong().await, []);

    let again = alice.log_in().await;
    again.request("GET", "/v1/devices").send().await.expect(200);
    refresh(&alice.client, &alice.refresh_token).send().await.expect(401);
    refresh(&alice.client, &next.refresh_token).send().await.expect(401);
    rotate(&again).await;
}

#[tokio::test]
async fn a_token_from_several_refreshes_ago_ends_the_session() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let mut last = rotate(&alice).await;
    for _ in 0..3 {
        server.clock.advance(Duration::from_hours(24));
        last = rotate(&last).await;
    }
    refresh(&alice.client, &alice.refresh_token).send().await.expect(401);
    refresh(&alice.client, &last.refresh_token).send().await.expect(401);
}

#[tokio::test]
async fn a_lost_answer_is_given_again_under_the_same_key() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let key = Uuid::new_v4();
    let first = refresh_with_key(&alice.client, &alice.refresh_token, key).send().await.expect(200);
    server.clock.advance(30 * SECOND);
    let spelled = refresh(&alice.client, &alice.refresh_token).header("idempotency-key", key.simple().to_string());
    assert_eq!(spelled.send().await.expect(200).body, first.body);
    server.clock.advance(20 * SECOND);
    let third = refresh_with_key(&alice.client, &alice.refresh_token, key).send().await.expect(200);
    assert_eq!(third.body, first.body);

    let next = renewed(&alice, &first.json());
    next.request("GET", "/v1/devices").send().await.expect(200);
    rotate(&next).await;
}

#[tokio::test]
async fn many_requests_with_one_key_at_once_get_one_answer() {
    let server = TestServer::start().await;
    let (alice, key) = (server.account().await, Uuid::new_v4());
    let answers = join_all((0..10).map(|_| refresh_with_key(&alice.client, &alice.refresh_token, key).send())).await;
    let first = renewed(&alice, &answers[0].clone().expect(200).json());
    for answer in answers {
        assert_eq!(renewed(&alice, &answer.expect(200).json()).refresh_token, first.refresh_token);
    }
    rotate(&first).await;
}

#[tokio::test]
async fn a_lost_answer_survives_a_restart() {
    let mut server = TestServer::start().await;
    let (alice, key) = (server.account().await, Uuid::new_v4());
    let first = refresh_with_key(&alice.client, &alice.refresh_token, key).send().await.expect(200);
    server.restart().await;
    let second = refresh_with_key(&alice.client, &alice.refresh_token, key).send().await.expect(200);
    assert_eq!(second.body, first.body);
}

#[tokio::test]
async fn after_a_minute_the_same_key_is_no_excuse() {
    let server = TestServer::start().await;
    let (alice, key) = (server.account().await, Uuid::new_v4());
    let first = refresh_with_key(&alice.client, &alice.refresh_token, key).send().await.expect(200);
    server.clock.advance(61 * SECOND);
    refresh_with_key(&alice.client, &alice.refresh_token, key).send().await.expect(401);
    refresh(&alice.client, &renewed(&alice, &first.json()).refresh_token).send().await.expect(401);
}

#[tokio::test]
async fn nothing_is_given_again_once_the_session_has_ended() {
    let server = TestServer::start().await;
    let (alice, key) = (server.account().await, Uuid::new_v4());
    let first = refresh_with_key(&alice.client, &alice.refresh_token, key).send().await.expect(200);
    renewed(&alice, &first.json()).log_out().await;
    refresh_with_key(&alice.client, &alice.refresh_token, key).send().await.expect(401);
    let again = alice.log_in().await;
    refresh_with_key(&alice.client, &alice.refresh_token, key).send().await.expect(401);
    rotate(&again).await;
}

#[tokio::test]
async fn an_idempotency_key_has_to_be_a_uuid() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    for bad in ["", "1", "not-a-uuid", &"x".repeat(36)] {
        refresh(&alice.client, &alice.refresh_token).header("idempotency-key", bad).send().await.expect(400);
    }
    rotate(&alice).await;
}

#[tokio::test]
async fn a_refresh_token_lives_for_its_lifetime_and_each_refresh_begins_a_new_one() {
    let server = TestServer::start().await;
    let lifetime = Duration::from_hours(30 * 24);
    let mut alice = server.account().await;
    for _ in 0..2 {
        server.clock.advance(lifetime - 60 * SECOND);
        alice = rotate(&alice).await;
    }
    server.clock.advance(lifetime);
    refresh(&alice.client, &alice.refresh_token).send().await.expect(401);
}

#[tokio::test]
async fn with_a_lifetime_of_zero_a_refresh_token_is_dead_on_arrival() {
    let server = TestServer::start_with(|config| config.auth.refresh_token_lifetime = Duration::ZERO).await;
    let alice = server.account().await;
    assert_eq!(alice.refresh_token.len(), 43);
    refresh(&alice.client, &alice.refresh_token).send().await.expect(401);
    let alice = alice.log_in().await;
    refresh(&alice.client, &alice.refresh_token).send().await.expect(401);
    alice.connect().await;
    alice.log_out().await;
}

#[tokio::test]
async fn the_refresh_token_of_a_removed_device_is_dead() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let linked = alice.link().await;
    alice.remove(&linked).await;
    refresh(&alice.client, &linked.refresh_token).send().await.expect(401);
    rotate(&alice).await;
}

#[tokio::test]
async fn the_devices_of_an_account_have_sessions_of_their_own() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let linked = alice.link().await;
    let next = rotate(&linked).await;
    server.clock.advance(11 * SECOND);
    refresh(&alice.client, &linked.refresh_token).send().await.expect(401);
    refresh(&alice.client, &next.refresh_token).send().await.expect(401);
    rotate(&alice).await;
    alice.request("GET", "/v1/devices").send().await.expect(200);
}

/// Signs with a new secret from the next start on.
fn change_secret(config: &mut Config, previous: Option<Secret>) {
    config.auth.jwt_secret = Secret::new("the secret that signs from now on");
    config.auth.jwt_secret_previous = previous;
}

#[tokio::test]
async fn a_refresh_that_is_repeated_across_a_change_of_the_signing_secret_gets_its_answer() {
    let mut server = TestServer::start().await;
    let (alice, key) = (server.account().await, Uuid::new_v4());
    let previous = server.server().app().config.auth.jwt_secret.clone();
    let first = refresh_with_key(&alice.client, &alice.refresh_token, key).send().await.expect(200).json();
    server.restart_with(|config| change_secret(config, Some(previous))).await;
    let again = refresh_with_key(&alice.client, &alice.refresh_token, key).send().await.expect(200).json();
    assert_eq!(again["refreshToken"], first["refreshToken"]);
    for answer in [&first, &again] {
        renewed(&alice, answer).request("GET", "/v1/devices").send().await.expect(200);
    }
    rotate(&renewed(&alice, &again)).await;
}

#[tokio::test]
async fn without_the_previous_secret_the_repeat_is_unauthorized_and_the_session_goes_on() {
    let mut server = TestServer::start().await;
    let (alice, key) = (server.account().await, Uuid::new_v4());
    let first = refresh_with_key(&alice.client, &alice.refresh_token, key).send().await.expect(200).json();
    server.restart_with(|config| change_secret(config, None)).await;
    let next = renewed(&alice, &first);
    next.request("GET", "/v1/devices").send().await.expect(401);
    for _ in 0..2 {
        refresh_with_key(&alice.client, &alice.refresh_token, key).send().await.expect(401);
        server.clock.advance(20 * SECOND);
    }
    let after = rotate(&next).await;
    after.request("GET", "/v1/devices").send().await.expect(200);
}
