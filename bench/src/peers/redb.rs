//! redb: one write transaction a record, committed with its default, immediate durability.

use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};

use super::{Log, text};

const RECORDS: TableDefinition<'static, u64, &'static [u8]> = TableDefinition::new("records");

struct Redb {
    database: Database,
    next: AtomicU64,
}

impl Log for Redb {
    fn append(&self, _: usize, record: &[u8]) -> Result<(), String> {
        let transaction = self.database.begin_write().map_err(text)?;
        {
            let mut records = transaction.open_table(RECORDS).map_err(text)?;
            records
                .insert(self.next.fetch_add(1, Ordering::Relaxed), record)
                .map_err(text)?;
        }
        transaction.commit().map_err(text)
    }
}

fn database(dir: &Path) -> Result<Database, String> {
    std::fs::create_dir_all(dir).map_err(text)?;
    Database::create(dir.join("records.redb")).map_err(text)
}

pub fn open(dir: &Path, _: usize) -> Result<Box<dyn Log>, String> {
    Ok(Box::new(Redb {
        database: database(dir)?,
        next: AtomicU64::new(0),
    }))
}

pub fn read_back(dir: &Path) -> Result<Vec<Vec<u8>>, String> {
    let database = database(dir)?;
    let transaction = database.begin_read().map_err(text)?;
    let records = transaction.open_table(RECORDS).map_err(text)?;
    let mut out = Vec::new();
    for entry in records.iter().map_err(text)? {
        out.push(entry.map_err(text)?.1.value().to_vec());
    }
    Ok(out)
}
