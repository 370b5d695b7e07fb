//! Resolves the names of push providers, on separate threads.
//!
//! The system's resolver blocks, for many seconds if a name's servers never answer. Clients choose these names. So there is
//! a bounded number of threads for the resolver, with a share for each domain. A caller waits for a limited time; its thread
//! counts until the resolver returns. Addresses are used again for a minute, so that a provider in use seldom needs a
//! thread, and for up to an hour when there is no thread or no answer.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use crate::limits::{LimitSubject, ResourceLimit, ResourceLimitConfig, ResourcePermit, Scope};

/// Threads in all.
const THREADS: u32 = 32;
/// Threads that ask for names of one domain.
const THREADS_OF_DOMAIN: u32 = 4;
/// Callers that wait for a thread.
const WAITING: usize = 256;
/// How long a caller waits for a thread, and then for the answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long addresses are used without asking again.
const FRESH: Duration = Duration::from_mins(1);
/// How long they are used when there is no thread or no answer.
const USABLE: Duration = Duration::from_hours(1);
/// Names whose addresses are remembered; the oldest gives way.
const REMEMBERED: usize = 1024;
/// Resolvers need little stack.
const STACK_BYTES: usize = 512 << 10;

/// How the addresses of a name are found: the system's resolver, or another one in a test.
type Ask = dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync;

/// Finds the addresses of names. Cloning gives the same threads and the same memory.
#[derive(Clone)]
pub(super) struct Names {
    threads: ResourceLimit,
    found: Arc<Mutex<HashMap<String, Found>>>,
    ask: Arc<Ask>,
}

struct Found {
    addresses: Vec<IpAddr>,
    at: Instant,
}

impl Names {
    /// Asks the system's resolver.
    pub fn of_the_system() -> Self {
        Self::asking(|name| Ok((name, 0).to_socket_addrs()?.map(|address| address.ip()).collect()))
    }

    fn asking(ask: impl Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync + 'static) -> Self {
        let threads = ResourceLimit::new(ResourceLimitConfig {
            shares: vec![(Scope::Own, THREADS_OF_DOMAIN)],
            max_waiting: WAITING,
            ..ResourceLimitConfig::total(THREADS)
        });
        Self { threads, found: Arc::default(), ask: Arc::new(ask) }
    }

    /// The addresses of a name. An error when it has none, or none can be found in time.
    pub async fn addresses(&self, name: &str) -> io::Result<Vec<IpAddr>> {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        if let Some(addresses) = self.remembered(&name, FRESH) {
            return Ok(addresses);
        }
        let asked = async {
            let thread = self.threads.take(LimitSubject::named(domain(&name)), 1, PATIENCE).await;
            let thread = thread.map_err(|_| io::Error::from(io::ErrorKind::ResourceBusy))?;
            let answer = timeout(PATIENCE, self.question(name.clone(), thread)?).await?;
            answer.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?
        };
        match asked.await {
            Ok(addresses) => {
                self.remember(name, &addresses);
                Ok(addresses)
            }
            // Only a missing answer lets old addresses count, not the answer that there is no such name.
            Err(error) if is_no_answer(&error) => self.remembered(&name, USABLE).ok_or(error),
            Err(error) => Err(error),
        }
    }

    /// Asks on a thread of its own, which counts until the resolver is done.
    fn question(&self, name: String, thread: ResourcePermit) -> io::Result<oneshot::Receiver<io::Result<Vec<IpAddr>>>> {
        let (answer, answered) = oneshot::channel();
        let ask = self.ask.clone();
        thread::Builder::new().name("resolver".into()).stack_size(STACK_BYTES).spawn(move || {
            let found = ask(&name);
            drop(thread);
            // A caller that has stopped waiting is no error.
            let _ = answer.send(found);
        })?;
        Ok(answered)
    }

    fn remembered(&self, name: &str, lifetime: Duration) -> Option<Vec<IpAddr>> {
        let found = self.found();
        found.get(name).filter(|found| found.at.elapsed() < lifetime).map(|found| found.addresses.clone())
    }

    fn remember(&self, name: String, addresses: &[IpAddr]) {
        let mut found = self.found();
        if found.len() >= REMEMBERED && !found.contains_key(&name) {
            let oldest = found.iter().min_by_key(|(_, found)| found.at).map(|(name, _)| name.clone());
            if let Some(name) = oldest {
                found.remove(&name);
            }
        }
        found.insert(name, Found { addresses: addresses.to_vec(), at: Instant::now() });
    }

    fn found(&self) -> MutexGuard<'_, HashMap<String, Found>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Resolve for Names {
    fn resolve(&self, name: Name) -> Resolving {
        let names = self.clone();
        Box::pin(async move {
            let addresses = names.addresses(name.as_str()).await?;
            Ok(Box::new(addresses.into_iter().map(|address| SocketAddr::new(address, 0))) as Addrs)
        })
    }
}

/// The last two labels of a name: one owner can make any number of names below them.
pub fn domain(name: &str) -> &str {
    let start = name.rmatch_indices('.').nth(1).map_or(0, |(dot, _)| dot + 1);
    &name[start..]
}

fn is_no_answer(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ResourceBusy, TimedOut, WouldBlock};
    matches!(error.kind(), TimedOut | ResourceBusy | WouldBlock | BrokenPipe)
        || error.to_string().contains("Temporary failure")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    #[test]
    fn names_share_by_their_last_two_labels() {
        for (name, expected) in
            [("a.b.example.org", "example.org"), ("example.org", "example.org"), ("localhost", "localhost"), ("", "")]
        {
            assert_eq!(domain(name), expected);
        }
    }

    /// A resolver that never answers names of `silent.test`, and counts what it is asked.
    fn names(asked: &Arc<AtomicUsize>) -> (Names, mpsc::Sender<()>) {
        let (release, wait) = mpsc::channel::<()>();
        let (asked, wait) = (asked.clone(), Mutex::new(wait));
        let names = Names::asking(move |name| {
            asked.fetch_add(1, Ordering::Relaxed);
            if name.contains("silent") {
                let _ = wait.lock().unwrap().recv();
                return Err(io::ErrorKind::TimedOut.into());
            }
            Ok(vec![ADDRESS])
        });
        (names, release)
    }

    #[tokio::test]
    async fn names_that_never_answer_hold_their_share_of_the_threads_and_no_more() {
        let asked = Arc::new(AtomicUsize::new(0));
        let (names, release) = names(&asked);
        let attack = (0..50).map(|n| names.clone().look(format!("n{n}.silent.test")));
        let attack = tokio::task::JoinSet::from_iter(attack);
        let busy = async {
            while names.threads.taken() < THREADS_OF_DOMAIN {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(10), busy).await.unwrap();
        assert_eq!(names.addresses("push.example").await.unwrap(), [ADDRESS]);
        assert_eq!(names.threads.taken(), THREADS_OF_DOMAIN);
        let ended = timeout(Duration::from_secs(30), attack.join_all()).await.unwrap();
        assert!(ended.iter().all(|answer| answer.is_err()));
        // Given up by their callers, and still counted: the resolver has not let go of them.
        assert_eq!(names.threads.taken(), THREADS_OF_DOMAIN);
        drop(release);
    }

    impl Names {
        async fn look(self, name: String) -> io::Result<Vec<IpAddr>> {
            self.addresses(&name).await
        }
    }

    #[tokio::test]
    async fn what_was_found_is_used_again_and_for_longer_when_no_thread_is_free() {
        let asked = Arc::new(AtomicUsize::new(0));
        let (names, _release) = names(&asked);
        for name in ["Push.Example", "push.example.", "push.example"] {
            assert_eq!(names.addresses(name).await.unwrap(), [ADDRESS]);
        }
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        let all: Vec<_> = (0..THREADS)
            .map(|n| names.threads.try_take(LimitSubject::named(&format!("d{n}.test")), 1).unwrap())
            .collect();
        tokio::time::pause();
        tokio::time::advance(FRESH).await;
        assert_eq!(names.addresses("push.example").await.unwrap(), [ADDRESS]);
        tokio::time::advance(USABLE).await;
        assert_eq!(names.addresses("push.example").await.unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        drop(all);
    }
}
