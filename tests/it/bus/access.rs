//! Passwords and encryption.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use obscura_server::bus::Signal;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{Node, heard, some_address};
use crate::harness::{Binary, Valkey, eventually, within};

#[tokio::test]
async fn a_password_and_a_user_are_taken_from_the_url() {
    let user = ["--user", "node", "on", ">s%cret", "resetchannels", "&user:*", "-@all", "+@connection", "+@pubsub"];
    let valkey = Valkey::start_with(&[&["--requirepass", "pass/word"][..], &user].concat()).await;
    let urls = ["redis://:pass%2Fword@", "valkey://node:s%25cret@"];
    let [one, other] = urls.map(|start| Node::open(&format!("{start}{}/0", valkey.address())));
    let address = some_address();
    let subscription = other.listen(address).await;
    one.bus.notify(&[address], Signal::AuthChanged);
    heard(&subscription, Signal::AuthChanged).await;
}

#[tokio::test]
async fn a_wrong_password_keeps_the_node_to_itself_until_it_is_right() {
    let valkey = Valkey::start_with(&["--requirepass", "right"]).await;
    let node = Node::open(&format!("redis://:wrong@{}", valkey.address()));
    let address = some_address();
    let subscription = node.bus.subscribe(address);
    node.bus.notify(&[address], Signal::NewMessages);
    assert_eq!(within("the signal", subscription.next()).await, Signal::NewMessages.into());
    let answer = within("an answer", node.bus.check()).await.unwrap_err().to_string();
    assert_eq!(answer, "there is no connection to Valkey at the moment");
    let operator = redis::Client::open(format!("redis://:right@{}", valkey.address())).unwrap();
    let mut connection = operator.get_multiplexed_async_connection().await.unwrap();
    let () = redis::cmd("CONFIG").arg(&["SET", "requirepass", "wrong"]).query_async(&mut connection).await.unwrap();
    node.ready().await;
}

#[tokio::test]
async fn an_encrypted_connection_is_made_when_the_authority_is_known_and_only_then() {
    let valkey = Valkey::start().await;
    let folder = tempfile::tempdir().unwrap();
    let authority = folder.path().join("ca.pem");
    let address = encrypted(valkey.address(), &authority).await;
    let url = format!("--pubsub-url=rediss://localhost:{}", address.port());
    let status = async |server: &Binary| server.management().get("/readyz").send().await.status;

    let variables = [("SSL_CERT_FILE", authority.to_str().unwrap())];
    let trusting = Binary::start_with(&folder.path().join("one"), &[&url], &variables).await;
    eventually("the encrypted connection", async || status(&trusting).await == 200).await;

    let wary = Binary::start_with(&folder.path().join("other"), &[&url], &[]).await;
    eventually("the refusal", async || wary.output().contains("there is no connection to Valkey")).await;
    assert_eq!(status(&wary).await, 503);
    assert!(wary.output().contains("certificate"), "{}", wary.output());
}

/// Accepts encrypted connections for a server that speaks in the clear, with a certificate of an authority of its own.
async fn encrypted(target: SocketAddr, authority: &Path) -> SocketAddr {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    std::fs::write(authority, issuer.pem()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["localhost".into()]).unwrap().signed_by(&key, &issuer).unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder().with_no_client_auth();
    let config = config.with_single_cert(vec![certificate.der().clone()], key).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut client) = acceptor.accept(client).await else { return };
                let Ok(mut server) = TcpStream::connect(target).await else { return };
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    address
}
