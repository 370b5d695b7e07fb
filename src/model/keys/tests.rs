//! Which keys, signatures and uploads are accepted.

use serde_json::Value;

use super::*;
use crate::model::xeddsa::signer::{Identity, ec_public_key, fake_kem_public_key};

const MAX: u32 = 3;

fn identity_key(identity: &Identity) -> PublicKey {
    PublicKey::from_base64(&identity.public_key_base64()).unwrap()
}

fn signature(identity: &Identity, message: &[u8]) -> Signature {
    Signature::from_bytes(&identity.sign(message)).unwrap()
}

fn signed_pre_key(identity: &Identity) -> SignedPreKey {
    let public_key = PublicKey::from_bytes(&ec_public_key(1)).unwrap();
    SignedPreKey { id: KeyId(1), public_key, signature: signature(identity, public_key.as_bytes()) }
}

fn one_time_pre_key(id: i32) -> OneTimePreKey {
    OneTimePreKey { id: KeyId(id), public_key: PublicKey::from_bytes(&[0x05; 33]).unwrap() }
}

fn pq_pre_key(identity: &Identity, id: i32) -> PqPreKey {
    let public_key = fake_kem_public_key(7);
    PqPreKey {
        id: PqKeyId::new(id).unwrap(),
        public_key: KemPublicKey::from_bytes(&public_key).unwrap(),
        signature: signature(identity, &public_key),
    }
}

/// As many keys as are allowed, and all of them right.
fn full_upload(identity: &Identity) -> PreKeys {
    PreKeys {
        signed: signed_pre_key(identity),
        one_time: (-1..=1).map(one_time_pre_key).collect(),
        pq_last_resort: Some(pq_pre_key(identity, 0)),
        pq_one_time: (1..=3).map(|id| pq_pre_key(identity, id)).collect(),
    }
}

/// What the checks say about a full upload after `change`.
fn verdict(change: impl FnOnce(&Identity, &mut PreKeys)) -> Result<(), KeyError> {
    let identity = Identity::generate();
    let mut upload = full_upload(&identity);
    change(&identity, &mut upload);
    let identity = identity_key(&identity);
    upload.check(&identity, MAX)?;
    upload.check_pq(&identity)
}

#[test]
fn keys_and_signatures_survive_a_round_trip() {
    let public_key = PublicKey::from_bytes(&ec_public_key(1)).unwrap();
    assert_eq!(PublicKey::from_base64(&public_key.to_base64()), Ok(public_key));
    assert_eq!(public_key.montgomery()[..], public_key.as_bytes()[1..]);
    let kem = KemPublicKey::from_bytes(&fake_kem_public_key(1)).unwrap();
    assert_eq!(KemPublicKey::from_base64(&kem.to_base64()), Ok(kem));
    let signature = signature(&Identity::generate(), b"message");
    assert_eq!(Signature::from_base64(&signature.to_base64()), Ok(signature));
}

#[test]
fn only_standard_base64_with_canonical_padding_is_read() {
    let bytes = [0xfb; 64];
    let good = STANDARD.encode(bytes); // "+/v7…+w=="
    assert!(good.starts_with("+/") && good.ends_with("w=="), "the table below relies on it: {good}");
    assert!(Signature::from_base64(&good).is_ok());
    for (why, text) in [
        ("URL-safe alphabet", good.replace('+', "-").replace('/', "_")),
        ("no padding", good.trim_end_matches('=').to_owned()),
        ("half the padding", good[..good.len() - 1].to_owned()),
        ("too much padding", format!("{good}=")),
        ("stray bits in the last character", good.replace("w==", "x==")),
        ("leading space", format!(" {good}")),
        ("trailing space", format!("{good} ")),
        ("trailing line feed", format!("{good}\n")),
        ("line break inside", format!("{}\r\n{}", &good[..44], &good[44..])),
        ("NUL", format!("{good}\0")),
        ("not ASCII", good.replacen('+', "é", 1)),
        ("two texts in one", format!("{good}{good}")),
    ] {
        assert_eq!(Signature::from_base64(&text), Err(KeyError::Base64 { what: SIGNATURE }), "{why}");
    }
}

#[test]
fn ec_keys_have_33_bytes_and_begin_with_05() {
    let read = |bytes: &[u8]| PublicKey::from_base64(&STANDARD.encode(bytes));
    assert!(read(&[0x05; 33]).is_ok(), "need not be a point of the curve");
    for found in [0, 1, 32, 34, 64, 1569] {
        let length = KeyError::Length { what: PUBLIC_KEY, expected: 33, found };
        assert_eq!(read(&vec![0x05; found]), Err(length));
    }
    for prefix in (0..=255).filter(|&prefix| prefix != 0x05) {
        assert_eq!(read(&[prefix; 33]), Err(KeyError::Prefix { what: PUBLIC_KEY, expected: 0x05 }), "{prefix:#04x}");
    }
}

#[test]
fn kyber_keys_have_1569_bytes_and_begin_with_08() {
    let read = |bytes: &[u8]| KemPublicKey::from_base64(&STANDARD.encode(bytes));
    assert!(read(&fake_kem_public_key(1)).is_ok());
    for found in [0, 33, 1568, 1570] {
        assert_eq!(read(&vec![0x08; found]), Err(KeyError::Length { what: PQ_PRE_KEY, expected: 1569, found }));
    }
    for prefix in (0..=255).filter(|&prefix| prefix != 0x08) {
        assert_eq!(read(&[prefix; 1569]), Err(KeyError::Prefix { what: PQ_PRE_KEY, expected: 0x08 }), "{prefix:#04x}");
    }
}

#[test]
fn signatures_have_64_bytes() {
    for found in [0, 63, 65] {
        let length = KeyError::Length { what: SIGNATURE, expected: 64, found };
        assert_eq!(Signature::from_base64(&STANDARD.encode(vec![0; found])), Err(length));
    }
}

#[test]
fn kyber_key_ids_are_not_negative_and_others_may_be() {
    assert_eq!(PqKeyId::new(-1), Err(KeyError::NegativeKeyId));
    assert_eq!(PqKeyId::new(i32::MIN), Err(KeyError::NegativeKeyId));
    assert_eq!(PqKeyId::new(0).map(PqKeyId::get), Ok(0));
    assert_eq!(PqKeyId::new(i32::MAX).map(PqKeyId::get), Ok(i32::MAX));
    assert!(KeyId(i32::MIN) < KeyId(0));
}

#[test]
fn the_debug_form_shows_no_bytes() {
    let identity = Identity::generate();
    let key = pq_pre_key(&identity, 1);
    assert_eq!(format!("{:?}", identity_key(&identity)), "PublicKey(33 bytes)");
    assert_eq!(format!("{:?}", key.public_key), "KemPublicKey(1569 bytes)");
    assert_eq!(format!("{:?}", key.signature), "Signature(64 bytes)");
}

#[test]
fn errors_name_the_problem() {
    let length = PublicKey::from_base64("AAAA").unwrap_err();
    assert_eq!(length.to_string(), "a public key must be 33 bytes long, not 3");
    let prefix = PublicKey::from_bytes(&[0x0a; 33]).unwrap_err();
    assert_eq!(prefix.to_string(), "a public key must begin with 0x05");
    let base64 = Signature::from_base64("A").unwrap_err();
    assert_eq!(base64.to_string(), "a signature is not standard base64 with padding");
    let negative = PqKeyId::new(-5).unwrap_err();
    assert_eq!(negative.to_string(), "the key id of a Kyber public key must be from 0 to 2147483647");
    assert_eq!(KeyError::Signature { member: "pqPreKeys" }.to_string(), "Invalid signature in pqPreKeys");
}

#[test]
fn a_full_upload_and_a_minimal_one_pass() {
    assert_eq!(verdict(|_, _| ()), Ok(()));
    assert_eq!(
        verdict(|_, upload| {
            upload.one_time.clear();
            upload.pq_last_resort = None;
            upload.pq_one_time.clear();
        }),
        Ok(())
    );
}

#[test]
fn a_signed_prekey_is_signed_over_33_bytes_or_32_under_either_sign() {
    let wrong = Err(KeyError::Signature { member: "signedPreKey" });
    let resign = |message: fn(&PublicKey) -> &[u8], flip: u8| {
        verdict(|identity, upload| {
            let mut signature = identity.sign(message(&upload.signed.public_key));
            signature[63] ^= flip;
            upload.signed.signature = Signature(signature);
        })
    };
    assert_eq!(resign(|key| key.as_bytes(), 0), Ok(()));
    assert_eq!(resign(|key| key.as_bytes(), 0x80), Ok(()));
    assert_eq!(resign(|key| key.montgomery(), 0), Ok(()));
    assert_eq!(resign(|key| key.montgomery(), 0x80), Ok(()));
    assert_eq!(resign(|key| &key.as_bytes()[..32], 0), wrong, "another 32 bytes");
    assert_eq!(verdict(|_, upload| upload.signed.signature.0[0] ^= 1), wrong);
    assert_eq!(verdict(|_, upload| upload.signed.public_key.0[32] ^= 1), wrong);
    assert_eq!(verdict(|_, upload| upload.signed = signed_pre_key(&Identity::generate())), wrong, "another account");
}

#[test]
fn kyber_prekeys_are_signed_over_1569_bytes_under_their_own_sign() {
    for member in ["pqLastResortPreKey", "pqPreKeys"] {
        let wrong = Err(KeyError::Signature { member });
        let changed = |change: fn(&Identity, &mut PqPreKey)| {
            verdict(|identity, upload| {
                let last = match member {
                    "pqPreKeys" => upload.pq_one_time.last_mut(),
                    _ => upload.pq_last_resort.as_mut(),
                };
                change(identity, last.unwrap());
            })
        };
        assert_eq!(changed(|_, _| ()), Ok(()));
        assert_eq!(changed(|_, key| key.signature.0[63] ^= 0x80), wrong, "sign flipped");
        assert_eq!(changed(|_, key| key.public_key.0[1568] ^= 1), wrong, "another key");
        assert_eq!(
            changed(|_, key| key.signature = signature(&Identity::generate(), key.public_key.as_bytes())),
            wrong
        );
        let raw = |identity: &Identity, key: &mut PqPreKey| {
            key.signature = signature(identity, &key.public_key.as_bytes()[1..]);
        };
        assert_eq!(changed(raw), wrong, "over the 1568 bytes after the prefix");
    }
}

#[test]
fn the_kyber_prekey_made_by_libsignal_passes() {
    let vectors: Value = serde_json::from_str(include_str!("../../../tests/vectors/libsignal.json")).unwrap();
    let vector = &vectors["kyberPreKeys"][0];
    let text = |member: &str| vector[member].as_str().unwrap();
    let key = PqPreKey {
        id: PqKeyId::new(1).unwrap(),
        public_key: KemPublicKey::from_base64(text("publicKey")).unwrap(),
        signature: Signature::from_base64(text("signature")).unwrap(),
    };
    assert!(key.is_signed_by(&PublicKey::from_base64(text("identityKey")).unwrap()));
    assert!(!key.is_signed_by(&identity_key(&Identity::generate())));
}

#[test]
fn key_ids_of_one_kind_are_distinct() {
    let ec = Err(KeyError::DuplicateKeyId { members: "oneTimePreKeys" });
    assert_eq!(verdict(|_, upload| upload.one_time[2].id = upload.one_time[0].id), ec);
    let pq = Err(KeyError::DuplicateKeyId { members: "pqPreKeys and pqLastResortPreKey" });
    assert_eq!(verdict(|_, upload| upload.pq_one_time[2].id = upload.pq_one_time[0].id), pq);
    assert_eq!(verdict(|identity, upload| upload.pq_last_resort = Some(pq_pre_key(identity, 2))), pq);
}

#[test]
fn an_upload_holds_at_most_the_maximum_of_each_kind() {
    let ec = Err(KeyError::TooMany { member: "oneTimePreKeys", max: MAX });
    assert_eq!(verdict(|_, upload| upload.one_time.push(one_time_pre_key(9))), ec);
    let pq = Err(KeyError::TooMany { member: "pqPreKeys", max: MAX });
    assert_eq!(verdict(|identity, upload| upload.pq_one_time.push(pq_pre_key(identity, 9))), pq);
}

#[test]
fn of_several_mistakes_the_first_in_the_order_of_the_contract_is_named() {
    let identity = Identity::generate();
    let mut upload = full_upload(&identity);
    upload.signed = signed_pre_key(&Identity::generate());
    upload.one_time = vec![one_time_pre_key(1); 9];
    upload.pq_one_time = vec![pq_pre_key(&Identity::generate(), 1); 9];
    let next = |upload: &PreKeys| {
        let identity = identity_key(&identity);
        upload.check(&identity, MAX).and_then(|()| upload.check_pq(&identity)).unwrap_err()
    };

    assert_eq!(next(&upload), KeyError::Signature { member: "signedPreKey" });
    upload.signed = signed_pre_key(&identity);
    assert_eq!(next(&upload), KeyError::DuplicateKeyId { members: "oneTimePreKeys" });
    upload.one_time = (0..9).map(one_time_pre_key).collect();
    assert!(matches!(next(&upload), KeyError::DuplicateKeyId { members } if members.starts_with("pqPreKeys")));
    upload.pq_one_time = (1..9).map(|id| pq_pre_key(&Identity::generate(), id)).collect();
    assert_eq!(next(&upload), KeyError::TooMany { member: "oneTimePreKeys", max: MAX });
    upload.one_time.truncate(3);
    assert_eq!(next(&upload), KeyError::TooMany { member: "pqPreKeys", max: MAX });
    upload.pq_one_time.truncate(3);
    assert_eq!(next(&upload), KeyError::Signature { member: "pqPreKeys" });
}

#[test]
fn one_time_kyber_keys_need_a_last_resort_key() {
    let mut upload = full_upload(&Identity::generate());
    assert!(!upload.needs_stored_last_resort(), "it brings its own");
    upload.pq_last_resort = None;
    assert!(upload.needs_stored_last_resort());
    upload.pq_one_time.clear();
    assert!(!upload.needs_stored_last_resort(), "it brings no Kyber keys at all");
}
