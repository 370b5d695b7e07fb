//! Passwords: hashing them and checking them, a few at a time and off the async threads.

use std::sync::{Arc, Mutex, PoisonError};

use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Block, Params, Version};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use subtle::ConstantTimeEq;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::error;

use crate::telemetry::metrics::{Held, Metrics};

/// What one hash costs: 19 MiB, two passes, one lane (OWASP's first choice for Argon2id).
const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;

/// How many may wait for a processor. At some 25 ms each, those behind would not wait for their answer anyway.
const MAX_WAITING: usize = 64;

/// Too many passwords are waiting; come again in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy;

/// Hashes and checks passwords. Cloning gives the same queue.
#[derive(Clone)]
pub struct Passwords {
    queue: Arc<Queue>,
}

struct Queue {
    /// One permit for everybody who is in here, hashing or waiting.
    places: Arc<Semaphore>,
    /// One permit for each processor, so that no more memory than that is taken at once.
    processors: Arc<Semaphore>,
    /// What hashes work in, one for each processor at the most. It is kept, because allocators hand such large pieces
    /// back late or never when threads take turns with them.
    memory: Mutex<Vec<Memory>>,
    metrics: Metrics,
}

type Memory = Vec<Block>;

impl Passwords {
    /// A queue with as many hashes at once as there are processors.
    pub fn new(metrics: &Metrics) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            queue: Arc::new(Queue {
                places: Arc::new(Semaphore::new(processors + MAX_WAITING)),
                processors: Arc::new(Semaphore::new(processors)),
                memory: Mutex::default(),
                metrics: metrics.clone(),
            }),
        }
    }

    /// The hash of a password, with a salt of its own, in PHC form.
    pub async fn hash(&self, password: String) -> Result<String, Busy> {
        self.in_turn(move |memory| {
            let salt: [u8; 16] = rand::random();
            let mut output = [0; Params::DEFAULT_OUTPUT_LEN];
            argon2id(our_costs(), &password, &salt, &mut output, memory).expect("the parameters are valid");
            let (salt, output) = (STANDARD_NO_PAD.encode(salt), STANDARD_NO_PAD.encode(output));
            format!("$argon2id$v=19$m={MEMORY_KIB},t={PASSES},p={LANES}${salt}${output}")
        })
        .await
    }

    /// Whether the password is the one that was hashed. Without a hash it never is, and finding that out takes the same
    /// work: so the time tells nobody whether an account exists.
    pub async fn verify(&self, password: String, hash: Option<String>) -> Result<bool, Busy> {
        self.in_turn(move |memory| match hash {
            Some(hash) => is_hash_of(&hash, &password, memory),
            None => {
                let mut unused = [0; Params::DEFAULT_OUTPUT_LEN];
                argon2id(our_costs(), &password, b"nobody's account", &mut unused, memory)
                    .expect("the parameters are valid");
                std::hint::black_box(unused);
                false
            }
        })
        .await
    }

    /// How many hashes have been computed.
    pub fn hashes_done(&self) -> u64 {
        self.queue.metrics.password_hashes_done.value(())
    }

    /// Runs `work` when a processor is free. Whoever stops waiting gives up the place at once; work that has begun keeps
    /// its permits to its end, because its memory is taken until then.
    async fn in_turn<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Memory) -> T + Send + 'static,
    ) -> Result<T, Busy> {
        let metrics = &self.queue.metrics;
        let Ok(place) = self.queue.places.clone().try_acquire_owned() else {
            metrics.passwords_refused.one(());
            return Err(Busy);
        };
        let held = metrics.password_hashes.hold(());
        let processor = self.queue.processors.clone().acquire_owned().await.expect("the semaphore is never closed");
        let queue = self.queue.clone();
        let done = tokio::task::spawn_blocking(move || {
            let _permits: ([OwnedSemaphorePermit; 2], Held) = ([processor, place], held);
            let mut memory = queue.memory().pop().unwrap_or_default();
            let result = work(&mut memory);
            queue.memory().push(memory);
            queue.metrics.password_hashes_done.one(());
            result
        });
        Ok(done.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())))
    }
}

impl Queue {
    fn memory(&self) -> std::sync::MutexGuard<'_, Vec<Memory>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn our_costs() -> Params {
    Params::new(MEMORY_KIB, PASSES, LANES, None).expect("the parameters are valid")
}

fn argon2id(
    costs: Params,
    password: &str,
    salt: &[u8],
    output: &mut [u8],
    memory: &mut Memory,
) -> Result<(), argon2::Error> {
    memory.resize(costs.block_count(), Block::default());
    let argon2id = Argon2::new(Algorithm::Argon2id, Version::V0x13, costs);
    argon2id.hash_password_into_with_memory(password.as_bytes(), salt, output, memory)
}

/// The costs are those of the hash, so older hashes stay good when ours change.
fn is_hash_of(hash: &str, password: &str, memory: &mut Memory) -> bool {
    let Some((costs, salt, expected)) = parts(hash) else {
        error!("a stored password hash can't be read; nobody can log in with it");
        return false;
    };
    let mut output = vec![0; expected.len()];
    argon2id(costs, password, &salt, &mut output, memory).is_ok() && output.ct_eq(&expected).into()
}

/// Costs, salt and output of a hash in PHC form; `None` when it isn't one of Argon2id, version 19.
fn parts(hash: &str) -> Option<(Params, Vec<u8>, Vec<u8>)> {
    let hash = PasswordHash::new(hash).ok()?;
    if hash.algorithm.as_str() != "argon2id" || hash.version != Some(19) {
        return None;
    }
    let costs = Params::try_from(&hash).ok()?;
    Some((costs, hash.salt?.as_ref().to_vec(), hash.hash?.as_bytes().to_vec()))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use argon2::{PasswordHasher, PasswordVerifier};
    use futures_util::future::join_all;
    use futures_util::poll;

    use super::*;

    const PASSWORD: &str = "correct horse battery staple";

    fn passwords() -> Passwords {
        Passwords::new(&Metrics::unread())
    }

    #[tokio::test]
    async fn only_the_password_that_was_hashed_is_right() {
        let passwords = passwords();
        let hash = passwords.hash(PASSWORD.into()).await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert_eq!(passwords.verify(PASSWORD.into(), Some(hash.clone())).await, Ok(true));
        assert_eq!(passwords.verify("correct horse battery stable".into(), Some(hash.clone())).await, Ok(false));
        assert_eq!(passwords.verify(String::new(), Some(hash)).await, Ok(false));
    }

    #[tokio::test]
    async fn one_password_has_many_hashes() {
        let passwords = passwords();
        assert_ne!(passwords.hash(PASSWORD.into()).await.unwrap(), passwords.hash(PASSWORD.into()).await.unwrap());
    }

    #[tokio::test]
    async fn without_a_hash_nothing_is_right_after_the_same_work() {
        let passwords = passwords();
        let hash = passwords.hash(PASSWORD.into()).await.unwrap();
        assert_eq!(passwords.hashes_done(), 1);
        passwords.verify(PASSWORD.into(), Some(hash)).await.unwrap();
        assert_eq!(passwords.hashes_done(), 2);
        assert_eq!(passwords.verify(PASSWORD.into(), None).await, Ok(false));
        assert_eq!(passwords.hashes_done(), 3);
    }

    #[tokio::test]
    async fn a_hash_made_with_other_costs_stays_good() {
        let costs = Params::new(1024, 1, 1, None).unwrap();
        let older = Argon2::new(Algorithm::Argon2id, Version::V0x13, costs);
        let hash = older.hash_password(PASSWORD.as_bytes()).unwrap().to_string();
        assert_eq!(passwords().verify(PASSWORD.into(), Some(hash)).await, Ok(true));
    }

    #[tokio::test]
    async fn our_hashes_are_what_the_library_itself_makes_and_accepts() {
        let hash = passwords().hash(PASSWORD.into()).await.unwrap();
        let parsed = PasswordHash::new(&hash).unwrap();
        assert!(Argon2::default().verify_password(PASSWORD.as_bytes(), &parsed).is_ok());
    }

    #[tokio::test]
    async fn no_more_memory_is_kept_than_processors_can_use() {
        let passwords = passwords();
        join_all((0..20).map(|_| passwords.verify(PASSWORD.into(), None))).await;
        let kept = passwords.queue.memory().len();
        assert!((1..=passwords.queue.processors.available_permits()).contains(&kept), "{kept}");
    }

    #[tokio::test]
    async fn a_damaged_hash_fits_no_password() {
        for damaged in ["", "nonsense", "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ"] {
            assert_eq!(passwords().verify(PASSWORD.into(), Some(damaged.into())).await, Ok(false), "{damaged}");
        }
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once_and_recovers() {
        let passwords = passwords();
        let processors = passwords.queue.processors.available_permits();
        let (ends, waits): (Vec<_>, Vec<_>) = (0..processors).map(|_| mpsc::channel::<()>()).unzip();
        let mut running = join_all(waits.into_iter().map(|wait| passwords.in_turn(move |_| wait.recv().is_ok())));
        assert!(poll!(&mut running).is_pending());
        assert_eq!(passwords.queue.processors.available_permits(), 0);

        let mut waiting = Box::pin(join_all((0..MAX_WAITING).map(|_| passwords.in_turn(|_| ()))));
        assert!(poll!(&mut waiting).is_pending());
        assert_eq!(passwords.hash(PASSWORD.into()).await, Err(Busy));
        assert_eq!(passwords.verify(PASSWORD.into(), None).await, Err(Busy));

        drop(waiting); // their clients hang up
        let next = passwords.in_turn(|_| "next");
        ends.iter().for_each(|end| end.send(()).unwrap());
        assert_eq!(next.await, Ok("next"));
        assert!(running.await.iter().all(|done| *done == Ok(true)));
    }

    #[tokio::test]
    async fn work_that_has_begun_keeps_its_memory_counted_though_its_client_is_gone() {
        let passwords = passwords();
        let processors = passwords.queue.processors.available_permits();
        let (end, wait) = mpsc::channel::<()>();
        let mut running = Box::pin(passwords.in_turn(move |_| wait.recv().is_ok()));
        assert!(poll!(&mut running).is_pending());
        drop(running);
        assert_eq!(passwords.queue.processors.available_permits(), processors - 1);
        end.send(()).unwrap();
        let all = passwords.queue.processors.acquire_many(u32::try_from(processors).unwrap()).await;
        assert!(all.is_ok(), "the permit comes back when the work ends");
    }
}
