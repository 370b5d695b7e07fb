//! HTTP with nothing hidden: every header and byte can be chosen, and every answer is held against the contract.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;

use super::{record, within_time};
use crate::openapi::{Answer, assert_documented};

/// Where a server is. It moves when the server restarts.
#[derive(Clone)]
pub struct Target(Arc<Mutex<SocketAddr>>);

impl Target {
    pub fn new(address: SocketAddr) -> Self {
        Self(Arc::new(Mutex::new(address)))
    }

    /// Not known yet.
    pub fn anywhere() -> Self {
        Self::new(([127, 0, 0, 1], 0).into())
    }

    pub fn get(&self) -> SocketAddr {
        *self.0.lock().unwrap()
    }

    pub fn set(&self, address: SocketAddr) {
        *self.0.lock().unwrap() = address;
    }
}

/// Somebody with an HTTP client. Cloning shares the connections.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    target: Target,
    is_api: bool,
}

impl Client {
    pub fn new(target: Target) -> Self {
        let http = reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none());
        Self { http: http.build().expect("a client"), target, is_api: true }
    }

    /// One that expects the habits of the management port.
    pub fn management(target: Target) -> Self {
        Self { is_api: false, ..Self::new(target) }
    }

    /// Where the server is now.
    pub fn address(&self) -> SocketAddr {
        self.target.get()
    }

    pub fn get(&self, path: &str) -> Request {
        self.request("GET", path)
    }

    pub fn post(&self, path: &str) -> Request {
        self.request("POST", path)
    }

    pub fn put(&self, path: &str) -> Request {
        self.request("PUT", path)
    }

    pub fn delete(&self, path: &str) -> Request {
        self.request("DELETE", path)
    }

    /// A request that still has neither headers nor a body.
    pub fn request(&self, method: &str, path: &str) -> Request {
        Request {
            client: self.clone(),
            method: method.to_owned(),
            path: path.to_owned(),
            headers: HeaderMap::new(),
            body: None,
        }
    }
}

/// A request in the making.
pub struct Request {
    client: Client,
    method: String,
    path: String,
    headers: HeaderMap,
    body: Option<reqwest::Body>,
}

impl Request {
    /// Adds a header, also a second one of the same name.
    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        let name = HeaderName::from_bytes(name.as_bytes()).expect("a header name");
        self.headers.append(name, HeaderValue::from_bytes(value.as_ref()).expect("a header value"));
        self
    }

    /// `Authorization: Bearer <token>`
    pub fn token(self, token: &str) -> Self {
        self.header("authorization", format!("Bearer {token}"))
    }

    /// A JSON body with its content type.
    pub fn json(self, value: &Value) -> Self {
        self.header("content-type", "application/json").body(value.to_string())
    }

    /// A body as it stands.
    pub fn body(mut self, body: impl Into<reqwest::Body>) -> Self {
        self.body = Some(body.into());
        self
    }

    /// The answer, held against what the contract says about all answers.
    pub async fn send(self) -> Response {
        let (method, path) = (self.method.clone(), self.path.clone());
        match self.try_send().await {
            Ok(response) => response,
            Err(error) => panic!("{method} {path} got no answer: {error:?}"),
        }
    }

    /// The answer, or why there is none.
    pub async fn try_send(self) -> Result<Response, reqwest::Error> {
        let url = format!("http://{}{}", self.client.address(), self.path);
        let method = reqwest::Method::from_bytes(self.method.as_bytes()).expect("a method");
        let sent_id = self.headers.get("x-request-id").cloned();
        record::request(&self.path, &self.headers, self.body.as_ref().and_then(reqwest::Body::as_bytes));
        let mut request = self.client.http.request(method, &url).headers(self.headers);
        if let Some(body) = self.body {
            request = request.body(body);
        }
        let what = format!("{} {url} to be answered", self.method);
        let answer = async {
            let response = request.send().await?;
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            Ok::<_, reqwest::Error>((status, headers, response.bytes().await?))
        };
        let (status, headers, body) = within_time(Duration::from_secs(60), &what, answer).await?;
        record::answer(&body);
        let response = Response { method: self.method, path: self.path, status, headers, body };
        if self.client.is_api {
            response.check(sent_id.as_ref());
        }
        Ok(response)
    }
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Response {
    method: String,
    path: String,
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Response {
    /// Fails the test unless the status is this one.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        let body = String::from_utf8_lossy(&self.body[..self.body.len().min(500)]);
        assert_eq!(self.status, status, "{} {}: {body}", self.method, self.path);
        self
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| {
            panic!("{} {}: {error} in {:?}", self.method, self.path, String::from_utf8_lossy(&self.body))
        })
    }

    /// The message of an error object.
    #[track_caller]
    pub fn error(&self) -> String {
        self.json()["error"].as_str().expect("an error message").to_owned()
    }

    /// A header, if there is exactly one of this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.get_all(name).iter();
        match (values.next(), values.next()) {
            (Some(value), None) => value.to_str().ok(),
            _ => None,
        }
    }

    /// What holds for every answer of the API port.
    fn check(&self, sent_id: Option<&HeaderValue>) {
        let what = format!("{} {} -> {}", self.method, self.path, self.status);
        assert_ne!(self.status, 500, "{what}: {:?}", String::from_utf8_lossy(&self.body));
        let id = self.headers.get("x-request-id").unwrap_or_else(|| panic!("{what} has no x-request-id"));
        match sent_id {
            Some(sent) => assert_eq!(id, sent, "{what}"),
            None => assert_eq!(id.len(), 36, "{what}: {id:?}"),
        }
        if self.status >= 400 {
            assert_eq!(self.header("content-type"), Some("application/json"), "{what}");
        }
        if self.status >= 400 && self.method != "HEAD" {
            let error = self.json();
            let members = error.as_object().unwrap_or_else(|| panic!("{what}: {error}"));
            assert_eq!(members.len(), 1, "{what}: {error}");
            assert!(members["error"].as_str().is_some_and(|message| !message.is_empty()), "{what}: {error}");
        }
        if self.status == 204 {
            assert!(self.body.is_empty(), "{what}");
            assert!(!self.headers.contains_key("content-type"), "{what}");
        }
        for (status, header) in [(429, "retry-after"), (503, "retry-after"), (405, "allow"), (426, "upgrade")] {
            assert!(self.status != status || self.headers.contains_key(header), "{what} without {header}");
        }
        let body = (self.method != "HEAD").then_some(&*self.body);
        assert_documented(&self.method, &self.path, &Answer { status: self.status, headers: &self.headers, body });
    }
}
