//! The management port: who can reach it, and that one client can't keep the others from it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tokio::net::{TcpSocket, TcpStream};

use crate::harness::{Binary, deployment, eventually, free_port, raw_request};

/// A connection from this address of the loopback network.
async fn connect_from(source: [u8; 4], target: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((source, 0)))?;
    socket.connect(target).await
}

async fn is_open(address: [u8; 4], port: u16) -> bool {
    TcpStream::connect(SocketAddr::from((address, port))).await.is_ok()
}

#[tokio::test]
async fn the_management_port_has_an_address_of_its_own() {
    let is_embedded = !deployment::is_distributed();
    for (option, expected) in
        [(None, is_embedded), (Some("--mgmt-host=127.0.0.1"), true), (Some("--mgmt-host=0.0.0.0"), false)]
    {
        let folder = tempfile::tempdir().unwrap();
        let (api, management) = (free_port(), free_port());
        let mut options = deployment::options(folder.path()).await;
        options.extend(["--server-host=0.0.0.0".to_owned()]);
        options.extend([format!("--server-port={api}"), format!("--mgmt-port={management}")]);
        options.extend(option.map(str::to_owned));
        let _server = Binary::begin(&options.iter().map(String::as_str).collect::<Vec<_>>());
        eventually("the API to be open", async || is_open([127, 0, 0, 2], api).await).await;
        assert!(is_open([127, 0, 0, 1], management).await);
        let is_loopback_only = !is_open([127, 0, 0, 2], management).await;
        assert_eq!(is_loopback_only, expected, "{option:?}: only the address itself is listened on");
    }
}

#[tokio::test]
async fn a_health_check_asks_at_the_management_address() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start(folder.path(), &["--mgmt-host=127.0.0.3"]).await;
    let address = server.management().address();
    assert_eq!(address.ip(), IpAddr::V4(Ipv4Addr::new(127, 0, 0, 3)));
    let port = format!("--mgmt-port={}", address.port());
    let finished = Binary::run(&["healthcheck", &port, "--mgmt-host=127.0.0.3"], &[]).await;
    assert!(finished.status.success(), "{}", finished.output);
    assert!(!Binary::run(&["healthcheck", &port, "--mgmt-host=127.0.0.1"], &[]).await.status.success());
}

#[tokio::test]
async fn silent_connections_of_one_address_leave_the_probes_of_others_alone() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start(folder.path(), &[]).await;
    let management = server.management().address();
    let mut silent = Vec::new();
    for _ in 0..64 {
        silent.push(connect_from([127, 0, 0, 2], management).await.unwrap());
    }
    let request = b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    for _ in 0..10 {
        assert!(raw_request(management, request).await.starts_with("HTTP/1.1 200 "));
    }
    let finished = Binary::run(&["healthcheck", &format!("--mgmt-port={}", management.port())], &[]).await;
    assert!(finished.status.success(), "{}", finished.output);
}
