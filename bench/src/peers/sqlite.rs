//! SQLite in WAL mode with `synchronous=FULL`: one transaction a record. One connection behind a
//! mutex; with a connection for each writer they would sleep in the busy handler.

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
};

use rusqlite::Connection;

use super::{Log, text};

struct Sqlite(Mutex<Connection>);

impl Log for Sqlite {
    fn append(&self, _: usize, record: &[u8]) -> Result<(), String> {
        let connection = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut insert = connection
            .prepare_cached("INSERT INTO records (body) VALUES (?1)")
            .map_err(text)?;
        insert.execute([record]).map(drop).map_err(text)
    }
}

fn connection(dir: &Path) -> Result<Connection, String> {
    std::fs::create_dir_all(dir).map_err(text)?;
    let connection = Connection::open(dir.join("records.db")).map_err(text)?;
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
             CREATE TABLE IF NOT EXISTS records (id INTEGER PRIMARY KEY, body BLOB NOT NULL);",
        )
        .map_err(text)?;
    Ok(connection)
}

pub fn open(dir: &Path, _: usize) -> Result<Box<dyn Log>, String> {
    Ok(Box::new(Sqlite(Mutex::new(connection(dir)?))))
}

pub fn read_back(dir: &Path) -> Result<Vec<Vec<u8>>, String> {
    let connection = connection(dir)?;
    let mut select = connection
        .prepare("SELECT body FROM records")
        .map_err(text)?;
    let rows = select.query_map([], |row| row.get(0)).map_err(text)?;
    rows.collect::<Result<_, _>>().map_err(text)
}
