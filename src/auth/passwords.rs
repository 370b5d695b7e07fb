//! Passwords: hashing them and checking them, a few at a time and off the async threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Params, PasswordHasher, PasswordVerifier, Version};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::error;

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
    hashes_done: AtomicU64,
}

impl Passwords {
    /// A queue with as many hashes at once as there are processors.
    pub fn new() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            queue: Arc::new(Queue {
                places: Arc::new(Semaphore::new(processors + MAX_WAITING)),
                processors: Arc::new(Semaphore::new(processors)),
                hashes_done: AtomicU64::new(0),
            }),
        }
    }

    /// The hash of a password, with a salt of its own, in PHC form.
    pub async fn hash(&self, password: String) -> Result<String, Busy> {
        self.in_turn(move || {
            argon2id().hash_password(password.as_bytes()).expect("the parameters are valid").to_string()
        })
        .await
    }

    /// Whether the password is the one that was hashed. Without a hash it never is, and finding that out takes the same
    /// work: so the time tells nobody whether an account exists.
    pub async fn verify(&self, password: String, hash: Option<String>) -> Result<bool, Busy> {
        self.in_turn(move || match hash {
            Some(hash) => is_hash_of(&hash, &password),
            None => {
                let mut unused = [0; Params::DEFAULT_OUTPUT_LEN];
                let salt = b"nobody's account";
                argon2id()
                    .hash_password_into(password.as_bytes(), salt, &mut unused)
                    .expect("the parameters are valid");
                std::hint::black_box(unused);
                false
            }
        })
        .await
    }

    /// How many hashes have been computed.
    pub fn hashes_done(&self) -> u64 {
        self.queue.hashes_done.load(Ordering::Relaxed)
    }

    /// Runs `work` when a processor is free. Whoever stops waiting gives up the place at once; work that has begun keeps
    /// its permits to its end, because its memory is taken until then.
    async fn in_turn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Busy> {
        let place = self.queue.places.clone().try_acquire_owned().map_err(|_| Busy)?;
        let processor = self.queue.processors.clone().acquire_owned().await.expect("the semaphore is never closed");
        let queue = self.queue.clone();
        let done = tokio::task::spawn_blocking(move || {
            let _permits: [OwnedSemaphorePermit; 2] = [processor, place];
            let result = work();
            queue.hashes_done.fetch_add(1, Ordering::Relaxed);
            result
        });
        Ok(done.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())))
    }
}

impl Default for Passwords {
    fn default() -> Self {
        Self::new()
    }
}

fn argon2id() -> Argon2<'static> {
    let params = Params::new(MEMORY_KIB, PASSES, LANES, None).expect("the parameters are valid");
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

/// The costs are those of the hash, so older hashes stay good when ours change.
fn is_hash_of(hash: &str, password: &str) -> bool {
    match PasswordHash::new(hash) {
        Ok(hash) => argon2id().verify_password(password.as_bytes(), &hash).is_ok(),
        Err(error) => {
            error!(%error, "a stored password hash can't be read; nobody can log in with it");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use futures_util::future::join_all;
    use futures_util::poll;

    use super::*;

    const PASSWORD: &str = "correct horse battery staple";

    #[tokio::test]
    async fn only_the_password_that_was_hashed_is_right() {
        let passwords = Passwords::new();
        let hash = passwords.hash(PASSWORD.into()).await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert_eq!(passwords.verify(PASSWORD.into(), Some(hash.clone())).await, Ok(true));
        assert_eq!(passwords.verify("correct horse battery stable".into(), Some(hash.clone())).await, Ok(false));
        assert_eq!(passwords.verify(String::new(), Some(hash)).await, Ok(false));
    }

    #[tokio::test]
    async fn one_password_has_many_hashes() {
        let passwords = Passwords::new();
        assert_ne!(passwords.hash(PASSWORD.into()).await.unwrap(), passwords.hash(PASSWORD.into()).await.unwrap());
    }

    #[tokio::test]
    async fn without_a_hash_nothing_is_right_after_the_same_work() {
        let passwords = Passwords::new();
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
        assert_eq!(Passwords::new().verify(PASSWORD.into(), Some(hash)).await, Ok(true));
    }

    #[tokio::test]
    async fn a_damaged_hash_fits_no_password() {
        for damaged in ["", "nonsense", "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ"] {
            assert_eq!(Passwords::new().verify(PASSWORD.into(), Some(damaged.into())).await, Ok(false), "{damaged}");
        }
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once_and_recovers() {
        let passwords = Passwords::new();
        let processors = passwords.queue.processors.available_permits();
        let (ends, waits): (Vec<_>, Vec<_>) = (0..processors).map(|_| mpsc::channel::<()>()).unzip();
        let mut running = join_all(waits.into_iter().map(|wait| passwords.in_turn(move || wait.recv().is_ok())));
        assert!(poll!(&mut running).is_pending());
        assert_eq!(passwords.queue.processors.available_permits(), 0);

        let mut waiting = Box::pin(join_all((0..MAX_WAITING).map(|_| passwords.in_turn(|| ()))));
        assert!(poll!(&mut waiting).is_pending());
        assert_eq!(passwords.hash(PASSWORD.into()).await, Err(Busy));
        assert_eq!(passwords.verify(PASSWORD.into(), None).await, Err(Busy));

        drop(waiting); // their clients hang up
        let next = passwords.in_turn(|| "next");
        ends.iter().for_each(|end| end.send(()).unwrap());
        assert_eq!(next.await, Ok("next"));
        assert!(running.await.iter().all(|done| *done == Ok(true)));
    }

    #[tokio::test]
    async fn work_that_has_begun_keeps_its_memory_counted_though_its_client_is_gone() {
        let passwords = Passwords::new();
        let processors = passwords.queue.processors.available_permits();
        let (end, wait) = mpsc::channel::<()>();
        let mut running = Box::pin(passwords.in_turn(move || wait.recv().is_ok()));
        assert!(poll!(&mut running).is_pending());
        drop(running);
        assert_eq!(passwords.queue.processors.available_permits(), processors - 1);
        end.send(()).unwrap();
        let all = passwords.queue.processors.acquire_many(u32::try_from(processors).unwrap()).await;
        assert!(all.is_ok(), "the permit comes back when the work ends");
    }
}
