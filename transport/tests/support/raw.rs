//! A peer played by hand: authenticated, and it says whatever a test wants.

use std::{net::SocketAddr, time::Duration};

use quinn::{Connection, ConnectionError, Endpoint, RecvStream, SendStream};
use tidelock_segments::NodeId;
use tidelock_transport::{
    frame::{Channel, CloseCode, Frame, FrameDecoder, Hello, HelloAck, WireLimits},
    limits,
    tls::{MeshTls, SERVER_NAME},
};

/// Far above anything that a healthy run needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// An authenticated QUIC client, with its control stream.
pub(crate) struct Raw {
    pub(crate) connection: Connection,
    pub(crate) send: SendStream,
    pub(crate) recv: RecvStream,
    decoder: FrameDecoder,
    _endpoint: Endpoint,
}

pub(crate) fn ack() -> Frame {
    Frame::HelloAck(HelloAck {
        frames_per_second: 1,
        in_bytes_per_second: 2,
        in_bytes_left_today: 3,
        out_bytes_per_second: 4,
    })
}

impl Drop for Raw {
    /// A stream that is dropped is finished, and whoever ends the control stream of a living session
    /// misbehaves: the connection goes first.
    fn drop(&mut self) {
        self.connection.close(0_u32.into(), b"");
    }
}

impl Raw {
    /// Calls the node `expected`, with these papers.
    pub(crate) async fn connect(tls: &MeshTls, to: SocketAddr, expected: &str) -> Self {
        let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let expected = NodeId::new(expected).unwrap();
        let client = tls.quic_client_config(Some(&expected)).unwrap();
        let client = quinn::ClientConfig::new(client);
        let connecting = endpoint.connect_with(client, to, SERVER_NAME).unwrap();
        let connection = connecting.await.unwrap();
        let (send, recv) = connection.open_bi().await.unwrap();
        let decoder = FrameDecoder::new(Channel::Control);
        Self {
            connection,
            send,
            recv,
            decoder,
            _endpoint: endpoint,
        }
    }

    pub(crate) async fn say(&mut self, frame: &Frame) {
        // The other side may have hung up already; the test asks for its reason.
        let _ = self.send.write_all(&frame.encode().unwrap()).await;
    }

    pub(crate) fn hello(domain: &str, name: &str) -> Frame {
        Frame::Hello(Box::new(Hello {
            version: limits::PROTOCOL_VERSION,
            domain: domain.into(),
            node_id: name.into(),
            limits: WireLimits {
                kinds: 0b1_1110,
                max_segment_bytes: 1 << 20,
                custody_free_bytes: 0,
                max_in_flight: 8,
            },
            posture: 0,
            endorsement: None,
            state_digest: [0; 32],
        }))
    }

    pub(crate) async fn hear(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            let chunk = self.recv.read_chunk(65_536, true).await.ok()??;
            self.decoder.push(&chunk.bytes);
        }
    }

    pub(crate) async fn closed(&self) -> CloseCode {
        close_code(&self.connection).await
    }
}

/// Why the other side hung up.
pub(crate) async fn close_code(connection: &Connection) -> CloseCode {
    match tokio::time::timeout(PATIENCE, connection.closed())
        .await
        .unwrap()
    {
        ConnectionError::ApplicationClosed(close) => {
            CloseCode::from_wire(close.error_code.into_inner()).unwrap()
        }
        other => panic!("closed by {other}"),
    }
}
