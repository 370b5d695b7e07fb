//! Public keys, their signatures, and the prekeys that a device uploads.
//!
//! The server keeps keys for others to fetch and never uses them. It checks what would otherwise fail on the fetching
//! client: lengths, type bytes and signatures. Whether an EC key is a point of the curve it doesn't check, and there is no
//! Kyber code here.

use std::collections::HashSet;
use std::fmt;
use std::hash::Hash;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use thiserror::Error;

use crate::model::xeddsa;

/// What is wrong with uploaded keys, in words for the client. Names JSON members and sizes, never a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum KeyError {
    /// Not the standard alphabet, padding missing or excessive, white space, or stray bits in the last character.
    #[error("{what} is not standard base64 with padding")]
    Base64 {
        /// What was to be read.
        what: &'static str,
    },
    /// Decoded, but not of the one length there is.
    #[error("{what} must be {expected} bytes long, not {found}")]
    Length {
        /// What was to be read.
        what: &'static str,
        /// The length it has to have, in bytes.
        expected: usize,
        /// The length it has, in bytes.
        found: usize,
    },
    /// The type byte is that of another kind of key.
    #[error("{what} must begin with {expected:#04x}")]
    Prefix {
        /// What was to be read.
        what: &'static str,
        /// The first byte it has to have.
        expected: u8,
    },
    /// Kyber key ids can't be negative.
    #[error("the key id of {PQ_PRE_KEY} must be from 0 to {}", i32::MAX)]
    NegativeKeyId,
    /// The signature isn't the identity key's, or is one over something else.
    #[error("Invalid signature in {member}")]
    Signature {
        /// The JSON member.
        member: &'static str,
    },
    /// Two keys with one id.
    #[error("key ids in {members} must be distinct")]
    DuplicateKeyId {
        /// The JSON member, or members that share their ids.
        members: &'static str,
    },
    /// More keys than a device may store.
    #[error("{member} may hold at most {max} keys")]
    TooMany {
        /// The JSON member.
        member: &'static str,
        /// How many are allowed.
        max: u32,
    },
}

const PUBLIC_KEY: &str = "a public key";
const PQ_PRE_KEY: &str = "a Kyber public key";
const SIGNATURE: &str = "a signature";

/// A Curve25519 public key as on the wire: 33 bytes, the type byte 0x05 and the X25519 key.
///
/// It may be no point of the curve (protocol level 0.10.0 allows that). A key which is none verifies no signature, so it
/// can't become an identity key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PublicKey([u8; Self::LEN]);

impl PublicKey {
    /// Bytes with the type byte.
    pub const LEN: usize = 33;
    const PREFIX: u8 = 0x05;

    /// Reads the JSON form, standard base64 with padding.
    ///
    /// # Errors
    /// Wrong base64, length or type byte.
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(&decode(PUBLIC_KEY, text)?)
    }

    /// Reads the stored form, which is the wire form.
    ///
    /// # Errors
    /// Wrong length or type byte.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KeyError> {
        prefixed(PUBLIC_KEY, Self::PREFIX, bytes).map(Self)
    }

    /// The JSON form.
    pub fn to_base64(&self) -> String {
        STANDARD.encode(self.0)
    }

    /// The stored form: all 33 bytes.
    pub fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    /// The 32 bytes after the type byte.
    pub fn montgomery(&self) -> &[u8; 32] {
        let (_, key) = self.0.split_last_chunk().expect("33 bytes end with 32");
        key
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({} bytes)", Self::LEN)
    }
}

/// A Kyber-1024 (round 3) public key as on the wire: 1569 bytes, the type byte 0x08 and the key.
///
/// The type byte 0x0a, that of ML-KEM, is refused as libsignal refuses it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct KemPublicKey(Box<[u8; Self::LEN]>);

impl KemPublicKey {
    /// Bytes with the type byte.
    pub const LEN: usize = 1569;
    const PREFIX: u8 = 0x08;

    /// Reads the JSON form, standard base64 with padding.
    ///
    /// # Errors
    /// Wrong base64, length or type byte.
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(&decode(PQ_PRE_KEY, text)?)
    }

    /// Reads the stored form, which is the wire form.
    ///
    /// # Errors
    /// Wrong length or type byte.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KeyError> {
        prefixed(PQ_PRE_KEY, Self::PREFIX, bytes).map(Box::new).map(Self)
    }

    /// The JSON form.
    pub fn to_base64(&self) -> String {
        STANDARD.encode(self.as_bytes())
    }

    /// The stored form: all 1569 bytes.
    pub fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Debug for KemPublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KemPublicKey({} bytes)", Self::LEN)
    }
}

/// An XEdDSA signature, 64 bytes. Having one says nothing about whether it is right.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Signature([u8; Self::LEN]);

impl Signature {
    /// Bytes.
    pub const LEN: usize = 64;

    /// Reads the JSON form, standard base64 with padding.
    ///
    /// # Errors
    /// Wrong base64 or length.
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(&decode(SIGNATURE, text)?)
    }

    /// Reads the stored form, which is the wire form.
    ///
    /// # Errors
    /// Wrong length.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KeyError> {
        sized(SIGNATURE, bytes).map(Self)
    }

    /// The JSON form.
    pub fn to_base64(&self) -> String {
        STANDARD.encode(self.0)
    }

    /// The stored form: all 64 bytes.
    pub fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({} bytes)", Self::LEN)
    }
}

/// A client's number for one of its EC prekeys. Any value, negative ones too: the protocol has always taken them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(pub i32);

/// A client's number for one of its Kyber prekeys, from 0 to 2147483647.
///
/// A first message names its Kyber prekey by this alone, so one-time and last-resort keys share their ids, and the server
/// never renumbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PqKeyId(i32);

impl PqKeyId {
    /// The id, if it is one.
    ///
    /// # Errors
    /// Negative.
    pub fn new(id: i32) -> Result<Self, KeyError> {
        if id < 0 { Err(KeyError::NegativeKeyId) } else { Ok(Self(id)) }
    }

    /// From 0 to 2147483647.
    pub fn get(self) -> i32 {
        self.0
    }
}

/// A client's number for one installation of itself. Any value; clients should keep to 1..=16380, because libsignal
/// can't address others in sealed multi-recipient messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegistrationId(pub i32);

/// The EC prekey that every bundle carries, signed by the account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedPreKey {
    /// Rises with each new key of a device.
    pub id: KeyId,
    /// The key.
    pub public_key: PublicKey,
    /// The identity key's signature over it.
    pub signature: Signature,
}

impl SignedPreKey {
    /// True when the signature verifies under either sign of the identity key, over all 33 bytes or the last 32.
    ///
    /// libsignal itself accepts only its own sign and the 33 bytes; older clients may rely on the rest.
    pub fn is_signed_by(&self, identity: &PublicKey) -> bool {
        let accepts = |message| xeddsa::verify_lenient(identity.montgomery(), message, self.signature.as_bytes());
        accepts(self.public_key.as_bytes()) || accepts(self.public_key.montgomery())
    }
}

/// An EC prekey that is handed out at most once. Not signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OneTimePreKey {
    /// Names it in the first message.
    pub id: KeyId,
    /// The key.
    pub public_key: PublicKey,
}

/// A Kyber prekey, one-time or last-resort, signed by the account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PqPreKey {
    /// Names it in the first message.
    pub id: PqKeyId,
    /// The key.
    pub public_key: KemPublicKey,
    /// The identity key's signature over it.
    pub signature: Signature,
}

impl PqPreKey {
    /// True when libsignal would accept the signature, which is over all 1569 bytes.
    pub fn is_signed_by(&self, identity: &PublicKey) -> bool {
        xeddsa::verify_strict(identity.montgomery(), self.public_key.as_bytes(), self.signature.as_bytes())
    }
}

/// The prekeys of one upload: at registration, reset, linking or refill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreKeys {
    /// Replaces the device's signed prekey.
    pub signed: SignedPreKey,
    /// Added to those stored.
    pub one_time: Vec<OneTimePreKey>,
    /// Replaces the stored one; absent, that one stays.
    pub pq_last_resort: Option<PqPreKey>,
    /// Added to those stored.
    pub pq_one_time: Vec<PqPreKey>,
}

impl PreKeys {
    /// Checks what is cheap and can be known without the store: the signature of the signed prekey, distinct ids, and at
    /// most `max` one-time keys of either kind. Two Kyber keys of one upload never share an id, the last-resort key
    /// included.
    ///
    /// # Errors
    /// The first that applies, in the order of the contract.
    pub fn check(&self, identity: &PublicKey, max: u32) -> Result<(), KeyError> {
        if !self.signed.is_signed_by(identity) {
            return Err(KeyError::Signature { member: "signedPreKey" });
        }
        if !are_distinct(self.one_time.iter().map(|key| key.id)) {
            return Err(KeyError::DuplicateKeyId { members: "oneTimePreKeys" });
        }
        if !are_distinct(self.pq().map(|(_, key)| key.id)) {
            return Err(KeyError::DuplicateKeyId { members: "pqPreKeys and pqLastResortPreKey" });
        }
        for (member, count) in [("oneTimePreKeys", self.one_time.len()), ("pqPreKeys", self.pq_one_time.len())] {
            if count > max as usize {
                return Err(KeyError::TooMany { member, max });
            }
        }
        Ok(())
    }

    /// Checks the signatures of the Kyber keys, some 50 µs each. They come last, once their number is known to be small.
    ///
    /// # Errors
    /// [`KeyError::Signature`]
    pub fn check_pq(&self, identity: &PublicKey) -> Result<(), KeyError> {
        match self.pq().find(|(_, key)| !key.is_signed_by(identity)) {
            Some((member, _)) => Err(KeyError::Signature { member }),
            None => Ok(()),
        }
    }

    /// True when the upload is in order only if the device has a last-resort Kyber key stored already. A new device has
    /// none.
    ///
    /// Without one, a device that ran out of one-time keys would drop back to bundles that today's clients can't use.
    pub fn needs_stored_last_resort(&self) -> bool {
        !self.pq_one_time.is_empty() && self.pq_last_resort.is_none()
    }

    /// All Kyber keys, each with the JSON member that it came in.
    fn pq(&self) -> impl Iterator<Item = (&'static str, &PqPreKey)> {
        let last_resort = self.pq_last_resort.iter().map(|key| ("pqLastResortPreKey", key));
        last_resort.chain(self.pq_one_time.iter().map(|key| ("pqPreKeys", key)))
    }
}

fn decode(what: &'static str, text: &str) -> Result<Vec<u8>, KeyError> {
    STANDARD.decode(text).map_err(|_| KeyError::Base64 { what })
}

fn sized<const N: usize>(what: &'static str, bytes: &[u8]) -> Result<[u8; N], KeyError> {
    bytes.try_into().map_err(|_| KeyError::Length { what, expected: N, found: bytes.len() })
}

fn prefixed<const N: usize>(what: &'static str, prefix: u8, bytes: &[u8]) -> Result<[u8; N], KeyError> {
    let key = sized::<N>(what, bytes)?;
    if key.first() == Some(&prefix) { Ok(key) } else { Err(KeyError::Prefix { what, expected: prefix }) }
}

fn are_distinct<T: Eq + Hash>(mut items: impl Iterator<Item = T>) -> bool {
    let mut seen = HashSet::new();
    items.all(|item| seen.insert(item))
}

#[cfg(test)]
mod tests;
