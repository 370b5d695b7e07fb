//! A push provider on this machine that speaks the real protocol and remembers what it was asked.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::http::{HeaderMap, Request, Response};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::harness::eventually;

/// What the provider was asked.
#[derive(Clone, Debug)]
pub struct Received {
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Received {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no {name}")).to_str().expect("text")
    }
}

/// How it answers.
#[derive(Clone, Debug)]
pub enum Answer {
    Status(u16, Value),
    RetryAfter(u16, &'static str),
    Redirect(&'static str),
    Nothing,
    /// Good, after this time.
    Late(std::time::Duration),
    /// Good, once there is a permit.
    After(Arc<Semaphore>),
}

/// Which HTTP it speaks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Speaks {
    Http1,
    Http2,
}

#[derive(Clone)]
pub struct Provider {
    address: SocketAddr,
    scheme: &'static str,
    received: Arc<Mutex<Vec<Received>>>,
    answer: Arc<Mutex<Answer>>,
}

/// The path at which access tokens are given out, and never counted as a push.
pub const TOKEN_PATH: &str = "/token";

impl Provider {
    /// In the clear, HTTP/1.1.
    pub async fn start() -> Self {
        Self::serve(Speaks::Http1, None).await
    }

    /// In the clear, HTTP/2 and nothing else.
    pub async fn start_http2() -> Self {
        Self::serve(Speaks::Http2, None).await
    }

    /// By TLS, with a certificate for `localhost` and 127.0.0.1 of an authority that is written to this file.
    pub async fn start_encrypted(authority: &Path) -> Self {
        Self::serve(Speaks::Http1, Some(acceptor(authority, "http/1.1"))).await
    }

    /// The same, with HTTP/2 and nothing else.
    pub async fn start_encrypted_http2(authority: &Path) -> Self {
        Self::serve(Speaks::Http2, Some(acceptor(authority, "h2"))).await
    }

    async fn serve(speaks: Speaks, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let provider = Self {
            address: listener.local_addr().expect("an address"),
            scheme: if tls.is_some() { "https" } else { "http" },
            received: Arc::default(),
            answer: Arc::new(Mutex::new(Answer::Status(200, json!({})))),
        };
        let own = provider.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (own, tls) = (own.clone(), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        None => own.attend(stream, speaks).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                own.attend(stream, speaks).await;
                            }
                        }
                    }
                });
            }
        });
        provider
    }

    async fn attend(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, speaks: Speaks) {
        let service = service_fn(move |request| self.clone().answer(request));
        let io = TokioIo::new(stream);
        // A client that goes away is no concern of ours.
        let _ = match speaks {
            Speaks::Http1 => hyper::server::conn::http1::Builder::new().serve_connection(io, service).await,
            Speaks::Http2 => {
                hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await
            }
        };
    }

    async fn answer(self, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let path = head.uri.path().to_owned();
        let is_token = path == TOKEN_PATH;
        self.received.lock().unwrap().push(Received { path, headers: head.headers, body });
        if is_token {
            let granted = json!({"access_token": "granted", "expires_in": 3600, "token_type": "Bearer"});
            return Ok(Response::new(Body::from(granted.to_string())));
        }
        let answer = self.answer.lock().unwrap().clone();
        let response = match answer {
            Answer::Status(status, body) => Response::builder().status(status).body(Body::from(body.to_string())),
            Answer::RetryAfter(status, after) => {
                Response::builder().status(status).header("retry-after", after).body(Body::empty())
            }
            Answer::Redirect(to) => Response::builder().status(307).header("location", to).body(Body::empty()),
            Answer::Late(time) => {
                tokio::time::sleep(time).await;
                Response::builder().body(Body::empty())
            }
            Answer::After(gate) => {
                gate.acquire().await.expect("an open gate").forget();
                Response::builder().body(Body::empty())
            }
            Answer::Nothing => std::future::pending().await,
        };
        Ok(response.expect("an answer"))
    }

    pub fn set(&self, answer: Answer) {
        *self.answer.lock().unwrap() = answer;
    }

    pub fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// What it was asked, without the requests for access tokens.
    pub fn pushes(&self) -> Vec<Received> {
        let received = self.received.lock().unwrap();
        received.iter().filter(|received| received.path != TOKEN_PATH).cloned().collect()
    }

    /// The requests for access tokens.
    pub fn token_requests(&self) -> Vec<Received> {
        let received = self.received.lock().unwrap();
        received.iter().filter(|received| received.path == TOKEN_PATH).cloned().collect()
    }

    /// How many pushes came for this token of FCM, or with it in the path.
    pub fn count(&self, token: &str) -> usize {
        let is_for = |push: &&Received| {
            let message: Value = serde_json::from_slice(&push.body).unwrap_or_default();
            message["message"]["token"] == token || push.path.ends_with(&format!("/{token}"))
        };
        self.pushes().iter().filter(is_for).count()
    }

    /// Waits until so many pushes came for this token.
    pub async fn pushed(&self, token: &str, count: usize) {
        eventually("a push", async || self.count(token) >= count).await;
    }
}

pub fn acceptor(authority: &Path, protocol: &str) -> TlsAcceptor {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    std::fs::write(authority, issuer.pem()).unwrap();
    let key = KeyPair::generate().unwrap();
    let names = vec!["localhost".into(), "127.0.0.1".into()];
    let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder().with_no_client_auth();
    let mut config = config.with_single_cert(vec![certificate.der().clone()], key).unwrap();
    config.alpn_protocols = vec![protocol.into()];
    TlsAcceptor::from(Arc::new(config))
}
