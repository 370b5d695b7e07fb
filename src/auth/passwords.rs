//! Passwords: hashing them and checking them, a few at a time and off the async threads.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Block, Params, Version};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use subtle::ConstantTimeEq;
use tracing::error;

use crate::limits::{
    LimitSubject, Quota, RateLimit, ResourceLimit, ResourceLimitConfig, ResourcePermit as Place, Scope,
};
use crate::telemetry::metrics::{ActiveGuard, Metrics, Refusal};

/// What one hash costs: 19 MiB, two passes, one lane (OWASP's first choice for Argon2id).
const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;

/// Wrong passwords after which a network (/24, /48) has to wait in the queue apart …
const WRONG_AT_ONCE: u32 = 2;
/// … and how many of them are forgotten in an hour.
const WRONG_PER_HOUR: u32 = 60;
/// Requests that may wait for a processor. Networks take turns, so only an attack from about as many networks as this would
/// keep others waiting.
const MAX_WAITING: usize = 1024;
/// The longest wait for a processor. Few clients wait longer for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Too many passwords are waiting, also of this client's network. The client should try again in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy;

/// Hashes and checks passwords. Cloning gives the same queue.
#[derive(Clone)]
pub struct Passwords {
    queue: Arc<Queue>,
}

struct Queue {
    /// One for each processor. Networks that wait take turns.
    processors: ResourceLimit,
    /// Half as many in addition, for networks with wrong passwords, so that other networks never wait for them.
    aside: ResourceLimit,
    /// Wrong passwords of each network.
    wrong: RateLimit,
    /// What hashes work in, one for each place at most. It is kept, because allocators hand such large pieces
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
                processors: ResourceLimit::new(in_turn(processors)),
                aside: ResourceLimit::new(in_turn(processors.div_ceil(2))),
                wrong: RateLimit::new(Refusal::PasswordLimit)
                    .with(Scope::Block, Quota::per_hour_with_burst(WRONG_PER_HOUR, WRONG_AT_ONCE)),
                memory: Mutex::default(),
                metrics: metrics.clone(),
            }),
        }
    }

    /// The hash of a password, with a salt of its own, in PHC form.
    pub async fn hash(&self, password: String, client: LimitSubject) -> Result<String, Busy> {
        self.in_turn(&self.queue.processors, client, move |memory| {
            let salt: [u8; 16] = rand::random();
            let mut output = [0; Params::DEFAULT_OUTPUT_LEN];
            argon2id(our_costs(), &password, &salt, &mut output, memory).expect("the parameters are valid");
            let (salt, output) = (STANDARD_NO_PAD.encode(salt), STANDARD_NO_PAD.encode(output));
            format!("$argon2id$v=19$m={MEMORY_KIB},t={PASSES},p={LANES}${salt}${output}")
        })
        .await
    }

    /// Whether the password is the one that was hashed. Without a hash it never is, and finding that out takes the same
    /// work: so the time does not tell whether an account exists.
    pub async fn verify(&self, password: String, hash: Option<String>, client: LimitSubject) -> Result<bool, Busy> {
        // Only a wrong password costs a token. Until the result is known, a try counts as wrong.
        let is_trusted = self.queue.wrong.take(client).is_ok();
        let places = if is_trusted { &self.queue.processors } else { &self.queue.aside };
        let is_right = self
            .in_turn(places, client, move |memory| match hash {
                Some(hash) => is_hash_of(&hash, &password, memory),
                None => {
                    let mut unused = [0; Params::DEFAULT_OUTPUT_LEN];
                    argon2id(our_costs(), &password, b"nobody's account", &mut unused, memory)
                        .expect("the parameters are valid");
                    std::hint::black_box(unused);
                    false
                }
            })
            .await;
        if is_trusted && is_right != Ok(false) {
            self.queue.wrong.release(client);
        }
        is_right
    }

    /// How many hashes have been computed.
    pub fn hashes_done(&self) -> u64 {
        self.queue.metrics.password_hashes_done.value(())
    }

    /// Runs `work` when a processor is free. A caller that stops waiting gives up its place at once; work that has begun
    /// keeps its processor to its end, because its memory is taken until then.
    async fn in_turn<T: Send + 'static>(
        &self,
        places: &ResourceLimit,
        client: LimitSubject,
        work: impl FnOnce(&mut Memory) -> T + Send + 'static,
    ) -> Result<T, Busy> {
        let metrics = &self.queue.metrics;
        let held = metrics.password_hashes.hold(());
        let Ok(processor) = places.take(client, 1, PATIENCE).await else {
            metrics.passwords_refused.increment(());
            return Err(Busy);
        };
        let queue = self.queue.clone();
        let done = tokio::task::spawn_blocking(move || {
            let _counted: (Place, ActiveGuard) = (processor, held);
            let mut memory = queue.memory().pop().unwrap_or_default();
            let result = work(&mut memory);
            queue.memory().push(memory);
            queue.metrics.password_hashes_done.increment(());
            result
        });
        Ok(done.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())))
    }
}

/// Places for which networks take turns.
fn in_turn(places: usize) -> ResourceLimitConfig {
    let total = u32::try_from(places).unwrap_or(u32::MAX);
    ResourceLimitConfig { max_waiting: MAX_WAITING, fairness: Scope::Block, ..ResourceLimitConfig::total(total) }
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

    const CLIENT: LimitSubject = LimitSubject::Exempt;

    fn processors() -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }

    fn passwords() -> Passwords {
        Passwords::new(&Metrics::unexported())
    }

    #[tokio::test]
    async fn only_the_password_that_was_hashed_is_right() {
        let passwords = passwords();
        let hash = passwords.hash(PASSWORD.into(), CLIENT).await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert_eq!(passwords.verify(PASSWORD.into(), Some(hash.clone()), CLIENT).await, Ok(true));
        assert_eq!(
            passwords.verify("correct horse battery stable".into(), Some(hash.clone()), CLIENT).await,
            Ok(false)
        );
        assert_eq!(passwords.verify(String::new(), Some(hash), CLIENT).await, Ok(false));
    }

    #[tokio::test]
    async fn one_password_has_many_hashes() {
        let passwords = passwords();
        assert_ne!(
            passwords.hash(PASSWORD.into(), CLIENT).await.unwrap(),
            passwords.hash(PASSWORD.into(), CLIENT).await.unwrap()
        );
    }

    #[tokio::test]
    async fn without_a_hash_nothing_is_right_after_the_same_work() {
        let passwords = passwords();
        let hash = passwords.hash(PASSWORD.into(), CLIENT).await.unwrap();
        assert_eq!(passwords.hashes_done(), 1);
        passwords.verify(PASSWORD.into(), Some(hash), CLIENT).await.unwrap();
        assert_eq!(passwords.hashes_done(), 2);
        assert_eq!(passwords.verify(PASSWORD.into(), None, CLIENT).await, Ok(false));
        assert_eq!(passwords.hashes_done(), 3);
    }

    #[tokio::test]
    async fn a_hash_made_with_other_costs_stays_good() {
        let costs = Params::new(1024, 1, 1, None).unwrap();
        let older = Argon2::new(Algorithm::Argon2id, Version::V0x13, costs);
        let hash = older.hash_password(PASSWORD.as_bytes()).unwrap().to_string();
        assert_eq!(passwords().verify(PASSWORD.into(), Some(hash), CLIENT).await, Ok(true));
    }

    #[tokio::test]
    async fn our_hashes_are_what_the_library_itself_makes_and_accepts() {
        let hash = passwords().hash(PASSWORD.into(), CLIENT).await.unwrap();
        let parsed = PasswordHash::new(&hash).unwrap();
        assert!(Argon2::default().verify_password(PASSWORD.as_bytes(), &parsed).is_ok());
    }

    #[tokio::test]
    async fn no_more_memory_is_kept_than_processors_can_use() {
        let passwords = passwords();
        join_all((0..20).map(|_| passwords.verify(PASSWORD.into(), None, CLIENT))).await;
        let kept = passwords.queue.memory().len();
        assert!((1..=processors() + processors().div_ceil(2)).contains(&kept), "{kept}");
    }

    #[tokio::test]
    async fn a_damaged_hash_fits_no_password() {
        for damaged in ["", "nonsense", "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ"] {
            assert_eq!(passwords().verify(PASSWORD.into(), Some(damaged.into()), CLIENT).await, Ok(false), "{damaged}");
        }
    }

    fn network(n: usize) -> LimitSubject {
        LimitSubject::Address(std::net::Ipv4Addr::new(198, 18, n as u8, 1).into())
    }

    fn taken(passwords: &Passwords) -> usize {
        passwords.queue.processors.taken() as usize
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once_and_recovers() {
        let passwords = passwords();
        let (ends, waits): (Vec<_>, Vec<_>) = (0..processors()).map(|_| mpsc::channel::<()>()).unzip();
        let mut running = join_all(
            waits
                .into_iter()
                .map(|wait| passwords.in_turn(&passwords.queue.processors, CLIENT, move |_| wait.recv().is_ok())),
        );
        assert!(poll!(&mut running).is_pending());
        assert_eq!(taken(&passwords), processors());

        let mut waiting = Box::pin(join_all(
            (0..MAX_WAITING).map(|_| passwords.in_turn(&passwords.queue.processors, network(1), |_| ())),
        ));
        assert!(poll!(&mut waiting).is_pending());
        assert_eq!(passwords.hash(PASSWORD.into(), network(1)).await, Err(Busy));

        // The network that fills it makes room for another one.
        let mut other = Box::pin(passwords.in_turn(&passwords.queue.processors, network(2), |_| "other"));
        assert!(poll!(&mut other).is_pending());

        drop(waiting); // their clients hang up
        ends.iter().for_each(|end| end.send(()).unwrap());
        assert_eq!(other.await, Ok("other"));
        assert!(running.await.iter().all(|done| *done == Ok(true)));
    }

    #[tokio::test]
    async fn work_that_has_begun_keeps_its_memory_counted_though_its_client_is_gone() {
        let passwords = passwords();
        let (end, wait) = mpsc::channel::<()>();
        let mut running =
            Box::pin(passwords.in_turn(&passwords.queue.processors, CLIENT, move |_| wait.recv().is_ok()));
        assert!(poll!(&mut running).is_pending());
        drop(running);
        assert_eq!(taken(&passwords), 1);
        end.send(()).unwrap();
        let all = u32::try_from(processors()).unwrap();
        let all = passwords.queue.processors.take(CLIENT, all, PATIENCE).await;
        assert!(all.is_ok(), "the processor is free when the work ends");
    }

    /// Many networks that ask without a pause make others wait for a few turns, and are served all the same.
    #[tokio::test(flavor = "multi_thread")]
    async fn networks_take_turns() {
        let passwords = passwords();
        let (end, wait) = mpsc::channel::<()>();
        let blocked: Vec<_> = (1..processors()).map(|_| passwords.queue.processors.try_take(CLIENT, 1)).collect();
        let mut first = Box::pin(passwords.in_turn(&passwords.queue.processors, CLIENT, move |_| wait.recv().is_ok()));
        assert!(poll!(&mut first).is_pending());
        let order = Arc::new(Mutex::new(Vec::new()));
        let turn = |n: usize| {
            let order = order.clone();
            passwords.in_turn(&passwords.queue.processors, network(n), move |_| order.lock().unwrap().push(n))
        };
        // One network asks for fifty, then another one for one.
        let mut many = Box::pin(join_all((0..50).map(|_| turn(1))));
        assert!(poll!(&mut many).is_pending());
        let mut one = Box::pin(turn(2));
        assert!(poll!(&mut one).is_pending());
        end.send(()).unwrap();
        let _ = tokio::join!(first, many, one);
        let place = order.lock().unwrap().iter().position(|n| *n == 2).unwrap();
        assert!(place <= 1, "{place}");
        drop(blocked);
    }

    #[tokio::test]
    async fn networks_that_guess_wait_apart_from_those_that_do_not() {
        let passwords = passwords();
        let hash = passwords.hash(PASSWORD.into(), CLIENT).await.unwrap();
        for _ in 0..WRONG_AT_ONCE {
            assert_eq!(passwords.verify("wrong".into(), Some(hash.clone()), network(1)).await, Ok(false));
            assert_eq!(passwords.verify(PASSWORD.into(), Some(hash.clone()), network(2)).await, Ok(true));
        }
        let all = |places: &ResourceLimit, n: usize| places.try_take(CLIENT, u32::try_from(n).unwrap()).unwrap();
        let _aside = all(&passwords.queue.aside, processors().div_ceil(2));
        let mut guess = Box::pin(passwords.verify("wrong".into(), Some(hash.clone()), network(1)));
        assert!(poll!(&mut guess).is_pending());
        assert_eq!(passwords.verify(PASSWORD.into(), Some(hash), network(2)).await, Ok(true));
        assert!(poll!(&mut guess).is_pending(), "it waits for its own kind");
    }
}
