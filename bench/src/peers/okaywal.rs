//! okaywal: a write-ahead log whose writers share syncs. It hands entries to its owner at a
//! checkpoint, every 768 KiB, and then forgets them; this owner takes them for stored, so the cost of
//! keeping them is not in its numbers.

use std::{
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use okaywal::{Configuration, Entry, EntryId, LogManager, SegmentReader, WriteAheadLog};

use super::{Log, text};

#[derive(Debug, Default, Clone)]
struct Recovered(Arc<Mutex<Vec<Vec<u8>>>>);

impl LogManager for Recovered {
    fn recover(&mut self, entry: &mut Entry<'_>) -> io::Result<()> {
        if let Some(chunks) = entry.read_all_chunks()? {
            self.0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend(chunks);
        }
        Ok(())
    }

    fn checkpoint_to(
        &mut self,
        _: EntryId,
        _: &mut SegmentReader,
        _: &WriteAheadLog,
    ) -> io::Result<()> {
        Ok(())
    }
}

struct OkayWal(Option<WriteAheadLog>);

impl Log for OkayWal {
    fn append(&self, _: usize, record: &[u8]) -> Result<(), String> {
        let wal = self.0.as_ref().ok_or("closed")?;
        let mut entry = wal.begin_entry().map_err(text)?;
        entry.write_chunk(record).map_err(text)?;
        entry.commit().map(drop).map_err(text)
    }
}

impl Drop for OkayWal {
    fn drop(&mut self) {
        if let Some(wal) = self.0.take() {
            let _ = wal.shutdown();
        }
    }
}

pub fn open(dir: &Path, _: usize) -> Result<Box<dyn Log>, String> {
    let wal = Configuration::default_for(dir)
        .open(Recovered::default())
        .map_err(text)?;
    Ok(Box::new(OkayWal(Some(wal))))
}

pub fn read_back(dir: &Path) -> Result<Vec<Vec<u8>>, String> {
    let recovered = Recovered::default();
    let wal = Configuration::default_for(dir)
        .open(recovered.clone())
        .map_err(text)?;
    wal.shutdown().map_err(text)?;
    let records = recovered
        .0
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    Ok(records)
}
