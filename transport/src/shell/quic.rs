//! quinn, configured and never by default: its own defaults have an unlimited connection window,
//! 65,536 half-open handshakes, migration on and keep-alive off.

use std::{io, net::SocketAddr, net::UdpSocket, sync::Arc, time::Duration};

use quinn::{
    AsyncUdpSocket, ClientConfig, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig,
    Runtime, ServerConfig, TokioRuntime, TransportConfig, ValidationTokenConfig, VarInt,
};
use tidelock_quota::MonotonicClock;
use tidelock_segments::NodeId;

use super::{MeshError, throttle::ThrottledSocket};
use crate::{
    congestion::{Congestion, PathMemory},
    limits::{
        MAX_CALLS_WAITING, MAX_INCOMING, MAX_INCOMING_BUFFER_BYTES, MIN_SEND_BYTES_PER_SECOND,
    },
    tls::MeshTls,
};

/// Above this a path MTU stalls for ever while segmentation offload is on: seen at 6,552.
pub(super) const MTU_MAX: u16 = 6_500;

/// Step below which no better path MTU is looked for. quinn reads the padding of a probe byte by byte: of
/// a session that carries nothing else it is the greater part of the cost. From 6,500 down this finds 1,446
/// on an Ethernet of 1,500, with probes of 40 KiB instead of 53 where everything passes.
const MTU_STEP: u16 = 64;

/// Data streams that a peer may have open: one of each kind, and one that replaces an abandoned one
/// of the same kind before it is gone.
const DATA_STREAMS: u32 = 8;

/// What is tunable of QUIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuicConfig {
    /// Packets that keep an idle session alive.
    pub keep_alive: Duration,
    /// Silence that ends a session.
    pub idle_timeout: Duration,
    /// Time for a handshake, in either direction.
    pub handshake_timeout: Duration,
    /// Bytes that a peer may send on one stream before they are read.
    pub stream_window_bytes: u32,
    /// Bytes that a peer may send on all streams before they are read. Worst case: this much for
    /// each session; only peers that have authenticated get that far.
    pub receive_window_bytes: u32,
    /// Bytes kept for one peer until it has acknowledged them.
    pub send_window_bytes: u32,
    /// Largest packet to try. Discovery finds what the path carries.
    pub mtu_max: u16,
    /// Kernel buffers, granted as far as the system allows.
    pub socket_buffer_bytes: usize,
    /// Congestion control, where the peer names no other.
    pub congestion: Congestion,
    /// Cap on what this node sends, all sessions and handshakes together, in bytes of UDP payload a
    /// second; none: as much as the paths carry.
    pub send_bytes_per_second: Option<u32>,
}

impl Default for QuicConfig {
    fn default() -> Self {
        Self {
            keep_alive: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(30),
            handshake_timeout: Duration::from_secs(5),
            stream_window_bytes: 6 * 1024 * 1024,
            receive_window_bytes: 8 * 1024 * 1024,
            send_window_bytes: 8 * 1024 * 1024,
            mtu_max: MTU_MAX,
            socket_buffer_bytes: 4 * 1024 * 1024,
            congestion: Congestion::default(),
            send_bytes_per_second: None,
        }
    }
}

impl QuicConfig {
    pub(super) fn check(&self) -> Result<(), MeshError> {
        let refuse = |detail| Err(MeshError::Config { detail });
        if self.keep_alive.is_zero() || self.keep_alive * 2 > self.idle_timeout {
            return refuse("keep-alive must be above 0 and at most half of the idle timeout");
        }
        if self.idle_timeout > Duration::from_secs(600) {
            return refuse("idle timeout is above 600 s: a dead link would look alive");
        }
        if self.handshake_timeout.is_zero() || self.handshake_timeout > Duration::from_secs(60) {
            return refuse("handshake timeout must be above 0 and at most 60 s");
        }
        if self.mtu_max < 1_200 || self.mtu_max > MTU_MAX {
            return refuse("largest packet must be between 1200 and 6500 bytes");
        }
        let windows = [
            self.stream_window_bytes,
            self.receive_window_bytes,
            self.send_window_bytes,
        ];
        if windows
            .iter()
            .any(|window| !(64 * 1024..=256 * 1024 * 1024).contains(window))
        {
            return refuse("windows must be between 64 KiB and 256 MiB");
        }
        let cap = self.send_bytes_per_second;
        if cap.is_some_and(|cap| cap < MIN_SEND_BYTES_PER_SECOND) {
            return refuse("the cap on what is sent must be at least 4096 bytes a second");
        }
        Ok(())
    }

    fn transport(
        &self,
        congestion: Congestion,
        memory: Option<&PathMemory>,
    ) -> Result<Arc<TransportConfig>, MeshError> {
        let idle = IdleTimeout::try_from(self.idle_timeout).map_err(|_| MeshError::Config {
            detail: "idle timeout is out of bounds",
        })?;
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(self.mtu_max).minimum_change(MTU_STEP);
        let mut transport = TransportConfig::default();
        transport
            .max_concurrent_bidi_streams(VarInt::from_u32(1))
            .max_concurrent_uni_streams(VarInt::from_u32(DATA_STREAMS))
            .stream_receive_window(VarInt::from_u32(self.stream_window_bytes))
            .receive_window(VarInt::from_u32(self.receive_window_bytes))
            .send_window(self.send_window_bytes.into())
            .max_idle_timeout(Some(idle))
            .keep_alive_interval(Some(self.keep_alive))
            .datagram_receive_buffer_size(None)
            .crypto_buffer_size(64 * 1024)
            .mtu_discovery_config(Some(mtu))
            .allow_spin(false);
        congestion.apply(&mut transport, memory);
        Ok(Arc::new(transport))
    }

    /// quinn's settings of the socket.
    ///
    /// # Errors
    /// [`MeshError::Config`].
    pub fn endpoint(&self) -> Result<EndpointConfig, MeshError> {
        let mut endpoint = EndpointConfig::default();
        endpoint
            .max_udp_payload_size(self.mtu_max)
            .map_err(|_| MeshError::Config {
                detail: "largest packet is out of bounds",
            })?;
        Ok(endpoint)
    }

    /// quinn's settings for those who call; `congestion` is that of the node where it is none.
    ///
    /// # Errors
    /// [`MeshError::Config`] and [`MeshError::Tls`].
    pub fn server(
        &self,
        tls: &MeshTls,
        congestion: Option<Congestion>,
        memory: Option<&PathMemory>,
    ) -> Result<ServerConfig, MeshError> {
        let mut tokens = ValidationTokenConfig::default();
        // Every address is validated anew: a token from an earlier session proves little.
        tokens.sent(0);
        let mut server = ServerConfig::with_crypto(tls.quic_server_config()?);
        server
            .transport_config(self.transport(congestion.unwrap_or(self.congestion), memory)?)
            .max_incoming(MAX_INCOMING)
            .incoming_buffer_size(MAX_INCOMING_BUFFER_BYTES / MAX_CALLS_WAITING as u64)
            .incoming_buffer_size_total(MAX_INCOMING_BUFFER_BYTES)
            .validation_token_config(tokens)
            .migration(false);
        Ok(server)
    }

    /// quinn's settings for a call to `peer`; `congestion` is that of the node where the peer has none
    /// of its own.
    ///
    /// # Errors
    /// [`MeshError::Config`] and [`MeshError::Tls`].
    pub fn client(
        &self,
        tls: &MeshTls,
        peer: &NodeId,
        congestion: Option<Congestion>,
        memory: Option<&PathMemory>,
    ) -> Result<ClientConfig, MeshError> {
        let congestion = congestion.unwrap_or(self.congestion);
        let mut client = ClientConfig::new(tls.quic_client_config(Some(peer))?);
        client.transport_config(self.transport(congestion, memory)?);
        Ok(client)
    }

    /// For a call to whoever of the domain answers: what is set for single peers does not apply.
    pub(super) fn client_to_anybody(&self, tls: &MeshTls) -> Result<ClientConfig, MeshError> {
        let mut client = ClientConfig::new(tls.quic_client_config(None)?);
        client.transport_config(self.transport(self.congestion, None)?);
        Ok(client)
    }

    /// A socket on `listen`, and quinn upon it as [`QuicConfig::open_on`] does it. Must be called
    /// within a tokio runtime.
    ///
    /// # Errors
    /// [`MeshError::Config`] and [`MeshError::Bind`].
    pub fn open(
        &self,
        listen: SocketAddr,
        server: Option<ServerConfig>,
        clock: &MonotonicClock,
    ) -> Result<Endpoint, MeshError> {
        self.quinn_on(self.socket(listen, clock)?, server)
    }

    /// A socket on `listen`, with this node's cap on what is sent.
    ///
    /// # Errors
    /// [`MeshError::Config`] and [`MeshError::Bind`].
    pub(super) fn socket(
        &self,
        listen: SocketAddr,
        clock: &MonotonicClock,
    ) -> Result<Arc<dyn AsyncUdpSocket>, MeshError> {
        let failed = |error: io::Error| MeshError::Bind {
            address: listen,
            kind: error.kind(),
        };
        let socket = TokioRuntime
            .wrap_udp_socket(self.bind(listen)?)
            .map_err(failed)?;
        self.capped(socket, clock)
    }

    fn capped(
        &self,
        socket: Arc<dyn AsyncUdpSocket>,
        clock: &MonotonicClock,
    ) -> Result<Arc<dyn AsyncUdpSocket>, MeshError> {
        Ok(match self.send_bytes_per_second {
            Some(cap) => Arc::new(ThrottledSocket::new(socket, cap, clock)?),
            None => socket,
        })
    }

    /// quinn on a socket that is there, with this node's cap on what is sent.
    ///
    /// # Errors
    /// [`MeshError::Config`] and [`MeshError::Start`].
    pub fn open_on(
        &self,
        socket: Arc<dyn AsyncUdpSocket>,
        server: Option<ServerConfig>,
        clock: &MonotonicClock,
    ) -> Result<Endpoint, MeshError> {
        self.quinn_on(self.capped(socket, clock)?, server)
    }

    /// quinn on a socket as it is.
    ///
    /// # Errors
    /// [`MeshError::Config`] and [`MeshError::Start`].
    pub(super) fn quinn_on(
        &self,
        socket: Arc<dyn AsyncUdpSocket>,
        server: Option<ServerConfig>,
    ) -> Result<Endpoint, MeshError> {
        let runtime = Arc::new(TokioRuntime);
        Endpoint::new_with_abstract_socket(self.endpoint()?, server, socket, runtime)
            .map_err(|error| MeshError::Start { kind: error.kind() })
    }

    fn bind(&self, listen: SocketAddr) -> Result<UdpSocket, MeshError> {
        let failed = |error: io::Error| MeshError::Bind {
            address: listen,
            kind: error.kind(),
        };
        let socket = UdpSocket::bind(listen).map_err(failed)?;
        // As much as the kernel grants; it cuts a bigger wish down by itself.
        let wish = self.socket_buffer_bytes;
        for granted in [
            rustix::net::sockopt::set_socket_recv_buffer_size(&socket, wish),
            rustix::net::sockopt::set_socket_send_buffer_size(&socket, wish),
        ] {
            if let Err(error) = granted {
                tracing::warn!(%error, wish, "socket buffer not enlarged");
            }
        }
        Ok(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_refused() {
        let good = QuicConfig::default();
        assert_eq!(good.check(), Ok(()), "the control");
        let bad = [
            QuicConfig {
                keep_alive: Duration::ZERO,
                ..good
            },
            QuicConfig {
                keep_alive: Duration::from_secs(20),
                ..good
            },
            QuicConfig {
                idle_timeout: Duration::from_secs(601),
                ..good
            },
            QuicConfig {
                handshake_timeout: Duration::ZERO,
                ..good
            },
            QuicConfig {
                mtu_max: 6_552,
                ..good
            },
            QuicConfig {
                mtu_max: 1_000,
                ..good
            },
            QuicConfig {
                send_window_bytes: 1,
                ..good
            },
            QuicConfig {
                send_bytes_per_second: Some(MIN_SEND_BYTES_PER_SECOND - 1),
                ..good
            },
        ];
        for config in bad {
            assert!(
                matches!(config.check(), Err(MeshError::Config { .. })),
                "{config:?}"
            );
        }
    }

    #[test]
    fn a_port_in_use_is_named() {
        let quic = QuicConfig::default();
        let held = quic.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = held.local_addr().unwrap();
        assert_eq!(
            quic.bind(address).map(|_| ()),
            Err(MeshError::Bind {
                address,
                kind: io::ErrorKind::AddrInUse
            })
        );
    }
}
