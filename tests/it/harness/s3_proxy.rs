//! A way to an S3 service on which things go wrong when a test wants them to.

use std::io;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is passed on.
    Pass,
    /// It is answered with this status, and the service doesn't hear of it.
    Answer(u16),
    /// The connection is cut after so many bytes of the request's body.
    CutRequest(u64),
    /// The connection is cut after so many bytes of the answer, its head included.
    CutAnswer(u64),
    /// It is answered with 200 and these bytes, whatever range it asks for.
    Whole(&'static [u8]),
    /// It waits for ever.
    Stall,
}

type Rule = Box<dyn Fn(&str, &str) -> Fate + Send>;

/// The proxy. Cloning gives the same proxy.
#[derive(Clone)]
pub struct S3Proxy {
    pub endpoint: String,
    state: Arc<State>,
}

struct State {
    upstream: String,
    rule: Mutex<Rule>,
    seen: Mutex<Vec<String>>,
}

impl S3Proxy {
    /// In front of this endpoint; everything is passed on until [`S3Proxy::rule`] says otherwise.
    pub async fn start(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let upstream = upstream.trim_start_matches("http://").to_owned();
        let rule: Mutex<Rule> = Mutex::new(Box::new(|_, _| Fate::Pass));
        let state = Arc::new(State { upstream, rule, seen: Mutex::default() });
        let accepting = state.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, accepting.clone()));
            }
        });
        Self { endpoint, state }
    }

    /// From now on this says what becomes of a request, by its method and target.
    pub fn rule(&self, rule: impl Fn(&str, &str) -> Fate + Send + 'static) {
        *self.state.rule.lock().unwrap() = Box::new(rule);
    }

    /// The requests so far that begin so, such as `DELETE /`.
    pub fn count(&self, beginning: &str) -> usize {
        self.state.seen.lock().unwrap().iter().filter(|request| request.starts_with(beginning)).count()
    }

    /// All requests so far, each as its method and target.
    pub fn seen(&self) -> Vec<String> {
        self.state.seen.lock().unwrap().clone()
    }
}

/// One request on each connection, so that each is looked at.
async fn serve(mut client: TcpStream, state: Arc<State>) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await?);
    }
    let text = String::from_utf8_lossy(&head).into_owned();
    let (line, fields) = text.split_once("\r\n").expect("a request line");
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    state.seen.lock().unwrap().push(format!("{method} {target}"));
    let length = fields.lines().find_map(|field| {
        let (name, value) = field.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<u64>().ok())?
    });
    let length = length.unwrap_or(0);
    let fate = state.rule.lock().unwrap()(method, target);
    match fate {
        Fate::Stall => std::future::pending().await,
        Fate::Answer(status) => {
            copy(&mut client, &mut tokio::io::sink(), length).await?;
            let answer = format!("HTTP/1.1 {status} No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
            client.write_all(answer.as_bytes()).await?;
            return client.shutdown().await;
        }
        Fate::Whole(bytes) => {
            let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", bytes.len());
            client.write_all(&[head.as_bytes(), bytes].concat()).await?;
            return client.shutdown().await;
        }
        _ => {}
    }
    let mut upstream = TcpStream::connect(&state.upstream).await?;
    let head = format!("{line}\r\nconnection: close\r\n{fields}");
    upstream.write_all(head.as_bytes()).await?;
    let passed = if let Fate::CutRequest(bytes) = fate { bytes.min(length) } else { length };
    copy(&mut client, &mut upstream, passed).await?;
    match fate {
        Fate::CutRequest(_) => {}
        Fate::CutAnswer(bytes) => copy(&mut upstream, &mut client, bytes).await?,
        _ => copy(&mut upstream, &mut client, u64::MAX).await?,
    }
    Ok(())
}

async fn copy(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin), bytes: u64) -> io::Result<()> {
    tokio::io::copy(&mut from.take(bytes), to).await?;
    to.flush().await
}
