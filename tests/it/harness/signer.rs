//! Keys and signatures as libsignal's clients make them, for tests.
//!
//! Also compiled into the unit tests of `model`, so it uses nothing else of the harness.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use curve25519_dalek::{EdwardsPoint, MontgomeryPoint, Scalar, scalar::clamp_integer};
use sha2::{Digest, Sha512};

/// An account's identity key pair.
pub struct Identity {
    secret: [u8; 32],
}

impl Identity {
    /// A new one each time.
    pub fn generate() -> Self {
        Self::from_seed(rand::random())
    }

    /// The same one for the same seed.
    pub fn from_seed(seed: u64) -> Self {
        Self { secret: clamp_integer(pseudorandom(b"ec", seed, 0)) }
    }

    /// As on the wire: 0x05 and the 32 bytes of X25519.
    pub fn public_key(&self) -> [u8; 33] {
        let mut key = [0x05; 33];
        key[1..].copy_from_slice(MontgomeryPoint::mul_base_clamped(self.secret).as_bytes());
        key
    }

    /// As in JSON.
    pub fn public_key_base64(&self) -> String {
        STANDARD.encode(self.public_key())
    }

    /// Signs in libsignal's form of XEdDSA: the sign of the Edwards key goes into the top bit of the signature.
    ///
    /// libsignal mixes random bytes into the nonce and this doesn't, which a verifier cannot tell.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        let secret = Scalar::from_bytes_mod_order(self.secret);
        let public = EdwardsPoint::mul_base(&secret).compress();
        let mut domain = [0xff; 32];
        domain[0] = 0xfe;

        let nonce = hash(&[&domain, &self.secret, message]);
        let r = EdwardsPoint::mul_base(&nonce).compress();
        let s = nonce + hash(&[r.as_bytes(), public.as_bytes(), message]) * secret;

        let mut signature = [0; 64];
        signature[..32].copy_from_slice(r.as_bytes());
        signature[32..].copy_from_slice(s.as_bytes());
        signature[63] |= public.as_bytes()[31] & 0x80;
        signature
    }
}

/// A curve point as on the wire, 33 bytes, for signed and one-time prekeys. The same one for the same seed.
pub fn ec_public_key(seed: u64) -> [u8; 33] {
    Identity::from_seed(seed).public_key()
}

/// Looks like a Kyber-1024 public key on the wire, 0x08 and 1568 bytes, but nobody could encrypt to it. The same one for
/// the same seed.
pub fn fake_kem_public_key(seed: u64) -> Vec<u8> {
    let body = (0..1568 / 32).flat_map(|block| pseudorandom(b"kem", seed, block));
    std::iter::once(0x08).chain(body).collect()
}

fn hash(parts: &[&[u8]]) -> Scalar {
    let hash = parts.iter().fold(Sha512::new(), Sha512::chain_update).finalize();
    Scalar::from_bytes_mod_order_wide(&hash.into())
}

fn pseudorandom(purpose: &[u8], seed: u64, block: u32) -> [u8; 32] {
    let hash: [u8; 64] = Sha512::new()
        .chain_update(purpose)
        .chain_update(seed.to_be_bytes())
        .chain_update(block.to_be_bytes())
        .finalize()
        .into();
    let mut bytes = [0; 32];
    bytes.copy_from_slice(&hash[..32]);
    bytes
}
