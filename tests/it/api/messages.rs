//! What a send is checked for, and what is queued.

use bytes::Bytes;
use prost::Message as _;
use uuid::Uuid;

use crate::harness::proto::{DeviceMismatch, Recipient, SendMessageRequest, Submission};
use crate::harness::{Device, TestServer, outcome, send_request, within};

const MAX_BODY: usize = 2 * 1024 * 1024;

fn submission(device: impl AsRef<[u8]>, message: &[u8]) -> Submission {
    Submission { device_id: Bytes::copy_from_slice(device.as_ref()), message: Bytes::copy_from_slice(message) }
}

fn recipient(user: impl AsRef<[u8]>, submissions: Vec<Submission>) -> Recipient {
    Recipient { user_id: Bytes::copy_from_slice(user.as_ref()), submissions }
}

fn request(recipients: Vec<Recipient>) -> SendMessageRequest {
    SendMessageRequest { recipients }
}

fn random_id() -> Bytes {
    Bytes::copy_from_slice(Uuid::new_v4().as_bytes())
}

fn sorted_ids(devices: &[&Device]) -> Vec<Bytes> {
    let mut ids: Vec<Bytes> = devices.iter().map(|device| device.id_bytes()).collect();
    ids.sort();
    ids
}

// ---- 7.1: the order of the checks ----

#[tokio::test]
async fn a_send_without_a_good_token_is_refused_before_anything_else_is_looked_at() {
    let server = TestServer::start().await;
    let client = server.client();
    client.post("/v1/messages").body(vec![0; MAX_BODY + 1]).send().await.expect(401);
    client.post("/v1/messages").token("forged").body("not protobuf").send().await.expect(401);
}

#[tokio::test]
async fn a_body_of_exactly_two_mebibytes_is_taken_and_one_byte_more_is_not() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let overhead = send_request(&[(&bob, &vec![7; MAX_BODY - 100])]).encoded_len() - (MAX_BODY - 100);
    let body = send_request(&[(&bob, &vec![7; MAX_BODY - overhead])]).encode_to_vec();
    assert_eq!(body.len(), MAX_BODY);
    alice.messages_request(Uuid::new_v4(), body).send().await.expect(200);

    let body = send_request(&[(&bob, &vec![7; MAX_BODY - overhead + 1])]).encode_to_vec();
    alice.messages_request(Uuid::new_v4(), body).send().await.expect(413);
    let envelope = bob.connect().await.messages(1).await.remove(0);
    assert_eq!(envelope.message.len(), MAX_BODY - overhead);
}

#[tokio::test]
async fn an_oversized_body_is_refused_before_the_idempotency_key_is_looked_at() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    alice.request("POST", "/v1/messages").body(vec![0; MAX_BODY + 1]).send().await.expect(413);
    let chunked = futures_util::stream::iter((0..3).map(|_| Ok::<_, std::io::Error>(vec![0_u8; 1024 * 1024])));
    let body = reqwest::Body::wrap_stream(chunked);
    alice.request("POST", "/v1/messages").body(body).send().await.expect(413);
}

#[tokio::test]
async fn the_idempotency_key_has_to_be_a_uuid() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    alice.request("POST", "/v1/messages").body("not protobuf").send().await.expect(400);
    for wrong in ["", "1", "not-a-uuid", "67e55044-10b1-426f-9247-bb680e5fe0c", "67e55044-10b1-426f-9247-bb680e5fe0c8 "]
    {
        let request = alice.request("POST", "/v1/messages").header("idempotency-key", wrong);
        let status = request.send().await.status;
        // The last one differs by white space around the value only, which HTTP takes away.
        assert_eq!(status, if wrong.ends_with(' ') { 200 } else { 400 }, "{wrong:?}");
    }
}

#[tokio::test]
async fn all_spellings_of_an_idempotency_key_are_one_key() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let spellings = [
        "67e55044-10b1-426f-9247-bb680e5fe0c8",
        "67E55044-10B1-426F-9247-BB680E5FE0C8",
        "67e5504410b1426f9247bb680e5fe0c8",
        "{67e55044-10b1-426f-9247-bb680e5fe0c8}",
        "urn:uuid:67e55044-10b1-426f-9247-bb680e5fe0c8",
    ];
    for (index, spelling) in spellings.into_iter().enumerate() {
        let request = alice.request("POST", "/v1/messages").header("idempotency-key", spelling);
        let answer = request.send().await.expect(200);
        assert_eq!(answer.headers.contains_key("idempotency-replayed"), index > 0, "{spelling}");
    }
}

#[tokio::test]
async fn a_body_that_is_no_send_request_is_refused() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    for body in [
        &b"\xff"[..],
        b"\x0a\x05ab",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"{\"recipients\":[]}",
        b"\x08\x01",
    ] {
        alice.messages_request(Uuid::new_v4(), body).send().await.expect(400);
    }
}

#[tokio::test]
async fn unknown_fields_are_ignored_and_an_empty_body_is_an_empty_request() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let answer = alice.messages_request(Uuid::new_v4(), Bytes::new()).send().await.expect(200);
    assert!(answer.body.is_empty());
    assert_eq!(answer.header("content-type"), Some("application/x-protobuf"));

    let mut body = send_request(&[(&bob, b"hello")]).encode_to_vec();
    body.extend(b"\x9a\x06\x03new"); // field 99
    let answer = alice.messages_request(Uuid::new_v4(), body).header("content-type", "text/plain").send().await;
    assert!(answer.expect(200).body.is_empty());
    bob.connect().await.expect_message("hello").await;
}

#[tokio::test]
async fn a_hundred_recipients_and_a_hundred_submissions_are_the_most() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let recipients = |count: usize| request((0..count).map(|_| recipient(random_id(), Vec::new())).collect());
    let submissions = |count: usize| {
        let all = (0..count).map(|_| submission(random_id(), b"x")).collect();
        request(vec![recipient(bob.user_bytes(), all)])
    };
    alice.post_messages(Uuid::new_v4(), &recipients(100)).await.expect(200);
    alice.post_messages(Uuid::new_v4(), &recipients(101)).await.expect(413);
    let answer = alice.post_messages(Uuid::new_v4(), &submissions(100)).await.expect(200);
    assert_eq!(outcome(&answer).invalid_device_ids.len(), 100);
    alice.post_messages(Uuid::new_v4(), &submissions(101)).await.expect(413);
    // Numbers come before structure: these ids are wrong as well.
    let malformed = request((0..101).map(|_| recipient(b"short", Vec::new())).collect());
    alice.post_messages(Uuid::new_v4(), &malformed).await.expect(413);
}

#[tokio::test]
async fn a_malformed_request_is_refused_as_a_whole() {
    let server = TestServer::start().await;
    let (alice, bob, carol) = (server.account().await, server.account().await, server.account().await);
    let good = recipient(bob.user_bytes(), vec![submission(bob.id_bytes(), b"never to be seen")]);
    let carols = |submissions| recipient(carol.user_bytes(), submissions);
    let wrong = [
        recipient(b"", Vec::new()),
        recipient(&carol.user.as_bytes()[..15], Vec::new()),
        recipient([carol.user.as_bytes().as_slice(), b"1"].concat(), Vec::new()),
        recipient(bob.user_bytes(), Vec::new()),
        carols(vec![submission(b"", b"x")]),
        carols(vec![submission(&carol.id.as_bytes()[..15], b"x")]),
        carols(vec![submission(alice.id_bytes(), b"x")]),
        carols(vec![submission(carol.id_bytes(), b"x"), submission(carol.id_bytes(), b"y")]),
        carols(vec![submission(bob.id_bytes(), b"x")]),
        carols(vec![submission(carol.id_bytes(), b"")]),
    ];
    for (index, wrong) in wrong.into_iter().enumerate() {
        for recipients in [vec![good.clone(), wrong.clone()], vec![wrong.clone(), good.clone()]] {
            let answer = alice.post_messages(Uuid::new_v4(), &request(recipients)).await;
            assert_eq!(answer.status, 400, "case {index}");
        }
    }
    assert_eq!(server.database().await.number("SELECT count(*) FROM messages").await, 0);
    assert_eq!(server.database().await.number("SELECT count(*) FROM sends").await, 0);
}

// ---- 7.2: complete delivery ----

#[tokio::test]
async fn a_complete_send_reaches_every_device_with_its_own_message() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let bob = server.account().await;
    let tablet = bob.link().await;
    alice.send(&[(&tablet, b"for the tablet"), (&bob, b"for the phone")]).await;
    bob.connect().await.expect_message("for the phone").await;
    tablet.connect().await.expect_message("for the tablet").await;
}

#[tokio::test]
async fn missing_devices_are_named_in_ascending_order_and_nothing_is_queued() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let bob = server.account().await;
    let (one, two, three, four) = (bob.link().await, bob.link().await, bob.link().await, bob.link().await);
    let answer = alice.post_messages(Uuid::new_v4(), &send_request(&[(&two, b"x")])).await.expect(200);
    let outcome = outcome(&answer);
    assert!(outcome.invalid_device_ids.is_empty());
    let missing_device_ids = sorted_ids(&[&bob, &one, &three, &four]);
    assert_eq!(outcome.device_mismatches, [DeviceMismatch { user_id: bob.user_bytes(), missing_device_ids }]);
    assert_eq!(server.database().await.number("SELECT count(*) FROM messages").await, 0);
}

#[tokio::test]
async fn targets_that_are_no_devices_of_their_user_come_back_in_request_order() {
    let server = TestServer::start().await;
    let (alice, bob, carol) = (server.account().await, server.account().await, server.account().await);
    let old = bob.link().await;
    bob.remove(&old).await;
    let unknown = random_id();
    let targets =
        [old.id_bytes(), bob.id_bytes(), unknown.clone(), carol.id_bytes()].map(|id| submission(id, b"hello bob"));
    let answer =
        alice.post_messages(Uuid::new_v4(), &request(vec![recipient(bob.user_bytes(), targets.to_vec())])).await;
    let outcome = outcome(&answer.expect(200));
    assert_eq!(outcome.invalid_device_ids, [old.id_bytes(), unknown, carol.id_bytes()]);
    assert!(outcome.device_mismatches.is_empty());
    bob.connect().await.expect_message("hello bob").await;
    assert_eq!(server.database().await.queued(&carol).await, 0);
}

#[tokio::test]
async fn a_stale_target_beside_a_missing_device_is_told_in_both_lists() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let bob = server.account().await;
    let old = bob.link().await;
    bob.remove(&old).await;
    let new = bob.link().await;
    let answer = alice.post_messages(Uuid::new_v4(), &send_request(&[(&old, b"x"), (&bob, b"y")])).await;
    let outcome = outcome(&answer.expect(200));
    assert_eq!(outcome.invalid_device_ids, [old.id_bytes()]);
    let mismatch = DeviceMismatch { user_id: bob.user_bytes(), missing_device_ids: vec![new.id_bytes()] };
    assert_eq!(outcome.device_mismatches, [mismatch]);
    assert_eq!(server.database().await.number("SELECT count(*) FROM messages").await, 0);
}

#[tokio::test]
async fn a_recipient_without_submissions_asks_for_the_devices() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let bob = server.account().await;
    let tablet = bob.link().await;
    let probe = request(vec![recipient(bob.user_bytes(), Vec::new()), recipient(random_id(), Vec::new())]);
    let outcome = outcome(&alice.post_messages(Uuid::new_v4(), &probe).await.expect(200));
    assert!(outcome.invalid_device_ids.is_empty());
    let mismatch = DeviceMismatch { user_id: bob.user_bytes(), missing_device_ids: sorted_ids(&[&bob, &tablet]) };
    assert_eq!(outcome.device_mismatches, [mismatch]);
}

#[tokio::test]
async fn an_unknown_user_has_no_devices_and_is_no_error() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let probe = request(vec![recipient(random_id(), Vec::new())]);
    assert!(alice.post_messages(Uuid::new_v4(), &probe).await.expect(200).body.is_empty());

    let target = random_id();
    let send = request(vec![recipient(random_id(), vec![submission(target.clone(), b"x")])]);
    let outcome = outcome(&alice.post_messages(Uuid::new_v4(), &send).await.expect(200));
    assert_eq!(outcome.invalid_device_ids, [target]);
    assert!(outcome.device_mismatches.is_empty());
}

#[tokio::test]
async fn a_sender_may_write_to_its_own_other_devices() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let probe = request(vec![recipient(alice.user_bytes(), Vec::new())]);
    let answer = alice.post_messages(Uuid::new_v4(), &probe).await.expect(200);
    assert!(answer.body.is_empty(), "without other devices there is nothing to reach");

    let tablet = alice.link().await;
    let outcome = outcome(&alice.post_messages(Uuid::new_v4(), &probe).await.expect(200));
    let mismatch = DeviceMismatch { user_id: alice.user_bytes(), missing_device_ids: vec![tablet.id_bytes()] };
    assert_eq!(outcome.device_mismatches, [mismatch]);
    alice.send_to(&tablet, "sync").await;
    tablet.connect().await.expect_message("sync").await;
    assert_eq!(server.database().await.queued(&alice).await, 0);
}

#[tokio::test]
async fn one_users_mismatch_leaves_the_others_alone() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let (bob, carol, dave) = (server.account().await, server.account().await, server.account().await);
    let (bobs, daves) = (bob.link().await, dave.link().await);
    let send = send_request(&[(&dave, b"d"), (&carol, b"c"), (&bob, b"b")]);
    let outcome = outcome(&alice.post_messages(Uuid::new_v4(), &send).await.expect(200));
    let mismatch = |user: &Device, device: &Device| DeviceMismatch {
        user_id: user.user_bytes(),
        missing_device_ids: vec![device.id_bytes()],
    };
    assert_eq!(outcome.device_mismatches, [mismatch(&dave, &daves), mismatch(&bob, &bobs)], "in request order");
    carol.connect().await.expect_message("c").await;
    assert_eq!(server.database().await.number("SELECT count(*) FROM messages").await, 1);
}

// ---- 7.2: one atomic step against device changes ----

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_joins_is_part_of_the_check_or_came_after_the_message() {
    let server = TestServer::start().await;
    let bob = server.account().await;
    let session = bob.approved_link_session().await;
    let mut senders = Vec::new();
    for _ in 0..4 {
        let (alice, bob) = (server.account().await, bob.clone());
        senders.push(tokio::spawn(async move {
            let mut queued = 0;
            let mut missing = Vec::new();
            while missing.len() < 5 {
                let answer = alice.post_messages(Uuid::new_v4(), &send_request(&[(&bob, b"x")])).await.expect(200);
                match outcome(&answer).device_mismatches.as_slice() {
                    [] if missing.is_empty() => queued += 1,
                    [] => panic!("a device that had joined was overlooked"),
                    [mismatch] => missing.push(mismatch.missing_device_ids.clone()),
                    more => panic!("{more:?}"),
                }
            }
            (queued, missing)
        }));
    }
    let tablet = bob.finish_link(&session, crate::harness::Keys::default()).await;
    let last = server.account().await;
    let answer = last.post_messages(Uuid::new_v4(), &send_request(&[(&bob, b"x")])).await.expect(200);
    assert_eq!(outcome(&answer).device_mismatches.len(), 1, "the device had been answered for");
    let mut total = 0;
    for sender in senders {
        let (queued, missing) = within("a sender", sender).await.unwrap();
        total += queued;
        assert!(missing.iter().all(|ids| ids == &[tablet.id_bytes()]));
    }
    assert_eq!(server.database().await.queued(&bob).await, total);
    assert_eq!(server.database().await.queued(&tablet).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_leaves_takes_only_its_own_messages_with_it() {
    let server = TestServer::start().await;
    let bob = server.account().await;
    let tablet = bob.link().await;
    let mut senders = Vec::new();
    for _ in 0..4 {
        let (alice, bob, tablet) = (server.account().await, bob.clone(), tablet.clone());
        senders.push(tokio::spawn(async move {
            let (mut sends, mut refused) = (0, 0);
            while refused < 5 {
                let request = send_request(&[(&bob, b"b"), (&tablet, b"t")]);
                let outcome = outcome(&alice.post_messages(Uuid::new_v4(), &request).await.expect(200));
                assert!(outcome.device_mismatches.is_empty());
                sends += 1;
                match outcome.invalid_device_ids.as_slice() {
                    [] => assert_eq!(refused, 0, "a device that had left was written to"),
                    ids => {
                        assert_eq!(ids, [tablet.id_bytes()]);
                        refused += 1;
                    }
                }
            }
            sends
        }));
    }
    bob.remove(&tablet).await;
    let mut total = 0;
    for sender in senders {
        total += within("a sender", sender).await.unwrap();
    }
    assert_eq!(server.database().await.number("SELECT count(*) FROM messages").await, total);
    assert_eq!(server.database().await.queued(&bob).await, total);
}

// ---- 7.4: what is queued ----

#[tokio::test]
async fn an_envelope_says_who_sent_it_and_when_and_carries_the_bytes_unchanged() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let tablet = bob.link().await;
    let every_byte: Vec<u8> = (0..=255).collect();
    let before = server.clock.now().millis() as u64;
    alice.send(&[(&bob, b"\0"), (&tablet, &every_byte)]).await;
    let after = server.clock.now().millis() as u64;

    let short = bob.connect().await.expect_message(b"\0").await;
    let long = tablet.connect().await.expect_message(&every_byte).await;
    for envelope in [&short, &long] {
        assert_eq!(envelope.id.len(), 16);
        assert_eq!(envelope.sender_user_id, alice.user_bytes());
        assert_eq!(envelope.sender_device_id, alice.id_bytes());
        assert!((before..=after).contains(&envelope.timestamp), "{before} {} {after}", envelope.timestamp);
    }
    assert_ne!(short.id, long.id);
    assert_eq!(short.timestamp, long.timestamp, "messages of one request have equal times");
}
