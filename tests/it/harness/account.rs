//! People with devices: registering, linking, sending and connecting in one line each.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use prost::Message as _;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use uuid::Uuid;

use super::proto::{Recipient, SendMessageRequest, SendMessageResponse, Submission};
use super::signer::{Identity, ec_public_key, fake_kem_public_key};
use super::{Client, Request, Response, Socket, unique_name};

/// The password of every test account.
pub const PASSWORD: &str = "correct horse battery staple";

/// Which prekeys a device uploads when it joins.
#[derive(Clone, Copy, Debug)]
pub struct Keys {
    /// Elliptic-curve one-time prekeys.
    pub one_time: u32,
    /// Kyber one-time prekeys; `None` leaves out every PQ member, the last-resort key included.
    pub pq_one_time: Option<u32>,
}

impl Default for Keys {
    fn default() -> Self {
        Self { one_time: 30, pq_one_time: None }
    }
}

impl Keys {
    /// The `DeviceKeys` of a request, signed by `identity`, with fresh keys each time.
    pub fn to_json(self, identity: &Identity) -> Value {
        let one_time: Vec<Value> = (1..=self.one_time).map(one_time_key).collect();
        let mut keys = json!({
            "identityKey": identity.public_key_base64(),
            "registrationId": 4711,
            "signedPreKey": signed_key(identity, 1),
            "oneTimePreKeys": one_time,
        });
        if let Some(count) = self.pq_one_time {
            keys["pqLastResortPreKey"] = kyber_key(identity, 1_000_000);
            keys["pqPreKeys"] = (1..=count).map(|id| kyber_key(identity, id)).collect();
        }
        keys
    }
}

fn seed() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A signed prekey in JSON.
pub fn signed_key(identity: &Identity, id: u32) -> Value {
    let key = ec_public_key(seed());
    json!({"keyId": id, "publicKey": STANDARD.encode(key), "signature": STANDARD.encode(identity.sign(&key))})
}

/// A one-time prekey in JSON.
pub fn one_time_key(id: u32) -> Value {
    json!({"keyId": id, "publicKey": STANDARD.encode(ec_public_key(seed()))})
}

/// A Kyber prekey in JSON.
pub fn kyber_key(identity: &Identity, id: u32) -> Value {
    let key = fake_kem_public_key(seed());
    json!({"keyId": id, "publicKey": STANDARD.encode(&key), "signature": STANDARD.encode(identity.sign(&key))})
}

/// A device that is logged in. Cloning gives another hand on the same device.
#[derive(Clone)]
pub struct Device {
    pub client: Client,
    pub identity: Arc<Identity>,
    pub username: String,
    pub user: Uuid,
    pub id: Uuid,
    pub token: String,
    pub refresh_token: String,
}

/// A message for a device.
pub type Message<'a> = (&'a Device, &'a [u8]);

impl Device {
    /// An upload of `announced` bytes of which only `sent` are sent, on a connection that stays open unless the server closes it.
    pub async fn begin_upload(&self, announced: usize, sent: usize) -> TcpStream {
        let mut stream = TcpStream::connect(self.client.address()).await.expect("a connection");
        let head = format!(
            "POST /v1/attachments HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-length: {announced}\r\n\r\n",
            self.token
        );
        stream.write_all(head.as_bytes()).await.expect("the head goes out");
        // A server with no room for them answers and closes before they all are out.
        let _ = stream.write_all(&vec![7; sent]).await;
        stream
    }

    /// A new account and its primary device, with the usual keys.
    pub async fn register(client: &Client) -> Self {
        Self::register_with(client, Keys::default()).await
    }

    /// A new account and its primary device, with these keys.
    pub async fn register_with(client: &Client, keys: Keys) -> Self {
        let identity = Arc::new(Identity::generate());
        let username = unique_name("user");
        let mut body = keys.to_json(&identity);
        body["username"] = json!(username);
        body["password"] = json!(PASSWORD);
        let answer = client.post("/v1/users").json(&body).send().await.expect(201).json();
        Self::from_answer(client, identity, username, &answer)
    }

    /// The device in an `AuthResponse`.
    pub fn from_answer(client: &Client, identity: Arc<Identity>, username: String, answer: &Value) -> Self {
        let text = |member: &str| answer[member].as_str().unwrap_or_else(|| panic!("no {member}: {answer}")).to_owned();
        let id = |member: &str| text(member).parse().expect("a UUID");
        Self {
            client: client.clone(),
            identity,
            username,
            user: id("userId"),
            id: id("deviceId"),
            token: text("token"),
            refresh_token: text("refreshToken"),
        }
    }

    /// This device, talking to another node.
    pub fn at(&self, client: &Client) -> Self {
        Self { client: client.clone(), ..self.clone() }
    }

    /// Another device of this account, linked by this one, which has to be the primary.
    pub async fn link(&self) -> Self {
        self.link_with(Keys::default()).await
    }

    /// The same with these keys.
    pub async fn link_with(&self, keys: Keys) -> Self {
        let session = self.approved_link_session().await;
        self.finish_link(&session, keys).await
    }

    /// A link session that is ready to be used.
    pub async fn approved_link_session(&self) -> String {
        let body = json!({"username": self.username, "password": PASSWORD});
        let session = self.client.post("/v1/link-sessions").json(&body).send().await.expect(201).json();
        let id = session["id"].as_str().expect("an id").to_owned();
        self.request("PUT", &format!("/v1/link-sessions/{id}")).body("approved").send().await.expect(204);
        id
    }

    /// The last step of linking.
    pub async fn finish_link(&self, session: &str, keys: Keys) -> Self {
        let mut body = keys.to_json(&self.identity);
        body["linkSessionId"] = json!(session);
        let answer = self.client.post("/v1/devices").json(&body).send().await.expect(201).json();
        Self::from_answer(&self.client, self.identity.clone(), self.username.clone(), &answer)
    }

    /// The same device after logging in again.
    pub async fn log_in(&self) -> Self {
        let body = json!({"username": self.username, "password": PASSWORD, "deviceId": self.id.to_string()});
        let answer = self.client.post("/v1/session").json(&body).send().await.expect(200).json();
        Self::from_answer(&self.client, self.identity.clone(), self.username.clone(), &answer)
    }

    /// The account started over: its new primary device.
    pub async fn reset(&self) -> Self {
        let identity = Arc::new(Identity::generate());
        let mut body = Keys::default().to_json(&identity);
        body["username"] = json!(self.username);
        body["password"] = json!(PASSWORD);
        let answer = self.client.post("/v1/users/reset").json(&body).send().await.expect(200).json();
        Self::from_answer(&self.client, identity, self.username.clone(), &answer)
    }

    /// Ends this device's session.
    pub async fn log_out(&self) {
        self.request("DELETE", "/v1/session").send().await.expect(204);
    }

    /// Removes a device of this account; this one has to be the primary.
    pub async fn remove(&self, device: &Self) {
        self.request("DELETE", &format!("/v1/devices/{}", device.id)).send().await.expect(204);
    }

    /// A request with this device's token.
    pub fn request(&self, method: &str, path: &str) -> Request {
        self.client.request(method, path).token(&self.token)
    }

    /// Bundles of all devices of a user.
    pub async fn bundles(&self, user: Uuid) -> Vec<Value> {
        let answer = self.request("GET", &format!("/v1/keys/{user}")).send().await.expect(200).json();
        answer["bundles"].as_array().expect("bundles").clone()
    }

    /// Uploads this many more one-time prekeys, with ids from `first`. The signed prekey gets the id `signed`.
    pub async fn refill(&self, signed: u32, first: u32, count: u32) {
        let one_time: Vec<Value> = (first..first + count).map(one_time_key).collect();
        let body = json!({"signedPreKey": signed_key(&self.identity, signed), "oneTimePreKeys": one_time});
        self.request("POST", "/v1/keys").json(&body).send().await.expect(204);
    }

    /// Queues these messages and expects that all of them were taken.
    pub async fn send(&self, messages: &[Message<'_>]) {
        let answer = self.post_messages(Uuid::new_v4(), &send_request(messages)).await.expect(200);
        assert!(answer.body.is_empty(), "not everything was queued: {:?}", outcome(&answer));
    }

    /// The same with messages of its own, for sends that go on side by side.
    pub async fn send_owned(&self, messages: Vec<(Self, Bytes)>) {
        let messages: Vec<Message<'_>> = messages.iter().map(|(device, message)| (device, &message[..])).collect();
        self.send(&messages).await;
    }

    /// One message for one device, which has to be the only one of its user.
    pub async fn send_to(&self, device: &Self, message: impl AsRef<[u8]>) {
        self.send(&[(device, message.as_ref())]).await;
    }

    /// The raw answer to a send.
    pub async fn post_messages(&self, key: Uuid, request: &SendMessageRequest) -> Response {
        self.messages_request(key, request.encode_to_vec()).send().await
    }

    /// A send that has not been sent.
    pub fn messages_request(&self, key: Uuid, body: impl Into<Bytes>) -> Request {
        self.request("POST", "/v1/messages").header("idempotency-key", key.to_string()).body(body.into())
    }

    /// A fresh gateway ticket.
    pub async fn ticket(&self) -> String {
        let answer = self.request("POST", "/v1/gateway/ticket").send().await.expect(201).json();
        answer["ticket"].as_str().expect("a ticket").to_owned()
    }

    /// An open gateway socket.
    pub async fn connect(&self) -> Socket {
        let ticket = self.ticket().await;
        match Socket::open(self.client.address(), &ticket).await {
            Ok(socket) => socket,
            Err(status) => panic!("the handshake was refused with {status}"),
        }
    }

    /// An open gateway socket of a client that is told of mail that it doesn't get.
    pub async fn connect_with_notices(&self) -> Socket {
        self.connect_with("unheard-of,inbox-notice").await
    }

    /// An open gateway socket of a client that names these features.
    pub async fn connect_with(&self, features: &str) -> Socket {
        let path = format!("/v1/gateway?ticket={}&features={features}", self.ticket().await);
        Socket::open_path(self.client.address(), &path).await.expect("a socket")
    }

    /// The 16 bytes of the user id.
    pub fn user_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(self.user.as_bytes())
    }

    /// The 16 bytes of the device id.
    pub fn id_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(self.id.as_bytes())
    }
}

/// The request for these messages, grouped by user in the order in which users first appear.
pub fn send_request(messages: &[Message<'_>]) -> SendMessageRequest {
    let mut request = SendMessageRequest::default();
    for (device, message) in messages {
        let submission = Submission { device_id: device.id_bytes(), message: Bytes::copy_from_slice(message) };
        match request.recipients.iter_mut().find(|recipient| recipient.user_id == device.user_bytes()) {
            Some(recipient) => recipient.submissions.push(submission),
            None => {
                request.recipients.push(Recipient { user_id: device.user_bytes(), submissions: vec![submission] });
            }
        }
    }
    request
}

/// What the answer to a send says.
pub fn outcome(response: &Response) -> SendMessageResponse {
    SendMessageResponse::decode(response.body.clone()).expect("a SendMessageResponse")
}
