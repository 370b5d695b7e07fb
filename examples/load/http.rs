//! HTTP/1.1 as cheap as it gets: one connection, one request at a time.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// An open connection.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// What the server said.
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON, if the status is the expected one.
    pub fn json(&self, status: u16) -> Result<serde_json::Value> {
        if self.status != status {
            bail!("the server answered {}: {}", self.status, String::from_utf8_lossy(&self.body));
        }
        Ok(serde_json::from_slice(&self.body)?)
    }
}

impl Connection {
    pub async fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("no connection to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(4096) })
    }

    /// Sends a whole request and reads the whole answer.
    pub async fn call(&mut self, request: &[u8]) -> Result<Answer> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        loop {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                bail!("the server closed the connection");
            }
            if let Some(answer) = parsed(&self.buffer)? {
                return Ok(answer);
            }
        }
    }

    /// A request without a body.
    pub async fn post(&mut self, path: &str, token: &str) -> Result<Answer> {
        self.call(head("POST", path, &format!("authorization: Bearer {token}\r\n"), 0).as_bytes()).await
    }

    /// A request with a JSON body.
    pub async fn post_json(&mut self, path: &str, body: &serde_json::Value) -> Result<Answer> {
        let body = body.to_string();
        let head = head("POST", path, "content-type: application/json\r\n", body.len());
        self.call((head + &body).as_bytes()).await
    }

    pub async fn get(&mut self, path: &str) -> Result<Answer> {
        self.call(head("GET", path, "", 0).as_bytes()).await
    }
}

/// A request head; `fields` are whole lines.
pub fn head(method: &str, path: &str, fields: &str, length: usize) -> String {
    format!("{method} {path} HTTP/1.1\r\nhost: load\r\n{fields}content-length: {length}\r\n\r\n")
}

/// The answer, once all of it is there. The server gives every answer a length.
fn parsed(bytes: &[u8]) -> Result<Option<Answer>> {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&bytes[..end])?;
    let status = head.get(9..12).and_then(|status| status.parse().ok()).context("not an HTTP answer")?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let body = &bytes[end + 4..];
    let length = length.unwrap_or_default();
    Ok((body.len() >= length).then(|| Answer { status, body: body[..length].to_vec() }))
}
