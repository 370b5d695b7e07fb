//! Log in and log out. Passwords are checked in turn, and nobody learns names.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::task::Poll;
use std::time::Duration;

use futures_util::poll;
use obscura_server::auth::passwords::{Busy, Passwords};
use obscura_server::limits::LimitSubject;
use serde_json::{Value, json};
use uuid::Uuid;

use super::strictness::assert_strict;
use crate::harness::{Client, Device, Event, Keys, PASSWORD, Response, Socket, TestServer, eventually};

async fn log_in(client: &Client, username: &str, password: &str, device: Uuid) -> Response {
    let body = json!({"username": username, "password": password, "deviceId": device.to_string()});
    client.post("/v1/session").json(&body).send().await
}

async fn refresh(device: &Device) -> Response {
    let body = json!({"refreshToken": device.refresh_token});
    device.client.post("/v1/session/refresh").json(&body).send().await
}

/// Whether the device's access token is good.
async fn is_known(device: &Device) -> bool {
    match device.request("GET", "/v1/devices").send().await.status {
        200 => true,
        401 => false,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_log_in_gives_the_device_a_new_session() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let response = log_in(&alice.client, &alice.username, PASSWORD, alice.id).await.expect(200);
    let answer = response.json();
    let members: Vec<&String> = answer.as_object().unwrap().keys().collect();
    assert_eq!(members, ["deviceId", "expiresAt", "refreshToken", "token", "userId"]);
    let again = Device::from_answer(&alice.client, alice.identity.clone(), alice.username.clone(), &answer);
    assert_eq!((again.user, again.id), (alice.user, alice.id));

    refresh(&alice).await.expect(401);
    assert!(is_known(&again).await);
    refresh(&again).await.expect(200);
}

#[tokio::test]
async fn a_log_in_ends_what_was_opened_with_the_tokens_before_it() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let tablet = alice.link().await;
    alice.request("PUT", "/v1/push-token").json(&json!({"token": "alice's phone"})).send().await.expect(204);
    // A thief with the access token has a socket, a ticket and an upload.
    let ticket = alice.ticket().await;
    let (mut stolen, mut second) = (alice.connect().await, alice.connect().await);
    let (mut of_tablet, mut of_bob) = (tablet.connect().await, bob.connect().await);

    let again = alice.log_in().await;
    for socket in [&mut stolen, &mut second] {
        assert_eq!(socket.until_end().await, [Event::Close(None), Event::End]);
    }
    assert!(!is_known(&alice).await);
    refresh(&alice).await.expect(401);
    assert_eq!(Socket::open(server.address(), &ticket).await.err(), Some(401));
    alice.request("POST", "/v1/gateway/ticket").send().await.expect(401);

    assert!(is_known(&again).await);
    bob.send(&[(&again, b"mail"), (&tablet, b"mail")]).await;
    assert_eq!(again.connect().await.messages(1).await.len(), 1, "the mail is still there");
    let pushes = server.database().await.number("SELECT count(*) FROM push_tokens").await;
    assert_eq!(pushes, 1, "the device stays registered for pushes");
    assert!(is_known(&tablet).await, "the account's other devices go on");
    for socket in [&mut of_tablet, &mut of_bob] {
        socket.until_pong().await;
    }
}

#[tokio::test]
async fn a_log_in_that_is_refused_ends_nothing() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let (ticket, mut socket) = (alice.ticket().await, alice.connect().await);
    log_in(&alice.client, &alice.username, "wrong horse battery staple", alice.id).await.expect(401);
    log_in(&bob.client, &bob.username, PASSWORD, alice.id).await.expect(409);
    assert!(is_known(&alice).await);
    assert_eq!(socket.until_pong().await, []);
    Socket::open(server.address(), &ticket).await.expect("the ticket is good");
    refresh(&alice).await.expect(200);
}

#[tokio::test]
async fn wrong_credentials_are_unauthorized_whatever_the_device() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let padded = format!(" {} ", alice.username);
    for (username, password) in [
        (alice.username.as_str(), "wrong horse battery staple"),
        (&alice.username, ""),
        (&alice.username, &PASSWORD.to_uppercase()),
        (&alice.username, &format!("{PASSWORD} ")),
        (&alice.username, &"x".repeat(1025)),
        (&padded, PASSWORD),
        ("nobody", PASSWORD),
        ("", ""),
        ("' OR ''='", PASSWORD),
    ] {
        for device in [alice.id, bob.id, Uuid::new_v4()] {
            let response = log_in(&alice.client, username, password, device).await.expect(401);
            assert_eq!(response.error(), "Unauthorized");
        }
    }
    log_in(&alice.client, &format!("{}\0", alice.username), PASSWORD, alice.id).await.expect(400);
    refresh(&alice).await.expect(200);
}

#[tokio::test]
async fn the_right_password_with_a_device_of_another_account_is_a_conflict() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let linked = alice.link().await;
    alice.remove(&linked).await;
    for device in [bob.id, linked.id, Uuid::new_v4()] {
        log_in(&alice.client, &alice.username, PASSWORD, device).await.expect(409);
    }
    for device in [&alice, &bob] {
        refresh(device).await.expect(200);
    }
}

#[tokio::test]
async fn a_device_id_is_read_in_any_spelling_of_a_uuid() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let id = alice.id;
    let body = |id: Value| json!({"username": alice.username.to_uppercase(), "password": PASSWORD, "deviceId": id});
    for spelling in
        [id.simple().to_string(), id.braced().to_string(), id.urn().to_string(), id.to_string().to_uppercase()]
    {
        alice.client.post("/v1/session").json(&body(json!(spelling))).send().await.expect(200);
    }
    for malformed in ["", "me", &id.to_string()[1..], &format!("{id} ")] {
        alice.client.post("/v1/session").json(&body(json!(malformed))).send().await.expect(422);
    }
    let unknown_user = json!({"username": "nobody", "password": PASSWORD, "deviceId": "me"});
    alice.client.post("/v1/session").json(&unknown_user).send().await.expect(422);
}

#[tokio::test]
async fn log_in_reads_json_strictly() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let good = json!({"username": alice.username, "password": PASSWORD, "deviceId": alice.id.to_string()});
    assert_strict(|| alice.client.post("/v1/session"), &good, &["username", "password", "deviceId"]).await;
    refresh(&alice).await.expect(200);
    let mut more = good.clone();
    more["unknown"] = json!({"ignored": [1, 2.5, null]});
    alice.client.post("/v1/session").json(&more).send().await.expect(200);
}

#[tokio::test]
async fn a_log_in_under_an_unknown_name_costs_the_same_work() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let passwords = &server.server().app().passwords;
    for (username, password, status) in [
        (alice.username.as_str(), PASSWORD, 200),
        (&alice.username, "wrong horse battery staple", 401),
        ("nobody", PASSWORD, 401),
        ("no such name, ever", "x", 401),
        ("", "", 401),
    ] {
        let before = passwords.hashes_done();
        log_in(&alice.client, username, password, alice.id).await.expect(status);
        assert_eq!(passwords.hashes_done(), before + 1, "{username:?}");
    }
    for username in [&alice.username, "nobody"] {
        let before = passwords.hashes_done();
        log_in(&alice.client, username, &"x".repeat(1025), alice.id).await.expect(401);
        assert_eq!(passwords.hashes_done(), before, "{username:?}");
    }
}

/// The network that the clients of a test are in. Another one would find room in a queue that this one fills.
const US: LimitSubject = LimitSubject::Address(IpAddr::V4(Ipv4Addr::LOCALHOST));

/// Fills the queue of passwords. Dropping the answer empties it.
async fn fill(passwords: &Passwords) -> Vec<impl Future<Output = Result<String, Busy>>> {
    // The first run to their end by themselves. Those that then have a turn don't take it, because nobody polls them.
    let processors = std::thread::available_parallelism().unwrap().get();
    let mut waiting = Vec::new();
    eventually("the queue to be full", async || {
        while waiting.len() < 2 * processors + 1024 {
            let passwords = passwords.clone();
            let mut hash = Box::pin(async move { passwords.hash(PASSWORD.into(), US).await });
            match poll!(&mut hash) {
                Poll::Ready(Err(Busy)) => return false,
                _ => waiting.push(hash),
            }
        }
        true
    })
    .await;
    waiting
}

#[tokio::test]
async fn with_too_many_passwords_waiting_the_next_is_told_to_come_again() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let mut keys = Keys::default().to_json(&alice.identity);
    keys["username"] = json!("somebody_new");
    keys["password"] = json!(PASSWORD);
    keys["deviceId"] = json!(alice.id.to_string());
    let full = fill(&server.server().app().passwords).await;
    for path in ["/v1/users", "/v1/users/reset", "/v1/session", "/v1/link-sessions"] {
        let response = alice.client.post(path).json(&keys).send().await.expect(503);
        assert_eq!(response.header("retry-after"), Some("1"), "{path}");
    }
    assert!(is_known(&alice).await, "nobody else has to wait");
    refresh(&alice).await.expect(200);
    drop(full);
    alice.client.post("/v1/users").json(&keys).send().await.expect(201);
}

#[tokio::test]
async fn a_log_out_ends_the_session_at_once() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let ticket = alice.ticket().await;
    let (mut first, mut second, mut other) = (alice.connect().await, alice.connect().await, bob.connect().await);
    alice.request("PUT", "/v1/push-token").json(&json!({"token": "alice's phone"})).send().await.expect(204);
    bob.request("PUT", "/v1/push-token").json(&json!({"token": "bob's phone"})).send().await.expect(204);

    alice.log_out().await;
    for socket in [&mut first, &mut second] {
        assert_eq!(socket.until_end().await, [Event::Close(None), Event::End]);
    }
    assert!(!is_known(&alice).await);
    refresh(&alice).await.expect(401);
    assert_eq!(Socket::open(server.address(), &ticket).await.err(), Some(401));
    alice.request("DELETE", "/v1/session").send().await.expect(401);
    let database = server.database().await;
    assert_eq!(database.number("SELECT count(*) FROM push_tokens WHERE token = 'alice''s phone'").await, 0);

    assert_eq!(other.until_pong().await, [], "others go on");
    assert_eq!(database.number("SELECT count(*) FROM push_tokens").await, 1);
    refresh(&bob).await.expect(200);
}

#[tokio::test]
async fn a_logged_out_device_keeps_its_keys_and_its_messages() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let linked = alice.link().await;
    bob.send(&[(&alice, b"for the primary"), (&linked, b"before")]).await;
    linked.log_out().await;
    bob.send(&[(&alice, b"for the primary"), (&linked, b"after")]).await;
    assert!(is_known(&alice).await, "the account's other devices go on");
    let devices = alice.request("GET", "/v1/devices").send().await.expect(200).json();
    assert_eq!(devices["devices"].as_array().unwrap().len(), 2);
    assert_eq!(bob.bundles(alice.user).await.len(), 2);

    let again = linked.log_in().await;
    let messages = again.connect().await.messages(2).await;
    assert_eq!(messages.iter().map(|envelope| &envelope.message[..]).collect::<Vec<_>>(), [&b"before"[..], b"after"]);
}

#[tokio::test]
async fn tokens_made_after_a_log_out_are_good_at_once_and_those_before_never_again() {
    let server = TestServer::start().await;
    let mut sessions = vec![server.account().await];
    for _ in 0..3 {
        let last = sessions.last().unwrap();
        last.log_out().await;
        let next = last.log_in().await;
        assert!(is_known(&next).await);
        let mut socket = next.connect().await;
        assert_eq!(socket.until_pong().await, []);
        for old in &sessions {
            assert!(!is_known(old).await);
            refresh(old).await.expect(401);
        }
        sessions.push(next);
    }
    let last = sessions.last().unwrap();
    let next = refresh(last).await.expect(200).json();
    assert!(next["expiresAt"].as_i64().unwrap() > server.clock.now().seconds() + 890);
    assert!(is_known(last).await, "a refresh ends no access token");
}

#[tokio::test]
async fn a_log_out_without_a_refresh_token_is_no_error() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    server.database().await.execute("DELETE FROM sessions").await;
    alice.log_out().await;
    assert!(!is_known(&alice).await);
}

#[tokio::test]
async fn a_log_out_holds_across_a_restart() {
    let mut server = TestServer::start().await;
    let alice = server.account().await;
    alice.log_out().await;
    server.restart().await;
    assert!(!is_known(&alice).await);
    server.clock.advance(Duration::from_secs(120));
    assert!(is_known(&alice.log_in().await).await);
}
