//! HTTP/1.1 as cheap as it gets: one connection, one request at a time, one buffer.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::origin::Origin;

/// How long an answer may take. Longer than any time limit of a server, so that its own answer is seen.
const PATIENCE: Duration = Duration::from_secs(150);
/// How much of a long body is read at a time.
const PART: usize = 256 << 10;

/// An open connection.
pub struct Connection {
    address: SocketAddr,
    origin: Origin,
    stream: TcpStream,
    answer: Vec<u8>,
}

/// What the server said.
#[derive(Debug)]
pub struct Answer<'a> {
    pub status: u16,
    pub body: &'a [u8],
}

impl Answer<'_> {
    /// The body as JSON, if the status is the expected one.
    pub fn json(&self, status: u16) -> Result<serde_json::Value> {
        self.expect(status)?;
        Ok(serde_json::from_slice(self.body)?)
    }

    /// Nothing, if the status is the expected one.
    pub fn expect(&self, status: u16) -> Result<()> {
        let hint = if self.status == 429 { "; the limits of a server under load have to be raised" } else { "" };
        let said = String::from_utf8_lossy(self.body);
        ensure!(self.status == status, "the server answered {} instead of {status}: {said}{hint}", self.status);
        Ok(())
    }
}

impl Connection {
    pub async fn open(address: SocketAddr) -> Result<Self> {
        Self::open_from(address, &Origin::default()).await
    }

    /// Opens a connection whose requests come from `origin`.
    pub async fn open_from(address: SocketAddr, origin: &Origin) -> Result<Self> {
        let stream = timeout(PATIENCE, origin.connect(address, None)).await?;
        let stream = stream.with_context(|| format!("no connection to {address}"))?;
        Ok(Self { address, origin: origin.clone(), stream, answer: Vec::with_capacity(4096) })
    }

    /// Where its requests come from.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Sends a request in one or two pieces and reads the whole answer.
    pub async fn call(&mut self, head: &[u8], body: &[u8]) -> Result<Answer<'_>> {
        let answer = timeout(PATIENCE, async {
            self.stream.write_all(head).await?;
            if !body.is_empty() {
                self.stream.write_all(body).await?;
            }
            let head = read_head(&mut self.stream, &mut self.answer).await?;
            let end = head.body + head.length;
            while self.answer.len() < end {
                self.answer.reserve(end - self.answer.len());
                ensure!(self.stream.read_buf(&mut self.answer).await? > 0, "the server closed the connection");
            }
            anyhow::Ok((head, end))
        });
        let (head, end) = answer.await.context("no answer in time")??;
        Ok(Answer { status: head.status, body: &self.answer[head.body..end] })
    }

    /// A request; `fields` are whole lines.
    pub async fn request(&mut self, method: &str, path: &str, fields: &str, body: &[u8]) -> Result<Answer<'_>> {
        let (address, length, origin) = (self.address, body.len(), self.origin.fields());
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\n{origin}{fields}content-length: {length}\r\n\r\n");
        self.call(head.as_bytes(), body).await
    }

    pub async fn get(&mut self, path: &str) -> Result<Answer<'_>> {
        self.request("GET", path, "", &[]).await
    }

    /// A request without a body.
    pub async fn post(&mut self, path: &str, token: &str) -> Result<Answer<'_>> {
        self.request("POST", path, &bearer(token), &[]).await
    }

    /// A request with a JSON body.
    pub async fn post_json(&mut self, path: &str, body: &serde_json::Value) -> Result<Answer<'_>> {
        self.request("POST", path, "content-type: application/json\r\n", body.to_string().as_bytes()).await
    }

    /// Reads an attachment and holds it against what it should be, without ever having all of it in memory.
    pub async fn download(&mut self, path: &str, token: &str, expected: &[u8]) -> Result<()> {
        let (address, origin, field) = (self.address, self.origin.fields(), bearer(token));
        let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\n{origin}{field}\r\n");
        let reading = timeout(PATIENCE, async {
            self.stream.write_all(request.as_bytes()).await?;
            let head = read_head(&mut self.stream, &mut self.answer).await?;
            ensure!(head.status == 200, "a download was answered with {}", head.status);
            ensure!(head.length == expected.len(), "{} bytes came instead of {}", head.length, expected.len());
            let mut done = 0;
            self.answer.drain(..head.body);
            loop {
                let part = &self.answer[..];
                ensure!(expected.get(done..done + part.len()) == Some(part), "an attachment came back changed");
                done += part.len();
                if done == expected.len() {
                    return Ok(());
                }
                self.answer.clear();
                self.answer.reserve(PART);
                ensure!(self.stream.read_buf(&mut self.answer).await? > 0, "the server closed the connection");
            }
        });
        reading.await.context("no answer in time")?
    }
}

/// The line that says who asks.
pub fn bearer(token: &str) -> String {
    format!("authorization: Bearer {token}\r\n")
}

struct Head {
    status: u16,
    length: usize,
    /// Where the body begins.
    body: usize,
}

async fn read_head(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Result<Head> {
    buffer.clear();
    loop {
        ensure!(stream.read_buf(buffer).await? > 0, "the server closed the connection");
        if let Some(head) = parsed(buffer)? {
            return Ok(head);
        }
    }
}

/// The head, once all of it is there.
fn parsed(bytes: &[u8]) -> Result<Option<Head>> {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&bytes[..end])?;
    let status = head.get(9..12).and_then(|status| status.parse().ok()).context("not an HTTP answer")?;
    let mut length = None;
    for (name, value) in head.split("\r\n").skip(1).filter_map(|line| line.split_once(':')) {
        if name.eq_ignore_ascii_case("content-length") {
            length = Some(value.trim().parse()?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            bail!("the server answers without a length, which this tool does not understand");
        }
    }
    Ok(Some(Head { status, length: length.unwrap_or_default(), body: end + 4 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_once_it_is_whole() {
        let bytes = b"HTTP/1.1 201 Created\r\nX-Other: 7\r\nContent-Length: 12\r\n\r\n{\"a\"";
        assert!(parsed(&bytes[..40]).unwrap().is_none());
        let head = parsed(bytes).unwrap().unwrap();
        assert_eq!((head.status, head.length, &bytes[head.body..]), (201, 12, &b"{\"a\""[..]));
    }

    #[test]
    fn an_answer_in_chunks_is_refused() {
        assert!(parsed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").is_err());
    }
}
