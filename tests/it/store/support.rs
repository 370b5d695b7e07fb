//! Accounts with keys of their own, devices that join them, and what they send and acknowledge.

use std::ops::RangeInclusive;
use std::time::Duration;

use bytes::Bytes;
use obscura_server::model::ids::{DeviceId, DeviceNo, IdempotencyKey, Position, UserId};
use obscura_server::model::keys::{
    KemPublicKey, KeyId, OneTimePreKey, PqKeyId, PqPreKey, PreKeys, PublicKey, RegistrationId, Signature, SignedPreKey,
};
use obscura_server::model::message::{Recipient, Sealed, SendRequest, Sender};
use obscura_server::store::{Approval, Linked, NewAccount, NewDevice, NewLink, Registered, Store};

use super::fixture::{NOW, Person, TestStore, grant};
use crate::harness::Database;
use crate::harness::signer::{Identity, ec_public_key, fake_kem_public_key};
use crate::harness::unique_name;

/// The one number that this query answers.
pub async fn number(store: &TestStore, query: &str) -> i64 {
    let database = store.database().await;
    let number = database.number(query).await;
    database.close().await;
    number
}

/// Rows of a table.
pub async fn count(store: &TestStore, table: &str) -> i64 {
    number(store, &format!("SELECT count(*) FROM {table}")).await
}

/// A send from one person to others, each with the size of the message in bytes.
pub fn send(from: &Person, to: &[(&Person, usize)]) -> SendRequest {
    let recipient = |(person, bytes): &(&Person, usize)| Recipient {
        user: person.user,
        submissions: vec![(person.device, Sealed(Bytes::from(vec![7; *bytes])))],
        throttled_for: None,
    };
    SendRequest {
        sender: Sender { user: from.user, device: from.device, no: from.no },
        key: IdempotencyKey::random(),
        digest: [1; 16],
        recipients: to.iter().map(recipient).collect(),
    }
}

/// What waits for a device.
pub async fn waiting(store: &TestStore, person: &Person) -> Vec<Position> {
    let page = store.unsent(person.no, Position(0), NOW, 10_000, 1 << 30).await.unwrap();
    page.envelopes.iter().map(|envelope| envelope.position).collect()
}

/// Acknowledges all that waits for a device.
pub async fn acknowledge(store: &TestStore, person: &Person) {
    let acks: Vec<_> = waiting(store, person).await.into_iter().map(|position| (person.no, position)).collect();
    store.commit_group(&[], &acks, NOW).await.unwrap();
}

/// Makes a group fail that queues a message of this size.
pub async fn deny_messages_of_49_bytes(database: &Database) {
    let deny = match database {
        Database::Sqlite(_) => {
            "CREATE TRIGGER deny BEFORE INSERT ON messages WHEN LENGTH(NEW.body) = 49
             BEGIN SELECT RAISE(ABORT, 'denied'); END"
        }
        Database::Postgres(_) => {
            "CREATE FUNCTION deny() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'denied'; END $$;
             CREATE TRIGGER deny BEFORE INSERT ON messages FOR EACH ROW WHEN (octet_length(NEW.body) = 49)
             EXECUTE FUNCTION deny()"
        }
    };
    database.execute(deny).await;
}

/// A device in the store.
#[derive(Clone, Copy)]
pub struct Member {
    pub user: UserId,
    pub device: DeviceId,
    pub no: DeviceNo,
    seed: u64,
}

impl Member {
    /// The account's identity key pair.
    pub fn identity(&self) -> Identity {
        Identity::from_seed(self.seed)
    }

    /// Prekeys of this account.
    pub fn keys(&self, signed: i32, one_time: RangeInclusive<i32>) -> PreKeys {
        prekeys(&self.identity(), signed, one_time)
    }
}

/// A new account with its primary device, and without one-time prekeys.
pub async fn account(store: &Store) -> Member {
    let seed = rand::random();
    account_with(store, seed, prekeys(&Identity::from_seed(seed), 1, NONE)).await
}

/// A new account whose identity comes from the seed, and whose primary device has these prekeys.
pub async fn account_with(store: &Store, seed: u64, prekeys: PreKeys) -> Member {
    let identity = Identity::from_seed(seed);
    let device = new_device(prekeys);
    let (user, id) = (UserId::random(), device.id);
    let account = NewAccount {
        user,
        username: unique_name("stored"),
        password_hash: "$argon2id$".to_owned(),
        identity: public_key(&identity),
        device,
        session: grant(NOW),
    };
    match store.register(&account).await.unwrap() {
        Registered::Account(no) => Member { user, device: id, no, seed },
        Registered::UsernameTaken => panic!("the name is unique"),
    }
}

/// Another device of the account.
pub async fn linked(store: &Store, primary: &Member) -> Member {
    linked_with(store, primary, primary.keys(1, NONE)).await
}

/// Another device of the account, with these prekeys.
pub async fn linked_with(store: &Store, primary: &Member, prekeys: PreKeys) -> Member {
    let hash = approved_link(store, primary).await;
    let link = new_link(hash, &primary.identity(), prekeys);
    match store.link_device(&link, NOW).await.unwrap() {
        Linked::Device { no, .. } => Member { device: link.device.id, no, ..*primary },
        refused => panic!("not linked: {refused:?}"),
    }
}

/// A link session that is ready to be used.
pub async fn approved_link(store: &Store, primary: &Member) -> [u8; 32] {
    let hash = rand::random();
    store.open_link(primary.user, &hash, NOW + Duration::from_mins(10), NOW).await.unwrap();
    store.approve_link(primary.user, &hash, Approval { parcel: b"parcel", proof_required: false }, NOW).await.unwrap();
    hash
}

/// A device that wants to join by this link session.
pub fn new_link(hash: [u8; 32], identity: &Identity, prekeys: PreKeys) -> NewLink {
    NewLink { hash, identity: public_key(identity), is_proven: false, device: new_device(prekeys), session: grant(NOW) }
}

/// A device without a name.
pub fn new_device(prekeys: PreKeys) -> NewDevice {
    NewDevice { id: DeviceId::random(), name: None, registration_id: RegistrationId(4711), prekeys }
}

/// No keys.
#[expect(clippy::reversed_empty_ranges, reason = "it is meant to be empty")]
pub const NONE: RangeInclusive<i32> = 1..=0;

/// A signed prekey with the id `signed`, and one-time prekeys with these ids. No Kyber keys.
pub fn prekeys(identity: &Identity, signed: i32, one_time: RangeInclusive<i32>) -> PreKeys {
    let key = ec_public_key(rand::random());
    PreKeys {
        signed: SignedPreKey {
            id: KeyId(signed),
            public_key: PublicKey::from_bytes(&key).unwrap(),
            signature: Signature::from_bytes(&identity.sign(&key)).unwrap(),
        },
        one_time: one_time.map(one_time_key).collect(),
        pq_last_resort: None,
        pq_one_time: Vec::new(),
    }
}

/// An elliptic-curve one-time prekey.
pub fn one_time_key(id: i32) -> OneTimePreKey {
    OneTimePreKey { id: KeyId(id), public_key: PublicKey::from_bytes(&ec_public_key(rand::random())).unwrap() }
}

/// A Kyber prekey.
pub fn pq_key(identity: &Identity, id: i32) -> PqPreKey {
    let key = fake_kem_public_key(rand::random());
    PqPreKey {
        id: PqKeyId::new(id).unwrap(),
        signature: Signature::from_bytes(&identity.sign(&key)).unwrap(),
        public_key: KemPublicKey::from_bytes(&key).unwrap(),
    }
}

/// The public half as the model knows it.
pub fn public_key(identity: &Identity) -> PublicKey {
    PublicKey::from_bytes(&identity.public_key()).unwrap()
}
