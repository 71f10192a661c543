//! iroh-blobs with its store on the disk. It speaks to loopback only: no relay, no look-up of
//! addresses, no port mapping.

use std::{path::Path, time::Instant};

use iroh::{
    Endpoint, EndpointAddr, RelayMode,
    endpoint::{Connection, presets},
    protocol::Router,
};
use iroh_blobs::{ALPN, BlobsProtocol, Hash, store::fs::FsStore};

use super::site::ANY;
use crate::{cpu, peers::text};

async fn endpoint() -> Result<Endpoint, String> {
    Endpoint::builder(presets::Minimal)
        .relay_mode(RelayMode::Disabled)
        .clear_address_lookup()
        .clear_ip_transports()
        .bind_addr(ANY)
        .map_err(text)?
        .bind()
        .await
        .map_err(text)
}

/// An end that has a blob.
pub struct Giver {
    router: Router,
    hash: Hash,
    bytes: u64,
}

impl Giver {
    /// Takes a file of this size, which no compressor makes smaller, into its store.
    pub async fn new(dir: &Path, bytes: u64) -> Result<Self, String> {
        let store = FsStore::load(dir).await.map_err(text)?;
        let file = dir.join("blob");
        let content = (0..bytes / 8 + 1).scan(1_u64, |state, _| {
            // xorshift64
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
            Some(*state)
        });
        let mut content: Vec<u8> = content.flat_map(u64::to_le_bytes).collect();
        content.truncate(usize::try_from(bytes).map_err(text)?);
        std::fs::write(&file, content).map_err(text)?;
        let tag = store.blobs().add_path(&file).await.map_err(text)?;
        std::fs::remove_file(&file).map_err(text)?;
        let router = Router::builder(endpoint().await?)
            .accept(ALPN, BlobsProtocol::new(&store, None))
            .spawn();
        Ok(Self {
            router,
            hash: tag.hash,
            bytes,
        })
    }

    /// Seconds and CPU-seconds until a fresh store holds it all. The clock starts with the connection,
    /// as it does for the others.
    pub async fn fetch(&self, dir: &Path) -> Result<(f64, f64), String> {
        let store = FsStore::load(dir).await.map_err(text)?;
        let client = endpoint().await?;
        let cpu_begun = cpu();
        let connection = self.connect(&client).await?;
        let begun = Instant::now();
        store
            .remote()
            .fetch(connection, self.hash)
            .await
            .map_err(text)?;
        store.sync_db().await.map_err(text)?;
        let taken = (
            begun.elapsed().as_secs_f64(),
            (cpu() - cpu_begun).as_secs_f64(),
        );
        // It says so only of what is there and verified.
        let held = store.remote().local(self.hash).await.map_err(text)?;
        if !held.is_complete() || held.local_bytes() != self.bytes {
            return Err(format!(
                "iroh-blobs holds {} of {} bytes",
                held.local_bytes(),
                self.bytes
            ));
        }
        client.close().await;
        store.shutdown().await.map_err(text)?;
        Ok(taken)
    }

    async fn connect(&self, client: &Endpoint) -> Result<Connection, String> {
        let giver = self.router.endpoint();
        let mut address = EndpointAddr::new(giver.id());
        for socket in giver.bound_sockets() {
            address = address.with_ip_addr(socket);
        }
        client.connect(address, ALPN).await.map_err(text)
    }

    pub async fn close(&self) {
        let _ = self.router.shutdown().await;
    }
}
