//! The encryption of Web Push messages: RFC 8291, in the content coding of RFC 8188.

use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::agreement::{ECDH_P256, PrivateKey, UnparsedPublicKey, agree};
use aws_lc_rs::error::Unspecified;
use aws_lc_rs::hmac::{HMAC_SHA256, Key, sign};

use crate::model::push::Subscription;

/// Bytes in one record; ours is shorter, and the last.
const RECORD: u32 = 4096;
/// Says that no record follows.
const LAST: u8 = 2;

/// Encrypts `text` for the subscriber. Fails when its public key is no point of the curve.
pub(super) fn seal(text: &[u8], subscription: &Subscription) -> Result<Vec<u8>, Unspecified> {
    seal_with(text, subscription, &PrivateKey::generate(&ECDH_P256)?, rand::random())
}

/// Whether something can be encrypted for this subscriber.
pub(super) fn can_seal(subscription: &Subscription) -> bool {
    seal(b"", subscription).is_ok()
}

fn seal_with(
    text: &[u8],
    subscription: &Subscription,
    private: &PrivateKey,
    salt: [u8; 16],
) -> Result<Vec<u8>, Unspecified> {
    let public = private.compute_public_key()?;
    let (ours, theirs) = (public.as_ref(), &subscription.p256dh[..]);
    let peer = UnparsedPublicKey::new(&ECDH_P256, theirs);
    let shared = agree(private, peer, Unspecified, |secret| {
        Ok(derive(&subscription.auth, secret, &[b"WebPush: info\0", theirs, ours]))
    })?;
    let key = derive(&salt, &shared, &[b"Content-Encoding: aes128gcm\0"]);
    let nonce = derive(&salt, &shared, &[b"Content-Encoding: nonce\0"]);
    let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &key[..16])?);
    let mut record = [text, &[LAST]].concat();
    key.seal_in_place_append_tag(Nonce::try_assume_unique_for_key(&nonce[..12])?, Aad::empty(), &mut record)?;
    let length = u8::try_from(ours.len()).map_err(|_| Unspecified)?;
    Ok([&salt[..], &RECORD.to_be_bytes(), &[length], ours, &record].concat())
}

/// HKDF with SHA-256, of which never more than the first block is needed.
fn derive(salt: &[u8], secret: &[u8], info: &[&[u8]]) -> [u8; 32] {
    let extracted = sign(&Key::new(HMAC_SHA256, salt), secret);
    let block = sign(&Key::new(HMAC_SHA256, extracted.as_ref()), &[&info.concat()[..], &[1]].concat());
    let mut derived = [0; 32];
    derived.copy_from_slice(block.as_ref());
    derived
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

    use super::*;

    fn bytes(text: &str) -> Vec<u8> {
        URL_SAFE_NO_PAD.decode(text).unwrap()
    }

    #[test]
    fn the_example_of_the_specification_comes_out_byte_by_byte() {
        let subscription = Subscription {
            endpoint: String::new(),
            p256dh: bytes("BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4"),
            auth: bytes("BTBZMqHH6r4Tts7J_aSIgg"),
        };
        let private = bytes("yfWPiYE-n46HLnH0KqZOF1fJJU3MYrct3AELtAQ-oRw");
        let private = PrivateKey::from_private_key(&ECDH_P256, &private).unwrap();
        let salt = bytes("DGv6ra1nlYgDCS1FRnbzlw").try_into().unwrap();
        let sealed = seal_with(b"When I grow up, I want to be a watermelon", &subscription, &private, salt).unwrap();
        assert_eq!(
            URL_SAFE_NO_PAD.encode(sealed),
            "DGv6ra1nlYgDCS1FRnbzlwAAEABBBP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A\
             _yl95bQpu6cVPTpK4Mqgkf1CXztLVBSt2Ks3oZwbuwXPXLWyouBWLVWGNWQexSgSxsj_Qulcy4a-fN"
        );
    }

    #[test]
    fn a_key_that_is_no_point_of_the_curve_is_refused() {
        for key in [vec![], vec![4; 65], vec![0; 65]] {
            assert!(!can_seal(&Subscription { endpoint: String::new(), p256dh: key, auth: vec![1; 16] }));
        }
    }
}
