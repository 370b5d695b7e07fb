//! Register and reset.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE};
use futures_util::future::join_all;
use serde_json::{Value, json};

use super::strictness::assert_strict;
use crate::harness::signer::{Identity, ec_public_key};
use crate::harness::{
    Client, Device, Event, Keys, PASSWORD, Response, Socket, TestServer, kyber_key, one_time_key, signed_key,
    unique_name,
};

const FEW: Keys = Keys { one_time: 2, pq_one_time: Some(2) };
const REQUIRED: [&str; 6] = ["username", "password", "identityKey", "registrationId", "signedPreKey", "oneTimePreKeys"];

/// A good registration or reset of an account with this name.
fn body(identity: &Identity, username: &str) -> Value {
    let mut body = FEW.to_json(identity);
    body["username"] = json!(username);
    body["password"] = json!(PASSWORD);
    body["name"] = json!("phone");
    body
}

async fn register(client: &Client, body: &Value) -> Response {
    client.post("/v1/users").json(body).send().await
}

async fn reset(client: &Client, body: &Value) -> Response {
    client.post("/v1/users/reset").json(body).send().await
}

#[tokio::test]
async fn a_registration_is_answered_with_a_complete_session_of_a_primary_device() {
    let server = TestServer::start().await;
    let (client, identity) = (server.client(), Identity::generate());
    let before = server.clock.now().seconds();
    let response = register(&client, &body(&identity, "Alice_01")).await.expect(201);
    assert_eq!(response.header("content-type"), Some("application/json"));
    let answer = response.json();
    let members: Vec<&String> = answer.as_object().unwrap().keys().collect();
    assert_eq!(members, ["deviceId", "expiresAt", "refreshToken", "token", "userId"]);
    assert_eq!(answer["refreshToken"].as_str().unwrap().len(), 43);
    let lifetime = answer["expiresAt"].as_i64().unwrap() - before;
    assert!((900..=905).contains(&lifetime), "{lifetime}");

    let device = Device::from_answer(&client, Arc::new(identity), "alice_01".into(), &answer);
    assert_eq!(answer["userId"], device.user.to_string(), "hyphenated lower case");
    assert_eq!(answer["deviceId"], device.id.to_string(), "hyphenated lower case");
    let devices = device.request("GET", "/v1/devices").send().await.expect(200).json();
    assert_eq!(devices, json!({"devices": [{"deviceId": device.id.to_string(), "name": "phone", "isPrimary": true}]}));
    let bundle = &device.bundles(device.user).await[0];
    assert_eq!(bundle["identityKey"], device.identity.public_key_base64());
    assert_eq!(bundle["registrationId"], 4711);
}

#[tokio::test]
async fn a_username_is_3_to_50_ascii_letters_digits_or_underscores() {
    let server = TestServer::start().await;
    let (client, identity) = (server.client(), Identity::generate());
    let (longest, too_long) = ("x".repeat(50), "x".repeat(51));
    for bad in ["", " ", "   ", "ab", &too_long, "a b", " abc", "abc ", "a-b", "a.b", "älice", "a\0b", "abc\n", "abc💥"]
    {
        register(&client, &body(&identity, bad)).await.expect(400);
    }
    for good in ["abc", "___", "123", &longest] {
        register(&client, &body(&identity, good)).await.expect(201);
    }
}

#[tokio::test]
async fn a_username_is_the_same_in_any_case() {
    let server = TestServer::start().await;
    let (client, identity) = (server.client(), Identity::generate());
    let answer = register(&client, &body(&identity, "MixedCase")).await.expect(201).json();
    for taken in ["mixedcase", "MIXEDCASE", "MixedCase"] {
        register(&client, &body(&identity, taken)).await.expect(409);
    }
    let log_in = json!({"username": "mIXEDcASE", "password": PASSWORD, "deviceId": answer["deviceId"]});
    client.post("/v1/session").json(&log_in).send().await.expect(200);
}

#[tokio::test]
async fn a_password_has_12_to_1024_bytes_and_all_of_them_count() {
    let server = TestServer::start().await;
    let (client, identity) = (server.client(), Identity::generate());
    for (username, password, status) in [
        ("empty", "", 400),
        ("eleven", "12345678901", 400),
        ("twelve", "123456789012", 201),
        ("umlauts", "ääääää", 201),
        ("zeros", "\0\0\0\0\0\0\0\0\0\0\0\0", 201),
        ("longest", &"x".repeat(1024), 201),
        ("too_long", &"x".repeat(1025), 400),
    ] {
        let mut body = body(&identity, username);
        body["password"] = json!(password);
        let response = register(&client, &body).await.expect(status);
        if password.len() < 12 {
            assert!(response.error().contains("at least 12 characters"));
        }
    }
    for (length, status) in [(1023, 401), (1024, 409), (1025, 401)] {
        let log_in = json!({"username": "longest", "password": "x".repeat(length), "deviceId": uuid::Uuid::new_v4().to_string()});
        client.post("/v1/session").json(&log_in).send().await.expect(status);
    }
}

#[tokio::test]
async fn the_name_of_a_device_is_optional_and_has_at_most_100_characters() {
    let server = TestServer::start().await;
    let client = server.client();
    for (name, status) in [
        (Some(json!(null)), 201),
        (None, 201),
        (Some(json!("")), 201),
        (Some(json!("🦀".repeat(100))), 201),
        (Some(json!("x".repeat(101))), 400),
        (Some(json!("a\0b")), 400),
    ] {
        let identity = Arc::new(Identity::generate());
        let username = unique_name("named");
        let mut body = body(&identity, &username);
        match &name {
            Some(name) => body["name"] = name.clone(),
            None => drop(body.as_object_mut().unwrap().remove("name")),
        }
        let response = register(&client, &body).await.expect(status);
        if status == 201 {
            let device = Device::from_answer(&client, identity, username, &response.json());
            let devices = device.request("GET", "/v1/devices").send().await.expect(200).json();
            assert_eq!(devices["devices"][0]["name"], name.unwrap_or(Value::Null));
        }
    }
}

/// What may be wrong with the keys of a new device. `identity` signs.
fn key_mistakes(identity: &Identity) -> Vec<(&'static str, &'static str, Value)> {
    let key = ec_public_key(77);
    let good = STANDARD.encode(key);
    let line_break = format!("{}\n{}", &good[..20], &good[20..]);
    let mut wrong_prefix = key;
    wrong_prefix[0] = 6;
    let bad_keys = [
        ("no base64", "!".repeat(44)),
        ("URL-safe alphabet", URL_SAFE.encode([0xfb; 33])),
        ("no padding", STANDARD_NO_PAD.encode([5; 32])),
        ("white space", format!("{good} ")),
        ("a line break", line_break),
        ("32 bytes", STANDARD.encode(&key[1..])),
        ("34 bytes", STANDARD.encode([5; 34])),
        ("another type byte", STANDARD.encode(wrong_prefix)),
        ("nothing", String::new()),
    ];
    let mut mistakes = Vec::new();
    for (what, text) in bad_keys {
        mistakes.push((what, "/identityKey", json!(text)));
        mistakes.push((what, "/signedPreKey/publicKey", json!(text)));
        mistakes.push((what, "/oneTimePreKeys/0/publicKey", json!(text)));
        mistakes.push((what, "/pqPreKeys/0/publicKey", json!(text)));
        mistakes.push((what, "/pqLastResortPreKey/publicKey", json!(text)));
    }
    for length in [0, 63, 65] {
        mistakes.push(("length", "/signedPreKey/signature", json!(STANDARD.encode(vec![1; length]))));
        mistakes.push(("length", "/pqPreKeys/0/signature", json!(STANDARD.encode(vec![1; length]))));
    }
    let other = Identity::generate();
    let mut of_pq = kyber_key(identity, 1);
    of_pq["keyId"] = json!(-1);
    let too_many: Vec<_> = (1..=101).map(one_time_key).collect();
    let too_many_pq: Vec<_> = (1..=101).map(|id| kyber_key(identity, id)).collect();
    mistakes.extend([
        ("another identity", "/identityKey", json!(other.public_key_base64())),
        ("signed by another", "/signedPreKey", signed_key(&other, 1)),
        ("signed by another", "/pqPreKeys/1", kyber_key(&other, 2)),
        ("signed by another", "/pqLastResortPreKey", kyber_key(&other, 3)),
        ("negative id", "/pqPreKeys/1", of_pq),
        ("ids repeat", "/oneTimePreKeys", json!([one_time_key(1), one_time_key(1)])),
        ("ids repeat", "/pqPreKeys", json!([kyber_key(identity, 1), kyber_key(identity, 1)])),
        ("ids repeat", "/pqPreKeys", json!([kyber_key(identity, 1_000_000)])),
        ("no last-resort key", "/pqLastResortPreKey", json!(null)),
        ("101 keys", "/oneTimePreKeys", json!(too_many)),
        ("101 keys", "/pqPreKeys", json!(too_many_pq)),
    ]);
    mistakes
}

#[tokio::test]
async fn wrong_keys_are_refused_and_nothing_changes() {
    let server = TestServer::start().await;
    let (client, identity) = (server.client(), Identity::generate());
    let alice = server.account().await;
    for (what, place, value) in key_mistakes(&identity) {
        let mut wrong = body(&identity, "mallory");
        *wrong.pointer_mut(place).unwrap() = value;
        let response = register(&client, &wrong).await;
        assert_eq!(response.status, 400, "register: {what} in {place}");

        wrong["username"] = json!(alice.username);
        let response = reset(&client, &wrong).await;
        assert_eq!(response.status, 400, "reset: {what} in {place}");
    }
    alice.request("GET", "/v1/devices").send().await.expect(200);
    register(&client, &body(&identity, "mallory")).await.expect(201);
}

#[tokio::test]
async fn all_that_the_contract_allows_in_keys_is_accepted() {
    let server = TestServer::start().await;
    let (client, identity) = (server.client(), Identity::generate());
    let key = ec_public_key(78);
    let signed = |signature: [u8; 64]| json!({"keyId": i32::MIN, "publicKey": STANDARD.encode(key), "signature": STANDARD.encode(signature)});
    let mut flipped = identity.sign(&key);
    flipped[63] ^= 0x80;
    let many: Vec<_> = (1..=100).map(one_time_key).collect();
    let many_pq: Vec<_> = (1..=100).map(|id| kyber_key(&identity, id)).collect();
    let no_point = STANDARD.encode([5; 33]);
    for (place, value) in [
        ("/signedPreKey", signed(identity.sign(&key))),
        ("/signedPreKey", signed(identity.sign(&key[1..]))),
        ("/signedPreKey", signed(flipped)),
        ("/registrationId", json!(i32::MIN)),
        ("/registrationId", json!(i32::MAX)),
        ("/oneTimePreKeys", json!([])),
        ("/oneTimePreKeys", json!([{"keyId": -1, "publicKey": no_point}, {"keyId": 0, "publicKey": no_point}])),
        ("/oneTimePreKeys", json!(many)),
        ("/pqPreKeys", json!(many_pq)),
        ("/pqPreKeys", json!(null)),
        ("/pqPreKeys/0/unknown", json!("ignored")),
        ("/unknown", json!([1, 2])),
    ] {
        let mut body = body(&identity, &unique_name("lenient"));
        match body.pointer_mut(place) {
            Some(found) => *found = value,
            None if place == "/unknown" => body["unknown"] = value,
            None => body["pqPreKeys"][0]["unknown"] = value,
        }
        let response = register(&client, &body).await;
        assert_eq!(response.status, 201, "{place}: {:?}", response.body);
    }
}

#[tokio::test]
async fn of_several_mistakes_the_first_in_the_order_of_the_contract_is_named() {
    let server = TestServer::start().await;
    let (client, alice) = (server.client(), server.account().await);
    let mut body = body(&alice.identity, "a!");
    body["password"] = json!("short");
    body["name"] = json!("x".repeat(101));
    body["identityKey"] = json!("?");
    for (expected, member, right) in [
        ("Username", "username", json!(alice.username)),
        ("at least 12 characters", "password", json!(PASSWORD)),
        ("name", "name", json!(null)),
        ("identityKey", "identityKey", json!(alice.identity.public_key_base64())),
    ] {
        let error = register(&client, &body).await.expect(400).error();
        assert!(error.contains(expected), "{error}, not {expected}");
        body[member] = right;
    }
    register(&client, &body).await.expect(409);
}

#[tokio::test]
async fn registration_and_reset_read_json_strictly() {
    let server = TestServer::start().await;
    let (client, alice) = (server.client(), server.account().await);
    let good = body(&alice.identity, &alice.username);
    for path in ["/v1/users", "/v1/users/reset"] {
        assert_strict(|| client.post(path), &good, &REQUIRED).await;
        for place in ["signedPreKey", "oneTimePreKeys", "pqPreKeys"] {
            for (member, wrong) in [("keyId", json!("1")), ("keyId", json!(1.5)), ("publicKey", json!(null))] {
                let mut body = good.clone();
                let key = if body[place].is_array() { &mut body[place][0] } else { &mut body[place] };
                key[member] = wrong;
                client.post(path).json(&body).send().await.expect(422);
            }
        }
    }
    alice.request("GET", "/v1/devices").send().await.expect(200);
}

#[tokio::test]
async fn of_many_registrations_of_one_name_at_once_one_succeeds() {
    let server = TestServer::start().await;
    let (client, identity) = (server.client(), Identity::generate());
    let body = body(&identity, "wanted");
    let answers = join_all((0..8).map(|_| register(&client, &body))).await;
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses.iter().filter(|status| **status == 201).count(), 1, "{statuses:?}");
    assert_eq!(statuses.iter().filter(|status| **status == 409).count(), 7, "{statuses:?}");
}

#[tokio::test]
async fn a_registration_that_is_refused_costs_no_hash() {
    let server = TestServer::start().await;
    let (client, alice) = (server.client(), server.account().await);
    let before = server.server().app().passwords.hashes_done();
    register(&client, &body(&alice.identity, &alice.username)).await.expect(409);
    register(&client, &body(&alice.identity, "a!")).await.expect(400);
    assert_eq!(server.server().app().passwords.hashes_done(), before);
}

#[tokio::test]
async fn a_reset_starts_the_account_over() {
    let server = TestServer::start().await;
    let (client, alice, bob) = (server.client(), server.account().await, server.account().await);
    let linked = alice.link().await;
    let waiting = json!({"username": alice.username, "password": PASSWORD});
    let link = client.post("/v1/link-sessions").json(&waiting).send().await.expect(201).json();
    let (ticket, mut sockets) = (alice.ticket().await, [alice.connect().await, linked.connect().await]);
    bob.send(&[(&alice, b"lost"), (&linked, b"lost")]).await;
    alice.send(&[(&bob, b"sent before")]).await;

    let identity = Arc::new(Identity::generate());
    let response = reset(&client, &body(&identity, &alice.username.to_uppercase())).await.expect(200);
    let new = Device::from_answer(&client, identity, alice.username.clone(), &response.json());
    assert_eq!(new.user, alice.user);
    assert!(![alice.id, linked.id].contains(&new.id));
    let devices = new.request("GET", "/v1/devices").send().await.expect(200).json();
    assert_eq!(devices, json!({"devices": [{"deviceId": new.id.to_string(), "name": "phone", "isPrimary": true}]}));
    let bundles = bob.bundles(alice.user).await;
    assert_eq!(bundles.len(), 1);
    assert_eq!(bundles[0]["identityKey"], new.identity.public_key_base64());

    for (old, socket) in [&alice, &linked].into_iter().zip(&mut sockets) {
        assert_eq!(socket.until_end().await, [Event::Close(None), Event::End]);
        old.request("GET", "/v1/devices").send().await.expect(401);
        let refresh = json!({"refreshToken": old.refresh_token});
        client.post("/v1/session/refresh").json(&refresh).send().await.expect(401);
        let log_in = json!({"username": old.username, "password": PASSWORD, "deviceId": old.id.to_string()});
        client.post("/v1/session").json(&log_in).send().await.expect(409);
    }
    assert_eq!(Socket::open(server.address(), &ticket).await.err(), Some(401));
    client.get(&format!("/v1/link-sessions/{}", link["id"].as_str().unwrap())).send().await.expect(404);
    assert_eq!(bob.connect().await.expect_message("sent before").await.sender_device_id, alice.id_bytes());
    bob.send_to(&new, "hello again").await;
    let mut socket = new.connect().await;
    assert_eq!(socket.pre_keys().await.one_time_pre_key_count, 1, "those of the reset");
    socket.expect_message("hello again").await;
}

#[tokio::test]
async fn a_reset_needs_the_password_and_a_failed_one_changes_nothing() {
    let server = TestServer::start().await;
    let (client, alice) = (server.client(), server.account().await);
    let mut socket = alice.connect().await;
    let good = body(&Identity::generate(), &alice.username);
    for (username, password, status) in [
        (alice.username.as_str(), "wrong horse battery staple", 401),
        (&alice.username, "", 401),
        (&alice.username, &"x".repeat(1025), 401),
        ("nobody", PASSWORD, 401),
        ("", PASSWORD, 401),
        (&format!(" {}", alice.username), PASSWORD, 401),
        (&format!("{}\0", alice.username), PASSWORD, 400),
    ] {
        let mut body = good.clone();
        body["username"] = json!(username);
        body["password"] = json!(password);
        reset(&client, &body).await.expect(status);
        body["signedPreKey"]["signature"] = json!("?");
        reset(&client, &body).await.expect(400);
    }
    assert_eq!(socket.until_pong().await, []);
    assert_eq!(alice.bundles(alice.user).await[0]["identityKey"], alice.identity.public_key_base64());
}
