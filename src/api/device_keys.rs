//! Keys in JSON: what registration, reset, linking and refill upload, and how it is checked.

use std::panic::resume_unwind;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use crate::api::error::ApiError;
use crate::limits::{LimitSubject, Limits, NoRoom};
use crate::model::keys::{
    KemPublicKey, KeyError, KeyId, OneTimePreKey, PqKeyId, PqPreKey, PreKeys, PublicKey, RegistrationId, Signature,
    SignedPreKey,
};
use crate::telemetry::metrics::Refusal;

/// Characters that the name of a device may have.
const MAX_NAME_CHARS: usize = 100;
/// With more Kyber keys than this, checking their signatures (some 50 µs each) leaves the async threads.
const FEW_SIGNATURES: usize = 4;
/// How long an upload waits for its turn to have them checked.
const SIGNATURES_PATIENCE: Duration = Duration::from_secs(5);

/// An EC prekey with its signature.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SignedPreKeyBody {
    /// Its number.
    pub key_id: i32,
    /// 33 bytes in base64.
    pub public_key: String,
    /// 64 bytes in base64.
    pub signature: String,
}

/// An EC prekey that is handed out once.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OneTimePreKeyBody {
    /// Its number.
    pub key_id: i32,
    /// 33 bytes in base64.
    pub public_key: String,
}

/// A Kyber prekey, one-time or last-resort, with its signature.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PqPreKeyBody {
    /// Its number, not negative.
    pub key_id: i32,
    /// 1569 bytes in base64.
    pub public_key: String,
    /// 64 bytes in base64.
    pub signature: String,
}

/// The prekeys of one upload, not read yet.
pub struct PreKeysBody {
    /// `signedPreKey`
    pub signed: SignedPreKeyBody,
    /// `oneTimePreKeys`
    pub one_time: Vec<OneTimePreKeyBody>,
    /// `pqLastResortPreKey`
    pub pq_last_resort: Option<PqPreKeyBody>,
    /// `pqPreKeys`
    pub pq_one_time: Option<Vec<PqPreKeyBody>>,
}

/// What a device that is about to be made says about itself, not read yet.
pub struct DeviceKeysBody {
    /// `name`
    pub name: Option<String>,
    /// `identityKey`
    pub identity_key: String,
    /// `registrationId`
    pub registration_id: i32,
    /// All its prekeys.
    pub prekeys: PreKeysBody,
}

/// The same, read and checked.
pub struct DeviceKeys {
    /// What its owner calls it.
    pub name: Option<String>,
    /// The identity key that signed its prekeys.
    pub identity: PublicKey,
    /// Its installation, as it names it.
    pub registration_id: RegistrationId,
    /// Its first prekeys.
    pub prekeys: PreKeys,
}

impl DeviceKeysBody {
    /// Reads everything and checks what is cheap, in the order of the contract. A device may have `max` one-time prekeys of
    /// a kind. What is left is [`DeviceKeys::check_pq`].
    pub fn read(self, max: u32) -> Result<DeviceKeys, ApiError> {
        let name = self.name;
        if let Some(name) = &name {
            check_name(name)?;
        }
        let identity = PublicKey::from_base64(&self.identity_key).map_err(in_member("identityKey"))?;
        let prekeys = self.prekeys.read(&identity, max)?;
        if prekeys.needs_stored_last_resort() {
            return Err(ApiError::bad_request("pqPreKeys needs a pqLastResortPreKey beside it"));
        }
        Ok(DeviceKeys { name, identity, registration_id: RegistrationId(self.registration_id), prekeys })
    }
}

impl DeviceKeys {
    /// Checks the signatures of the Kyber keys: see [`check_pq`].
    pub async fn check_pq(mut self, limits: &Limits, subject: LimitSubject) -> Result<Self, ApiError> {
        self.prekeys = check_pq(self.prekeys, self.identity, limits, subject).await?;
        Ok(self)
    }
}

/// Checks the signatures of the Kyber keys of an upload that has many: off the async threads, and in the subject's turn, because
/// a few milliseconds of work are easily asked for. Those of an upload with few were checked when it was read.
pub async fn check_pq(
    prekeys: PreKeys,
    identity: PublicKey,
    limits: &Limits,
    subject: LimitSubject,
) -> Result<PreKeys, ApiError> {
    if has_few_signatures(&prekeys) {
        return Ok(prekeys);
    }
    let turn = limits.signatures.take(subject, 1, SIGNATURES_PATIENCE).await;
    let turn = turn.map_err(|NoRoom| ApiError::unavailable(Refusal::Signatures))?;
    let checking = spawn_blocking(move || {
        // Held to the end of the work, also when the request is given up.
        let _turn = turn;
        prekeys.check_pq(&identity).map(|()| prekeys)
    });
    checking.await.unwrap_or_else(|error| resume_unwind(error.into_panic())).map_err(wrong)
}

impl PreKeysBody {
    /// Reads the prekeys and checks what is cheap against the identity key of their account, in the order of the contract.
    /// A device may have `max` one-time prekeys of a kind. What is left is [`check_pq`].
    ///
    /// Whether [`PreKeys::needs_stored_last_resort`] is in order only the caller knows.
    pub fn read(self, identity: &PublicKey, max: u32) -> Result<PreKeys, ApiError> {
        let signed = read_signed(&self.signed).map_err(in_member("signedPreKey"))?;
        let prekeys = match self.read_others(signed.clone()) {
            Ok(prekeys) => prekeys,
            Err(_) if !signed.is_signed_by(identity) => {
                return Err(wrong(KeyError::Signature { member: "signedPreKey" }));
            }
            Err(error) => return Err(error),
        };
        prekeys.check(identity, max).map_err(wrong)?;
        if has_few_signatures(&prekeys) {
            prekeys.check_pq(identity).map_err(wrong)?;
        }
        Ok(prekeys)
    }

    fn read_others(self, signed: SignedPreKey) -> Result<PreKeys, ApiError> {
        let one_time = self.one_time.iter().map(read_one_time).collect::<Result<_, _>>();
        let pq_last_resort = self.pq_last_resort.as_ref().map(read_pq).transpose();
        let pq_one_time = self.pq_one_time.unwrap_or_default().iter().map(read_pq).collect::<Result<_, _>>();
        Ok(PreKeys {
            signed,
            one_time: one_time.map_err(in_member("oneTimePreKeys"))?,
            pq_last_resort: pq_last_resort.map_err(in_member("pqLastResortPreKey"))?,
            pq_one_time: pq_one_time.map_err(in_member("pqPreKeys"))?,
        })
    }
}

fn has_few_signatures(prekeys: &PreKeys) -> bool {
    prekeys.pq_one_time.len() <= FEW_SIGNATURES
}

fn check_name(name: &str) -> Result<(), ApiError> {
    if name.chars().count() > MAX_NAME_CHARS {
        return Err(ApiError::bad_request("The name of a device must have at most 100 characters"));
    }
    if name.contains('\0') {
        return Err(ApiError::bad_request("The name of a device must not contain a NUL character"));
    }
    Ok(())
}

fn read_signed(body: &SignedPreKeyBody) -> Result<SignedPreKey, KeyError> {
    Ok(SignedPreKey {
        id: KeyId(body.key_id),
        public_key: PublicKey::from_base64(&body.public_key)?,
        signature: Signature::from_base64(&body.signature)?,
    })
}

fn read_one_time(body: &OneTimePreKeyBody) -> Result<OneTimePreKey, KeyError> {
    Ok(OneTimePreKey { id: KeyId(body.key_id), public_key: PublicKey::from_base64(&body.public_key)? })
}

fn read_pq(body: &PqPreKeyBody) -> Result<PqPreKey, KeyError> {
    Ok(PqPreKey {
        id: PqKeyId::new(body.key_id)?,
        public_key: KemPublicKey::from_base64(&body.public_key)?,
        signature: Signature::from_base64(&body.signature)?,
    })
}

fn wrong(error: KeyError) -> ApiError {
    ApiError::bad_request(error.to_string())
}

fn in_member(member: &'static str) -> impl Fn(KeyError) -> ApiError {
    move |error| ApiError::bad_request(format!("{member}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;

    use super::*;
    use crate::config::Config;
    use crate::model::xeddsa::signer::{Identity, ec_public_key, fake_kem_public_key};

    const MAX: u32 = 8;

    fn signed_pre_key(identity: &Identity) -> SignedPreKeyBody {
        let key = ec_public_key(1);
        SignedPreKeyBody {
            key_id: 1,
            public_key: STANDARD.encode(key),
            signature: STANDARD.encode(identity.sign(&key)),
        }
    }

    fn pq_pre_key(identity: &Identity, key_id: i32) -> PqPreKeyBody {
        let key = fake_kem_public_key(u64::try_from(key_id).unwrap());
        PqPreKeyBody { key_id, public_key: STANDARD.encode(&key), signature: STANDARD.encode(identity.sign(&key)) }
    }

    /// As many keys as are allowed.
    fn upload(identity: &Identity) -> DeviceKeysBody {
        let one_time = |key_id| OneTimePreKeyBody { key_id, public_key: STANDARD.encode([5; 33]) };
        DeviceKeysBody {
            name: Some("x".repeat(100)),
            identity_key: identity.public_key_base64(),
            registration_id: -7,
            prekeys: PreKeysBody {
                signed: signed_pre_key(identity),
                one_time: (0..8).map(one_time).collect(),
                pq_last_resort: Some(pq_pre_key(identity, 100)),
                pq_one_time: Some((0..8).map(|id| pq_pre_key(identity, id)).collect()),
            },
        }
    }

    async fn check(body: DeviceKeysBody) -> Result<DeviceKeys, ApiError> {
        let config = Config::embedded(Path::new("unused")).unwrap();
        let limits = Limits::new(&config.rate_limits, &config.account_rates, 0);
        body.read(MAX)?.check_pq(&limits, LimitSubject::Exempt).await
    }

    /// The message for a full upload after `change`; empty when it passes.
    async fn verdict(change: impl FnOnce(&Identity, &mut DeviceKeysBody)) -> String {
        let identity = Identity::generate();
        let mut body = upload(&identity);
        change(&identity, &mut body);
        match check(body).await {
            Ok(_) => String::new(),
            Err(ApiError::BadRequest(message)) => message.into_owned(),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_full_upload_is_read_as_it_is() {
        let identity = Identity::generate();
        let keys = check(upload(&identity)).await.unwrap();
        assert_eq!(keys.name, Some("x".repeat(100)));
        assert_eq!(keys.identity.as_bytes(), &identity.public_key());
        assert_eq!(keys.registration_id, RegistrationId(-7));
        assert_eq!(keys.prekeys.signed.id, KeyId(1));
        assert_eq!(keys.prekeys.one_time.len(), 8);
        assert_eq!(keys.prekeys.pq_last_resort.unwrap().id, PqKeyId::new(100).unwrap());
        assert_eq!(keys.prekeys.pq_one_time.len(), 8);
    }

    #[tokio::test]
    async fn a_name_has_at_most_100_characters_and_no_nul() {
        assert_eq!(verdict(|_, body| body.name = None).await, "");
        assert_eq!(verdict(|_, body| body.name = Some(String::new())).await, "");
        assert_eq!(verdict(|_, body| body.name = Some("\u{1f980}".repeat(100))).await, "");
        assert!(verdict(|_, body| body.name = Some("x".repeat(101))).await.contains("at most 100 characters"));
        assert!(verdict(|_, body| body.name = Some("a\0b".into())).await.contains("NUL"));
    }

    #[tokio::test]
    async fn one_time_kyber_keys_of_a_new_device_need_a_last_resort_key() {
        let message = verdict(|_, body| body.prekeys.pq_last_resort = None).await;
        assert!(message.contains("pqLastResortPreKey"), "{message}");
        let without = |_: &Identity, body: &mut DeviceKeysBody| {
            body.prekeys.pq_last_resort = None;
            body.prekeys.pq_one_time = None;
        };
        assert_eq!(verdict(without).await, "");
    }

    #[tokio::test]
    async fn of_several_mistakes_the_first_in_the_order_of_the_contract_is_named() {
        type Change = fn(&mut DeviceKeysBody);
        let mistakes: [(&str, Change); 9] = [
            ("The name", |body| body.name = Some("x".repeat(101))),
            ("identityKey", |body| body.identity_key = "AAAA".into()),
            ("signedPreKey: a public key", |body| body.prekeys.signed.public_key = STANDARD.encode([5; 32])),
            ("signedPreKey: a signature", |body| body.prekeys.signed.signature = "!".into()),
            ("Invalid signature in signedPreKey", |body| body.prekeys.signed = signed_pre_key(&Identity::generate())),
            ("oneTimePreKeys", |body| body.prekeys.one_time[0].public_key = STANDARD.encode([8; 33])),
            ("pqLastResortPreKey", |body| body.prekeys.pq_last_resort.as_mut().unwrap().key_id = -1),
            ("pqPreKeys", |body| body.prekeys.pq_one_time.as_mut().unwrap()[0].public_key.clear()),
            ("", |_| ()),
        ];
        for (first, (expected, _)) in mistakes.iter().enumerate() {
            // Later changes first: those of `signedPreKey` as a whole would undo the ones before.
            let later_mistakes = |_: &Identity, body: &mut DeviceKeysBody| {
                mistakes[first..].iter().rev().for_each(|(_, change)| change(body));
            };
            let message = verdict(later_mistakes).await;
            assert!(message.starts_with(expected), "{message}, not {expected}");
        }
    }

    #[tokio::test]
    async fn the_signatures_of_few_and_of_many_kyber_keys_are_checked() {
        for count in [1, FEW_SIGNATURES, FEW_SIGNATURES + 1, 8] {
            let truncated = |body: &mut DeviceKeysBody| body.prekeys.pq_one_time.as_mut().unwrap().truncate(count);
            assert_eq!(verdict(|_, body| truncated(body)).await, "", "{count}");
            let message = verdict(|_, body| {
                truncated(body);
                body.prekeys.pq_one_time.as_mut().unwrap()[count - 1] = pq_pre_key(&Identity::generate(), 7);
            });
            assert_eq!(message.await, "Invalid signature in pqPreKeys", "{count}");
        }
    }

    #[tokio::test]
    async fn an_upload_has_distinct_ids_and_not_too_many_keys() {
        let message = verdict(|_, body| body.prekeys.one_time[1].key_id = 0).await;
        assert!(message.contains("distinct"), "{message}");
        let ninth = OneTimePreKeyBody { key_id: 9, public_key: STANDARD.encode([5; 33]) };
        let message = verdict(|_, body| body.prekeys.one_time.push(ninth)).await;
        assert_eq!(message, "oneTimePreKeys may hold at most 8 keys");
        let message =
            verdict(|identity, body| body.prekeys.pq_one_time.as_mut().unwrap().push(pq_pre_key(identity, 9)));
        assert_eq!(message.await, "pqPreKeys may hold at most 8 keys");
    }
}
