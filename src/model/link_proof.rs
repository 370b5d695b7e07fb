//! The proof that a new device holds the identity key of the account that it joins.
//!
//! The signature over a signed prekey proves nothing: it can be taken from any bundle. So a new device signs the link
//! session and its own keys. The bytes are documented for clients in `openapi.yaml`; integers are big-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 22 | `obscura.v1 link proof` in ASCII and a zero byte, which no other message that this key signs begins with |
//! | 32 | SHA-256 of the text of the link session's id |
//! | 33 | identity key, as on the wire |
//! | 4 | registration id |
//! | 4 + 33 | signed prekey: id, key |
//! | 4 | number of EC one-time prekeys, then each: id (4), key (33) |
//! | 1 | 1 and the last-resort Kyber prekey: id (4), key (1569); or 0 |
//! | 4 | number of one-time Kyber prekeys, then each: id (4), key (1569) |

use crate::model::keys::{PqPreKey, PreKeys, PublicKey, RegistrationId, Signature};
use crate::model::xeddsa;

const DOMAIN: &[u8] = b"obscura.v1 link proof\0";

/// What a new device signs with the identity key.
#[derive(Clone, Copy, Debug)]
pub struct LinkProof<'a> {
    /// SHA-256 of the text of the link session's id.
    pub link_hash: &'a [u8; 32],
    /// The identity key.
    pub identity: &'a PublicKey,
    /// The installation, as the device names it.
    pub registration_id: RegistrationId,
    /// All its prekeys, in the order of the request.
    pub prekeys: &'a PreKeys,
}

impl LinkProof<'_> {
    /// True when libsignal would accept the signature. It takes about 50 µs, and half a millisecond with a hundred Kyber
    /// keys.
    pub fn is_signed(&self, signature: &Signature) -> bool {
        xeddsa::verify_strict(self.identity.montgomery(), &self.message(), signature.as_bytes())
    }

    /// The signed bytes.
    pub fn message(&self) -> Vec<u8> {
        let signed = &self.prekeys.signed;
        let mut bytes = [DOMAIN, self.link_hash, self.identity.as_bytes()].concat();
        bytes.extend(self.registration_id.0.to_be_bytes());
        put(&mut bytes, signed.id.0, signed.public_key.as_bytes());
        put_count(&mut bytes, self.prekeys.one_time.len());
        for key in &self.prekeys.one_time {
            put(&mut bytes, key.id.0, key.public_key.as_bytes());
        }
        bytes.push(self.prekeys.pq_last_resort.is_some().into());
        self.prekeys.pq_last_resort.iter().for_each(|key| put_pq(&mut bytes, key));
        put_count(&mut bytes, self.prekeys.pq_one_time.len());
        self.prekeys.pq_one_time.iter().for_each(|key| put_pq(&mut bytes, key));
        bytes
    }
}

fn put(bytes: &mut Vec<u8>, id: i32, public_key: &[u8]) {
    bytes.extend(id.to_be_bytes());
    bytes.extend(public_key);
}

fn put_pq(bytes: &mut Vec<u8>, key: &PqPreKey) {
    put(bytes, key.id.get(), key.public_key.as_bytes());
}

fn put_count(bytes: &mut Vec<u8>, count: usize) {
    bytes.extend(u32::try_from(count).expect("an upload has fewer keys than 2^32").to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::keys::{KemPublicKey, KeyId, OneTimePreKey, PqKeyId, SignedPreKey};
    use crate::model::xeddsa::signer::{Identity, ec_public_key, fake_kem_public_key};

    fn ec(seed: u64) -> PublicKey {
        PublicKey::from_bytes(&ec_public_key(seed)).unwrap()
    }

    fn pq(id: i32) -> PqPreKey {
        PqPreKey {
            id: PqKeyId::new(id).unwrap(),
            public_key: KemPublicKey::from_bytes(&fake_kem_public_key(1)).unwrap(),
            signature: Signature::from_bytes(&[0; 64]).unwrap(),
        }
    }

    fn prekeys() -> PreKeys {
        PreKeys {
            signed: SignedPreKey {
                id: KeyId(-2),
                public_key: ec(1),
                signature: Signature::from_bytes(&[0; 64]).unwrap(),
            },
            one_time: vec![OneTimePreKey { id: KeyId(258), public_key: ec(2) }],
            pq_last_resort: Some(pq(9)),
            pq_one_time: vec![pq(3), pq(4)],
        }
    }

    #[test]
    fn the_signed_bytes_are_those_of_the_document() {
        let (prekeys, identity) = (prekeys(), ec(7));
        let proof = LinkProof {
            link_hash: &[0xaa; 32],
            identity: &identity,
            registration_id: RegistrationId(4711),
            prekeys: &prekeys,
        };
        let kem = fake_kem_public_key(1);
        let expected = [
            &b"obscura.v1 link proof\0"[..],
            &[0xaa; 32],
            &ec_public_key(7),
            &[0, 0, 0x12, 0x67],
            &[0xff, 0xff, 0xff, 0xfe],
            &ec_public_key(1),
            &[0, 0, 0, 1],
            &[0, 0, 1, 2],
            &ec_public_key(2),
            &[1, 0, 0, 0, 9],
            &kem,
            &[0, 0, 0, 2],
            &[0, 0, 0, 3],
            &kem,
            &[0, 0, 0, 4],
            &kem,
        ];
        assert_eq!(proof.message(), expected.concat());
        let few = PreKeys { pq_last_resort: None, pq_one_time: Vec::new(), one_time: Vec::new(), ..prekeys.clone() };
        let few = LinkProof { prekeys: &few, ..proof }.message();
        assert_eq!(few.len(), 22 + 32 + 33 + 4 + 37 + 4 + 1 + 4);
        assert_eq!(few[few.len() - 9..], [0; 9]);
    }

    #[test]
    fn a_proof_is_of_one_link_one_identity_and_all_keys() {
        let identity = Identity::generate();
        let public_key = PublicKey::from_bytes(&identity.public_key()).unwrap();
        let keys = prekeys();
        let proof = LinkProof {
            link_hash: &[1; 32],
            identity: &public_key,
            registration_id: RegistrationId(1),
            prekeys: &keys,
        };
        let sign = |message: &[u8]| Signature::from_bytes(&identity.sign(message)).unwrap();
        let signature = sign(&proof.message());
        assert!(proof.is_signed(&signature));
        assert!(!LinkProof { link_hash: &[2; 32], ..proof }.is_signed(&signature));
        assert!(!LinkProof { registration_id: RegistrationId(2), ..proof }.is_signed(&signature));
        assert!(!LinkProof { identity: &ec(1), ..proof }.is_signed(&signature));
        let changes: [fn(&mut PreKeys); 5] = [
            |keys| keys.signed.id = KeyId(7),
            |keys| keys.one_time[0].public_key = keys.signed.public_key,
            |keys| keys.one_time.clear(),
            |keys| keys.pq_last_resort = None,
            |keys| keys.pq_one_time.swap(0, 1),
        ];
        for change in changes {
            let mut changed = keys.clone();
            change(&mut changed);
            assert!(!LinkProof { prekeys: &changed, ..proof }.is_signed(&signature), "{changed:?}");
        }
        assert!(!proof.is_signed(&sign(public_key.as_bytes())), "the signature of a key");
    }
}
