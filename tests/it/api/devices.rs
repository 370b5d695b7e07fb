//! Listing, linking and removing devices.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::signer::Identity;
use crate::harness::{
    Device, Event, Keys, PASSWORD, Response, Socket, TestServer, eventually, kyber_key, one_time_key, signed_key,
    within,
};

async fn list(device: &Device) -> Value {
    device.request("GET", "/v1/devices").send().await.expect(200).json()["devices"].clone()
}

async fn delete(device: &Device, target: Uuid) -> Response {
    device.request("DELETE", &format!("/v1/devices/{target}")).send().await
}

/// A request to link a device, in order in every respect.
fn link_request(session: &str, identity: &Identity) -> Value {
    let mut body = Keys { one_time: 2, pq_one_time: Some(1) }.to_json(identity);
    body["linkSessionId"] = json!(session);
    body
}

async fn link(device: &Device, body: &Value) -> Response {
    device.client.post("/v1/devices").json(body).send().await
}

mod listing {
    use super::*;

    #[tokio::test]
    async fn devices_come_oldest_first_with_exactly_these_members() {
        let server = TestServer::start().await;
        let alice = server.account().await;
        let second = alice.link().await;
        let mut body = link_request(&alice.approved_link_session().await, &alice.identity);
        body["name"] = json!("Läptop \"1\"");
        let third = link(&alice, &body).await.expect(201).json();
        let answer = second.request("GET", "/v1/devices").send().await.expect(200);
        let expected = format!(
            r#"{{"devices":[{{"deviceId":"{}","name":null,"isPrimary":true}},{{"deviceId":"{}","name":null,"isPrimary":false}},{{"deviceId":{},"name":"Läptop \"1\"","isPrimary":false}}]}}"#,
            alice.id, second.id, third["deviceId"]
        );
        assert_eq!(answer.body, expected);
        assert_eq!(list(&alice).await, list(&second).await);
    }

    #[tokio::test]
    async fn an_account_sees_only_its_own_devices() {
        let server = TestServer::start().await;
        let (alice, bob) = (server.account().await, server.account().await);
        bob.link().await;
        assert_eq!(list(&alice).await.as_array().unwrap().len(), 1);
        server.client().get("/v1/devices").send().await.expect(401);
    }
}

mod linking {
    use super::*;

    #[tokio::test]
    async fn a_linked_device_is_logged_in_and_not_primary() {
        let server = TestServer::start().await;
        let alice = server.account().await;
        let body = link_request(&alice.approved_link_session().await, &alice.identity);
        let answer = link(&alice, &body).await.expect(201).json();
        assert_eq!(answer.as_object().unwrap().len(), 5);
        assert_eq!(answer["userId"], alice.user.to_string());
        assert_eq!(answer["refreshToken"].as_str().unwrap().len(), 43);
        let ahead = answer["expiresAt"].as_i64().unwrap() - server.clock.now().seconds();
        assert!((890..=900).contains(&ahead), "{ahead}");

        let second = Device::from_answer(&alice.client, alice.identity.clone(), alice.username.clone(), &answer);
        assert_eq!(
            list(&second).await[1],
            json!({"deviceId": second.id.to_string(), "name": null, "isPrimary": false})
        );
        let refresh = json!({"refreshToken": second.refresh_token});
        alice.client.post("/v1/session/refresh").json(&refresh).send().await.expect(200);
        alice.request("GET", "/v1/devices").send().await.expect(200);
        second.request("PUT", "/v1/link-sessions/x").send().await.expect(403);
    }

    #[tokio::test]
    async fn a_used_link_session_is_gone() {
        let server = TestServer::start().await;
        let alice = server.account().await;
        let session = alice.approved_link_session().await;
        alice.finish_link(&session, Keys::default()).await;
        alice.client.get(&format!("/v1/link-sessions/{session}")).send().await.expect(404);
        let again = link(&alice, &link_request(&session, &alice.identity)).await.expect(403);
        assert_eq!(again.error(), "Invalid link session");
        assert_eq!(list(&alice).await.as_array().unwrap().len(), 2);
    }

    #[tokio::test]
    async fn a_link_session_makes_one_device_however_many_try_at_once() {
        let server = TestServer::start().await;
        let alice = server.account().await;
        let session = alice.approved_link_session().await;
        let bodies: Vec<Value> = (0..10).map(|_| link_request(&session, &alice.identity)).collect();
        let answers = join_all(bodies.iter().map(|body| link(&alice, body))).await;
        let mut statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
        statuses.sort_unstable();
        assert_eq!(statuses, [201, 403, 403, 403, 403, 403, 403, 403, 403, 403]);
        assert_eq!(list(&alice).await.as_array().unwrap().len(), 2);
    }

    #[tokio::test]
    async fn invalid_link_sessions_are_all_refused_alike() {
        let server = TestServer::start().await;
        let alice = server.account().await;
        let credentials = json!({"username": alice.username, "password": PASSWORD});
        let opened = alice.client.post("/v1/link-sessions").json(&credentials).send().await.expect(201).json();
        let unapproved = opened["id"].as_str().unwrap();
        for session in [unapproved, "", "unknown", "a\0b", &"A".repeat(43)] {
            let answer = link(&alice, &link_request(session, &alice.identity)).await.expect(403);
            assert_eq!(answer.error(), "Invalid link session");
        }
        let approved = alice.approved_link_session().await;
        server.clock.advance(Duration::from_secs(600));
        let answer = link(&alice, &link_request(&approved, &alice.identity)).await.expect(403);
        assert_eq!(answer.error(), "Invalid link session");
    }

    #[tokio::test]
    async fn the_device_limit_names_its_number_and_leaves_the_session_usable() {
        let server = TestServer::start_with(|config| config.auth.max_devices_per_user = 3).await;
        let alice = server.account().await;
        let second = alice.link().await;
        alice.link().await;
        let session = alice.approved_link_session().await;
        let answer = link(&alice, &link_request(&session, &Identity::generate())).await.expect(403);
        assert_eq!(answer.error(), "Device limit reached. Maximum allowed is 3.");
        assert_eq!(list(&alice).await.as_array().unwrap().len(), 3);
        alice.remove(&second).await;
        link(&alice, &link_request(&session, &alice.identity)).await.expect(201);
    }

    #[tokio::test]
    async fn ten_devices_are_the_default_limit_even_when_more_join_at_once() {
        let server = TestServer::start().await;
        let alice = server.account().await;
        let mut sessions = Vec::new();
        for _ in 0..12 {
            sessions.push(alice.approved_link_session().await);
        }
        let bodies: Vec<Value> = sessions.iter().map(|session| link_request(session, &alice.identity)).collect();
        let answers = join_all(bodies.iter().map(|body| link(&alice, body))).await;
        let (linked, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == 201);
        assert_eq!((linked.len(), refused.len()), (9, 3));
        for answer in refused {
            assert_eq!(answer.error(), "Device limit reached. Maximum allowed is 10.");
        }
        assert_eq!(list(&alice).await.as_array().unwrap().len(), 10);
    }

    #[tokio::test]
    async fn another_identity_is_refused_and_leaves_the_session_usable() {
        let server = TestServer::start().await;
        let alice = server.account().await;
        let session = alice.approved_link_session().await;
        let answer = link(&alice, &link_request(&session, &Identity::generate())).await.expect(403);
        assert_eq!(answer.error(), "Identity key does not match the account identity");
        link(&alice, &link_request(&session, &alice.identity)).await.expect(201);
    }

    #[tokio::test]
    async fn bad_keys_come_before_the_link_session_and_leave_it_usable() {
        let server = TestServer::start().await;
        let alice = server.account().await;
        let session = alice.approved_link_session().await;
        let stranger = Identity::generate();
        let many: Vec<Value> = (1..=101).map(one_time_key).collect();
        let many_pq: Vec<Value> = (1..=101).map(|id| kyber_key(&alice.identity, id)).collect();
        for (member, value) in [
            ("name", json!("x".repeat(101))),
            ("name", json!("nul\0")),
            ("identityKey", json!("no base64")),
            ("identityKey", json!(stranger.public_key_base64())),
            ("signedPreKey", signed_key(&stranger, 1)),
            ("signedPreKey", json!({"keyId": 1, "publicKey": "BQ==", "signature": "AA=="})),
            ("oneTimePreKeys", json!([one_time_key(1), one_time_key(1)])),
            ("oneTimePreKeys", json!([{"keyId": 1, "publicKey": "AAAA"}])),
            ("oneTimePreKeys", json!(many)),
            ("pqLastResortPreKey", kyber_key(&stranger, 9)),
            ("pqLastResortPreKey", kyber_key(&alice.identity, 1)),
            ("pqLastResortPreKey", Value::Null),
            ("pqPreKeys", json!([kyber_key(&alice.identity, 3), kyber_key(&alice.identity, 3)])),
            ("pqPreKeys", json!([kyber_key(&stranger, 3)])),
            ("pqPreKeys", json!(many_pq)),
        ] {
            for session in [session.as_str(), "unknown"] {
                let mut body = link_request(session, &alice.identity);
                body[member] = value.clone();
                let answer = link(&alice, &body).await;
                assert_eq!(answer.status, 400, "{member}: {:?}", answer.body);
            }
        }
        for (member, value) in [
            ("linkSessionId", Value::Null),
            ("linkSessionId", json!(1)),
            ("registrationId", json!(1_i64 << 31)),
            ("signedPreKey", Value::Null),
            ("oneTimePreKeys", Value::Null),
            ("identityKey", Value::Null),
        ] {
            let mut body = link_request(&session, &alice.identity);
            body[member] = value;
            assert_eq!(link(&alice, &body).await.status, 422, "{member}");
            body.as_object_mut().unwrap().remove(member);
            assert_eq!(link(&alice, &body).await.status, 422, "{member} is missing");
        }
        assert_eq!(list(&alice).await.as_array().unwrap().len(), 1);
        link(&alice, &link_request(&session, &alice.identity)).await.expect(201);
    }

    #[tokio::test]
    async fn a_reset_account_is_joined_only_with_its_new_identity() {
        let server = TestServer::start().await;
        let old = server.account().await;
        let session = old.approved_link_session().await;
        let new = old.reset().await;
        let answer = link(&new, &link_request(&session, &new.identity)).await.expect(403);
        assert_eq!(answer.error(), "Invalid link session");
        let session = new.approved_link_session().await;
        let answer = link(&new, &link_request(&session, &old.identity)).await.expect(403);
        assert_eq!(answer.error(), "Identity key does not match the account identity");
        link(&new, &link_request(&session, &new.identity)).await.expect(201);
    }
}

mod removing {
    use super::*;

    #[tokio::test]
    async fn a_removed_device_is_gone_at_once() {
        let server = TestServer::start().await;
        let alice = server.account().await;
        let second = alice.link().await;
        delete(&alice, second.id).await.expect(204);
        assert_eq!(list(&alice).await.as_array().unwrap().len(), 1);
        second.request("GET", "/v1/devices").send().await.expect(401);
        let refresh = json!({"refreshToken": second.refresh_token});
        second.client.post("/v1/session/refresh").json(&refresh).send().await.expect(401);
        let log_in = json!({"username": alice.username, "password": PASSWORD, "deviceId": second.id.to_string()});
        second.client.post("/v1/session").json(&log_in).send().await.expect(409);
        assert_eq!(alice.bundles(alice.user).await.len(), 1);
        let bundle = format!("/v1/keys/{}/devices/{}", alice.user, second.id);
        alice.request("GET", &bundle).send().await.expect(404);
        delete(&alice, second.id).await.expect(404);
    }

    #[tokio::test]
    async fn its_tickets_are_void_and_its_sockets_closed() {
        let server = TestServer::start().await;
        let alice = server.account().await;
        let second = alice.link_with(Keys { one_time: 30, pq_one_time: None }).await;
        let ticket = second.ticket().await;
        let mut socket = second.connect().await;
        alice.remove(&second).await;
        assert_eq!(Socket::open(server.address(), &ticket).await.err(), Some(401));
        let event = within("the socket to be closed", socket.next()).await;
        assert!(matches!(event, Event::Close(None)), "an empty close frame: {event:?}");
    }

    #[tokio::test]
    async fn mail_for_it_is_gone_and_mail_from_it_stays() {
        let server = TestServer::start().await;
        let (alice, bob) = (server.account().await, server.account().await);
        let second = alice.link().await;
        bob.send(&[(&alice, b"a"), (&second, b"b")]).await;
        second.send_to(&bob, "from the second").await;
        alice.remove(&second).await;
        let database = server.database().await;
        assert_eq!(database.number("SELECT count(*) FROM messages").await, 2);
        assert_eq!((database.queued(&alice).await, database.queued(&bob).await), (1, 1));
        let from_it = format!("SELECT count(*) FROM messages WHERE sender_device = {}", database.literal(second.id));
        assert_eq!(database.number(&from_it).await, 1);
    }

    #[tokio::test]
    async fn more_mail_than_fits_into_a_transaction_is_deleted_as_well() {
        let server = TestServer::start_with(|config| config.messaging.inbox_max_bytes = 1 << 30).await;
        let (alice, bob) = (server.account().await, server.account().await);
        let second = alice.link().await;
        let large = vec![1; 1_000_000];
        for _ in 0..40 {
            bob.send(&[(&alice, b"small"), (&second, &large)]).await;
        }
        alice.remove(&second).await;
        let database = server.database().await;
        eventually("the mail to be gone", async || database.number("SELECT count(*) FROM messages").await == 40).await;
        assert_eq!(database.queued(&alice).await, 40);
    }

    #[tokio::test]
    async fn a_linked_device_removes_itself_and_no_other_device() {
        let server = TestServer::start().await;
        let (alice, bob) = (server.account().await, server.account().await);
        let (second, third) = (alice.link().await, alice.link().await);
        for target in [alice.id, third.id, bob.id, Uuid::new_v4()] {
            let answer = delete(&second, target).await.expect(403);
            assert_eq!(answer.error(), "Only the primary device can delete other devices");
        }
        delete(&second, second.id).await.expect(204);
        delete(&second, second.id).await.expect(401);
        assert_eq!(list(&alice).await.as_array().unwrap().len(), 2);
    }

    #[tokio::test]
    async fn the_primary_device_stays_and_strangers_are_not_found() {
        let server = TestServer::start().await;
        let (alice, bob) = (server.account().await, server.account().await);
        let of_bob = bob.link().await;
        let answer = delete(&alice, alice.id).await.expect(403);
        assert_eq!(answer.error(), "The primary device cannot be deleted; reset the account instead");
        for target in [bob.id, of_bob.id, Uuid::new_v4()] {
            delete(&alice, target).await.expect(404);
        }
        assert_eq!(list(&bob).await.as_array().unwrap().len(), 2);
    }

    #[tokio::test]
    async fn a_malformed_id_is_400_but_only_with_a_token() {
        let server = TestServer::start().await;
        let alice = server.account().await;
        alice.request("DELETE", "/v1/devices/no-uuid").send().await.expect(400);
        server.client().delete("/v1/devices/no-uuid").send().await.expect(401);
        let second = alice.link().await;
        second.request("DELETE", "/v1/devices/no-uuid").send().await.expect(400);
        let spelled = format!("/v1/devices/{}", second.id.simple().to_string().to_uppercase());
        alice.request("DELETE", &spelled).send().await.expect(204);
    }

    #[tokio::test]
    async fn a_device_removed_twice_at_once_is_removed_once() {
        let server = TestServer::start().await;
        let alice = server.account().await;
        let second = alice.link().await;
        let answers = join_all((0..6).map(|_| delete(&alice, second.id))).await;
        let mut statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
        statuses.sort_unstable();
        assert_eq!(statuses, [204, 404, 404, 404, 404, 404]);
    }

    #[tokio::test]
    async fn a_freed_place_can_be_taken() {
        let server = TestServer::start_with(|config| config.auth.max_devices_per_user = 2).await;
        let alice = server.account().await;
        let second = alice.link().await;
        delete(&second, second.id).await.expect(204);
        let third = alice.link().await;
        assert_ne!(second.id, third.id);
        assert!(Arc::ptr_eq(&alice.identity, &third.identity));
    }
}
