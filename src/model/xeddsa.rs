//! Checks XEdDSA signatures: Ed25519 signatures made with X25519 keys, as libsignal makes them.
//!
//! Sources: "The XEdDSA and VXEdDSA Signature Schemes", revision 1 (sections 2.3, 3 and 5); RFC 7748 (the keys);
//! RFC 8032 (the equation). The specification fixes the sign of the Edwards key to 0. libsignal doesn't: it signs with the
//! key as it comes and carries the sign in the top bit of the signature, which is otherwise always 0.
//!
//! Everything here is public, so nothing here takes care to run in constant time.
//!
//! What is accepted besides the usual is what libsignal accepts, because a stricter relay would turn away working clients:
//! - a key that isn't reduced mod 2^255 - 19, or has its top bit set, counts as the reduced one (RFC 7748 section 5);
//! - `s` may be any number below 2^253, so signatures are malleable: never use one as an identifier;
//! - a key of small order is a key. Everyone can sign for it, which harms only the account that chose it. (The
//!   `verify_strict` of `ed25519-dalek` refuses those; ours is named after the sign bit.)
//!
//! A key that belongs to no point of the curve (but to its twist) verifies nothing.

use curve25519_dalek::{EdwardsPoint, MontgomeryPoint, Scalar};
use sha2::{Digest, Sha512};

/// The sign of the Edwards point, in the last byte of a signature.
const SIGN_BIT: u8 = 0x80;
/// Bits of the last byte that are 0 in every `s` below 2^253.
const BEYOND_S: u8 = 0xe0;

/// True when libsignal would accept the signature: the sign bit selects the Edwards point.
///
/// `key` is the X25519 public key, without the type byte. Never panics, whatever the bytes.
pub fn verify_strict(key: &[u8; 32], message: &[u8], signature: &[u8; 64]) -> bool {
    verify(key, message, signature, sign_of(signature))
}

/// True when the signature is right for either sign of the Edwards point: the sign bit is ignored.
///
/// Protocol level 0.10.0 checks signed prekeys so. Costs up to twice as much as [`verify_strict`].
pub fn verify_lenient(key: &[u8; 32], message: &[u8], signature: &[u8; 64]) -> bool {
    let sign = sign_of(signature);
    verify(key, message, signature, sign) || verify(key, message, signature, sign ^ 1)
}

/// The sign of the Edwards point as the signature gives it: 0 or 1.
fn sign_of(signature: &[u8; 64]) -> u8 {
    u8::from(signature[63] & SIGN_BIT != 0)
}

/// Checks `R == sB - hA` in encoded form, with `h = SHA-512(R || A || message) mod q` (RFC 8032 section 5.1.7, without the
/// cofactor).
fn verify(key: &[u8; 32], message: &[u8], signature: &[u8; 64], sign: u8) -> bool {
    let (r, s) = halves(signature);
    if s[31] & BEYOND_S != 0 {
        return false;
    }
    let Some(a) = MontgomeryPoint(*key).to_edwards(sign) else { return false };

    let hash = Sha512::new().chain_update(r).chain_update(a.compress().as_bytes()).chain_update(message).finalize();
    let h = Scalar::from_bytes_mod_order_wide(&hash.into());
    let s = Scalar::from_bytes_mod_order(s);
    EdwardsPoint::vartime_double_scalar_mul_basepoint(&h, &-a, &s).compress().as_bytes() == &r
}

/// `R` and `s`, the latter without the sign bit.
fn halves(signature: &[u8; 64]) -> ([u8; 32], [u8; 32]) {
    let mut r = [0; 32];
    let mut s = [0; 32];
    r.copy_from_slice(&signature[..32]);
    s.copy_from_slice(&signature[32..]);
    s[31] &= !SIGN_BIT;
    (r, s)
}

#[cfg(test)]
#[path = "../../tests/it/harness/signer.rs"]
pub(crate) mod signer;

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use proptest::prelude::*;
    use serde_json::Value;

    use super::{signer::Identity, *};

    fn bytes<const N: usize>(value: &Value) -> [u8; N] {
        decode(value).try_into().unwrap()
    }

    fn decode(value: &Value) -> Vec<u8> {
        STANDARD.decode(value.as_str().unwrap()).unwrap()
    }

    fn montgomery(wire_key: [u8; 33]) -> [u8; 32] {
        wire_key[1..].try_into().unwrap()
    }

    fn vectors() -> Value {
        serde_json::from_str(include_str!("../../tests/vectors/libsignal.json")).unwrap()
    }

    #[test]
    fn verdicts_are_those_of_libsignal() {
        let vectors = vectors();
        let vectors = vectors["xeddsa"].as_array().unwrap();
        assert_eq!(vectors.len(), 20);
        for vector in vectors {
            let key = montgomery(bytes(&vector["publicKey"]));
            let (message, signature) = (decode(&vector["message"]), bytes(&vector["signature"]));
            let why = &vector["why"];
            assert_eq!(Value::from(verify_strict(&key, &message, &signature)), vector["strict"], "strict: {why}");
            assert_eq!(Value::from(verify_lenient(&key, &message, &signature)), vector["lenient"], "lenient: {why}");
        }
    }

    #[test]
    fn the_kyber_key_signed_by_libsignal_verifies() {
        let vector = &vectors()["kyberPreKeys"][0];
        let key = montgomery(bytes(&vector["identityKey"]));
        let (message, signature) = (decode(&vector["publicKey"]), bytes(&vector["signature"]));
        assert!(verify_strict(&key, &message, &signature));
        assert!(!verify_strict(&key, &message[1..], &signature), "without its type byte");
    }

    #[test]
    fn keys_with_either_sign_verify() {
        let mut seen = [0; 2];
        for number in 0..32 {
            let identity = Identity::from_seed(number);
            let signature = identity.sign(b"message");
            assert!(verify_strict(&montgomery(identity.public_key()), b"message", &signature));
            seen[usize::from(sign_of(&signature))] += 1;
        }
        assert!(seen.iter().all(|&count| count > 0), "both signs occur: {seen:?}");
    }

    #[test]
    fn the_top_bit_of_a_key_is_ignored() {
        let identity = Identity::generate();
        let signature = identity.sign(b"message");
        let mut key = montgomery(identity.public_key());
        key[31] |= 0x80;
        assert!(verify_strict(&key, b"message", &signature));
    }

    /// Adds the group order to `s`, which changes the number and not the scalar.
    fn add_order(signature: &mut [u8; 64]) {
        let order = (-Scalar::ONE).to_bytes(); // and 1, which is the first carry
        let sign = signature[63] & SIGN_BIT;
        signature[63] &= !SIGN_BIT;
        let mut carry = 1;
        for (byte, addend) in signature[32..].iter_mut().zip(order) {
            let sum = u16::from(*byte) + u16::from(addend) + carry;
            *byte = sum.to_le_bytes()[0];
            carry = sum >> 8;
        }
        signature[63] |= sign;
    }

    #[test]
    fn s_may_be_unreduced_but_not_reach_2_to_the_253() {
        let identity = Identity::from_seed(1);
        let key = montgomery(identity.public_key());
        let mut signature = identity.sign(b"message");
        add_order(&mut signature);
        assert!(verify_strict(&key, b"message", &signature));
        for _ in 2..=6 {
            add_order(&mut signature);
            assert!(!verify_strict(&key, b"message", &signature));
            assert!(!verify_lenient(&key, b"message", &signature));
        }
    }

    #[test]
    fn degenerate_keys_and_signatures_do_not_panic() {
        let minus_one = {
            let mut key = [0xff; 32];
            (key[0], key[31]) = (0xec, 0x7f);
            key
        };
        for key in [[0; 32], minus_one, [0xff; 32]] {
            for signature in [[0; 64], [0xff; 64], Identity::generate().sign(b"message")] {
                assert!(!verify_strict(&key, b"message", &signature));
                assert!(!verify_lenient(&key, b"message", &signature));
            }
        }
    }

    #[test]
    fn a_key_on_the_twist_verifies_nothing_and_one_of_small_order_anything() {
        // `R` = the neutral element and `s` = 0 fit whenever hA is the neutral element: sooner or later for u = 0 and
        // u = 1, which are points of order 2 and 4, and never for the rest, half of which are on the twist.
        let mut forged = [0; 64];
        forged[0] = 1;
        for u in 0..=255 {
            let mut key = [0; 32];
            key[0] = u;
            let accepted = (0..64).any(|message| verify_lenient(&key, &[message], &forged));
            assert_eq!(accepted, u < 2, "u = {u}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_neither_panic_nor_verify(
            key: [u8; 32], message: Vec<u8>, mut signature in proptest::array::uniform::<_, 64>(any::<u8>()),
            s_in_range: bool,
        ) {
            if s_in_range {
                signature[63] &= 0x9f;
            }
            prop_assert!(!verify_strict(&key, &message, &signature));
            prop_assert!(!verify_lenient(&key, &message, &signature));
        }

        #[test]
        fn only_the_signed_message_and_the_signing_key_verify(
            seed: u64, mut message in prop::collection::vec(any::<u8>(), 1..2000), at: prop::sample::Index,
        ) {
            let identity = Identity::from_seed(seed);
            let key = montgomery(identity.public_key());
            let signature = identity.sign(&message);
            prop_assert!(verify_strict(&key, &message, &signature));
            prop_assert!(verify_lenient(&key, &message, &signature));

            let stranger = montgomery(Identity::from_seed(seed.wrapping_add(1)).public_key());
            prop_assert!(!verify_lenient(&stranger, &message, &signature));
            prop_assert!(!verify_lenient(&key, &message[1..], &signature));
            let bit = at.index(message.len() * 8);
            message[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!verify_lenient(&key, &message, &signature));
        }

        #[test]
        fn every_bit_of_a_signature_counts_but_the_sign_when_lenient(seed: u64, bit in 0usize..512) {
            let identity = Identity::from_seed(seed);
            let key = montgomery(identity.public_key());
            let mut signature = identity.sign(b"message");
            signature[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!verify_strict(&key, b"message", &signature));
            prop_assert_eq!(verify_lenient(&key, b"message", &signature), bit == 511);
        }
    }
}
