//! fjall: an insert and a `persist` with `fdatasync` for each record; concurrent writers share what
//! the journal's lock lets them share.

use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};

use super::{Log, text};

struct Fjall {
    database: Database,
    records: Keyspace,
    next: AtomicU64,
}

impl Log for Fjall {
    fn append(&self, _: usize, record: &[u8]) -> Result<(), String> {
        let key = self.next.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        self.records.insert(key, record).map_err(text)?;
        self.database.persist(PersistMode::SyncData).map_err(text)
    }
}

fn database(dir: &Path) -> Result<(Database, Keyspace), String> {
    let database = Database::builder(dir).open().map_err(text)?;
    let records = database
        .keyspace("records", KeyspaceCreateOptions::default)
        .map_err(text)?;
    Ok((database, records))
}

pub fn open(dir: &Path, _: usize) -> Result<Box<dyn Log>, String> {
    let (database, records) = database(dir)?;
    Ok(Box::new(Fjall {
        database,
        records,
        next: AtomicU64::new(0),
    }))
}

pub fn read_back(dir: &Path) -> Result<Vec<Vec<u8>>, String> {
    let (_database, records) = database(dir)?;
    records
        .iter()
        .map(|guard| guard.value().map(|value| value.to_vec()).map_err(text))
        .collect()
}
