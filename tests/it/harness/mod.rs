//! What the tests have in common: a server to talk to, clients that talk to it, and patience with an end.

mod account;
mod binary;
mod client;
mod collector;
mod database;
pub mod deployment;
mod pgbouncer;
mod postgres;
pub mod proto;
mod proxy;
mod raw;
mod record;
mod s3;
mod s3_proxy;
pub mod server;
pub mod signer;
mod small_disk;
mod socket;
mod valkey;

use std::future::Future;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub use account::{Device, Keys, PASSWORD, kyber_key, one_time_key, outcome, send_request, signed_key};
pub use binary::{Binary, Finished};
pub use client::{Client, Request, Response};
pub use collector::{Collector, Seen, body};
pub use database::{Database, HeldWrite};
pub use pgbouncer::PgBouncer;
pub use postgres::Postgres;
pub use proxy::{Proxy, Way};
pub use raw::{RawSocket, opcode, raw_answer, raw_request};
pub use record::without_welcome;
pub use s3::{Bucket, S3, S3Process};
pub use s3_proxy::{Fate, S3Proxy};
pub use server::{TestServer, impatient};
pub use small_disk::SmallDisk;
pub use socket::{Event, Socket, distinct_ids};
pub use valkey::Valkey;

/// How long a test waits for anything that should happen at once. Generous, because machines are busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for `future`, and fails the test if it takes too long.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    within_time(PATIENCE, what, future).await
}

/// Waits this long for `future`, and fails the test if it takes longer.
pub async fn within_time<T>(patience: Duration, what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(patience, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited more than {patience:?}: {what}"),
    }
}

/// Looks again and again until `check` holds, for what can be seen but not awaited, such as a row that goes away.
pub async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !check().await {
        assert!(Instant::now() < deadline, "waited more than {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A name that no other test uses.
pub fn unique_name(prefix: &str) -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("{prefix}_{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A port that stays free while who uses it is away for a moment: below those that the system hands out by itself.
pub fn free_port() -> u16 {
    let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    std::iter::repeat_with(|| rand::random_range(15_000..30_000)).find(is_free).expect("there is always another one")
}

/// Adds everything that a process writes to this text.
fn collect(mut pipe: impl Read + Send + 'static, text: Arc<Mutex<String>>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Ok(length @ 1..) = pipe.read(&mut buffer) {
            text.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    });
}
