//! Where a connection comes from, as the server sees it.

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::Result;
use tokio::net::{TcpSocket, TcpStream};

/// The source address of a connection, and the client address that a proxy would add to its requests.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// Bound before connecting; `None` leaves the choice to the system.
    source: Option<IpAddr>,
    /// The value of `X-Forwarded-For`.
    forwarded: Option<String>,
}

impl Origin {
    /// The loopback address 127.1.`network`.`host`, which no server trusts by default.
    pub fn direct(network: u8, host: u8) -> Self {
        Self { source: Some(Ipv4Addr::new(127, 1, network, host).into()), forwarded: None }
    }

    /// As [`Self::direct`], with a header of its own invention.
    pub fn forged(network: u8, host: u8, forwarded: impl Display) -> Self {
        Self { forwarded: Some(forwarded.to_string()), ..Self::direct(network, host) }
    }

    /// A client of a proxy on this machine, which servers trust by default.
    pub fn behind_proxy(forwarded: impl Display) -> Self {
        Self { source: Some(Ipv4Addr::LOCALHOST.into()), forwarded: Some(forwarded.to_string()) }
    }

    /// Opens a connection from here. A small receive buffer, in bytes, lets the server feel early that nothing is read.
    pub async fn connect(&self, address: SocketAddr, receive_buffer: Option<u32>) -> Result<TcpStream> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if let Some(bytes) = receive_buffer {
            socket.set_recv_buffer_size(bytes)?;
        }
        if let Some(source) = self.source {
            socket.bind((source, 0).into())?;
        }
        let stream = socket.connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// The client address that a proxy has added, if it is one.
    pub fn forwarded(&self) -> Option<&str> {
        self.forwarded.as_deref()
    }

    /// The header lines of each request from here.
    pub fn fields(&self) -> String {
        self.forwarded.as_ref().map_or_else(String::new, |address| format!("x-forwarded-for: {address}\r\n"))
    }
}
